"""One look at a bank: what the checks share, read when it is first asked for."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

from membank.bank_service.fsck.chain import Chain, survey_chain
from membank.bank_service.fsck.manifests import ManifestIndex, survey_manifests
from membank.bank_service.fsck.packs import Packs, survey_packs
from membank.bank_service.fsck.retention import Needed, needed_manifests
from membank.bank_service.fsck.segments import (
    JournalScan,
    check_local_chain,
    check_stored_chain,
    local_order,
    scan_object,
    stored_order,
    survey_journal,
)
from membank.bank_service.fsck.snapshots import Snapshots, survey_snapshots
from membank.bank_service.store.journal.spares import SPARE_SUFFIX
from membank.bank_service.store.local_objects import LocalObjects
from membank.bank_service.store.objects import ObjectStore, directory_of
from membank.bank_service.store.sealed_objects import Halves, halves_of
from membank.wire.format.layout import log_prefix, partition_prefix
from membank.wire.spec import BankSpec


@dataclass(slots=True)
class Tally:
    """What was looked at so far."""

    num_manifests: int = 0
    num_slots: int = 0
    num_bytes: int = 0
    num_frames: int = 0
    num_replayed: int = 0


class BankView:
    """A bank as it is at one moment, or nearly so: a service may be changing it.

    Parameters
    ----------
    objects
        The bank's storage.
    spec
        Its spec; None = it cannot be read.
    deep
        True to read the content of slots, and to compute journalled updates again.
    journal_dir
        Directory of the journals, where a service keeps them outside of the bank.
    with_journals
        Partitions that have files of a local journal among their objects.
    suspects
        Keys of slots to read; None = all.
    before
        An earlier look, whose records are not read again.
    looked_at
        Called with the number of objects that have been looked at since.
    """

    def __init__(
        self,
        objects: ObjectStore,
        spec: BankSpec | None,
        *,
        deep: bool,
        journal_dir: Path | None = None,
        with_journals: Collection[int] = (),
        suspects: Collection[str] | None = None,
        before: BankView | None = None,
        looked_at: Callable[[int], None] = lambda count: None,
    ) -> None:
        self.objects = objects
        self.spec = spec
        self.deep = deep
        self.journal_dir = journal_dir
        self.with_journals = with_journals
        self.suspects = suspects
        self.looked_at = looked_at
        self.tally = Tally()
        self._known = before.chain.links if before is not None else {}

    def again(self, suspects: Collection[str] | None) -> BankView:
        """Return a fresh look at the same bank, for a second opinion on `suspects`."""
        return BankView(
            self.objects,
            self.spec,
            deep=self.deep,
            journal_dir=self.journal_dir,
            with_journals=self.with_journals,
            suspects=suspects,
            before=self,
        )

    @cached_property
    def chain(self) -> Chain:
        """The revision records."""
        chain = survey_chain(self.objects, self._known)
        self.looked_at(len(chain.links))
        return chain

    @cached_property
    def snapshots(self) -> Snapshots:
        """The snapshots."""
        return survey_snapshots(self.objects, self.chain)

    @cached_property
    def packs(self) -> Packs:
        """The packs in the bank's own store."""
        return survey_packs(self.objects, deep=self.deep)


class PartitionView:
    """One partition of a bank.

    Parameters
    ----------
    bank
        The look at the bank.
    spec
        The bank's spec.
    number
        The partition.
    """

    def __init__(self, bank: BankView, spec: BankSpec, number: int) -> None:
        self.bank = bank
        self.spec = spec
        self.number = number

    @cached_property
    def manifests(self) -> ManifestIndex:
        """The manifests."""
        # An owner trims its journal after it published what was in it: a journal that is read
        # first cannot seem to begin too late.
        _ = self.journals
        index = survey_manifests(self.bank.objects, self.spec, self.bank.chain, self.number)
        self.bank.tally.num_manifests += len(index.summaries)
        self.bank.looked_at(len(index.summaries))
        return index

    @cached_property
    def journals(self) -> list[JournalScan]:
        """The journals: on a local disk, and in the bank's own storage."""
        found = [self._local_journal(), self._stored_journal()]
        self.bank.tally.num_frames += sum(journal.num_frames for journal in found)
        return found

    @property
    def journal_place(self) -> str:
        """Where a journal on a local disk is, or would be; empty = nobody said."""
        if self.bank.journal_dir is not None:
            folder = self.bank.journal_dir.absolute() / self.spec.bank_id / f"{self.number:04d}"
            return str(folder)
        is_local = directory_of(self.bank.objects) is not None
        is_beside = is_local or self.number in self.bank.with_journals
        return f"{partition_prefix(self.number)}/journal" if is_beside else ""

    def _local_files(self) -> tuple[JournalScan, list[str]]:
        """Return where the local journal is, with nothing read yet, and what lies there."""
        place = self.journal_place
        if self.bank.journal_dir is not None:
            found = JournalScan(LocalObjects(place), place)
            return found, found.objects.list("")
        found = JournalScan(self.bank.objects)
        return found, found.objects.list(place) if place else []

    def _local_journal(self) -> JournalScan:
        found, keys = self._local_files()
        check = partial(check_local_chain, self._identity)
        return survey_journal(found, local_order(keys), self.spec, check)

    def spares(self) -> Iterator[JournalScan]:
        """Yield what is found in each spare segment; nothing needs it, so it need not be whole."""
        journal, keys = self._local_files()
        for key in keys:
            if key.endswith(SPARE_SUFFIX):
                found = JournalScan(journal.objects, journal.place)
                yield survey_journal(found, [key], self.spec, lambda scans: 0)

    def _stored_journal(self) -> JournalScan:
        objects = self.bank.objects
        keys = stored_order(objects.list(log_prefix(self.number)), self.number)
        found = JournalScan(objects, scan=scan_object)
        check = partial(check_stored_chain, self._identity)
        return survey_journal(found, keys, self.spec, check)

    @property
    def _identity(self) -> str:
        return f"{self.spec.bank_id}/{self.number}"

    @cached_property
    def needed(self) -> Needed:
        """The manifests that something needs."""
        return needed_manifests(self.bank.chain, self.bank.snapshots.revisions, self.manifests)

    @cached_property
    def keys(self) -> frozenset[str]:
        """Keys of the partition's objects."""
        # A slot is written before a manifest names it: listed after the manifests, it is there.
        _ = self.manifests
        return frozenset(self.bank.objects.list(partition_prefix(self.number))) - self.halves.all

    @cached_property
    def halves(self) -> Halves:
        """What is stored of the partition without its key, or the other way round."""
        _ = self.manifests
        return halves_of(self.bank.objects, partition_prefix(self.number))
