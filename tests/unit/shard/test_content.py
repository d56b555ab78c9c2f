"""Contents in memory."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from membank.bank_service.shard.content import (
    INITIAL_ENTRY,
    BlockRecord,
    Content,
    initial_content,
    kept,
    new_array,
    read_only,
)
from membank.bank_service.shard.partition_store import PartitionStore
from membank.bank_service.shard.residency import Residency
from membank.bank_service.shard.table import BlockTable
from membank.bank_service.store.checked_read import read_checked
from membank.wire.format import NO_SLOT, Entry, encode_slot, initial_weight
from membank.wire.spec import Array, BlockRef, Role, dtype_of
from tiny_bank import create_bank, tiny_spec

A, B, C = BlockRef(1, 0), BlockRef(1, 1), BlockRef(1, 2)


def test_wipe_zeroes_what_nobody_reads() -> None:
    memory = bytearray(b"\xff" * 16)
    content = Content({Role.WEIGHT: np.frombuffer(memory, np.float32)}, 0)
    content.wipe()
    assert memory == bytes(16)


def test_wipe_spares_what_somebody_reads() -> None:
    memory = bytearray(b"\xff" * 16)
    arrays: dict[Role, Array] = {Role.WEIGHT: np.frombuffer(memory, np.float32)}
    reader = arrays[Role.WEIGHT][1:]
    Content(arrays, 0).wipe()
    assert memory == b"\xff" * 16
    assert reader.size == 3
    assert arrays == {}


def test_wipe_spares_what_somebody_reads_of_memory_that_is_shared() -> None:
    # A view of this array refers to the array below.
    below = np.ones(4, np.int32)
    Content({Role.WEIGHT: below.view(np.float32)}, 0).wipe()
    assert below.tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize("is_read", [False, True])
def test_wipe_zeroes_what_lies_in_larger_memory(is_read: bool) -> None:
    # As `new_array` makes them: views of an array that nobody else knows.
    memory = bytearray(b"\xff" * 20)
    content = Content(
        {Role.WEIGHT: np.frombuffer(memory, np.uint8)[:16].view(np.float32).reshape(2, 2)}, 0
    )
    assert isinstance(content.weight.base, np.ndarray)
    reader = read_only(content.weight)[1:] if is_read else None
    content.wipe()
    assert memory == (b"\xff" * 20 if is_read else bytes(16) + b"\xff" * 4)
    del reader


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_what_is_kept_is_a_copy(dtype: str) -> None:
    values = np.arange(24).reshape(2, 3, 4).astype(dtype_of(dtype))
    copy = kept(values.transpose(2, 0, 1))
    assert (copy.shape, copy.dtype) == ((4, 2, 3), values.dtype)
    assert copy.flags.c_contiguous
    assert copy.flags.writeable
    expected = values.astype(np.float32).transpose(2, 0, 1).copy()
    values[...] = 0
    np.testing.assert_array_equal(copy.astype(np.float32), expected)
    assert isinstance(copy.base, np.ndarray)
    assert copy.base.base is None


@pytest.mark.parametrize("shape", [(3, 3, 11, 7), (1, 3, 2, 680), (3, 3, 2, 680)])
def test_an_array_asks_for_as_much_memory_as_a_slot_that_was_read(shape: tuple[int, ...]) -> None:
    # What is asked for, not what is given: the allocator leaves a remainder too small for another.
    # Smaller ones come from pools of numpy and of Python, larger ones from a pool of ours.
    array = new_array(shape, np.dtype(np.float32))
    owner = array
    while isinstance(owner.base, np.ndarray):
        owner = owner.base
    assert owner.flags.owndata
    # The one begins with its numbers, the other with the head of its object.
    assert owner.nbytes == sys.getsizeof(b"".join(encode_slot(array, 0)))


def test_a_large_array_takes_the_place_of_a_slot_that_was_read(tmp_path: Path) -> None:
    # Of a size that no other test uses, so that its segment is this test's own.
    array = new_array((8, 3, 64, 683), np.dtype(np.float32))
    path = tmp_path / "slot"
    path.write_bytes(b"".join(encode_slot(array, 0)))
    place = array.ctypes.data
    del array
    data, _ = read_checked(str(path), 8 * 3 * 64 * 683 * 4)
    assert np.frombuffer(data, np.uint8).ctypes.data == place


def test_a_block_is_loaded_though_a_removal_wiped_what_was_resident(tmp_path: Path) -> None:
    bank = create_bank(tmp_path)
    record = BlockRecord(INITIAL_ENTRY, initial_content(bank.spec, A))
    assert record.content is not None
    record.content.wipe()
    loaded = PartitionStore(bank, 0).load_content(A, record, bank.spec.roles)
    assert loaded.arrays.keys() == set(bank.spec.roles)
    np.testing.assert_array_equal(loaded.weight, initial_weight(bank.spec, A))


def _record(slot: int, crcs: tuple[int, ...] = (1, 2, 3)) -> BlockRecord:
    content = initial_content(tiny_spec(), A)
    return BlockRecord(Entry(slot=slot, version=1, crcs=crcs), content)


def test_the_least_recently_used_clean_content_goes_first() -> None:
    size = initial_content(tiny_spec(), A).num_bytes
    residency, table = Residency(2 * size), BlockTable({})
    residency.put(table, A, _record(0))
    residency.put(table, B, _record(1))
    residency.touch(A)
    residency.put(table, C, _record(2))
    assert [ref for ref in (A, B, C) if table.record(ref).content is not None] == [A, C]
    assert table.record(B).entry.slot == 1
    assert residency.num_bytes == 2 * size


def test_dirty_content_counts_and_never_goes() -> None:
    residency, table = Residency(0), BlockTable({})
    residency.put(table, A, _record(NO_SLOT))
    residency.put(table, B, _record(1))
    dirty = table.record(A)
    assert dirty.content is not None
    assert table.record(B).content is None
    assert residency.num_bytes == table.dirty_bytes == dirty.content.num_bytes
    # Once in a slot, it goes like any other.
    residency.put(table, A, _record(4))
    assert table.record(A).content is None
    assert (residency.num_bytes, table.dirty_bytes) == (0, 0)


def test_what_a_consolidation_holds_makes_clean_content_go() -> None:
    size = initial_content(tiny_spec(), A).num_bytes
    residency, table = Residency(size), BlockTable({})
    residency.put(table, A, _record(0))
    residency.lend(size)
    assert table.record(A).content is None
    residency.lend(-size)
    assert residency.num_bytes == 0


def test_a_table_remembers_only_what_the_manifest_does_not_say() -> None:
    entries = {ref: _record(slot).entry for slot, ref in enumerate((A, B))}
    table = BlockTable(entries)
    table.set(A, BlockRecord(Entry(slot=7, version=2, crcs=(1, 2, 3))))
    assert [table.record(ref).entry.slot for ref in (A, B)] == [7, 1]
    table.rebase({**entries, A: Entry(slot=8, version=3, crcs=(1, 2, 3))})
    assert table.record(A).entry.slot == 8
    assert table.record(C).is_initial
