"""Which journal a partition writes, and which one holds what its last owner acknowledged."""

from __future__ import annotations

import logging
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from membank.bank_service.shard.config import Durability
from membank.bank_service.shard.context import ShardContext
from membank.bank_service.store.journal import (
    Journal,
    LocalJournal,
    ObjectJournal,
    Ownership,
    ShippedJournal,
)
from membank.bank_service.store.objects import directory_of
from membank.wire.errors import CorruptionError, FailedPreconditionError, Reason
from membank.wire.format import Manifest
from membank.wire.format.layout import log_prefix, manifest_prefix, partition_prefix

_LOG = logging.getLogger(__name__)


def journal_folder(context: ShardContext, number: int) -> Path:
    """Return the directory of the journal and the lock of partition `number`.

    Raises
    ------
    FailedPreconditionError
        If the bank is not in a directory and no `journal_dir` is set, or it is sealed and its
        journal would not be.
    """
    bank, configured = context.bank, context.config.journal_dir
    if bank.is_sealed and context.config.durability is not Durability.STORE:
        # Gradients tell what they were computed on, and no key would ever be destroyed for them.
        raise FailedPreconditionError(
            f"the bank at {bank.url} is sealed, and a journal on a local disk would hold its updates "
            f"in the clear; set durability to {Durability.STORE.value}",
            reason=Reason.BAD_CONFIG,
            metadata={"field": "durability", "value": context.config.durability.value},
        )
    if configured is not None:
        return Path(configured) / bank.spec.bank_id / f"{number:04d}"
    if (directory := directory_of(bank.objects)) is not None:
        return directory / partition_prefix(number) / "journal"
    raise FailedPreconditionError(
        f"{bank.url} is not a directory, so journal_dir must say where the journals go",
        reason=Reason.BAD_CONFIG,
    )


@dataclass(frozen=True, slots=True)
class PartitionJournals:
    """The journals of a partition.

    There are two where the settings have changed since the last owner: a bank that was served
    with journals on a disk may be opened with journals in the bank's storage, and the other way
    round. Nothing that was acknowledged may be overlooked for that.
    """

    journal: Journal
    """Where the new owner writes."""
    inherited: Journal | None = None
    """Where the updates since the manifest are, if not in `journal`."""
    unused: tuple[Journal, ...] = ()
    """Others, which hold nothing that is needed."""

    def begin(self, ownership: Ownership, after_lsn: int) -> None:
        """Let the new owner begin; from then on the old one appends nothing to any of them."""
        for journal in self.unused:
            # What they hold goes: it may be of blocks that are deleted one day.
            journal.begin(ownership, after_lsn)
            journal.close()
        if self.inherited is not None:
            self.inherited.begin(ownership, after_lsn)
            # A journal that begins after the manifest says that there is another one in between:
            # so the inherited one is found again if this owner dies before it is in slots.
            after_lsn = max(after_lsn, self.inherited.last_lsn)
        self.journal.begin(ownership, after_lsn)

    def close(self) -> None:
        """Release what is held, after an opening that failed."""
        for journal in (self.journal, self.inherited, *self.unused):
            if journal is not None:
                journal.close()

    @property
    def epoch(self) -> int:
        """Greatest epoch that a journal knows; 0 = none."""
        journals = [self.journal, *self.unused, *([self.inherited] if self.inherited else [])]
        found = [journal.ownership for journal in journals]
        return max((ownership.epoch for ownership in found if ownership is not None), default=0)


