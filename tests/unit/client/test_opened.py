"""A bank read from its files answers as the shards that serve it do."""

import inspect
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from membank.client import AsyncBankClient, AsyncOpenedBank, BankClient, OpenedBank
from membank.client.bank_files import DirectoryFiles, FsspecFiles, open_files
from membank.client.retriever import LsaEmbedder, LsaSettings
from membank.wire.codec import fetch_codec
from membank.wire.errors import (
    CorruptionError,
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
    Reason,
)
from membank.wire.records import Block
from membank.wire.spec import BlockRef, BlockState
from membank.wire.steps import Delete, Swap, Withhold
from shard_rig import RIG_SPEC, Crash, ShardRig, When, asked

TOPIC, OTHER, THIRD = BlockRef(1, 1), BlockRef(1, 2), BlockRef(1, 3)
LEAF = BlockRef(2, 2)


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[ShardRig]:
    rig = ShardRig(tmp_path / "bank")
    yield rig
    rig.close()


def swap(rig: ShardRig, request_id: str, *refs: BlockRef, value: float = 1.0) -> None:
    contents = [
        Swap(
            ref=ref,
            weight=np.full(rig.spec.block_shape(ref.level), value, np.float32).astype(
                rig.spec.numpy_dtype
            ),
        )
        for ref in refs
    ]
    rig.operations.apply(asked(request_id), contents)


def consolidate(rig: ShardRig) -> None:
    for shard in rig.shards.values():
        shard.consolidate()


def open_it(rig: ShardRig, snapshot: str = "") -> OpenedBank:
    return BankClient.open(rig.objects.root, snapshot=snapshot)


def told(block: Block) -> tuple[object, ...]:
    """Return all that a block says, its header included."""
    weight = block.weight
    content = None if weight is None else (weight.dtype, weight.shape, weight.tobytes())
    return (block.header, content)


def served(rig: ShardRig, dtype: str | None, snapshot: str) -> dict[BlockRef, tuple[object, ...]]:
    """Return what shards answer, and the revision of it under no block."""
    found = {}
    for ref in rig.spec.blocks():
        answer = rig.owner(ref).fetch([ref], dtype=dtype, snapshot=snapshot)
        block = answer.blocks[0]
        if block.weight is not None:
            # What a client makes of what travels.
            payload = block.weight.reshape(-1).view(np.uint8)
            weight = fetch_codec(block.header.dtype).decode(payload, block.header.shape)
            block = replace(block, weight=weight)
        found[ref] = (answer.revision, *told(block))
    return found


def read(rig: ShardRig, dtype: str | None, snapshot: str) -> dict[BlockRef, tuple[object, ...]]:
    fetched = open_it(rig, snapshot).fetch_blocks(rig.spec.blocks(), dtype=dtype)
    return {ref: (fetched.revision, *told(block)) for ref, block in fetched.items()}


def live_through_much(rig: ShardRig) -> None:
    """Leave blocks in every state: as initialised, trained, swapped, hidden, gone, made anew."""
    rig.push(TOPIC, "p1")
    rig.push(LEAF, "p2", value=0.3)
    swap(rig, "s1", OTHER, value=1e30)
    rig.operations.create_snapshot(asked("n1"), "then")
    rig.push(TOPIC, "p3")
    rig.operations.apply(asked("w1"), [Withhold(topic=OTHER)])
    rig.operations.apply(asked("d1"), [Delete(topic=THIRD)])
    swap(rig, "s2", THIRD)
    rig.operations.rollback(asked("b1"), "then", TOPIC)
    rig.push(TOPIC, "p4")
    consolidate(rig)


class TestAsServed:
    @pytest.mark.slow
    @pytest.mark.parametrize("kept_as", ["float32", "bfloat16"])
    def test_every_block(self, tmp_path: Path, kept_as: str) -> None:
        rig = ShardRig(tmp_path / "bank", spec=replace(RIG_SPEC, dtype=kept_as))
        live_through_much(rig)
        for dtype in (None, "float32", "bfloat16", "float16", "int8"):
            for snapshot in ("", "then"):
                assert read(rig, dtype, snapshot) == served(rig, dtype, snapshot)
        rig.close()

    def test_a_bank_that_nobody_has_changed(self, rig: ShardRig) -> None:
        assert read(rig, None, "") == served(rig, None, "")
        assert set(open_it(rig).state.manifests) == set(range(RIG_SPEC.num_partitions))

    @pytest.mark.slow
    def test_topics(self, rig: ShardRig) -> None:
        live_through_much(rig)
        for parent, depth in ((None, 0), (None, 1), (TOPIC, 0), (TOPIC, 1)):
            expected, _ = rig.operations.list_topics(parent, depth=depth)
            assert open_it(rig).topics(parent, depth=depth) == expected

    @pytest.mark.parametrize("when", list(When))
    def test_a_transaction_that_was_cut_off(self, rig: ShardRig, when: When) -> None:
        swap(rig, "s1", TOPIC)
        rig.faults.arm("put_if_absent revisions", when, Crash)
        with pytest.raises(Crash):
            swap(rig, "s2", TOPIC, OTHER, value=2.0)
        found = open_it(rig).fetch_blocks([TOPIC, OTHER])
        is_committed = when is When.AFTER
        assert found.versions == ({TOPIC: 2, OTHER: 1} if is_committed else {TOPIC: 1, OTHER: 0})
        rig.start_coordinator()
        assert read(rig, None, "")[TOPIC][1:] == served(rig, None, "")[TOPIC][1:]

    @pytest.mark.slow
    def test_after_a_takeover(self, rig: ShardRig) -> None:
        live_through_much(rig)
        rig.kill_shards()
        rig.open_shards()
        consolidate(rig)
        assert read(rig, None, "") == served(rig, None, "")


