"""Entry tables: they answer like a dict, and hold the bytes that the format says."""

import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from membank.wire.errors import CorruptionError
from membank.wire.format import NO_SLOT, Entry, EntryTable, Manifest, decode_manifest
from membank.wire.format.entries import ENTRY_DTYPE
from membank.wire.format.manifest import encode_manifest
from membank.wire.spec import BlockRef, BlockState

NUM_ROLES = 2
U32 = st.integers(0, 2**32 - 1)
# Few blocks, so that changes meet what there is.
REFS = st.builds(BlockRef, st.integers(1, 3), st.one_of(st.integers(0, 5), U32))
STORED = st.builds(
    Entry,
    slot=st.integers(0, NO_SLOT - 1),
    version=st.integers(0, 2**64 - 1),
    state=st.sampled_from(BlockState),
    step=U32,
    updates=U32,
    crcs=st.tuples(U32, U32),
)
BARE = st.builds(
    Entry, slot=st.just(NO_SLOT), version=U32, state=st.sampled_from(BlockState), crcs=st.just(())
)
ENTRIES = st.dictionaries(REFS, STORED | BARE)


@given(ENTRIES)
def test_a_table_answers_like_the_dict_it_was_made_of(entries: dict[BlockRef, Entry]) -> None:
    table = EntryTable.of(entries, NUM_ROLES)
    assert table == entries
    assert dict(table.items()) == entries
    assert list(table) == sorted(entries)
    assert list(table.values()) == [entries[ref] for ref in sorted(entries)]
    assert all(table[ref] == entry and ref in table for ref, entry in entries.items())


@given(ENTRIES, REFS)
def test_a_block_that_is_not_there_is_not_found(
    entries: dict[BlockRef, Entry], ref: BlockRef
) -> None:
    entries.pop(ref, None)
    table = EntryTable.of(entries, NUM_ROLES)
    assert ref not in table
    assert table.get(ref) is None
    with pytest.raises(KeyError):
        table[ref]


@given(ENTRIES, ENTRIES)
def test_changes_replace_and_add_and_leave_the_old_table(
    before: dict[BlockRef, Entry], changes: dict[BlockRef, Entry]
) -> None:
    table = EntryTable.of(before, NUM_ROLES)
    assert table.updated(changes) == before | changes
    assert table == before


@given(ENTRIES)
def test_slots_and_states_are_those_of_the_entries(entries: dict[BlockRef, Entry]) -> None:
    table = EntryTable.of(entries, NUM_ROLES)
    named = {r.level << 32 | e.slot for r, e in entries.items() if e.slot != NO_SLOT}
    assert table.slots().tolist() == sorted(named)
    for state in BlockState:
        expected = sorted(ref for ref, entry in entries.items() if entry.state is state)
        assert table.in_state(state) == expected


@given(ENTRIES)
def test_a_manifest_is_the_same_bytes_whatever_holds_its_entries(
    entries: dict[BlockRef, Entry],
) -> None:
    def manifest(held: EntryTable | dict[BlockRef, Entry]) -> Manifest:
        return Manifest(partition=1, number=2, revision=3, epoch=4, nonce="n", lsn=5, entries=held)

    data = encode_manifest(manifest(entries))
    assert encode_manifest(manifest(EntryTable.of(entries, NUM_ROLES))) == data
    decoded = decode_manifest(data, num_roles=NUM_ROLES, key="k")
    assert decoded == manifest(entries)
    assert encode_manifest(decoded) == data


def test_a_row_is_laid_out_as_documented() -> None:
    entry = Entry(
        slot=3, version=1 << 40, state=BlockState.WITHHELD, step=5, updates=1 << 33, crcs=(7, 8)
    )
    expected = struct.pack(
        "<BBHIII Q III I".replace(" ", ""), 2, 2, 0, 9, 3, 5, 1 << 40, 7, 8, 0, 2**32 - 1
    )
    assert EntryTable.of({BlockRef(2, 9): entry}).tobytes() == expected


def test_rows_of_another_writer_may_come_in_any_order() -> None:
    entries = {BlockRef(1, n): Entry(slot=n, version=1, crcs=(n, n)) for n in range(5)}
    rows = np.frombuffer(EntryTable.of(entries).tobytes(), ENTRY_DTYPE)
    assert EntryTable(rows[::-1], NUM_ROLES) == entries


def test_a_manifest_with_a_block_twice_or_an_unknown_state_is_refused() -> None:
    entries = {BlockRef(1, n): Entry(slot=n, version=1, crcs=(n, n)) for n in range(2)}
    rows = np.frombuffer(EntryTable.of(entries).tobytes(), ENTRY_DTYPE).copy()
    rows["state"][0] = 4
    with pytest.raises(ValueError, match="state"):
        EntryTable(rows, NUM_ROLES)
    rows["state"][0] = 1
    rows["cluster"] = 0
    with pytest.raises(ValueError, match="twice"):
        EntryTable(rows, NUM_ROLES)


def test_damage_that_a_writer_signed_is_named_as_corruption() -> None:
    entries = {BlockRef(1, n): Entry(slot=n, version=1, crcs=(n, n)) for n in range(2)}
    rows = np.frombuffer(EntryTable.of(entries).tobytes(), ENTRY_DTYPE).copy()
    table = EntryTable(rows, NUM_ROLES)
    rows["cluster"] = 0  # behind the table's back
    manifest = Manifest(partition=0, number=1, revision=0, epoch=0, nonce="n", lsn=0, entries=table)
    with pytest.raises(CorruptionError, match="twice"):
        decode_manifest(encode_manifest(manifest), num_roles=NUM_ROLES, key="k")
