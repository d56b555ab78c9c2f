"""The judge of a campaign of kills: each way in which a bank can fail its clients is seen."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

import pytest

from campaign_bank import (
    DOOMED,
    HIDDEN_TOPIC,
    MARKED,
    SPEC,
    Delete,
    Fetched,
    Image,
    Push,
    Replace,
    RollBack,
    Surveyed,
    Swap,
    TakeSnapshot,
    Transaction,
    Withhold,
    marked_content,
    numbered_content,
)
from campaign_model import History, Wrong
from campaign_tally import Tally
from campaign_twin import Twin, fresh_image, in_state, initial_image
from membank.wire.errors import Reason
from membank.wire.records import BlockChange, TransactionReport, UpdateResult
from membank.wire.spec import BlockRef, BlockState

A, B, C = BlockRef(1, 0), BlockRef(1, 1), BlockRef(1, 3)
MARK = MARKED[0]
GONE = Image(state=BlockState.DELETED, step=0, arrays=())


class Witness:
    """A bank that a test makes up, block by block, and the history that judges it."""

    def __init__(self) -> None:
        self.history = History()
        self.versions = dict.fromkeys(SPEC.blocks(), 0)
        self.images = {ref: initial_image(ref) for ref in SPEC.blocks()}
        self.revision = 0

    def push(self, number: int, *refs: BlockRef) -> Push:
        """Push, truthfully."""
        push = Push(
            request_id=f"push-{number}",
            number=number,
            bases={ref: self.versions[ref] for ref in refs},
        )
        asked = self.history.ask()
        for ref in refs:
            self.versions[ref] += 1
            self.images[ref] = Twin().trained(ref, self.images[ref], number)
        self.history.pushed(push, asked, [self.accepted(ref) for ref in refs])
        return push

    def accepted(self, ref: BlockRef) -> UpdateResult:
        """Return the answer that was given last."""
        return UpdateResult(ref=ref, accepted=True, version=self.versions[ref])

    def refuse(self, ref: BlockRef, base: int, reason: Reason) -> None:
        """Refuse a push, made on `base`, at the present version."""
        push = Push(request_id="refused", number=99, bases={ref: base})
        refused = UpdateResult(ref=ref, accepted=False, version=self.versions[ref], reason=reason)
        self.history.pushed(push, self.history.ask(), [refused])

    def fetched(self, *refs: BlockRef, revision: int = 1) -> Fetched:
        """Return what a truthful fetch returns."""
        return Fetched(
            revision=revision,
            versions={ref: self.versions[ref] for ref in refs},
            weights={ref: image.arrays[0] for ref in refs if (image := self.images[ref]).arrays},
        )

    def fetch(self, fetched: Fetched, *refs: BlockRef) -> list[Wrong]:
        """Let a reader ask for blocks and get `fetched`; return what is wrong at once."""
        self.history.fetched(self.history.ask(), refs, fetched)
        return self.wrong()

    def wrong(self) -> list[Wrong]:
        """Return what is wrong so far."""
        return [violation.kind for violation in self.history.violations]

    def transact(self, operation: Transaction, images: Mapping[BlockRef, Image]) -> None:
        """Run a transaction that makes blocks so."""
        asked = self.history.ask()
        self.revision += 1
        changes = []
        for ref, image in images.items():
            changes.append(
                BlockChange(
                    ref=ref,
                    version_before=self.versions[ref],
                    version_after=self.versions[ref] + 1,
                    state_before=self.images[ref].state,
                    state_after=image.state,
                    num_bytes=0,
                )
            )
            self.versions[ref] += 1
            self.images[ref] = image
        report = TransactionReport(revision=self.revision, changes=tuple(changes))
        self.history.changed(operation, asked, report)

    def swap(self, value: int) -> None:
        """Swap the marked blocks."""
        images = {ref: fresh_image(marked_content(ref, value)) for ref in MARKED}
        self.transact(Swap(request_id=f"swap-{value}", value=value), images)

    def look(self, least: Mapping[BlockRef, int] | None = None) -> list[Wrong]:
        """Let the history judge, and return what is wrong."""
        served = {
            ref: image.arrays[0]
            for ref, image in self.images.items()
            if image.state is BlockState.ACTIVE
        }
        found = Surveyed(versions=self.versions, images=self.images, served=served)
        self.history.check(found, least)
        return self.wrong()


@pytest.fixture
def witness() -> Witness:
    return Witness()


def test_truthful_bank_is_believed(witness: Witness) -> None:
    witness.swap(1)
    witness.push(2, A, B)
    witness.push(3, A)
    assert witness.look() == []

    witness.push(4, A)
    witness.swap(5)
    assert witness.look() == []


def test_update_that_is_gone_is_lost(witness: Witness) -> None:
    before = witness.images[A]
    witness.push(1, A)
    witness.versions[A], witness.images[A] = 0, before

    assert witness.look() == [Wrong.LOST]


def test_lost_machine_may_take_the_newest_updates_alone(witness: Witness) -> None:
    least = dict.fromkeys(SPEC.blocks(), 0)
    witness.push(1, A)
    copied = witness.images[A]
    witness.push(2, A)
    witness.versions[A], witness.images[A] = 1, copied
    assert witness.look(least | {A: 1}) == []

    witness.images[A] = initial_image(A)
    assert witness.look(least | {A: 1}) == [Wrong.DIFFERING]
    assert witness.look(least | {A: 2}) == [Wrong.DIFFERING, Wrong.LOST]


def test_version_that_nobody_was_told_of_is_doubled(witness: Witness) -> None:
    witness.push(1, A)
    witness.versions[A] += 1
    witness.images[A] = Twin().trained(A, witness.images[A], 1)

    assert witness.look() == [Wrong.DOUBLED]


def test_content_that_does_not_follow_is_differing(witness: Witness) -> None:
    witness.push(1, A)
    witness.images[A] = Twin().trained(A, initial_image(A), 2)

    assert witness.look() == [Wrong.DIFFERING]


def test_optimizer_state_and_step_are_compared_too(witness: Witness) -> None:
    witness.push(1, A, B)
    weight, *_ = witness.images[A].arrays
    witness.images[A] = replace(witness.images[A], arrays=(weight, *initial_image(A).arrays[1:]))
    witness.images[B] = replace(witness.images[B], step=2)

    assert witness.look() == [Wrong.DIFFERING, Wrong.DIFFERING]


def test_one_version_given_to_two_updates_is_lost(witness: Witness) -> None:
    first = witness.push(1, A)
    second = replace(first, request_id="push-2", number=2)
    witness.history.pushed(second, witness.history.ask(), [witness.accepted(A)])

    assert witness.wrong() == [Wrong.LOST]


def test_acknowledged_version_that_is_unknown_to_the_bank_is_lost(witness: Witness) -> None:
    push = Push(request_id="push-1", number=1, bases={A: 3})
    refused = UpdateResult(ref=A, accepted=False, version=2, reason=Reason.VERSION_MISMATCH)
    witness.history.pushed(push, witness.history.ask(), [refused])

    assert witness.wrong() == [Wrong.LOST]


def test_unjustified_refusal_of_a_block_is_failed(witness: Witness) -> None:
    for reason in (Reason.BLOCK_DELETED, Reason.BLOCK_WITHHELD, Reason.NOT_FINITE):
        witness.refuse(A, 0, reason)

    assert witness.look() == [Wrong.FAILED] * 3


def test_newest_version_is_not_stale(witness: Witness) -> None:
    witness.push(1, A)
    witness.refuse(A, 1, Reason.STALE_VERSION)
    witness.refuse(A, 0, Reason.STALE_VERSION)

    assert witness.look() == [Wrong.FAILED] * 2


def test_justified_refusals_are_believed(witness: Witness) -> None:
    hidden = in_state(witness.images[HIDDEN_TOPIC], BlockState.WITHHELD)
    witness.transact(Withhold(request_id="hide"), {HIDDEN_TOPIC: hidden})
    witness.refuse(HIDDEN_TOPIC, 0, Reason.BLOCK_WITHHELD)
    witness.transact(Delete(request_id="delete"), dict.fromkeys(DOOMED, GONE))
    witness.refuse(DOOMED[0], 0, Reason.BLOCK_DELETED)
    content = fresh_image(numbered_content(A, 5))
    witness.transact(Replace(request_id="replace", refs=(A,), number=5), {A: content})
    witness.push(6, A)
    witness.refuse(A, 0, Reason.STALE_VERSION)

    assert witness.look() == []


def test_gradient_on_content_that_was_replaced_since_must_be_refused(witness: Witness) -> None:
    content = fresh_image(numbered_content(A, 5))
    witness.transact(Replace(request_id="replace", refs=(A,), number=5), {A: content})
    push = Push(request_id="push-6", number=6, bases={A: 0})
    witness.versions[A] += 1
    witness.images[A] = Twin().trained(A, witness.images[A], 6)
    witness.history.pushed(push, witness.history.ask(), [witness.accepted(A)])

    assert witness.look() == [Wrong.FAILED]


def test_version_that_a_refusal_told_of_must_stay(witness: Witness) -> None:
    push = Push(request_id="refused", number=1, bases={A: 0})
    refused = UpdateResult(ref=A, accepted=False, version=3, reason=Reason.BLOCK_WITHHELD)
    witness.history.pushed(push, witness.history.ask(), [refused])

    assert witness.look() == [Wrong.LOST]


def test_answer_to_a_push_that_leaves_a_block_out_is_lost(witness: Witness) -> None:
    push = Push(request_id="push-1", number=1, bases={A: 0, B: 0})
    asked = witness.history.ask()
    witness.versions[A] += 1
    witness.history.pushed(push, asked, [witness.accepted(A)])

    assert witness.wrong() == [Wrong.LOST]


def test_truthful_fetch_is_believed(witness: Witness) -> None:
    witness.swap(1)
    witness.push(2, A)
    witness.transact(Delete(request_id="delete"), dict.fromkeys(DOOMED, GONE))

    assert witness.fetch(witness.fetched(*MARKED), *MARKED) == []
    assert witness.fetch(witness.fetched(A, *DOOMED), A, *DOOMED) == []
    assert witness.look() == []


def test_fetch_older_than_what_was_acknowledged_is_lost(witness: Witness) -> None:
    old = witness.fetched(A)
    witness.push(1, A)

    assert witness.fetch(old, A) == [Wrong.LOST]


def test_fetch_older_than_what_another_one_saw_is_lost(witness: Witness) -> None:
    old = witness.fetched(A)
    witness.versions[A] += 1  # a push that is not answered yet
    witness.images[A] = Twin().trained(A, witness.images[A], 1)

    assert witness.fetch(witness.fetched(A), A) == []
    assert witness.fetch(old, A) == [Wrong.LOST]


def test_version_that_was_read_and_vanishes_is_lost(witness: Witness) -> None:
    before = witness.images[A]
    witness.versions[A] += 1
    witness.images[A] = Twin().trained(A, before, 1)
    assert witness.fetch(witness.fetched(A), A) == []
    witness.versions[A], witness.images[A] = 0, before

    assert witness.look() == [Wrong.LOST]


def test_fetch_that_leaves_a_block_out_is_lost(witness: Witness) -> None:
    assert witness.fetch(witness.fetched(A), A, B) == [Wrong.LOST]


def test_fetch_without_the_content_of_a_marked_block_is_lost(witness: Witness) -> None:
    witness.swap(1)
    fetched = replace(witness.fetched(*MARKED), weights={})

    assert witness.fetch(fetched, *MARKED) == [Wrong.LOST]


def test_fetched_content_that_was_never_there_is_differing(witness: Witness) -> None:
    witness.push(1, A)
    torn = witness.images[A].arrays[0][:16] + initial_image(A).arrays[0][16:]
    fetched = replace(witness.fetched(A), weights={A: torn})

    assert witness.fetch(fetched, A) == []
    assert witness.look() == [Wrong.DIFFERING]


def test_fetch_that_returns_deleted_content_is_differing(witness: Witness) -> None:
    held = witness.images[DOOMED[0]].arrays[0]
    witness.transact(Delete(request_id="delete"), dict.fromkeys(DOOMED, GONE))
    fetched = replace(witness.fetched(*DOOMED), weights={DOOMED[0]: held})

    assert witness.fetch(fetched, *DOOMED) == []
    assert witness.look() == [Wrong.DIFFERING]


def test_two_numbers_in_one_fetch_are_torn(witness: Witness) -> None:
    witness.swap(1)
    weights = {ref: marked_content(ref, 1 + (ref == MARK)).tobytes() for ref in MARKED}
    fetched = replace(witness.fetched(*MARKED), weights=weights)

    assert witness.fetch(fetched, *MARKED) == [Wrong.TORN]


def test_two_numbers_in_every_block_are_torn(witness: Witness) -> None:
    witness.swap(1)
    weights = {}
    for ref in MARKED:
        content = marked_content(ref, 1)
        content.flat[0] = 2
        weights[ref] = content.tobytes()
    fetched = replace(witness.fetched(*MARKED), weights=weights)

    assert witness.fetch(fetched, *MARKED) == [Wrong.TORN]


def test_swap_that_is_half_there_is_torn(witness: Witness) -> None:
    witness.swap(1)
    witness.look()
    witness.swap(2)
    witness.images[MARK] = fresh_image(marked_content(MARK, 1))

    assert witness.look() == [Wrong.DIFFERING, Wrong.TORN]


def test_transaction_that_leaves_a_block_out_is_lost(witness: Witness) -> None:
    images = {ref: fresh_image(marked_content(ref, 1)) for ref in MARKED[1:]}
    witness.transact(Swap(request_id="swap-1", value=1), images)

    assert Wrong.LOST in witness.wrong()


def test_rollback_returns_to_what_was_pinned(witness: Witness) -> None:
    witness.push(1, A)
    pinned = witness.images[A]
    witness.transact(TakeSnapshot(request_id="pin", name="s"), {})
    witness.push(2, A)
    witness.transact(RollBack(request_id="back", target="s"), {A: pinned})

    assert witness.look() == []


def test_rollback_to_something_else_is_differing(witness: Witness) -> None:
    witness.push(1, A)
    witness.transact(TakeSnapshot(request_id="pin", name="s"), {})
    witness.push(2, A)
    witness.transact(RollBack(request_id="back", target="s"), {A: initial_image(A)})

    assert witness.look() == [Wrong.DIFFERING]


def test_rollback_that_leaves_a_changed_block_out_is_lost(witness: Witness) -> None:
    witness.transact(TakeSnapshot(request_id="pin", name="s"), {})
    witness.push(1, A)
    witness.transact(RollBack(request_id="back", target="s"), {})

    assert witness.look() == [Wrong.LOST]


def test_revision_that_a_transaction_on_the_partition_ended_holds_all_updates(
    witness: Witness,
) -> None:
    assert SPEC.partition_of(A) == SPEC.partition_of(MARK)
    witness.swap(1)
    witness.push(2, A)
    before = witness.images[A]
    witness.push(3, A)
    witness.swap(4)
    witness.transact(RollBack(request_id="back", target=1, topic=A), {A: before})

    assert witness.look() == [Wrong.DIFFERING]


def test_revision_that_ended_elsewhere_may_hold_some_updates(witness: Witness) -> None:
    assert SPEC.partition_of(C) not in {SPEC.partition_of(ref) for ref in MARKED}
    witness.swap(1)
    witness.push(2, C)
    before = witness.images[C]
    witness.push(3, C)
    witness.swap(4)
    witness.transact(RollBack(request_id="back", target=1, topic=C), {C: before})

    assert witness.look() == []


def test_deleted_content_is_remembered(witness: Witness) -> None:
    witness.push(1, *DOOMED)
    held = {ref: witness.images[ref].arrays for ref in DOOMED}
    witness.transact(Delete(request_id="delete"), dict.fromkeys(DOOMED, GONE))

    assert witness.look() == []
    for arrays in held.values():
        assert all(data[:24] in witness.history.forbidden for data in arrays)


def test_campaign_that_got_hardly_an_update_acknowledged_proves_nothing() -> None:
    counts = Counter({"update acknowledged": 12, "update refused": 500})
    assert Tally(kills=12, requests=counts).is_vacuous
    assert not Tally(kills=11, requests=counts).is_vacuous
    assert Tally().is_vacuous