def open_journals(
    context: ShardContext,
    number: int,
    folder: Path,
    manifest: Manifest,
    bases: Collection[str],
) -> PartitionJournals:
    """Open the journals of partition `number` and find the one that continues `manifest`.

    Parameters
    ----------
    context
        What the shard's partitions share.
    number
        The partition.
    folder
        Directory of the journal, locked by the caller.
    manifest
        The manifest in force, with what the last owner says of itself.
    bases
        Nonces of the manifests that an owner may have started from that published none.

    Raises
    ------
    CorruptionError
        If a journal is damaged, or the one that must be there is missing.
    """
    config, bank = context.config, context.bank
    identity = f"{bank.spec.bank_id}/{number}"
    local = LocalJournal.open(
        folder,
        identity,
        sync=config.durability is Durability.HOST,
        segment_bytes=config.segment_bytes,
        spare_bytes=config.spare_bytes,
        open_file=context.open_log_file,
    )
    stored = ObjectJournal.open(bank.objects, number, identity)

    def is_current(ownership: Ownership) -> bool:
        return any(ownership.is_current(manifest.epoch, manifest.owner, nonce) for nonce in bases)

    journal: Journal
    others: list[Journal]
    if config.durability is Durability.STORE:
        journal, others = stored, [local]
    elif config.ship_every_s:
        journal, others = ShippedJournal(local, stored, is_current), []
    else:
        journal, others = local, [stored]
    found: list[Journal] = [j for j in (journal, *others) if j.ownership is not None]
    current = [j for j in found if j.ownership is not None and is_current(j.ownership)]
    if not current:
        _require_replaceable(found, manifest, folder, is_elsewhere=config.journal_dir is not None)
        _tell_missing(manifest, folder)
    joined = [j for j in current if j.base <= manifest.lsn]
    if current and not joined:
        raise _gap(current[0], manifest, folder)
    # The one that reaches furthest has everything; a new one may have been begun beside it.
    source = max(joined, key=lambda j: (j.last_lsn, j is journal), default=None)
    unused = [j for j in found if j is not source]
    for other in unused:
        _tell_lost(other, manifest, folder, is_lost=other not in current)
        other.discard()
    return PartitionJournals(
        journal,
        inherited=source if source is not journal else None,
        unused=tuple(j for j in unused if j is not journal),
    )


def _require_replaceable(
    stale: list[Journal], manifest: Manifest, folder: Path, *, is_elsewhere: bool
) -> None:
    """Raise unless a partition may go on without the journal of its last owner.

    It may if the journal was on another machine: what that one acknowledged since its last
    consolidation (or shipping) is lost with it, as its durability says.
    """
    if manifest.number == 0 and stale:
        prefix = manifest_prefix(manifest.partition)
        raise CorruptionError(
            f"the journal in {folder} continues a manifest, but {prefix} holds none; restore the "
            "manifests from a copy",
            reason=Reason.MANIFEST_CORRUPT,
            metadata={"file": str(folder), "key": prefix},
        )
    if manifest.durability == Durability.STORE:
        prefix = log_prefix(manifest.partition)
        raise CorruptionError(
            f"the journal in {prefix} is missing, in which the owner before kept its updates; "
            "restore it from a copy",
            reason=Reason.JOURNAL_CORRUPT,
            metadata={"key": prefix},
        )
    if manifest.owner and not is_elsewhere:
        raise CorruptionError(
            f"the journal in {folder} is missing, or its last segment is; restore it from a copy, "
            "or set journal_dir if it is kept elsewhere",
            reason=Reason.JOURNAL_CORRUPT,
            metadata={"file": str(folder)},
        )


def _tell_missing(manifest: Manifest, folder: Path) -> None:
    # An owner that let go has left nothing in its journal.
    if manifest.owner and manifest.lock:
        _LOG.warning(
            "partition %d goes on without the journal of its last owner, which is not in %s: what "
            "that one acknowledged after update %d, if anything, is lost",
            manifest.partition,
            folder,
            manifest.lsn,
        )


def _tell_lost(journal: Journal, manifest: Manifest, folder: Path, *, is_lost: bool) -> None:
    if is_lost and journal.last_lsn > manifest.lsn:
        _LOG.warning(
            "discarding updates %d to %d in %s: another owner took the partition over without them",
            manifest.lsn + 1,
            journal.last_lsn,
            folder,
        )


def _gap(journal: Journal, manifest: Manifest, folder: Path) -> CorruptionError:
    prefix = manifest_prefix(manifest.partition)
    return CorruptionError(
        f"the journal in {folder} continues after update {journal.base}, but the newest "
        f"manifest in {prefix} (number {manifest.number}) ends at {manifest.lsn}; restore the "
        "missing manifest or journal from a copy",
        reason=Reason.MANIFEST_CORRUPT,
        metadata={"file": str(folder), "key": prefix},
    )
