"""Opening a partition: who owns it, what counts, what the journal adds."""

from __future__ import annotations

import fcntl
import logging
import os
import uuid
from dataclasses import replace
from pathlib import Path

from membank.bank_service.shard.config import Durability
from membank.bank_service.shard.context import ShardContext
from membank.bank_service.shard.partition import Partition
from membank.bank_service.shard.partition_store import PartitionStore
from membank.bank_service.shard.retention import Retention
from membank.bank_service.shard.update_frame import decode_update
from membank.bank_service.store.journal import Journal, LocalJournal, Ownership
from membank.bank_service.store.local_objects import LocalObjects
from membank.bank_service.store.objects import storage_error
from membank.wire.errors import CorruptionError, FailedPreconditionError, Reason
from membank.wire.format import Manifest
from membank.wire.format.layout import manifest_prefix, partition_prefix

_LOG = logging.getLogger(__name__)
_LOCK_NAME = "lock"


class PartitionLock:
    """Keeps a second process of this machine from owning the same partition.

    The kernel releases it when the process dies, however that happens.

    Parameters
    ----------
    folder
        Directory of the partition's journal; made if missing.
    what
        The partition, for the error.
    """

    def __init__(self, folder: Path, what: str) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._handle = os.open(folder / _LOCK_NAME, os.O_CREAT | os.O_RDWR, 0o644)
        except OSError as err:
            raise storage_error(err, str(folder)) from err
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as err:
            os.close(self._handle)
            raise FailedPreconditionError(
                f"{what} is served by another process of this machine; stop that one first",
                reason=Reason.BANK_IN_USE,
                metadata={"folder": str(folder)},
            ) from err

    def release(self) -> None:
        """Let others own the partition."""
        os.close(self._handle)


def journal_folder(context: ShardContext, number: int) -> Path:
    """Return the directory of the journal of partition `number`.

    Raises
    ------
    FailedPreconditionError
        If the bank is not in a directory and no `journal_dir` is set.
    """
    bank, configured = context.bank, context.config.journal_dir
    if configured is not None:
        return Path(configured) / bank.spec.bank_id / f"{number:04d}"
    if isinstance(bank.objects, LocalObjects):
        return bank.objects.root / partition_prefix(number) / "journal"
    raise FailedPreconditionError(
        f"{bank.url} is not a directory, so journal_dir must say where the journals go",
        reason=Reason.BAD_CONFIG,
    )


def open_partition(context: ShardContext, number: int, folder: Path, revision: int) -> Partition:
    """Take partition `number` over, and return it with every acknowledged update applied.

    Parameters
    ----------
    context
        What the shard's partitions share.
    number
        The partition.
    folder
        Directory of its journal, locked by the caller.
    revision
        Newest committed revision of the bank.

    Raises
    ------
    CorruptionError
        If something that was acknowledged is missing or damaged; names the file.
    """
    config, spec = context.config, context.bank.spec
    journal = LocalJournal.open(
        folder,
        f"{spec.bank_id}/{number}",
        sync=config.durability is Durability.HOST,
        segment_bytes=config.segment_bytes,
        open_file=context.open_log_file,
    )
    retention = Retention(
        num_revisions=config.retained_revisions,
        ended_within_s=config.retained_s,
        clock=context.wall_clock,
    )
    store = PartitionStore(context.bank, number, retention=retention)
    loaded = store.load_manifests()
    before = loaded.current or _empty_manifest(number)
    _check_continuity(journal, before, folder, is_elsewhere=config.journal_dir is not None)
    epoch = max(_epoch_of(journal), before.epoch) + 1
    # The segment first: a journal whose epoch is older than the manifest's means that another
    # owner was there, and a crash between the two must not look like that.
    journal.begin(Ownership(epoch, uuid.uuid4().hex, before.nonce), before.lsn)
    manifest = store.publish(replace(before, epoch=epoch, prepared=False))
    partition = Partition(context, number, store, journal, manifest, revision)
    for frame in journal.replay(manifest.lsn):
        partition.apply_frame(decode_update(frame.payload, spec))
    if loaded.undecided is not None:
        partition.resume_hold(loaded.undecided)
    partition.finish_removal()
    partition.tidy()
    return partition


def _check_continuity(
    journal: Journal, manifest: Manifest, folder: Path, *, is_elsewhere: bool
) -> None:
    """Raise unless `journal` is the one that the newest owner of the partition wrote.

    `is_elsewhere` says that the journal is not part of the bank's directory, so that another
    machine may have had the bank meanwhile.
    """
    if _epoch_of(journal) < manifest.epoch and not is_elsewhere:
        raise CorruptionError(
            f"the journal in {folder} is missing, or its last segment is; restore it from a copy, "
            "or set journal_dir if it is kept elsewhere",
            reason=Reason.JOURNAL_CORRUPT,
            metadata={"file": str(folder)},
        )
    if _epoch_of(journal) < manifest.epoch:
        if journal.last_lsn > manifest.lsn:
            _LOG.warning(
                "discarding updates %d to %d in %s: another owner took the partition over without "
                "them",
                manifest.lsn + 1,
                journal.last_lsn,
                folder,
            )
        journal.discard()
    elif journal.base > manifest.lsn:
        raise CorruptionError(
            f"the journal in {folder} continues after update {journal.base}, but the newest "
            f"manifest in {manifest_prefix(manifest.partition)} (number {manifest.number}) ends at "
            f"{manifest.lsn}; restore the missing manifest or journal from a copy",
            reason=Reason.MANIFEST_CORRUPT,
            metadata={"file": str(folder), "key": manifest_prefix(manifest.partition)},
        )


def _epoch_of(journal: Journal) -> int:
    return 0 if journal.ownership is None else journal.ownership.epoch


def _empty_manifest(number: int) -> Manifest:
    return Manifest(partition=number, number=0, revision=0, epoch=0, nonce="", lsn=0, entries={})
