"""Reading blocks as a snapshot pins them, while the bank goes on changing.

Slots never change and a snapshot keeps those that it needs, so its readers hold nothing back. What
they are told of a block follows from two things: the manifest that the snapshot pins, and whether
the block may be used at present. Content comes from slots alone, never from what is resident of the
present state.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from threading import Lock

from membank.bank_service.shard.content import INITIAL_ENTRY, BlockRecord, read_only
from membank.bank_service.shard.context import ShardContext
from membank.bank_service.shard.partition import Partition
from membank.bank_service.shard.reader import LoadedBlock
from membank.wire.errors import CorruptionError, NotFoundError, Reason, UnavailableError
from membank.wire.format import NO_SLOT, Entry
from membank.wire.format.entries import EntryTable
from membank.wire.records import Snapshot
from membank.wire.spec import BlockRef, BlockState, Role

_MAX_SNAPSHOTS = 4
"""Snapshots whose manifests are kept in memory; those that were read last."""
_ATTEMPTS = 16


@dataclass(frozen=True, slots=True)
class _Pinned:
    """A snapshot as it was found at one revision of the shard."""

    snapshot: Snapshot
    revision: int
    """Revision of the shard. While it is in force, the snapshot exists and nothing more of it has
    been deleted."""
    entries: dict[int, Mapping[BlockRef, Entry]] = field(default_factory=dict)
    """What it pins, by partition, as far as somebody asked."""
    erased: dict[int, frozenset[BlockRef]] = field(default_factory=dict)
    """Blocks of those partitions that were deleted when their entries were read."""


class PinnedReader:
    """Reads blocks of all partitions of a shard as snapshots pin them.

    Parameters
    ----------
    context
        What the shard's partitions share.
    partition_of
        Returns the partition that holds a block.
    revision
        Returns the newest revision that the shard has installed.
    """

    # `_lock` guards `_known` alone. What it holds is only ever added to, by equal values.

    def __init__(
        self,
        context: ShardContext,
        partition_of: Callable[[BlockRef], Partition],
        revision: Callable[[], int],
    ) -> None:
        self._context = context
        self._bank = context.bank
        self._partition_of = partition_of
        self._revision = revision
        self._lock = Lock()
        self._known: OrderedDict[str, _Pinned] = OrderedDict()

    def read(
        self, name: str, refs: Sequence[BlockRef], *, wanted: Callable[[int, Entry], bool]
    ) -> tuple[int, list[LoadedBlock]]:
        """Return the weights of blocks as snapshot `name` pins them, and its revision.

        Parameters
        ----------
        name
            The snapshot.
        refs
            The blocks.
        wanted
            Given a position in `refs` and the entry there, says whether content is wanted.

        Raises
        ------
        NotFoundError
            If there is no such snapshot (UNKNOWN_SNAPSHOT).
        CorruptionError
            If a manifest or slot that the snapshot needs is missing or damaged.
        """
        for _ in range(_ATTEMPTS):
            pinned = self._resolve(name)
            try:
                entries = self._capture(pinned, refs)
                if entries is not None:
                    return pinned.snapshot.revision, self._load(refs, entries, wanted)
            except CorruptionError:
                # A removal, or the end of the snapshot, destroys slots after it has made a revision
                # of its own; where none came, something is damaged.
                if self._revision() == pinned.revision:
                    raise
        raise UnavailableError(
            "the bank changed faster than the snapshot could be read; retry",
            reason=Reason.OVERLOADED,
        )

    def _resolve(self, name: str) -> _Pinned:
        revision = self._revision()
        with self._lock:
            known = self._known.get(name)
        if known is not None and known.revision == revision:
            return known
        record = self._bank.require_record(revision)
        snapshot = self._bank.pinned(name, record)
        pinned = _Pinned(snapshot, revision)
        is_same = known is not None and known.snapshot == snapshot
        if known is not None and is_same and record.removal_revision <= known.revision:
            # Reading manifests anew for every revision would make readers pay for every writer.
            pinned = _Pinned(snapshot, revision, known.entries, known.erased)
        with self._lock:
            self._known[name] = pinned
            self._known.move_to_end(name)
            while len(self._known) > _MAX_SNAPSHOTS:
                self._known.popitem(last=False)
        return pinned

    def _capture(self, pinned: _Pinned, refs: Sequence[BlockRef]) -> list[Entry] | None:
        """Return what is told of blocks at one moment; None = a revision came between."""
        partitions = [self._partition_of(ref) for ref in refs]
        for partition in {partition.number: partition for partition in partitions}.values():
            if partition.number not in pinned.erased:
                self._read_entries(pinned, partition)
        found = []
        with self._context.state_lock:
            if self._revision() != pinned.revision:
                return None
            for ref, partition in zip(refs, partitions, strict=True):
                now = partition.record(ref).entry
                then = pinned.entries[partition.number].get(ref, INITIAL_ENTRY)
                if now.state is not BlockState.ACTIVE:
                    found.append(now)
                elif ref in pinned.erased[partition.number]:
                    found.append(_erased(then))
                else:
                    found.append(then)
        return found

    def _read_entries(self, pinned: _Pinned, partition: Partition) -> None:
        revision = pinned.snapshot.revision
        number = self._bank.named_manifest(revision, partition.number)
        entries: Mapping[BlockRef, Entry] = {}
        if number:
            try:
                entries = self._bank.read_manifest(partition.number, number).entries
            except NotFoundError as err:
                raise CorruptionError(
                    f"manifest {number} of partition {partition.number} is missing, which snapshot "
                    f"{pinned.snapshot.name} needs; restore the file from a copy",
                    reason=Reason.MANIFEST_CORRUPT,
                    metadata={"partition": str(partition.number), "manifest": str(number)},
                ) from err
        # A delete that is in force may not have reached this manifest yet, and one that comes later
        # makes a revision. So a block stays deleted for readers of older snapshots, also where it
        # is created anew.
        with self._context.state_lock:
            present = EntryTable.of(partition.manifest.entries)
        pinned.entries[partition.number] = entries
        pinned.erased[partition.number] = frozenset(present.in_state(BlockState.DELETED))

    def _load(
        self,
        refs: Sequence[BlockRef],
        entries: Sequence[Entry],
        wanted: Callable[[int, Entry], bool],
    ) -> list[LoadedBlock]:
        def load(position: int) -> None:
            ref, entry = refs[position], entries[position]
            store = self._partition_of(ref).store
            content = store.load_content(ref, BlockRecord(entry), (Role.WEIGHT,))
            arrays = {Role.WEIGHT: read_only(content.weight)}
            loaded[position] = LoadedBlock(entry, arrays, content.weight_crc)

        loaded = [LoadedBlock(entry, {}, 0) for entry in entries]
        positions = [place for place, entry in enumerate(entries) if wanted(place, entry)]
        self._context.loaders.map(load, positions)
        return loaded


def _erased(entry: Entry) -> Entry:
    return Entry(slot=NO_SLOT, version=entry.version, state=BlockState.DELETED)
