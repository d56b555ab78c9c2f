"""Opening a partition: who owns it, what counts, what the journal adds.

A new owner first takes the partition over: its manifest is published, so that the old owner can
publish nothing more. Then it lets the old owner's lease run out, and only then does it replay the
journal and serve.
"""

from __future__ import annotations

import logging
import math
import uuid
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from membank.bank_service.shard.context import ShardContext
from membank.bank_service.shard.journals import (
    PartitionJournals,
    journal_folder,
    open_journals,
)
from membank.bank_service.shard.lease import MARGIN
from membank.bank_service.shard.lock_file import LockFile
from membank.bank_service.shard.partition import Partition
from membank.bank_service.shard.partition_store import PartitionStore
from membank.bank_service.shard.retention import Retention
from membank.bank_service.shard.state import PartitionState
from membank.bank_service.shard.update_frame import decode_update
from membank.bank_service.store.journal import Ownership
from membank.bank_service.store.objects import directory_of
from membank.wire.format import Manifest

_LOG = logging.getLogger(__name__)

_OPENING_THREADS = 8


@dataclass(frozen=True, slots=True)
class Takeover:
    """A partition that nobody else can publish to any more, and that is not served yet."""

    number: int
    """The partition."""
    store: PartitionStore
    """Its slots and manifests."""
    journals: PartitionJournals
    """Where updates since the manifest are, and where new ones go."""
    manifest: Manifest
    """The manifest by which it was taken over."""
    undecided: Manifest | None
    """A prepared manifest whose revision nobody has decided."""
    wait_s: float
    """Seconds until the owner before has certainly stopped answering."""


def lock_partitions(
    context: ShardContext, numbers: Sequence[int], undo: ExitStack
) -> dict[int, tuple[Path, str]]:
    """Lock partitions; return the journal's folder and the lock's identity of each.

    Parameters
    ----------
    context
        What the shard's partitions share.
    numbers
        The partitions.
    undo
        Gets what releases the locks.

    Raises
    ------
    FailedPreconditionError
        If another process of this machine owns one of them (BANK_IN_USE).
    """
    locked = {}
    for number in numbers:
        folder = journal_folder(context, number)
        lock = LockFile(folder, f"partition {number} of bank {context.bank.spec.name}")
        undo.callback(lock.release)
        locked[number] = (folder, lock.identity)
    return locked


def open_partitions(
    context: ShardContext,
    locks: Mapping[int, tuple[Path, str]],
    revision: int,
    undo: ExitStack,
) -> dict[int, Partition]:
    """Take partitions over and recover them, with one wait for the leases of all.

    Parameters
    ----------
    context
        What the partitions share.
    locks
        What `lock_partitions` returned.
    revision
        Newest committed revision of the bank.
    undo
        Gets what releases the journals.
    """

    def begin(item: tuple[int, tuple[Path, str]]) -> Takeover:
        number, (folder, identity) = item
        return take_over(context, number, folder, identity, revision, undo)

    # Side by side: behind a network, an opening is a dozen round trips for each partition.
    with ThreadPoolExecutor(_OPENING_THREADS, thread_name_prefix="membank-open") as pool:
        takeovers = list(pool.map(begin, locks.items()))
        wait_s = max((takeover.wait_s for takeover in takeovers), default=0.0)
        if wait_s:
            _LOG.info("waiting %.1f s: an owner on another machine may still be answering", wait_s)
            context.sleep(wait_s)
        opened = list(pool.map(lambda takeover: recover(context, takeover, revision), takeovers))
    return {partition.number: partition for partition in opened}


def take_over(
    context: ShardContext, number: int, folder: Path, lock: str, revision: int, undo: ExitStack
) -> Takeover:
    """Become the owner of partition `number`.

    Parameters
    ----------
    context
        What the shard's partitions share.
    number
        The partition.
    folder
        Directory of its journal.
    lock
        Identity of the lock on `folder`, which the caller holds.
    revision
        Newest committed revision of the bank, as of before the manifests are read.
    undo
        Gets what releases the journals.

    Raises
    ------
    CorruptionError
        If something that was acknowledged is missing or damaged; names the file.
    """
    retention = Retention(
        num_revisions=context.config.retained_revisions,
        ended_within_s=context.config.retained_s,
        clock=context.wall_clock,
    )
    store = PartitionStore(context.bank, number, retention=retention)
    loaded = store.load_manifests()
    before = _as_of_owner(loaded.current or _empty_manifest(number), loaded.last_published)
    journals = open_journals(context, number, folder, before, loaded.bases)
    undo.callback(journals.close)
    ownership = Ownership(
        epoch=max(journals.epoch, before.epoch) + 1, owner=uuid.uuid4().hex, onto=before.nonce
    )
    # The journals first: one that does not know the manifest's owner means that another owner was
    # there, and a crash between the two must not look like that.
    journals.begin(ownership, before.lsn)
    lease_s = _lease_s(context)
    manifest = store.publish(
        replace(
            before,
            # So the next opening need not look at what was committed until now.
            revision=max(before.revision, revision),
            epoch=ownership.epoch,
            owner=ownership.owner,
            lock=lock,
            lease_s=0.0 if math.isinf(lease_s) else lease_s,
            durability=context.config.durability.value,
            prepared=False,
        )
    )
    # Whoever holds the lock that the last owner held knows that it is gone.
    is_gone = before.lock in {"", lock}
    return Takeover(
        number=number,
        store=store,
        journals=journals,
        manifest=manifest,
        undecided=loaded.undecided,
        wait_s=0.0 if is_gone else before.lease_s * MARGIN,
    )


def recover(context: ShardContext, takeover: Takeover, revision: int) -> Partition:
    """Return a partition that was taken over, with every acknowledged update applied.

    Parameters
    ----------
    context
        What the shard's partitions share.
    takeover
        The partition; `wait_s` has passed.
    revision
        Newest committed revision of the bank.

    Raises
    ------
    CorruptionError
        If the journal cannot be replayed.
    UnavailableError
        If somebody else has taken the partition over meanwhile (FENCED).
    """
    store, journals, manifest = takeover.store, takeover.journals, takeover.manifest
    journal = journals.journal
    state = PartitionState(
        context, takeover.number, store, journal, manifest, revision, _lease_s(context)
    )
    state.lease.renew()
    partition = Partition(state)
    source = journals.inherited or journal
    for frame in source.replay(manifest.lsn):
        partition.replay(decode_update(frame, context.bank.spec))
    if journals.inherited is not None:
        # Into slots at once: from here on, `journal` alone holds what came since the manifest.
        partition.settle_inheritance(journals.inherited)
    if takeover.undecided is not None:
        partition.resume_hold(takeover.undecided)
    partition.finish_removal()
    partition.tidy()
    return partition


def _as_of_owner(current: Manifest, last: Manifest | None) -> Manifest:
    """Return the manifest in force, with what `last` says of the last owner.

    A transaction may put in force what was prepared by the owner before the last one.
    """
    if last is None:
        return current
    return replace(
        current,
        epoch=last.epoch,
        owner=last.owner,
        lock=last.lock,
        lease_s=last.lease_s,
        durability=last.durability,
        nonce=last.nonce,
    )


def _lease_s(context: ShardContext) -> float:
    """Return how long an owner may answer without asking; infinity = a lock proves that it may."""
    config = context.config
    is_locked = directory_of(context.bank.objects) is not None and config.journal_dir is None
    return math.inf if is_locked or config.lease_s == 0 else config.lease_s


def _empty_manifest(number: int) -> Manifest:
    return Manifest(partition=number, number=0, revision=0, epoch=0, nonce="", lsn=0, entries={})