class TestReading:
    def test_says_what_it_reads(self, rig: ShardRig) -> None:
        rig.operations.create_snapshot(asked("n1"), "then")
        swap(rig, "s1", TOPIC)
        now, then = open_it(rig).state, open_it(rig, "then").state
        assert ((now.revision, now.snapshot), (then.revision, then.snapshot)) == (
            (2, ""),
            (1, "then"),
        )
        partition = RIG_SPEC.partition_of(TOPIC)
        assert now.manifests[partition] > then.manifests[partition] > 0

    def test_stays_with_what_it_has_read(self, rig: ShardRig) -> None:
        bank = open_it(rig)
        swap(rig, "s1", TOPIC)
        assert bank.fetch([TOPIC]).versions == {TOPIC: 0}
        assert open_it(rig).fetch([TOPIC]).versions == {TOPIC: 1}

    def test_does_not_see_the_journal(self, rig: ShardRig) -> None:
        rig.push(TOPIC, "p1")
        assert open_it(rig).fetch([TOPIC]).versions == {TOPIC: 0}
        consolidate(rig)
        assert open_it(rig).fetch([TOPIC]).versions == {TOPIC: 1}

    def test_paths_end_at_what_is_withheld(self, rig: ShardRig) -> None:
        rig.operations.create_snapshot(asked("n1"), "then")
        rig.operations.apply(asked("w1"), [Withhold(topic=LEAF)])
        for snapshot in ("", "then"):
            memory = open_it(rig, snapshot).fetch([TOPIC, LEAF])
            assert (list(memory), memory.ended_at) == ([TOPIC], LEAF)

    def test_held_blocks_are_reused(self, rig: ShardRig) -> None:
        held = open_it(rig).fetch([TOPIC, LEAF])
        swap(rig, "s1", TOPIC)
        again = open_it(rig).fetch([TOPIC, LEAF], held=held)
        assert [again[ref] is held[ref] for ref in (TOPIC, LEAF)] == [False, True]

    def test_weights_are_read_only(self, rig: ShardRig) -> None:
        swap(rig, "s1", TOPIC)
        for weight in open_it(rig).fetch([TOPIC, LEAF]).weights.values():
            assert not weight.flags.writeable

    def test_routes(self, tmp_path: Path) -> None:
        rig = ShardRig(tmp_path / "bank")
        embedder = LsaEmbedder(
            np.array([3], np.uint64), np.ones((1, 2), np.float32), np.ones(1, np.float32),
            LsaSettings(subject_dims=1),
        )  # fmt: skip
        bank = OpenedBank(DirectoryFiles(rig.objects.root), embedder=embedder)
        path = bank.route("anything")
        assert [ref.level for ref in path] == [1, 2]
        assert bank.route("anything", beams=2) == bank.route_beam("anything", 2)[0].path
        with pytest.raises(InvalidArgumentError):
            bank.route_beam("anything", 0)
        with pytest.raises(FailedPreconditionError):
            open_it(rig).route("the bank's own embedder is none of the client's")
        rig.close()

    async def test_on_an_event_loop(self, rig: ShardRig) -> None:
        swap(rig, "s1", TOPIC)
        bank = await AsyncBankClient.open(rig.objects.root)
        assert (bank.spec, bank.state) == (rig.spec, open_it(rig).state)
        assert (await bank.fetch([TOPIC])).versions == {TOPIC: 1}
        assert (await bank.fetch_blocks([TOPIC])).states == {TOPIC: BlockState.ACTIVE}
        assert len(await bank.topics()) == rig.spec.num_blocks
        async with bank.stream([TOPIC]) as memory:
            assert (await memory.head()).versions == {TOPIC: 1}

    @pytest.mark.parametrize("dtype", [None, "int8"])
    def test_layer_by_layer(self, rig: ShardRig, dtype: str | None) -> None:
        swap(rig, "s1", TOPIC)
        rig.operations.apply(asked("s2"), [Withhold(topic=LEAF)])
        consolidate(rig)
        bank = open_it(rig)
        expected = bank.fetch([TOPIC, LEAF], dtype=dtype)
        with bank.stream([TOPIC, LEAF, TOPIC], dtype=dtype) as memory:
            head = memory.head()
            assert (head.revision, head.ended_at) == (expected.revision, LEAF)
            for number in range(memory.num_layers):
                (array,) = memory.layer(number).values()
                np.testing.assert_array_equal(array, expected.weights[TOPIC][number])
            assert memory.memory().versions == expected.versions


