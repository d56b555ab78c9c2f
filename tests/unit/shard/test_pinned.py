"""Readers that are pinned to a snapshot: the same bytes for ever, or an error that says why not."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from membank.bank_service.shard import Shard, ShardConfig
from membank.bank_service.shard.contract import (
    BlockOperation,
    Erase,
    SetContent,
    SetState,
)
from membank.bank_service.shard.maintenance import ThreadMaintenance
from membank.bank_service.shard.partition import Partition
from membank.bank_service.shard.pinned import PinnedReader
from membank.bank_service.store import Bank
from membank.bank_service.store.bank import SNAPSHOT_OPERATION, UNPIN_OPERATION
from membank.wire.errors import CorruptionError, NotFoundError, Reason, UnavailableError
from membank.wire.format.layout import manifest_key
from membank.wire.records import Snapshot
from membank.wire.spec import Array, BlockRef, BlockState
from tiny_bank import UnsyncedObjects, commit_record, create_bank, make_update, transact

A, B, C, LEAF = BlockRef(1, 0), BlockRef(1, 1), BlockRef(1, 2), BlockRef(2, 5)
ALL = (A, B, C, LEAF)
CONFIG = ShardConfig(hold_wait_s=0, retained_revisions=1)


@pytest.fixture
def bank(tmp_path: Path) -> Bank:
    return create_bank(tmp_path / "bank")


@pytest.fixture
def shard(bank: Bank) -> Iterator[Shard]:
    shard = Shard.open(bank, config=CONFIG)
    yield shard
    shard.close()


def push(shard: Shard, name: str, *refs: BlockRef) -> None:
    assert all(r.accepted for r in shard.push(make_update(shard, refs, name)).results)


def pin(shard: Shard, bank: Bank, name: str) -> int:
    """Make a snapshot as the coordinator does; return its revision."""
    revision = bank.latest_number() + 1
    prepared = shard.prepare(revision, [], all_partitions=True)
    bank.create_snapshot(Snapshot(name=name, revision=revision, create_time_s=0.0))
    record = replace(
        commit_record(bank, revision, prepared),
        operation=SNAPSHOT_OPERATION,
        detail={"snapshot": name},
    )
    shard.commit(bank.decide(record))
    return revision


def unpin(shard: Shard, bank: Bank, name: str, *, remove: bool = True) -> None:
    """Give a snapshot up as the coordinator does, up to the removal of its name or with it."""
    revision = bank.latest_number() + 1
    prepared = shard.prepare(revision, [], all_partitions=True)
    record = replace(
        commit_record(bank, revision, prepared),
        operation=UNPIN_OPERATION,
        detail={"snapshot": name},
    )
    stands = bank.decide(record)
    shard.commit(stands)
    if remove:
        bank.remove_ended_snapshot(stands)


def weights(shard: Shard, snapshot: str = "") -> dict[BlockRef, bytes | None]:
    blocks = shard.fetch(ALL, snapshot=snapshot).blocks
    return {b.ref: None if b.weight is None else b.weight.tobytes() for b in blocks}


def filled(bank: Bank, ref: BlockRef, value: float) -> Array:
    return np.full(bank.spec.block_shape(ref.level), value, np.float32)


def test_a_pinned_reader_gets_what_was_pinned(shard: Shard, bank: Bank) -> None:
    push(shard, "u0", A, B)
    then = weights(shard)
    revision = pin(shard, bank, "then")
    push(shard, "u1", A, C, LEAF)
    shard.consolidate()
    transact(shard, bank, [SetContent(ref=B, weight=filled(bank, B, 3.0))])
    result = shard.fetch(ALL, snapshot="then")
    assert result.revision == revision
    assert [block.version for block in result.blocks] == [1, 1, 0, 0]
    assert weights(shard, "then") == then != weights(shard)
    assert all(
        not block.weight.flags.writeable for block in result.blocks if block.weight is not None
    )


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_in_the_dtype_that_was_asked_for(shard: Shard, bank: Bank, dtype: str) -> None:
    pin(shard, bank, "then")
    expected = shard.fetch([A], dtype=dtype).blocks[0]
    push(shard, "u1", A)
    found = shard.fetch([A], dtype=dtype, snapshot="then").blocks[0]
    assert found.header == expected.header
    assert found.weight is not None
    assert expected.weight is not None
    assert found.weight.tobytes() == expected.weight.tobytes()


def test_a_held_version_is_compared_with_the_pinned_one(shard: Shard, bank: Bank) -> None:
    push(shard, "u0", A, B)
    pin(shard, bank, "then")
    push(shard, "u1", A)
    held_a, held_b = shard.fetch([A, B], held_versions=[2, 1], snapshot="then").blocks
    # The present version of A is not the pinned one.
    assert not held_a.header.unchanged
    assert held_a.weight is not None
    assert held_b.header.unchanged
    assert held_b.weight is None


def test_what_is_withheld_or_deleted_by_now_is_not_read(shard: Shard, bank: Bank) -> None:
    push(shard, "u0", *ALL)
    then = weights(shard)
    pin(shard, bank, "then")
    transact(shard, bank, [SetState(ref=A, state=BlockState.WITHHELD), Erase(ref=B)])
    blocks = shard.fetch([A, B, C], snapshot="then").blocks
    assert [block.header.state for block in blocks] == [
        BlockState.WITHHELD,
        BlockState.DELETED,
        BlockState.ACTIVE,
    ]
    assert [block.weight is None for block in blocks] == [True, True, False]
    transact(shard, bank, [SetState(ref=A, state=BlockState.ACTIVE)])
    assert weights(shard, "then") == {**then, B: None}


def test_what_was_withheld_then_is_not_read(shard: Shard, bank: Bank) -> None:
    transact(shard, bank, [SetState(ref=A, state=BlockState.WITHHELD)])
    pin(shard, bank, "then")
    transact(shard, bank, [SetState(ref=A, state=BlockState.ACTIVE)])
    (block,) = shard.fetch([A], snapshot="then").blocks
    assert (block.weight, block.header.state) == (None, BlockState.WITHHELD)


@pytest.mark.parametrize("read_before", [True, False])
@pytest.mark.parametrize("restart", [True, False])
@pytest.mark.parametrize("initial", [True, False])
def test_what_is_created_anew_after_a_delete_stays_deleted(
    bank: Bank, *, read_before: bool, restart: bool, initial: bool
) -> None:
    shard = Shard.open(bank, config=CONFIG)
    if initial:
        # An entry without a slot, of which nothing is left to be missing.
        transact(shard, bank, [SetState(ref=A, state=BlockState.WITHHELD)])
        transact(shard, bank, [SetState(ref=A, state=BlockState.ACTIVE)])
    else:
        push(shard, "u0", A)
    pin(shard, bank, "then")
    if read_before:
        weights(shard, "then")
    transact(shard, bank, [Erase(ref=A)])
    transact(shard, bank, [SetContent(ref=A, weight=filled(bank, A, 9.0))])
    if restart:
        shard.close()
        shard = Shard.open(bank, config=CONFIG)
    (block,) = shard.fetch([A], snapshot="then").blocks
    assert (block.weight, block.header.state) == (None, BlockState.DELETED)
    shard.close()


def test_what_is_decided_between_looking_and_capturing_is_noticed(shard: Shard, bank: Bank) -> None:
    transact(shard, bank, [SetState(ref=A, state=BlockState.WITHHELD)])
    transact(shard, bank, [SetState(ref=A, state=BlockState.ACTIVE)])
    pin(shard, bank, "then")
    pending: list[list[BlockOperation]] = [
        [Erase(ref=A)],
        [SetContent(ref=A, weight=filled(bank, A, 9.0))],
    ]

    def partition_of(ref: BlockRef) -> Partition:
        while armed and pending:
            transact(shard, bank, pending.pop(0))
        return shard._owner(ref)

    armed = False
    reader = PinnedReader(shard._context, partition_of, lambda: shard.revision)
    _, (before,) = reader.read("then", [A], wanted=lambda _, entry: True)
    assert before.entry.state is BlockState.ACTIVE
    armed = True
    _, (after,) = reader.read("then", [A], wanted=lambda _, entry: False)
    assert pending == []
    assert after.entry.state is BlockState.DELETED


class Gate(UnsyncedObjects):
    """Calls `before` with each key that is read or removed."""

    before: Callable[[str, str], None] = staticmethod(lambda verb, key: None)

    def get(self, key: str) -> bytes:
        self.before("get", key)
        return super().get(key)

    def get_checked(self, key: str, num_bytes: int) -> tuple[memoryview, int]:
        self.before("get", key)
        return super().get_checked(key, num_bytes)

    def delete(self, key: str) -> None:
        self.before("delete", key)
        super().delete(key)


def gated(tmp_path: Path) -> tuple[Gate, Bank]:
    create_bank(tmp_path / "bank")
    gate = Gate(tmp_path / "bank")
    return gate, Bank.open(gate)


def test_a_delete_between_looking_and_loading_is_noticed(tmp_path: Path) -> None:
    gate, bank = gated(tmp_path)
    shard = Shard.open(bank, config=CONFIG)
    push(shard, "u0", A, C)
    pin(shard, bank, "then")
    push(shard, "u1", A)
    slots: list[str] = []

    def erase_first(verb: str, key: str) -> None:
        if verb == "get" and "/weight/c." in key and not slots:
            slots.append(key)
            transact(shard, bank, [Erase(ref=A)])

    gate.before = erase_first
    blocks = shard.fetch([A, C], snapshot="then").blocks
    assert slots
    assert [block.header.state for block in blocks] == [BlockState.DELETED, BlockState.ACTIVE]
    assert blocks[0].weight is None
    shard.close()


def test_a_manifest_that_is_read_before_its_purge_tells_no_tales(tmp_path: Path) -> None:
    # The delete is in force, its bytes are not gone yet: a reader that looks just then must not
    # take the block for one that exists when it is created anew.
    gate, bank = gated(tmp_path)
    shard = Shard.open(bank, config=CONFIG)
    transact(shard, bank, [SetState(ref=A, state=BlockState.WITHHELD)])
    transact(shard, bank, [SetState(ref=A, state=BlockState.ACTIVE)])
    push(shard, "u0", C)
    pin(shard, bank, "then")
    pinned_key = manifest_key(0, bank.named_manifest(3, 0))
    seen: list[BlockState] = []

    def read_before_purge(verb: str, key: str) -> None:
        if verb == "get" and key == pinned_key and not seen:
            seen.append(BlockState.ACTIVE)
            seen.append(shard.fetch([A], snapshot="then").blocks[0].header.state)

    prepared = shard.prepare(4, [Erase(ref=A)])
    gate.before = read_before_purge
    shard.commit(bank.decide(commit_record(bank, 4, prepared)))
    assert seen[1:] == [BlockState.DELETED]
    transact(shard, bank, [SetContent(ref=A, weight=filled(bank, A, 9.0))])
    (block,) = shard.fetch([A], snapshot="then").blocks
    assert (block.weight, block.header.state) == (None, BlockState.DELETED)
    shard.close()


def unknown(shard: Shard, name: str) -> None:
    with pytest.raises(NotFoundError) as caught:
        shard.fetch([A], snapshot=name)
    assert caught.value.reason is Reason.UNKNOWN_SNAPSHOT


def test_an_unknown_snapshot(shard: Shard, bank: Bank) -> None:
    unknown(shard, "nothing")
    # A name without a commit is none, whatever revision it names.
    for revision in (0, 1, 7):
        name = f"uncommitted-{revision}"
        bank.create_snapshot(Snapshot(name=name, revision=revision, create_time_s=0.0))
        unknown(shard, name)
    transact(shard, bank, [], all_partitions=True)
    unknown(shard, "uncommitted-1")


def test_one_that_is_given_up_is_unknown_at_once(shard: Shard, bank: Bank) -> None:
    push(shard, "u0", A)
    pin(shard, bank, "then")
    weights(shard, "then")
    # The commit has reached the shard, the name is not removed yet.
    unpin(shard, bank, "then", remove=False)
    unknown(shard, "then")
    bank.remove_ended_snapshot(bank.latest_commit())
    unknown(shard, "then")


def test_a_name_may_be_used_again(shard: Shard, bank: Bank) -> None:
    push(shard, "u0", A)
    pin(shard, bank, "latest")
    first = weights(shard, "latest")
    unpin(shard, bank, "latest")
    push(shard, "u1", A)
    revision = pin(shard, bank, "latest")
    assert shard.fetch([A], snapshot="latest").revision == revision
    assert weights(shard, "latest") == weights(shard) != first


def test_the_end_of_a_snapshot_while_it_is_read_is_said(tmp_path: Path) -> None:
    gate, bank = gated(tmp_path)
    shard = Shard.open(bank, config=CONFIG)
    push(shard, "u0", A, C)
    pin(shard, bank, "then")
    push(shard, "u1", A, C)
    loads = []

    def end_before_the_second(verb: str, key: str) -> None:
        if verb != "get" or "/weight/c." not in key:
            return
        loads.append(key)
        if len(loads) == 2:
            unpin(shard, bank, "then")
            shard.consolidate()
            shard.collect(0)

    gate.before = end_before_the_second
    with pytest.raises(NotFoundError) as caught:
        shard.fetch([A, C], snapshot="then")
    assert caught.value.reason is Reason.UNKNOWN_SNAPSHOT
    shard.close()


def test_damage_is_said_and_not_taken_for_a_change(
    shard: Shard, bank: Bank, tmp_path: Path
) -> None:
    push(shard, "u0", A)
    revision = pin(shard, bank, "then")
    entry = bank.read_manifest(0, bank.named_manifest(revision, 0)).entries[A]
    slot = tmp_path / f"bank/partitions/0000/level-1/weight/c.{entry.slot}.0.0.0.0"
    kept = slot.read_bytes()
    slot.write_bytes(bytes([kept[0] ^ 1]) + kept[1:])
    with pytest.raises(CorruptionError) as caught:
        shard.fetch([A], snapshot="then")
    assert caught.value.reason is Reason.SLOT_CORRUPT
    slot.write_bytes(kept)
    shard.close(consolidate=False)
    again = Shard.open(bank, config=CONFIG)
    (tmp_path / "bank" / manifest_key(0, bank.named_manifest(revision, 0))).unlink()
    with pytest.raises(CorruptionError, match="which snapshot then needs"):
        again.fetch([A], snapshot="then")
    again.close(consolidate=False)


def test_a_shard_that_is_behind_says_so(shard: Shard, bank: Bank) -> None:
    pin(shard, bank, "then")
    with pytest.raises(UnavailableError) as caught:
        shard.fetch([A], min_revision=99, snapshot="then")
    assert caught.value.reason is Reason.BEHIND_REVISION


def test_pinned_content_is_not_kept_among_the_present(shard: Shard, bank: Bank) -> None:
    push(shard, "u0", A)
    pin(shard, bank, "then")
    push(shard, "u1", A)
    present = weights(shard)
    before = shard.stats().resident_bytes
    weights(shard, "then")
    assert shard.stats().resident_bytes == before
    assert weights(shard) == present


def test_many_snapshots_are_read_side_by_side(shard: Shard, bank: Bank) -> None:
    then = {}
    for number in range(7):
        push(shard, f"u{number}", A, LEAF)
        then[f"s{number}"] = weights(shard)
        pin(shard, bank, f"s{number}")
    for _ in range(2):
        for name, expected in then.items():
            assert weights(shard, name) == expected


@pytest.mark.slow
@pytest.mark.parametrize("resident_bytes", [0, 1 << 20])
def test_the_same_bytes_for_ever_while_everything_goes_on(
    tmp_path: Path, resident_bytes: int
) -> None:
    bank = create_bank(tmp_path / "bank")
    config = ShardConfig(
        hold_wait_s=30,
        retained_revisions=1,
        consolidate_bytes=3000,
        segment_bytes=1500,
        resident_bytes=resident_bytes,
    )
    shard = Shard.open(bank, config=config, maintenance=ThreadMaintenance())
    push(shard, "first", *ALL)
    then = weights(shard)
    revision = pin(shard, bank, "then")
    stop = threading.Event()
    failures: list[BaseException] = []
    num_reads = [0] * 2

    def guarded(action: Callable[[], None]) -> Callable[[], None]:
        def run() -> None:
            try:
                while not stop.is_set():
                    action()
            except BaseException as err:  # told to the test
                failures.append(err)
                stop.set()

        return run

    def reader(number: int) -> Callable[[], None]:
        def read() -> None:
            assert weights(shard, "then") == then
            assert shard.fetch([A], snapshot="then").revision == revision
            num_reads[number] += 1

        return read

    def collect() -> None:
        for partition in shard.partitions:
            shard.collect(partition)

    threads = [
        threading.Thread(target=guarded(action)) for action in (reader(0), reader(1), collect)
    ]
    for thread in threads:
        thread.start()
    try:
        for number in range(40):
            push(shard, f"p{number}", A, LEAF, C)
            shard.consolidate()
            content: Sequence[BlockOperation] = [
                SetContent(ref=A, weight=filled(bank, A, float(number)))
            ]
            transact(shard, bank, content)
            if stop.is_set():
                break
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert failures == []
    assert min(num_reads) > 0
    assert weights(shard, "then") == then
    # Nothing of what came between is kept.
    assert len(bank.manifest_numbers(0)) < 8
    shard.close()
