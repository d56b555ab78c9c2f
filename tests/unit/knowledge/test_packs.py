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
    UnavailableError,
)
from membank.wire.format import TreeDocument
from membank.wire.format.pack import Pack, PackedBlock, decode_pack, encode_pack
from membank.wire.signing import Signer, TrustedKeys
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
from shard_rig import RIG_SPEC, ShardRig, When, asked, full_tree

TOPIC, LEAF = BlockRef(1, 1), BlockRef(2, 2)
SIGNER = Signer.generate()


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[ShardRig]:
    rig = ShardRig(tmp_path / "bank", spec=dataclasses.replace(RIG_SPEC, dtype="bfloat16"))
    for number in range(3):
        rig.push(TOPIC, f"a{number}", value=0.3 * number - 0.5)
    rig.push(LEAF, "b")
    yield rig
    rig.close()


def contents(rig: ShardRig, topic: BlockRef = TOPIC) -> dict[tuple[BlockRef, str], bytes]:
    """Return the bytes of every array of a topic, optimizer state and step included."""
    found: dict[tuple[BlockRef, str], bytes] = {}
    for ref in rig.spec.subtree(topic):
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


def test_what_a_commit_deleted_is_in_no_pack_though_a_shard_lags(rig: ShardRig) -> None:
    rig.faults.arm("commit shard-1", When.BEFORE, UnavailableError)
    with pytest.raises(UnavailableError, match="committed"):
        rig.operations.apply(asked("r1"), [Delete(topic=TOPIC)])
    with pytest.raises(FailedPreconditionError) as caught:
        rig.export(TOPIC)
    assert caught.value.reason is Reason.BLOCK_DELETED


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


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (np.ones(1, np.float32), Reason.BAD_SHAPE),  # numpy would fill a row with it
        (np.ones(4, np.float32), Reason.BAD_SHAPE),
        (np.ones(3, np.float16), Reason.BAD_DTYPE),
        (np.array([0.0, np.nan, 1.0], np.float32), Reason.NOT_FINITE),
        (np.array([0.0, np.inf, 1.0], np.float32), Reason.NOT_FINITE),
    ],
)
def test_a_centroid_that_is_none_of_this_tree_is_refused(
    rig: ShardRig, row: Array, reason: Reason
) -> None:
    pack = decode_pack(rig.export(TOPIC))
    pack = dataclasses.replace(pack, centroids={**pack.centroids, TOPIC: row})
    before = rig.state()
    with pytest.raises(InvalidArgumentError) as caught:
        rig.operations.import_topic(asked("r1"), encode_pack(pack))
    assert caught.value.reason is reason
    assert rig.state() == before
    assert rig.log.last == 0


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


def test_a_pack_goes_to_another_topic_with_all_that_is_said_of_it(rig: ShardRig) -> None:
    there = BlockRef(1, 3)
    before = contents(rig)
    tree = tree_of(rig)
    pack = rig.export(TOPIC)
    dry, topic = rig.operations.import_topic(asked("", dry_run=True), pack, topic=there)
    assert (topic, [change.ref for change in dry.changes]) == (there, list(RIG_SPEC.subtree(there)))
    assert rig.log.last == 0
    rig.operations.import_topic(asked("r1"), pack, topic=there)
    places = dict(zip(RIG_SPEC.subtree(there), RIG_SPEC.subtree(TOPIC), strict=True))
    moved = {(places[ref], role): data for (ref, role), data in contents(rig, there).items()}
    assert moved == before
    after = tree_of(rig)
    for ref, source in places.items():
        assert after.labels[ref] == tree.labels[source]
        assert after.num_documents[ref] == tree.num_documents[source]
        row = after.centroids[ref.level - 1][ref.cluster]
        np.testing.assert_array_equal(row, tree.centroids[source.level - 1][source.cluster])
    assert rig.log.committed.detail["from_topic"] == str(TOPIC)
    assert rig.log.committed.detail["topic"] == str(there)


def test_a_topic_that_was_replaced_keeps_none_of_its_labels(rig: ShardRig) -> None:
    there = BlockRef(1, 3)
    pack = decode_pack(rig.export(TOPIC))
    bare = dataclasses.replace(pack, labels={TOPIC: "only"}, num_documents={})
    rig.operations.import_topic(asked("r1"), encode_pack(bare), topic=there)
    tree = tree_of(rig)
    assert [tree.labels.get(ref) for ref in RIG_SPEC.subtree(there)] == ["only", None, None]
    assert not tree.num_documents.keys() & set(RIG_SPEC.subtree(there))


def test_a_deleted_topic_is_made_anew_by_the_pack_of_another(rig: ShardRig) -> None:
    there = BlockRef(1, 3)
    rig.operations.apply(asked("r1"), [Delete(topic=there)])
    rig.operations.import_topic(asked("r2"), rig.export(TOPIC), topic=there)
    assert rig.status(there).state is BlockState.ACTIVE
    assert len(contents(rig, there)) == len(contents(rig))


def test_another_anchor_is_refused_under_any_topic(rig: ShardRig, tmp_path: Path) -> None:
    spec = dataclasses.replace(rig.spec, bank_id="", fingerprint="other")
    other = ShardRig(tmp_path / "other", spec=spec)
    try:
        with pytest.raises(FailedPreconditionError, match=r"pack anchor, bank other") as caught:
            other.operations.import_topic(asked("r1"), rig.export(TOPIC), topic=BlockRef(1, 3))
        assert caught.value.reason is Reason.FINGERPRINT_MISMATCH
        assert other.log.last == 0
    finally:
        other.close()


def test_the_service_signs_and_takes_only_what_it_trusts(rig: ShardRig) -> None:
    ours, theirs = Signer.generate(), Signer.generate()
    unsigned = rig.export(TOPIC)
    keys = TrustedKeys({ours.public_key: "we"})
    rig.signer, rig.trusted_keys = theirs, keys
    rig.start_coordinator()
    foreign = rig.export(TOPIC)
    rig.signer = ours
    rig.start_coordinator()
    own = rig.export(TOPIC)
    before = rig.state()
    for pack, reason in ((unsigned, Reason.UNSIGNED), (foreign, Reason.UNTRUSTED_KEY)):
        with pytest.raises(FailedPreconditionError) as caught:
            rig.operations.import_topic(asked("r1"), pack)
        assert caught.value.reason is reason
    assert rig.state() == before
    rig.operations.import_topic(asked("r1"), own)
    assert rig.log.committed.detail["signed_by"] == ["we"]
    rig.trusted_keys = None
    rig.start_coordinator()
    rig.operations.import_topic(asked("r2"), foreign)
    assert rig.log.committed.detail["signed_by"] == [theirs.public_key.key_id]


def test_a_signature_that_is_not_of_the_pack_is_refused_by_every_service(rig: ShardRig) -> None:
    one, other = (
        encode_pack(decode_pack(rig.export(ref)), signers=[SIGNER]) for ref in (TOPIC, LEAF)
    )
    values = [decode_pack(data).signatures[0].to_json()["value"] for data in (one, other)]
    forged = one.replace(str(values[0]).encode(), str(values[1]).encode())
    with pytest.raises(CorruptionError) as caught:
        rig.operations.import_topic(asked("r1"), forged)
    assert caught.value.reason is Reason.BAD_SIGNATURE


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
