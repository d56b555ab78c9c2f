"""What a bank must hold, from nothing but what its clients were told.

Every version of a block has one cause: the push or transaction to which it was acknowledged. From
the causes, in the order of the versions, a twin computes what the block must be, with the
optimizer's own code. Where a cause leaves more than one possibility (a rollback to a state that was
taken while others pushed), all of them are followed, and the block must be one of them.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from enum import StrEnum
from typing import NamedTuple

from campaign_bank import (
    DOOMED,
    HIDDEN_TOPIC,
    MARKED,
    SPEC,
    Delete,
    DropSnapshot,
    Fetched,
    Image,
    Push,
    Recreate,
    Replace,
    Restore,
    RollBack,
    Surveyed,
    Swap,
    TakeSnapshot,
    Transaction,
    Withhold,
    marked_content,
    numbered_content,
)
from campaign_past import Asked, Cause, Deed, Past, Refusal, served
from campaign_twin import Twin, fresh_image, in_state, initial_image, numbers_in
from membank.wire.records import BlockChange, TransactionReport, UpdateResult
from membank.wire.spec import BlockRef, BlockState
from tiny_bank import gradient_for

_TRACE_BYTES = 24
"""Bytes of a deleted block by which it would be recognised; no two contents begin alike."""


class Wrong(StrEnum):
    """How a bank can fail its clients."""

    LOST = "lost"
    """Something acknowledged is not in the bank."""
    DOUBLED = "doubled"
    """Something was applied more often than it was acknowledged."""
    TORN = "torn"
    """Blocks of one swap were seen apart."""
    DIFFERING = "differing"
    """The right versions, and content that does not follow from them."""
    RESURRECTED = "resurrected"
    """Something that was deleted is there."""
    FSCK = "fsck_errors"
    """The check of the bank reports damage."""
    FAILED = "failed"
    """The service did not start, did not answer, or did not refuse what it must, and that alone."""


class Violation(NamedTuple):
    """One failure."""

    kind: Wrong
    """Which."""
    text: str
    """What was expected, and what was found."""


class History:
    """What clients asked and were told; safe to use from their threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._moment = 0
        self._told = dict.fromkeys(SPEC.blocks(), 0)
        self._states = dict.fromkeys(SPEC.blocks(), BlockState.ACTIVE)
        self._past = {ref: Past(initial_image(ref)) for ref in SPEC.blocks()}
        self._deeds: list[Deed] = []
        self._snapshots: dict[str, Deed] = {}
        self._unchecked: list[Deed] = []
        self._refusals: list[tuple[BlockRef, Refusal]] = []
        self._seen: set[tuple[BlockRef, int, bytes | None]] = set()
        self._marks: dict[int, set[tuple[float, ...]]] = {}
        self._twin = Twin()
        self._traces: dict[BlockRef, set[bytes]] = defaultdict(set)
        self.forbidden: list[bytes] = []
        """Beginnings of contents and gradients that were deleted, oldest first."""
        self.violations: list[Violation] = []
        """What went wrong."""

    # ---- what clients are told

    def ask(self) -> Asked:
        """Take note that a request is about to be sent for the first time."""
        with self._lock:
            return Asked(self._next_moment(), dict(self._told))

    def newest(self, refs: Iterable[BlockRef]) -> dict[BlockRef, int]:
        """Return the newest versions that anybody was told of, be it by a fetch or a refusal."""
        with self._lock:
            return {ref: self._told[ref] for ref in refs}

    def state(self, ref: BlockRef) -> BlockState:
        """Return the last state of a block that an operator was told."""
        with self._lock:
            return self._states[ref]

    def snapshots(self) -> list[str]:
        """Return the names of the snapshots, oldest first."""
        with self._lock:
            return list(self._snapshots)

    def blame(self, kind: Wrong, text: str) -> None:
        """Take note of a failure."""
        with self._lock:
            self._blame(kind, text)

    def pushed(self, push: Push, asked: Asked, results: Sequence[UpdateResult]) -> None:
        """Take note of the answer to a push; a repeated one must say the same."""
        with self._lock:
            self._next_moment()
            if left_out := push.bases.keys() - {result.ref for result in results}:
                self._blame(
                    Wrong.LOST, f"the answer to {push.request_id} leaves out {_names(left_out)}"
                )
            for result in results:
                base = push.bases[result.ref]
                if result.accepted:
                    self._record(result.ref, result.version, Cause(asked, push))
                elif result.version < base:
                    self._blame(
                        Wrong.LOST,
                        f"{push.request_id}: block {result.ref} is at version {result.version}, "
                        f"but somebody was told of {base}",
                    )
                else:
                    self._tell(result.ref, result.version)
                    self._refusals.append((result.ref, _refusal(push, result)))

    def changed(self, operation: Transaction, asked: Asked, report: TransactionReport) -> None:
        """Take note of the first answer to a transaction."""
        with self._lock:
            for change in report.changes:
                self._record(change.ref, change.version_after, Cause(asked, operation))
                self._states[change.ref] = change.state_after
            deed = Deed(
                revision=report.revision,
                asked=asked,
                answered=self._next_moment(),
                request=operation,
                changed=frozenset(change.ref for change in report.changes),
            )
            if self._deeds and deed.revision <= self._deeds[-1].revision:
                self._blame(
                    Wrong.DOUBLED,
                    f"{operation.request_id} made revision {deed.revision}, "
                    f"and so did {self._deeds[-1].request.request_id}",
                )
            self._deeds.append(deed)
            self._unchecked.append(deed)
            self._check_scope(operation, report.changes)
            match operation:
                case TakeSnapshot(name=name):
                    self._snapshots[name] = deed
                case DropSnapshot(name=name):
                    del self._snapshots[name]

    def fetched(self, asked: Asked, refs: Sequence[BlockRef], fetched: Fetched) -> None:
        """Take note of what a reader got for `refs`; its content is judged by the next check."""
        with self._lock:
            if fetched.versions.keys() != set(refs):
                self._blame(
                    Wrong.LOST, f"a fetch of {_names(refs)} returned {_names(fetched.versions)}"
                )
            for ref, version in fetched.versions.items():
                if version < asked.versions[ref]:
                    self._blame(
                        Wrong.LOST,
                        f"a fetch returned block {ref} at version {version}, "
                        f"though somebody had been told of {asked.versions[ref]}",
                    )
                self._tell(ref, version)
                self._seen.add((ref, version, fetched.weights.get(ref)))
            self._check_marks(fetched)

    def _check_marks(self, fetched: Fetched) -> None:
        marked = [ref for ref in fetched.versions if ref in MARKED]
        if empty := [ref for ref in marked if ref not in fetched.weights]:
            self._blame(Wrong.LOST, f"a fetch returned no content of {_names(empty)}")
        marks = {numbers_in(fetched.weights[ref]) for ref in marked if ref in fetched.weights}
        # The first revision made them all one number; each revision holds one, on every shard.
        if not marks or fetched.revision == 0:
            return
        known = self._marks.setdefault(fetched.revision, marks)
        if _are_torn(marks) or known != marks:
            self._blame(
                Wrong.TORN,
                f"a fetch at revision {fetched.revision} saw the numbers {marks} in "
                f"marked blocks, and the first one at that revision {known}",
            )

    # ---- what the bank holds

    def check(self, found: Surveyed, least: Mapping[BlockRef, int] | None = None) -> None:
        """Compare a bank that is at rest, every request answered, with what it must hold.

        Parameters
        ----------
        found
            What it holds.
        least
            Versions from which on it may have lost what is newer, with its machine; nothing can be
            asked of it afterwards. None = it may have lost nothing.
        """
        with self._lock:
            for ref in SPEC.blocks():
                must = (least or self._told)[ref]
                self._check_block(ref, found.versions[ref], found.images[ref], must)
                self._check_served(ref, found)
            if not self.violations:
                self._check_answers()
            marks = {numbers_in(found.images[ref].arrays[0]) for ref in MARKED}
            if found.versions[MARKED[0]] and _are_torn(marks):
                self._blame(Wrong.TORN, f"marked blocks hold the numbers {marks}")

    def _check_answers(self) -> None:
        """Judge what was answered since the last check; the past of every block is known now."""
        for deed in self._unchecked:
            if isinstance(deed.request, RollBack):
                self._check_rollback(deed, deed.request)
        for ref, refusal in self._refusals:
            if not self._past[ref].justifies(refusal):
                self._blame(Wrong.FAILED, f"block {ref} refuses for no reason: {refusal}")
        for ref, version, weight in self._seen:
            if not self._past[ref].shows(version, weight):
                self._blame(
                    Wrong.DIFFERING,
                    f"a fetch of block {ref} at version {version} returned "
                    f"{weight and weight.hex()}, which it never held",
                )
        self._unchecked.clear()
        self._refusals.clear()
        self._seen.clear()

    def _check_block(self, ref: BlockRef, version: int, image: Image, must: int) -> None:
        past = self._past[ref]
        if must > version:
            beyond = [past.causes[v].request.request_id for v in sorted(past.causes) if v > version]
            self._blame(
                Wrong.LOST,
                f"block {ref} is at version {version}, though somebody was told of "
                f"{must}; without {', '.join(beyond)}",
            )
            return
        unknown = [v for v in range(past.known + 1, version + 1) if v not in past.causes]
        if unknown:
            self._blame(
                Wrong.DOUBLED,
                f"block {ref} is at version {version}, but nobody was told of {unknown}",
            )
            return
        for number in range(past.known + 1, version + 1):
            request = past.causes[number].request
            if isinstance(request, Push) and past.is_stale(request.bases[ref], number - 1):
                self._blame(Wrong.FAILED, f"block {ref} accepted {request}, which was stale")
            past.images[number] = self._after(ref, request, past.images[number - 1])
            self._trace(ref, request, past.images[number])
        if image not in past.images[version]:
            self._blame(Wrong.DIFFERING, self._difference(ref, version, image))
        past.images[version] = {image}

    def _after(
        self, ref: BlockRef, request: Push | Transaction, before: Iterable[Image]
    ) -> set[Image]:
        match request:
            case Push(number=number):
                # It was accepted, so of what the block may have been, this is what it was.
                active = [image for image in before if image.state is BlockState.ACTIVE]
                return {self._twin.trained(ref, image, number) for image in active}
            case Swap(value=value):
                return {fresh_image(marked_content(ref, value))}
            case Replace(number=number) | Recreate(number=number):
                return {fresh_image(numbered_content(ref, number))}
            case Withhold():
                return {in_state(image, BlockState.WITHHELD) for image in before}
            case Restore():
                return {in_state(image, BlockState.ACTIVE) for image in before}
            case Delete():
                return {Image(state=BlockState.DELETED, step=0, arrays=())}
            case RollBack():
                # A rollback that changes a block never makes it a deleted one.
                found = self._at_target(ref, request)
                return {image for image in found if image.state is not BlockState.DELETED}
            case _:
                return set()  # changes no block, so that no version can be its doing

    def _check_served(self, ref: BlockRef, found: Surveyed) -> None:
        image = found.images[ref]
        if found.served.get(ref) != served(image):
            self._blame(
                Wrong.DIFFERING,
                f"a fetch of block {ref}, which is {image.state.name}, does not return what is kept",
            )

    # ---- rollbacks

    def _at_target(self, ref: BlockRef, request: RollBack) -> set[Image]:
        """Return what a block may have been at the state that a rollback returns to."""
        past = self._past[ref]
        if isinstance(request.target, str):
            pinned = self._named(request.target)
            return past.between(pinned.asked.versions[ref], pinned.answered)
        # The end of a revision: folded by the transaction that ended it, where that changed the
        # partition; or else whenever it was folded last, which an earlier one did at the latest.
        ending = next(deed for deed in self._deeds if deed.revision > request.target)
        partition = SPEC.partition_of(ref)
        folds = [
            deed
            for deed in self._deeds
            if deed.revision <= ending.revision and partition in deed.partitions()
        ]
        since = folds[-1].asked.versions[ref] if folds else 0
        return past.between(since, ending.answered)

    def _check_rollback(self, deed: Deed, request: RollBack) -> None:
        """Blame a rollback that left a block as it was, though that was not as wanted."""
        for ref in set(request.refs()) - deed.changed - self._erased_since(request):
            then = self._at_target(ref, request)
            now = self._past[ref].between(deed.asked.versions[ref], deed.answered)
            is_gone = any(image.state is BlockState.DELETED for image in then | now)
            if not is_gone and not then & now:
                self._blame(
                    Wrong.LOST, f"{request.request_id} to {request.target} left block {ref} out"
                )

    def _erased_since(self, request: RollBack) -> set[BlockRef]:
        target = request.target
        revision = self._named(target).revision if isinstance(target, str) else target
        return {
            ref
            for deed in self._deeds
            if deed.revision > revision and isinstance(deed.request, Delete)
            for ref in deed.changed
        }

    def _named(self, snapshot: str) -> Deed:
        # A rollback may be judged when its target has been given up since.
        return next(
            deed
            for deed in reversed(self._deeds)
            if isinstance(deed.request, TakeSnapshot) and deed.request.name == snapshot
        )

    # ---- what was deleted

    def _trace(self, ref: BlockRef, request: Push | Transaction, images: Iterable[Image]) -> None:
        """Remember what a block that will be deleted has held; it must not be found afterwards."""
        if ref not in DOOMED:
            return
        traces = self._traces[ref]
        if isinstance(request, Delete):
            self.forbidden += sorted(traces)
            traces.clear()
            return
        held = [data[:_TRACE_BYTES] for image in images for data in image.arrays]
        if isinstance(request, Push):
            held.append(gradient_for(SPEC, ref, request.number).tobytes()[:_TRACE_BYTES])
        traces |= {data for data in held if any(data)}

    # ---- with the lock held

    def _next_moment(self) -> int:
        self._moment += 1
        return self._moment

    def _blame(self, kind: Wrong, text: str) -> None:
        self.violations.append(Violation(kind, text))

    def _record(self, ref: BlockRef, version: int, cause: Cause) -> None:
        mine = cause.request.request_id
        other = self._past[ref].causes.setdefault(version, cause).request.request_id
        if other != mine:
            self._blame(
                Wrong.LOST, f"version {version} of block {ref} is both {other}'s and {mine}'s"
            )
        self._tell(ref, version)

    def _tell(self, ref: BlockRef, version: int) -> None:
        self._told[ref] = max(self._told[ref], version)

    def _check_scope(self, operation: Transaction, changes: Sequence[BlockChange]) -> None:
        changed = {change.ref for change in changes}
        allowed, required = self._scope(operation)
        for refs, what in ((changed - allowed, "changed"), (required - changed, "left out")):
            if refs:
                self._blame(Wrong.LOST, f"{operation} {what} {_names(refs)}")

    def _scope(self, operation: Transaction) -> tuple[set[BlockRef], set[BlockRef]]:
        """Return the blocks that a transaction may change, and those that it must."""
        match operation:
            case Swap():
                return set(MARKED), set(MARKED)
            case Replace(refs=refs):
                return set(refs), set(refs)
            case Delete() | Recreate():
                return set(DOOMED), set(DOOMED)
            case RollBack():
                return set(operation.refs()) - self._erased_since(operation), set()
            case Withhold() | Restore():
                # A rollback may have done a part of it before.
                return set(SPEC.subtree(HIDDEN_TOPIC)), set()
            case TakeSnapshot() | DropSnapshot():
                return set(), set()

    def _difference(self, ref: BlockRef, version: int, image: Image) -> str:
        past = self._past[ref]
        cause = past.causes.get(version)
        by = "" if cause is None else f", made by {cause.request.request_id}"
        expected = " or ".join(one.told_from(image) for one in past.images[version])
        return f"block {ref} at version {version}{by}: found {image}, expected {expected}"


def _refusal(push: Push, result: UpdateResult) -> Refusal:
    return Refusal(
        request_id=push.request_id,
        base=push.bases[result.ref],
        version=result.version,
        reason=result.reason,
    )


def _are_torn(marks: Collection[tuple[float, ...]]) -> bool:
    return len(marks) > 1 or any(len(numbers) > 1 for numbers in marks)


def _names(refs: Iterable[BlockRef]) -> str:
    return ", ".join(str(ref) for ref in sorted(refs))
