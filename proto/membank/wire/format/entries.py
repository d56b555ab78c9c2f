"""The records of a manifest: what it says of each block.

A partition may have a hundred thousand blocks, and a manifest is written at every consolidation.
So the records stay what they are in the file, rows of 40 bytes, and become objects one by one as
they are looked up; the next manifest is a copy of the rows with a few of them replaced.
"""

from __future__ import annotations

import struct
from collections.abc import ItemsView, Iterator, Mapping, ValuesView
from dataclasses import dataclass
from itertools import starmap

import numpy as np
import numpy.typing as npt

from membank.wire.spec import BlockRef, BlockState

NO_SLOT = 0xFFFF_FFFF
"""Slot of an entry that has no stored content (as initialised, or deleted)."""

MAX_ROLES = 3
"""Arrays per block that an entry has room for: the weight and two of optimizer state."""

ENTRY_DTYPE = np.dtype(
    [
        ("level", "u1"),
        ("state", "u1"),
        ("reserved", "<u2"),
        ("cluster", "<u4"),
        ("slot", "<u4"),
        ("step", "<u4"),
        ("version", "<u8"),
        ("crc", "<u4", (MAX_ROLES,)),
        ("updates", "<u4"),
    ]
)
"""One record as stored."""

_ROW = struct.Struct("<BBHIIIQIIII")
"""The same for the struct module, which is ten times faster for single rows."""
_MAX_U32 = 0xFFFF_FFFF
_LEVEL_SHIFT = 32
_STATES = {int(state): state for state in BlockState}


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """What a manifest says of one block."""

    slot: int
    """Row in the zarr arrays of its level, one for all roles; `NO_SLOT` = no stored content."""
    version: int
    """Version of the block."""
    state: BlockState = BlockState.ACTIVE
    """State of the block."""
    step: int = 0
    """Gradient steps taken; the optimizer's bias correction counts by it."""
    updates: int = 0
    """Updates since the last administrative change, at most 2^32-1. A gradient whose base is
    further back was computed on other content and is refused."""
    crcs: tuple[int, ...] = ()
    """CRC-32C of each role's content, in the order of the spec's roles; empty without a slot."""


