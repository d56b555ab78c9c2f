"""Packs in the bank's own store: kept by name, and destroyed with the topics that they hold.

A pack is two objects: ``packs/NAME.json`` says what ``packs/NAME.pack`` holds. The first is created
before the second and removed after it, so there is never a pack that a deletion would overlook.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence

from membank.bank_service.store import Bank
from membank.wire.errors import (
    AlreadyExistsError,
    CorruptionError,
    InvalidArgumentError,
    NotFoundError,
    Reason,
)
from membank.wire.format import RevisionRecord
from membank.wire.format.layout import PACKS, pack_key, pack_name, pack_record_key
from membank.wire.format.stored_pack import PackRecord, decode_pack_record, encode_pack_record
from membank.wire.records import StoredPack
from membank.wire.spec import NAME_PATTERN, BlockRef, BlockState

_LOG = logging.getLogger(__name__)

PACK_OPERATION = "delete-pack"
"""Operation of a record that ends a stored pack by name."""
STORED_PACK = "stored_pack"
"""Name under which the detail of a record has that of a stored pack."""


class StoredPacks:
    """The packs in the store of one bank. Written to only while no transaction is under way.

    Parameters
    ----------
    bank
        The bank.
    """

    def __init__(self, bank: Bank) -> None:
        self._bank = bank
        self._objects = bank.objects

    def list(self) -> tuple[StoredPack, ...]:
        """Return the packs, by name; one whose description is damaged is left out, and logged."""
        found = []
        for name in self._names():
            try:
                record = self._find(name)
            except CorruptionError as err:
                # It must not keep the others from being used; `membank fsck` reports it.
                _LOG.warning("pack %s is left out: %s", name, err)
                continue
            if record is not None and self._is_whole(name):
                found.append(record.pack)
        return tuple(found)

    def require(self, name: str) -> PackRecord:
        """Return what is said of the pack called `name`.

        Raises
        ------
        NotFoundError
            If there is none, or its export was cut off (UNKNOWN_PACK).
        CorruptionError
            If what is said of it is damaged.
        """
        record = self._find(name) if NAME_PATTERN.fullmatch(name) else None
        if record is None or not self._is_whole(name):
            raise self._unknown(name)
        return record

    def read(self, name: str) -> bytes:
        """Return the pack called `name`; errors as for `require`."""
        self.require(name)
        try:
            return self._objects.get(pack_key(name))
        except NotFoundError as err:
            raise self._unknown(name) from err

    def write(self, record: PackRecord, data: Sequence[bytes | memoryview]) -> None:
        """Keep a pack; no effect where the very same one is kept already.

        Parameters
        ----------
        record
            What is said of it.
        data
            The pack, in pieces.

        Raises
        ------
        InvalidArgumentError
            If its name is none.
        AlreadyExistsError
            If there is another pack of the name (PACK_EXISTS).
        """
        name = record.pack.name
        if not NAME_PATTERN.fullmatch(name):
            raise InvalidArgumentError(
                f"pack name {name!r}: use lower case letters, digits, hyphens, at most 63"
            )
        if pack_record_key(name) in self._objects.list(PACKS):
            held = self._find(name)
            if self._is_whole(name):
                if held is not None and held.sha256 == record.sha256:
                    return  # the export is a repetition: the answer to the first was lost
                raise AlreadyExistsError(
                    f"bank {self._bank.spec.name} has a pack {name!r} already; choose another name, "
                    "or delete it",
                    reason=Reason.PACK_EXISTS,
                    metadata={"pack": name},
                )
        # Replaces what an export that was cut off has left.
        self._objects.put(pack_record_key(name), encode_pack_record(record), durable=True)
        self._objects.put(pack_key(name), data, durable=True)

    def doomed(self, name: str) -> StoredPack:
        """Return the pack called `name`, or what is left of it, before it is destroyed.

        Raises
        ------
        NotFoundError
            If there is nothing of it (UNKNOWN_PACK).
        """
        if not NAME_PATTERN.fullmatch(name) or name not in self._names():
            raise self._unknown(name)
        try:
            record = self._find(name)
        except CorruptionError:
            record = None
        # Of what was cut off or damaged, only the name is known.
        nothing = StoredPack(
            name=name, topic=BlockRef(1, 0), revision=0, num_bytes=0, create_time_s=0.0
        )
        return nothing if record is None else record.pack

    def destroy_ended(self, record: RevisionRecord) -> None:
        """Destroy the packs that the transaction of `record` ends; may be repeated.

        These are the one that it names, where that was asked for, and every one that tells of a block
        which it deleted. A pack of which nobody can tell what it holds goes as well: knowledge that is
        to be gone must not survive in a damaged file.
        """
        for name in self.holding(deleted_by(record), record.revision):
            self._destroy(name)
        if record.operation == PACK_OPERATION:
            name = str(record.detail[STORED_PACK])
            if name in self._names() and self._is_older(name, record.revision):
                self._destroy(name)

    def holding(self, deleted: frozenset[BlockRef], revision: int) -> tuple[str, ...]:
        """Return the names of the packs that go where `revision` deletes these blocks."""
        if not deleted:
            return ()
        return tuple(
            name for name in self._names() if self._is_older(name, revision, among=deleted)
        )

    def _is_older(
        self, name: str, revision: int, *, among: frozenset[BlockRef] | None = None
    ) -> bool:
        """Say whether a pack is of before `revision`, and tells of a block `among` these (None = any).

        One of a later revision holds what was created anew. Of what cannot be read, it is taken for so.
        """
        try:
            held = self._find(name)
        except CorruptionError as err:
            _LOG.warning("pack %s goes with revision %d: %s", name, revision, err)
            return True
        if held is None:
            return True
        return held.pack.revision < revision and (among is None or not among.isdisjoint(held.refs))

    def _names(self) -> Sequence[str]:
        names = {pack_name(key) for key in self._objects.list(PACKS)}
        return sorted(name for name in names if name is not None)

    def _find(self, name: str) -> PackRecord | None:
        key = pack_record_key(name)
        try:
            return decode_pack_record(self._objects.get(key), key=f"{self._bank.url}/{key}")
        except NotFoundError:
            return None

    def _is_whole(self, name: str) -> bool:
        try:
            self._objects.get_range(pack_key(name), 0, 1)
        except NotFoundError:
            return False
        return True

    def _destroy(self, name: str) -> None:
        self._objects.delete(pack_key(name))
        self._objects.delete(pack_record_key(name))

    def _unknown(self, name: str) -> NotFoundError:
        return NotFoundError(
            f"bank {self._bank.spec.name} has no pack {name!r}; `membank packs` lists them",
            reason=Reason.UNKNOWN_PACK,
            metadata={"pack": name},
        )


def detail_of(pack: StoredPack) -> dict[str, object]:
    """Return what a record says of a pack; `pack_of` reads it."""
    return {
        STORED_PACK: pack.name,
        "topic": str(pack.topic),
        "from_revision": pack.revision,
        "num_bytes": pack.num_bytes,
        "create_time_s": pack.create_time_s,
    }


def pack_of(record: RevisionRecord) -> StoredPack:
    """Return the pack that `record` ended by name."""
    detail = record.detail
    return StoredPack(
        name=str(detail[STORED_PACK]),
        topic=BlockRef.parse(str(detail["topic"])),
        revision=int(str(detail["from_revision"])),
        num_bytes=int(str(detail["num_bytes"])),
        create_time_s=float(str(detail["create_time_s"])),
    )


def deleted_by(record: RevisionRecord) -> frozenset[BlockRef]:
    """Return the blocks that the transaction of `record` deleted."""
    changes = record.detail.get("changes")
    return frozenset(_deleted(changes if isinstance(changes, list) else []))


def _deleted(changes: Sequence[Sequence[int]]) -> Iterator[BlockRef]:
    for level, cluster, _, _, _, state_after, _ in changes:
        if state_after == BlockState.DELETED:
            yield BlockRef(level, cluster)
