"""Topics leave a bank as a file and come back bit for bit; what does not fit is refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors

from membank.wire.errors import (
    CorruptionError,
    FailedPreconditionError,
    InvalidArgumentError,
    MembankError,
    Reason,
)
from membank.wire.format import TreeDocument
from membank.wire.format.pack import Pack, PackedBlock, decode_pack, encode_pack
from membank.wire.spec import (
    Array,
    BlockRef,
    BlockState,
    LevelSpec,
    OptimizerKind,
    OptimizerSpec,
    Role,
)
from membank.wire.steps import Delete
from shard_rig import RIG_SPEC, ShardRig, asked, full_tree

TOPIC, LEAF = BlockRef(1, 1), BlockRef(2, 2)


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[ShardRig]:
    rig = ShardRig(tmp_path / "bank", spec=dataclasses.replace(RIG_SPEC, dtype="bfloat16"))
    for number in range(3):
        rig.push(TOPIC, f"a{number}", value=0.3 * number - 0.5)
    rig.push(LEAF, "b")
    yield rig
    rig.close()


def contents(rig: ShardRig) -> dict[tuple[BlockRef, str], bytes]:
    """Return the bytes of every array of the topic, optimizer state and step included."""
    found: dict[tuple[BlockRef, str], bytes] = {}
    for ref in rig.spec.subtree(TOPIC):
        for content in rig.owner(ref).read([ref]):
            found[ref, "weight"] = content.weight.tobytes()
            found[ref, "step"] = str(content.step).encode()
            for role, array in content.optimizer_state.items():
                found[ref, role.value] = array.tobytes()
    return found


def tree_of(rig: ShardRig) -> TreeDocument:
    tree = rig.bank.read_tree(rig.log.committed.tree_revision)
    assert tree is not None
    return tree


def test_delete_and_import_return_every_bit(rig: ShardRig) -> None:
    before, tree_before = contents(rig), tree_of(rig)
    pack = rig.export(TOPIC)
    rig.operations.apply(asked("r1"), [Delete(topic=TOPIC)])
    assert contents(rig) == {}
    report, topic = rig.operations.import_topic(asked("r2"), pack)
    assert topic == TOPIC
    assert contents(rig) == before
    assert {change.state_after for change in report.changes} == {BlockState.ACTIVE}
    # Versions go on growing, so that nobody takes the new content for the old.
    assert rig.status(TOPIC).version == 5
    tree = tree_of(rig)
    assert tree.labels == tree_before.labels
    assert tree.num_documents == tree_before.num_documents
    for now, then in zip(tree.centroids, tree_before.centroids, strict=True):
        np.testing.assert_array_equal(now, then)


def test_equal_topics_are_equal_files(rig: ShardRig) -> None:
    first = rig.export(TOPIC)
    assert rig.export(TOPIC) == first
    assert encode_pack(decode_pack(first)) == first


def test_other_readers_open_a_pack(rig: ShardRig) -> None:
    data = rig.export(TOPIC)
    tensors = dict(safetensors.deserialize(data))  # type: ignore[no-untyped-call]
    weight = tensors["1/1/weight"]
    assert weight["dtype"] == "BF16"
    assert tuple(weight["shape"]) == rig.spec.block_shape(1)
    assert bytes(weight["data"]) == contents(rig)[TOPIC, "weight"]


def test_export_of_weights_alone_starts_the_optimizer_afresh(rig: ShardRig) -> None:
    pack = rig.export(TOPIC, weights_only=True)
    before = contents(rig)
    rig.operations.apply(asked("r1"), [Delete(topic=TOPIC)])
    rig.operations.import_topic(asked("r2"), pack)
    after = contents(rig)
    assert after[TOPIC, "weight"] == before[TOPIC, "weight"]
    assert after[TOPIC, "step"] == b"0"
    assert not np.frombuffer(after[TOPIC, Role.EXP_AVG.value], np.float32).any()


def test_import_over_an_existing_topic_replaces_it(rig: ShardRig) -> None:
    before = contents(rig)
    pack = rig.export(TOPIC)
    rig.push(TOPIC, "later")
    rig.operations.import_topic(asked("r1"), pack)
    assert contents(rig) == before
    # Nothing of the tree changed, so no new document was written.
    assert rig.tree_keys() == ["trees/0000000000.safetensors"]


def test_dry_run_of_an_import_changes_nothing(rig: ShardRig) -> None:
    pack = rig.export(TOPIC)
    before = rig.state()
    report, _ = rig.operations.import_topic(asked("", dry_run=True), pack)
    assert len(report.changes) == 3
    assert rig.state() == before


def test_a_deleted_block_is_not_in_the_pack(rig: ShardRig) -> None:
    rig.operations.apply(asked("r1"), [Delete(topic=LEAF)])
    pack = decode_pack(rig.export(TOPIC))
    assert [block.ref for block in pack.blocks] == [TOPIC, BlockRef(2, 3)]
    assert LEAF not in pack.labels
    rig.operations.apply(asked("r2"), [Delete(topic=TOPIC)])
    with pytest.raises(FailedPreconditionError):
        rig.operations.export_topic(TOPIC)


def test_retry_of_an_import_after_a_restart_is_answered_alike(rig: ShardRig) -> None:
    pack = rig.export(TOPIC)
    answer = rig.operations.import_topic(asked("r1"), pack)
    rig.start_coordinator()
    assert rig.operations.import_topic(asked("r1"), pack) == answer


MISMATCHES = {
    "anchor": ({"fingerprint": "other"}, None, Reason.FINGERPRINT_MISMATCH),
    "width": ({"width": 8}, None, Reason.BAD_SHAPE),
    "layers": ({"num_layers": 3}, None, Reason.BAD_SHAPE),
    "dtype": ({"dtype": "float32"}, None, Reason.BAD_DTYPE),
    "block width": (
        {"levels": (RIG_SPEC.levels[0], LevelSpec(fan_out=2, block_width=1))},
        None,
        Reason.BAD_SHAPE,
    ),
    "fan-out below": (
        {"levels": (RIG_SPEC.levels[0], LevelSpec(fan_out=3, block_width=2))},
        None,
        Reason.BAD_SHAPE,
    ),
    "optimizer": (
        {"optimizer": OptimizerSpec(kind=OptimizerKind.ADAGRAD)},
        None,
        Reason.BAD_PACK,
    ),
    "retriever": (
        {},
        dataclasses.replace(full_tree(RIG_SPEC), embedder={"kind": "another"}),
        Reason.FINGERPRINT_MISMATCH,
    ),
}


@pytest.mark.parametrize("name", MISMATCHES)
def test_a_pack_that_does_not_fit_is_refused_with_the_reason(
    rig: ShardRig, tmp_path: Path, name: str
) -> None:
    fields, tree, reason = MISMATCHES[name]
    pack = rig.export(TOPIC)
    spec = dataclasses.replace(rig.spec, bank_id="", **fields)  # type: ignore[arg-type]
    other = ShardRig(tmp_path / "other", spec=spec, tree=tree)
    try:
        before = other.state()
        with pytest.raises(MembankError) as caught:
            other.operations.import_topic(asked("r1"), pack)
        assert caught.value.reason is reason
        assert other.state() == before
        assert other.log.last == 0
    finally:
        other.close()


def test_a_pack_moves_to_another_bank_of_the_same_anchor(rig: ShardRig, tmp_path: Path) -> None:
    pack = rig.export(TOPIC)
    spec = dataclasses.replace(rig.spec, bank_id="", name="second", num_partitions=2, init_seed=9)
    other = ShardRig(tmp_path / "other", spec=spec)
    try:
        other.operations.import_topic(asked("r1"), pack)
        assert contents(other) == contents(rig)
        assert other.log.committed.detail["from_bank"] == rig.spec.bank_id
    finally:
        other.close()


def small_pack() -> Pack:
    def filled(ref: BlockRef, value: float) -> Array:
        return np.full(RIG_SPEC.block_shape(ref.level), value, np.float32).astype(
            ml_dtypes.bfloat16
        )

    spec = dataclasses.replace(RIG_SPEC, dtype="bfloat16")
    blocks = tuple(
        PackedBlock(ref=ref, version=3, step=2, weight=filled(ref, float(ref.cluster)))
        for ref in spec.subtree(TOPIC)
    )
    return Pack(spec=spec, topic=TOPIC, revision=7, blocks=blocks, labels={TOPIC: "metals"})


def test_every_byte_of_a_pack_is_guarded() -> None:
    data = encode_pack(small_pack())
    for position in range(0, len(data), 7):
        damaged = bytearray(data)
        damaged[position] ^= 0x20
        with pytest.raises((CorruptionError, InvalidArgumentError)):
            decode_pack(bytes(damaged))


def test_damage_names_the_array() -> None:
    data = bytearray(encode_pack(small_pack()))
    data[-1] ^= 1
    with pytest.raises(CorruptionError, match=r"2/3/weight|2/2/weight|1/1/weight"):
        decode_pack(bytes(data))


@pytest.mark.parametrize("data", [b"", b"junk", b"\x08" + b"\0" * 7 + b'{"a":1} '])
def test_what_is_no_pack_is_called_so(data: bytes) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        decode_pack(data)
    assert caught.value.reason is Reason.BAD_PACK


def test_truncated_pack_is_refused() -> None:
    data = encode_pack(small_pack())
    with pytest.raises(InvalidArgumentError):
        decode_pack(data[:-1])


def test_a_newer_pack_asks_for_an_upgrade(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("membank.wire.format.pack.document.FULL_VERSION", 3)
    data = encode_pack(small_pack())
    monkeypatch.undo()
    with pytest.raises(FailedPreconditionError) as caught:
        decode_pack(data)
    assert caught.value.reason is Reason.FORMAT_TOO_NEW
