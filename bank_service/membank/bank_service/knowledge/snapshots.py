"""Snapshots: names that pin a revision, made and given up by transactions."""

from __future__ import annotations

from collections.abc import Callable

from membank.bank_service.knowledge.contract import AdminRequest
from membank.bank_service.knowledge.revisions import RevisionLog
from membank.bank_service.knowledge.transactions import Coordinator, Plan
from membank.bank_service.store import Bank
from membank.bank_service.store.bank import SNAPSHOT_OPERATION, UNPIN_OPERATION
from membank.wire.errors import AlreadyExistsError, InvalidArgumentError, NotFoundError, Reason
from membank.wire.format import RevisionRecord
from membank.wire.records import Snapshot
from membank.wire.spec import NAME_PATTERN


class SnapshotCatalog:
    """The snapshots of one bank.

    Parameters
    ----------
    bank
        The bank.
    coordinator
        Runs the transactions.
    log
        The bank's records.
    clock
        Seconds since 1970-01-01 UTC.
    """

    def __init__(
        self, bank: Bank, coordinator: Coordinator, log: RevisionLog, clock: Callable[[], float]
    ) -> None:
        self._bank = bank
        self._coordinator = coordinator
        self._log = log
        self._clock = clock

    def list(self) -> tuple[Snapshot, ...]:
        """Return the snapshots, oldest first."""
        in_force = self._log.committed
        found = (s for s in self._bank.snapshots() if self._bank.is_snapshot(s, in_force))
        return tuple(sorted(found, key=lambda snapshot: snapshot.revision))

    def get(self, name: str) -> Snapshot:
        """Return the snapshot called `name`, or raise `NotFoundError` (UNKNOWN_SNAPSHOT)."""
        return self._bank.pinned(name, self._log.committed)

    def create(self, request: AdminRequest, name: str) -> Snapshot:
        """Pin the present state under `name`."""
        if not NAME_PATTERN.fullmatch(name):
            raise InvalidArgumentError(
                f"snapshot name {name!r}: use lower case letters, digits, hyphens, at most 63"
            )
        create_time_s = self._clock()

        def plan() -> Plan:
            self._require_free(name)
            return Plan(
                detail={"snapshot": name, "create_time_s": create_time_s},
                all_partitions=True,
                # Pinned first: between a commit and its pin, a shard could drop what it names.
                before_commit=lambda revision: self._bank.create_snapshot(
                    Snapshot(name=name, revision=revision, create_time_s=create_time_s)
                ),
            )

        outcome = self._coordinator.run(request, SNAPSHOT_OPERATION, {"snapshot": name}, plan)
        if outcome.record is not None:
            create_time_s = _time_of(outcome.record)
        return Snapshot(name=name, revision=outcome.report.revision, create_time_s=create_time_s)

    def delete(self, request: AdminRequest, name: str) -> tuple[Snapshot, int]:
        """Give a snapshot up; returns it, and the revision after it."""

        def plan() -> Plan:
            snapshot = self.get(name)
            return Plan(
                # The coordinator removes the name once the commit is in force everywhere: a reader
                # that finds it gone then has a revision that says why.
                detail={
                    "snapshot": name,
                    "revision": snapshot.revision,
                    "create_time_s": snapshot.create_time_s,
                },
                # A commit that named no partition would leave what the snapshot pinned the
                # beginning of every revision to come.
                all_partitions=True,
            )

        outcome = self._coordinator.run(request, UNPIN_OPERATION, {"snapshot": name}, plan)
        record = outcome.record
        assert record is not None  # there is no dry run of it
        snapshot = Snapshot(
            name=name,
            revision=int(str(record.detail["revision"])),
            create_time_s=_time_of(record),
        )
        return snapshot, record.revision

    def leftovers(self) -> tuple[Snapshot, ...]:
        """Return the names that are no snapshots; only while no transaction is under way."""
        in_force = self._log.committed
        return tuple(s for s in self._bank.snapshots() if not self._bank.is_snapshot(s, in_force))

    def _require_free(self, name: str) -> None:
        try:
            found = self._bank.snapshot(name)
        except NotFoundError:
            return
        if not self._bank.is_snapshot(found, self._log.committed):
            # Left by a transaction that was never committed.
            self._bank.delete_snapshot(name)
            return
        raise AlreadyExistsError(
            f"bank {self._bank.spec.name} has a snapshot {name!r} already; choose another name",
            reason=Reason.SNAPSHOT_EXISTS,
            metadata={"snapshot": name},
        )


def _time_of(record: RevisionRecord) -> float:
    return float(str(record.detail["create_time_s"]))
