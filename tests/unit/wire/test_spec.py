"""How blocks are numbered, nested and placed."""

from __future__ import annotations

import pytest

from membank.wire.errors import InvalidArgumentError, NotFoundError, Reason
from membank.wire.spec import BankSpec, BlockRef, LevelSpec, OptimizerKind, OptimizerSpec, Role

SPEC = BankSpec(
    name="small",
    num_layers=2,
    width=8,
    num_partitions=3,
    levels=(
        LevelSpec(fan_out=4, block_width=4),
        LevelSpec(fan_out=3, block_width=2),
        LevelSpec(fan_out=2, block_width=1),
    ),
)


def test_paths_are_nested() -> None:
    assert SPEC.path_to(BlockRef(3, 23)) == (BlockRef(1, 3), BlockRef(2, 11), BlockRef(3, 23))
    assert SPEC.path_to(BlockRef(1, 2)) == (BlockRef(1, 2),)


def test_subtree_holds_exactly_what_lies_under_the_topic() -> None:
    topic = BlockRef(1, 2)
    expected = {ref for ref in SPEC.blocks() if SPEC.path_to(ref)[0] == topic}
    assert set(SPEC.subtree(topic)) == expected
    assert len(list(SPEC.subtree(topic))) == 1 + 3 + 6


def test_subtree_shares_a_partition_below_the_partition_level() -> None:
    for cluster in range(SPEC.num_clusters(1)):
        partitions = {SPEC.partition_of(ref) for ref in SPEC.subtree(BlockRef(1, cluster))}
        assert partitions == {cluster % 3}


def test_numbers_of_the_bank() -> None:
    assert [SPEC.num_clusters(level) for level in (1, 2, 3)] == [4, 12, 24]
    assert SPEC.num_blocks == len(list(SPEC.blocks())) == 40
    assert SPEC.block_shape(2) == (2, 3, 2, 8)
    assert SPEC.weight_bytes(1) == 2 * 3 * 4 * 8 * 4
    assert SPEC.optimizer_bytes(1) == 2 * SPEC.weight_bytes(1)


@pytest.mark.parametrize(
    ("ref", "reason"),
    [
        (BlockRef(0, 0), Reason.UNKNOWN_LEVEL),
        (BlockRef(4, 0), Reason.UNKNOWN_LEVEL),
        (BlockRef(2, 12), Reason.UNKNOWN_CLUSTER),
    ],
)
def test_unknown_blocks_are_named(ref: BlockRef, reason: Reason) -> None:
    with pytest.raises(NotFoundError) as caught:
        SPEC.check_ref(ref)
    assert caught.value.reason is reason


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("name", "Has Capitals"),
        ("num_layers", 0),
        ("levels", ()),
        ("dtype", "int8"),
        ("num_partitions", 0),
        ("partition_level", 4),
        ("max_staleness", -1),
        ("init_std", float("nan")),
    ],
)
def test_bad_specs_are_refused(field: str, value: object) -> None:
    good = {
        "name": "x",
        "num_layers": 1,
        "width": 1,
        "levels": (LevelSpec(fan_out=1, block_width=1),),
    }
    with pytest.raises(InvalidArgumentError):
        BankSpec(**{**good, field: value})  # type: ignore[arg-type]


def test_optimizer_kinds_name_their_state() -> None:
    assert OptimizerSpec(kind="adamw").state_roles == (Role.EXP_AVG, Role.EXP_AVG_SQ)  # type: ignore[arg-type]
    assert OptimizerSpec(kind=OptimizerKind.SGD, beta1=0.0).state_roles == ()
    with pytest.raises(InvalidArgumentError, match="lion"):
        OptimizerSpec(kind="lion")  # type: ignore[arg-type]


def test_block_refs_read_as_written() -> None:
    assert BlockRef.parse("2/37") == BlockRef(2, 37)
    with pytest.raises(InvalidArgumentError):
        BlockRef.parse("chemistry")