class EntryTable(Mapping[BlockRef, Entry]):
    """Entries by block, kept as the rows of a manifest; never changed.

    Parameters
    ----------
    rows
        (N,) of `ENTRY_DTYPE`, in any order; not copied, must not be changed.
    num_roles
        Number of arrays per block of the bank, at most `MAX_ROLES`.

    Raises
    ------
    ValueError
        If a block occurs twice, or a state is unknown.
    """

    __slots__ = ("_keys", "_num_roles", "_rows")

    def __init__(self, rows: npt.NDArray[np.void], num_roles: int) -> None:
        keys = _keys(rows)
        if not (keys[:-1] < keys[1:]).all():
            order = np.argsort(keys)
            rows, keys = rows[order], keys[order]
            if not (keys[:-1] < keys[1:]).all():
                raise ValueError("a block occurs twice")
        states = rows["state"]
        if len(rows) and not min(_STATES) <= states.min() <= states.max() <= max(_STATES):
            raise ValueError("a state is unknown")
        self._rows = rows
        self._keys = keys
        self._num_roles = num_roles

    @classmethod
    def of(cls, entries: Mapping[BlockRef, Entry], num_roles: int = MAX_ROLES) -> EntryTable:
        """Return `entries` as a table."""
        if isinstance(entries, EntryTable):
            return entries
        return cls(_packed(entries), num_roles)

    def updated(self, changes: Mapping[BlockRef, Entry]) -> EntryTable:
        """Return a table in which `changes` take the place of what there was, or are added."""
        if not changes:
            return self
        new = _packed(changes)
        keys = _keys(new)
        places = np.searchsorted(self._keys, keys)
        is_known = np.zeros(len(keys), np.bool_)
        inside = places < len(self._keys)
        is_known[inside] = self._keys[places[inside]] == keys[inside]
        rows = self._rows.copy()
        rows[places[is_known]] = new[is_known]
        if not is_known.all():
            rows = np.insert(rows, places[~is_known], new[~is_known])
        return EntryTable(rows, self._num_roles)

    def slots(self) -> npt.NDArray[np.uint64]:
        """Return the slots that are named, each as ``level << 32 | slot``, sorted, none twice."""
        rows = self._rows[self._rows["slot"] != NO_SLOT]
        return np.unique(_joined(rows["level"], rows["slot"]))

    def in_state(self, state: BlockState) -> list[BlockRef]:
        """Return the blocks that are in `state`."""
        rows = self._rows[self._rows["state"] == state]
        return list(map(BlockRef, rows["level"].tolist(), rows["cluster"].tolist()))

    def tobytes(self) -> bytes:
        """Return the rows as a manifest holds them, by level, then by cluster."""
        return self._rows.tobytes()

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[BlockRef]:
        return map(BlockRef, self._rows["level"].tolist(), self._rows["cluster"].tolist())

    def __contains__(self, ref: object) -> bool:
        return self._place(ref) is not None

    def __getitem__(self, ref: BlockRef) -> Entry:
        place = self._place(ref)
        if place is None:
            raise KeyError(ref)
        return self._entry(*_ROW.unpack(self._rows[place].tobytes()))

    def items(self) -> ItemsView[BlockRef, Entry]:
        # docstring inherited
        return _Items(self)

    def values(self) -> ValuesView[Entry]:
        # docstring inherited
        return _Values(self)

    def __eq__(self, other: object) -> bool:
        if (
            isinstance(other, EntryTable)
            and self._num_roles == other._num_roles
            and self.tobytes() == other.tobytes()
        ):
            return True
        return super().__eq__(other)

    __hash__ = None  # type: ignore[assignment]  # a mapping, like a dict

    def _place(self, ref: object) -> int | None:
        if not isinstance(ref, tuple) or len(ref) != 2:
            return None
        key = np.uint64(ref[0] << _LEVEL_SHIFT | ref[1])
        place = int(self._keys.searchsorted(key))
        return place if place < len(self._keys) and self._keys[place] == key else None

    def _entries(self) -> Iterator[Entry]:
        return starmap(self._entry, _ROW.iter_unpack(self._rows.tobytes()))

    def _entry(
        self, _level: int, state: int, _zero: int, _cluster: int, slot: int, step: int,
        version: int, *crcs_and_updates: int,
    ) -> Entry:  # fmt: skip
        return Entry(
            slot=slot,
            version=version,
            state=_STATES[state],
            step=step,
            updates=crcs_and_updates[MAX_ROLES],
            crcs=() if slot == NO_SLOT else crcs_and_updates[: self._num_roles],
        )


class _Items(ItemsView[BlockRef, Entry]):
    # The inherited ones would search for every single key.
    _mapping: EntryTable

    def __iter__(self) -> Iterator[tuple[BlockRef, Entry]]:
        return zip(self._mapping, self._mapping.values(), strict=True)


class _Values(ValuesView[Entry]):
    _mapping: EntryTable

    def __iter__(self) -> Iterator[Entry]:
        return self._mapping._entries()


def _keys(rows: npt.NDArray[np.void]) -> npt.NDArray[np.uint64]:
    """Return one number per row by which blocks are sorted."""
    return _joined(rows["level"], rows["cluster"])


def _joined(level: npt.NDArray[np.uint8], low: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint64]:
    high: npt.NDArray[np.uint64] = level.astype(np.uint64) << np.uint64(_LEVEL_SHIFT)
    high |= low
    return high


def _packed(entries: Mapping[BlockRef, Entry]) -> npt.NDArray[np.void]:
    """Return one row per entry, sorted."""
    data = b"".join(
        _ROW.pack(
            level, entry.state, 0, cluster, entry.slot, entry.step, entry.version,
            *(*entry.crcs, 0, 0, 0)[:MAX_ROLES], min(entry.updates, _MAX_U32),
        )
        for (level, cluster), entry in entries.items()
    )  # fmt: skip
    rows = np.frombuffer(data, ENTRY_DTYPE)
    return rows[np.argsort(_keys(rows))]