def test_both_kinds_have_the_same_calls() -> None:
    def calls(kind: type) -> dict[str, inspect.Signature]:
        members = inspect.getmembers(kind, inspect.isfunction)
        return {name: inspect.signature(call) for name, call in members if name[0] != "_"}

    sync, core = calls(OpenedBank), calls(AsyncOpenedBank)
    # What these return is of two kinds.
    assert sync.pop("stream").parameters == core.pop("stream").parameters
    assert sync == core


class TestRefuses:
    def test_what_is_no_bank(self, tmp_path: Path) -> None:
        with pytest.raises(NotFoundError) as caught:
            BankClient.open(tmp_path)
        assert caught.value.reason is Reason.NOT_A_BANK

    @pytest.mark.parametrize("name", ["never", "../bank", "given-up"])
    def test_what_is_no_snapshot(self, rig: ShardRig, name: str) -> None:
        rig.operations.create_snapshot(asked("n1"), "given-up")
        rig.operations.delete_snapshot(asked("n2"), "given-up")
        with pytest.raises(NotFoundError) as caught:
            open_it(rig, name)
        assert caught.value.reason is Reason.UNKNOWN_SNAPSHOT

    def test_a_newer_format(self, rig: ShardRig) -> None:
        path = rig.objects.root / "bank.json"
        path.write_text(json.dumps({**json.loads(path.read_bytes()), "format": 3}))
        with pytest.raises(FailedPreconditionError) as caught:
            open_it(rig)
        assert caught.value.reason is Reason.FORMAT_TOO_NEW

    def test_unknown_blocks_and_dtypes(self, rig: ShardRig) -> None:
        with pytest.raises(NotFoundError):
            open_it(rig).fetch([BlockRef(1, 4)])
        with pytest.raises(InvalidArgumentError):
            open_it(rig).fetch([TOPIC], dtype="sparse")


class TestDamage:
    @pytest.mark.parametrize("is_missing", [True, False])
    @pytest.mark.parametrize(
        "pattern", ["partitions/0001/level-1/weight/c.*", "partitions/0001/manifests/*2"]
    )
    def test_the_file_is_named(self, rig: ShardRig, pattern: str, is_missing: bool) -> None:
        swap(rig, "s1", TOPIC)
        (path,) = rig.objects.root.glob(pattern)
        if is_missing:
            path.unlink()
        else:
            data = bytearray(path.read_bytes())
            data[len(data) // 2] ^= 1
            path.write_bytes(data)
        with pytest.raises(CorruptionError, match=str(path)):
            open_it(rig).fetch([TOPIC])
        if is_missing:
            # The shard must not trip over it when it is closed.
            rig.kill_shards()

    def test_a_record_is_missing(self, rig: ShardRig) -> None:
        swap(rig, "s1", TOPIC)
        swap(rig, "s2", TOPIC)
        (rig.objects.root / "revisions/0000000001.json").unlink()
        with pytest.raises(CorruptionError, match=r"0000000001\.json"):
            open_it(rig).fetch([TOPIC])

    def test_what_a_snapshot_needs_is_missing(self, rig: ShardRig) -> None:
        rig.operations.create_snapshot(asked("n1"), "then")
        number = open_it(rig, "then").state.manifests[1]
        swap(rig, "s1", TOPIC)
        path = rig.objects.root / f"partitions/0001/manifests/{number:010d}"
        path.unlink()
        with pytest.raises(CorruptionError, match=str(path)):
            open_it(rig, "then")


class TestWhere:
    def test_directories(self, rig: ShardRig) -> None:
        root = rig.objects.root
        for where in (root, str(root), f"file://{root}"):
            assert BankClient.open(where).spec == rig.spec

    def test_fsspec(self, rig: ShardRig) -> None:
        import fsspec

        swap(rig, "s1", TOPIC)
        memory = fsspec.filesystem("memory")
        memory.put(str(rig.objects.root), "/opened", recursive=True)
        for url in ("memory://opened", "fsspec+memory://opened/"):
            bank = BankClient.open(url)
            found = bank.fetch_blocks(rig.spec.blocks())
            expected = open_it(rig).fetch_blocks(rig.spec.blocks())
            assert [told(b) for b in found.values()] == [told(b) for b in expected.values()]
        with pytest.raises(NotFoundError):
            BankClient.open("memory://elsewhere")
        memory.rm("/opened", recursive=True)

    def test_fsspec_is_not_installed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "fsspec", None)
        with pytest.raises(FailedPreconditionError, match="service") as caught:
            open_files("memory://opened")
        assert caught.value.reason is Reason.MISSING_EXTRA

    def test_nobody_serves_the_url(self) -> None:
        with pytest.raises(InvalidArgumentError):
            FsspecFiles("nosuchscheme://bank")
