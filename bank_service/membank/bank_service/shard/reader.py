"""Reading blocks of one moment while others change them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from membank.bank_service.shard.content import BlockRecord, Content, read_only
from membank.bank_service.shard.context import ShardContext
from membank.bank_service.shard.partition import Partition
from membank.wire.errors import CorruptionError, Reason, UnavailableError
from membank.wire.format import Entry
from membank.wire.spec import Array, BlockRef, Role

_ATTEMPTS = 16
_NOTHING = Content({}, 0)


@dataclass(frozen=True, slots=True)
class LoadedBlock:
    """A block as it was at one moment."""

    entry: Entry
    """Version and state."""
    arrays: Mapping[Role, Array]
    """Read-only arrays per role that was asked for; empty where content was not wanted."""
    weight_crc: int
    """CRC-32C of the weight; 0 where content was not wanted."""


@dataclass(slots=True)
class _Capture:
    partition: Partition
    record: BlockRecord
    arrays: dict[Role, Array]
    weight_crc: int


class BlockReader:
    """Reads blocks of all partitions of a shard.

    All blocks of a call are captured under one short lock, so they belong to one moment. What is
    not in memory is loaded afterwards: a slot never changes, and if it went away because its block
    moved on, the whole capture is repeated.

    Parameters
    ----------
    context
        What the shard's partitions share.
    partition_of
        Returns the partition that holds a block.
    """

    def __init__(
        self, context: ShardContext, partition_of: Callable[[BlockRef], Partition]
    ) -> None:
        self._context = context
        self._partition_of = partition_of

    def read(
        self,
        refs: Sequence[BlockRef],
        roles: Sequence[Role],
        *,
        wanted: Callable[[int, Entry], bool],
        revision: Callable[[], int],
    ) -> tuple[int, list[LoadedBlock]]:
        """Return blocks of one moment, and the revision then in force.

        Parameters
        ----------
        refs
            The blocks.
        roles
            Roles to return of each.
        wanted
            Given a position in `refs` and the entry there, says whether content is wanted.
        revision
            Returns the revision in force; called with the state lock held.

        Raises
        ------
        CorruptionError
            If a slot is missing or damaged.
        """
        for _ in range(_ATTEMPTS):
            number, captures = self._capture(refs, roles, revision)
            loaded = self._load(refs, captures, roles, wanted)
            if loaded is not None:
                return number, loaded
        raise UnavailableError(
            "the blocks changed faster than they could be loaded; retry",
            reason=Reason.OVERLOADED,
        )

    def _capture(
        self, refs: Sequence[BlockRef], roles: Sequence[Role], revision: Callable[[], int]
    ) -> tuple[int, list[_Capture]]:
        captures = []
        with self._context.state_lock:
            number = revision()
            for ref in refs:
                partition = self._partition_of(ref)
                record = partition.record(ref)
                self._context.residency.touch(ref)
                # The views are taken here because a removal may wipe the content right after.
                resident = record.content or _NOTHING
                arrays = {
                    role: read_only(resident.arrays[role])
                    for role in roles
                    if role in resident.arrays
                }
                captures.append(_Capture(partition, record, arrays, resident.weight_crc))
        return number, captures

    def _load(
        self,
        refs: Sequence[BlockRef],
        captures: Sequence[_Capture],
        roles: Sequence[Role],
        wanted: Callable[[int, Entry], bool],
    ) -> list[LoadedBlock] | None:
        """Return the captured blocks with their content, or None if one of them moved on."""
        is_wanted = [
            wanted(position, capture.record.entry) for position, capture in enumerate(captures)
        ]
        absent = [
            (ref, capture)
            for ref, capture, asked in zip(refs, captures, is_wanted, strict=True)
            if asked and len(capture.arrays) < len(roles)
        ]
        if not all(self._context.loaders.map(lambda pair: self._fill(*pair, roles), absent)):
            return None
        return [
            LoadedBlock(capture.record.entry, capture.arrays, capture.weight_crc)
            if asked
            else LoadedBlock(capture.record.entry, {}, 0)
            for capture, asked in zip(captures, is_wanted, strict=True)
        ]

    def _fill(self, ref: BlockRef, capture: _Capture, roles: Sequence[Role]) -> bool:
        """Load a captured block's content; False = it moved on."""
        try:
            content = capture.partition.store.load_content(ref, capture.record, roles)
        except CorruptionError:
            if self._moved_on(ref, capture):
                return False
            raise
        # Before it is kept: from then on a removal may wipe the content at any moment.
        capture.arrays = {role: read_only(content.arrays[role]) for role in roles}
        capture.weight_crc = content.weight_crc
        capture.partition.keep(ref, capture.record, content)
        return True

    def _moved_on(self, ref: BlockRef, capture: _Capture) -> bool:
        with self._context.state_lock:
            return capture.partition.record(ref).entry != capture.record.entry
