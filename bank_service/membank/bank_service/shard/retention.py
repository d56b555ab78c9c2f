"""Which manifests of a partition are needed (docs/format.md, "What is retained").

What is needed follows from what is stored: from the manifests, the promise that the one in force
makes (`Manifest.history_from`), and the snapshots. Settings only say how far the next manifest may
raise that promise, so another setting, another owner or a lost process never makes a revision look
kept that is not.
"""

from __future__ import annotations

import time
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from membank.bank_service.shard.slot_sets import SlotSet
from membank.bank_service.store.bank import Bank
from membank.wire.format import RevisionRecord


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class StoredManifest:
    """What is remembered of a stored manifest."""

    number: int
    """Its number."""
    revision: int
    """Revision that it belongs to."""
    prepared: bool
    """True where it counts only if its revision was committed with it."""
    history_from: int
    """What it promises."""
    slots: SlotSet
    """The slots that it names."""

    @property
    def order(self) -> tuple[int, int]:
        """Place among the manifests that count; the greatest is in force."""
        return (self.revision, self.number)


@dataclass(frozen=True, kw_only=True, slots=True)
class Retention:
    """How much history the settings ask to keep, snapshots aside."""

    num_revisions: int = 8
    """Newest revisions that can be returned to, at least 1."""
    ended_within_s: float = 0.0
    """Revisions that ended less than so many seconds ago can be returned to as well."""
    clock: Callable[[], float] = time.time
    """Seconds since 1970-01-01 UTC."""

    def floor(self, bank: Bank, revision: int) -> int:
        """Return the oldest revision to keep, if `revision` is (or is about to be) in force."""
        now = self.clock()
        oldest = revision
        for num_kept, record in enumerate(_commits_before(bank, revision), start=1):
            # A revision ends when the next one begins, which may be about to.
            following = bank.outline(oldest)
            age_s = 0.0 if following is None else now - following.time_s
            if num_kept >= self.num_revisions and age_s >= self.ended_within_s:
                break
            oldest = record.revision
        return oldest


class Chain:
    """The manifests of a partition that count, in their order.

    Parameters
    ----------
    counting
        The manifests.
    """

    def __init__(self, counting: Iterable[StoredManifest]) -> None:
        self._all = sorted(counting, key=lambda manifest: manifest.order)
        self._named = [manifest for manifest in self._all if manifest.prepared]

    @property
    def newest(self) -> StoredManifest | None:
        """The manifest in force; None where nothing was ever changed."""
        return self._all[-1] if self._all else None

    def end_of(self, revision: int) -> StoredManifest | None:
        """Return the end of `revision`; None = as initialised."""
        return _last_until(self._all, revision)

    def beginning_of(self, revision: int) -> StoredManifest | None:
        """Return the beginning of `revision`; None = as initialised.

        A commit names what was prepared for it, so that needs no look at the records.
        """
        return _last_until(self._named, revision)

    def ends(self) -> dict[int, int]:
        """Return the number of the manifest that ends each revision that has one of its own."""
        return {manifest.revision: manifest.number for manifest in self._all}

    def needed(self, history_from: int, pinned: Iterable[int]) -> set[int]:
        """Return the numbers of the manifests that are needed.

        Parameters
        ----------
        history_from
            Oldest revision that can be returned to.
        pinned
            Revisions of the snapshots.
        """
        later = {m.revision for m in self._all if m.revision > history_from}
        # The newest by number says who owns the partition. It is another than the one in force
        # where an owner came between the preparation of that and its commit.
        needed = {max(m.number for m in self._all)} if self._all else set()
        for revision in {history_from, *later, *pinned}:
            for manifest in (self.beginning_of(revision), self.end_of(revision)):
                if manifest is not None:
                    needed.add(manifest.number)
        return needed


def _last_until(ordered: Sequence[StoredManifest], revision: int) -> StoredManifest | None:
    place = bisect_right(ordered, revision, key=lambda manifest: manifest.revision)
    return ordered[place - 1] if place else None


def _commits_before(bank: Bank, revision: int) -> Iterator[RevisionRecord]:
    return (r for r in bank.outlines(range(revision - 1, -1, -1)) if r.committed)
