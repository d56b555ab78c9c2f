"""Pushing in fewer bytes: what is sent, what is kept, and what becomes of it when something fails."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import pytest
from numpy.typing import NDArray

from fake_bank import SPEC, FakeBank
from faults import Fault
from in_process import InProcessNetwork
from membank.client import (
    BankClient,
    ClientConfig,
    CompressedPushes,
    Compression,
    ErrorFeedback,
    RetryConfig,
)
from membank.wire.codec import Encoded, Sparse, push_codec
from membank.wire.errors import InvalidArgumentError, Reason, UnavailableError
from membank.wire.records import UpdateResult
from membank.wire.spec import Array, BlockRef, BlockState

TOP, OTHER = BlockRef(1, 0), BlockRef(1, 1)
SHAPE = SPEC.block_shape(1)
TENTH = Compression(wire="sparse", share=0.1)
CONFIG = ClientConfig(
    timeout_s=5.0,
    retry=RetryConfig(max_attempts=2, initial_backoff_s=0.001, max_backoff_s=0.002),
)


def gradient(seed: int) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(SHAPE, np.float32)


def decoded(encoded: Encoded) -> NDArray[np.float32]:
    return push_codec(encoded.codec).decode(encoded.payload, encoded.shape).astype(np.float32)


def applied(ref: BlockRef, version: int) -> list[UpdateResult]:
    return [UpdateResult(ref=ref, accepted=True, version=version)]


def refused(ref: BlockRef, reason: Reason) -> list[UpdateResult]:
    return [UpdateResult(ref=ref, accepted=False, version=9, reason=reason)]


def feedback(*, share: float = 0.1, **options: int) -> ErrorFeedback:
    return ErrorFeedback(Sparse(share), **({"max_staleness": 4} | options))


class TestErrorFeedback:
    @pytest.mark.parametrize("name", ["bfloat16", "float16", "int8"])
    def test_what_rounding_takes_away_comes_with_the_next_gradient(self, name: str) -> None:
        one = ErrorFeedback(push_codec(name), max_staleness=4)
        sent = np.zeros(SHAPE, np.float64)
        for step in range(20):
            sending = one.begin(f"p{step}", {TOP: gradient(0)}, {TOP: step})
            sent += decoded(sending.encoded[TOP])
            one.settle(f"p{step}", applied(TOP, step + 1))
        # All but what is left of the last one: 20 roundings of the same number would add up.
        left = 20 * gradient(0) - sent
        rounding = np.abs(gradient(0) - decoded(_encoded(name, gradient(0)))).max()
        assert np.abs(left).max() < 2.5 * rounding

    def test_all_of_a_gradient_is_sent_in_the_end(self) -> None:
        one = feedback()
        sent = np.zeros(SHAPE, np.float32)
        for step in range(10):
            # Nothing is added after the first one.
            values = gradient(0) if step == 0 else np.zeros(SHAPE, np.float32)
            sending = one.begin(f"p{step}", {TOP: values}, {TOP: step})
            sent += decoded(sending.encoded[TOP])
            one.settle(f"p{step}", applied(TOP, step + 1))
        np.testing.assert_array_equal(sent, gradient(0))

    @pytest.mark.parametrize("reason", [Reason.NOT_FINITE, Reason.OVERLOADED])
    def test_a_refused_gradient_leaves_what_was_left_before(self, reason: Reason) -> None:
        one, control = feedback(), feedback()
        for each in (one, control):
            each.begin("p1", {TOP: gradient(1)}, {TOP: 0})
            each.settle("p1", applied(TOP, 1))
        one.begin("p2", {TOP: gradient(2)}, {TOP: 1})
        one.settle("p2", refused(TOP, reason))
        ours = one.begin("p3", {TOP: gradient(3)}, {TOP: 1})
        theirs = control.begin("p3", {TOP: gradient(3)}, {TOP: 1})
        assert ours.encoded[TOP].payload.tobytes() == theirs.encoded[TOP].payload.tobytes()

    def test_numbers_that_are_none_are_sent_and_never_kept(self) -> None:
        one = feedback()
        bad = gradient(1)
        bad[0, 0, 0, 0] = np.nan
        sending = one.begin("p1", {TOP: bad}, {TOP: 0})
        assert np.isnan(decoded(sending.encoded[TOP])).any()
        one.settle("p1", refused(TOP, Reason.NOT_FINITE))
        assert np.isfinite(
            decoded(one.begin("p2", {TOP: gradient(2)}, {TOP: 0}).encoded[TOP])
        ).all()
        assert one.num_bytes == 0

    @pytest.mark.parametrize(
        "reason",
        [
            Reason.BLOCK_DELETED,
            Reason.BLOCK_WITHHELD,
            Reason.VERSION_MISMATCH,
            Reason.STALE_VERSION,
        ],
    )
    def test_what_is_about_another_block_is_dropped(self, reason: Reason) -> None:
        one = feedback()
        one.begin("p1", {TOP: gradient(1)}, {TOP: 0})
        one.settle("p1", applied(TOP, 1))
        one.begin("p2", {TOP: gradient(2)}, {TOP: 1})
        one.settle("p2", refused(TOP, reason))
        assert one.num_bytes == 0
        sending = one.begin("p3", {TOP: gradient(3)}, {TOP: 9})
        assert sending.base == {TOP: 9}
        assert sending.encoded[TOP].payload.tobytes() == Sparse(0.1).encode(gradient(3)).tobytes()

    def test_the_older_of_the_two_is_the_base(self) -> None:
        one = feedback()
        one.begin("p1", {TOP: gradient(1)}, {TOP: 0})
        one.settle("p1", applied(TOP, 2))
        sending = one.begin("p2", {TOP: gradient(2)}, {TOP: 5})
        assert sending.base == {TOP: 2}
        # Refused for the age of what was added: that goes.
        one.settle("p2", refused(TOP, Reason.STALE_VERSION))
        assert one.num_bytes == 0

    def test_a_gradient_that_is_too_old_itself_takes_nothing_along(self) -> None:
        one = feedback()
        one.begin("p1", {TOP: gradient(1)}, {TOP: 0})
        one.settle("p1", applied(TOP, 8))
        assert one.begin("p2", {TOP: gradient(2)}, {TOP: 3}).base == {TOP: 3}
        one.settle("p2", refused(TOP, Reason.STALE_VERSION))
        assert one.num_bytes == 4 * SPEC.block_params(1)

    def test_what_would_be_refused_for_its_age_is_not_sent(self) -> None:
        one = feedback()
        one.begin("p1", {TOP: gradient(1)}, {TOP: 0})
        one.settle("p1", applied(TOP, 1))
        sending = one.begin("p2", {TOP: gradient(2)}, {TOP: 6})
        assert sending.base == {TOP: 6}
        assert sending.encoded[TOP].payload.tobytes() == Sparse(0.1).encode(gradient(2)).tobytes()

    def test_a_push_that_is_begun_again_is_the_same(self) -> None:
        one = feedback()
        first = one.begin("p1", {TOP: gradient(1)}, {TOP: 0})
        assert one.begin("p1", {TOP: gradient(2)}, {TOP: 0}) is first
        with pytest.raises(InvalidArgumentError, match="p1"):
            one.begin("p2", {TOP: gradient(2)}, {TOP: 0})
        one.settle("p1", applied(TOP, 1))
        one.settle("p1", applied(TOP, 1))
        assert one.unsettled([TOP]) == []

    def test_the_caller_may_change_its_gradient_afterwards(self) -> None:
        for name in ("float32", "int8"):
            one = ErrorFeedback(push_codec(name), max_staleness=4)
            values = gradient(1)
            sending = one.begin("p1", {TOP: values}, {TOP: 0})
            before = sending.encoded[TOP].payload.tobytes()
            values[...] = 0
            assert sending.encoded[TOP].payload.tobytes() == before

    def test_what_is_kept_is_bounded(self) -> None:
        one = feedback(max_bytes=4 * SPEC.block_params(1))
        for number, ref in enumerate((TOP, OTHER)):
            one.begin(f"p{number}", {ref: gradient(number)}, {ref: 0})
            one.settle(f"p{number}", applied(ref, 1))
        assert (one.num_bytes, one.num_dropped) == (4 * SPEC.block_params(1), 1)
        sending = one.begin("p3", {TOP: gradient(3)}, {TOP: 1})
        assert sending.encoded[TOP].payload.tobytes() == Sparse(0.1).encode(gradient(3)).tobytes()

    def test_gradients_of_one_block_have_one_shape(self) -> None:
        one = feedback()
        one.begin("p1", {TOP: gradient(1)}, {TOP: 0})
        one.settle("p1", applied(TOP, 1))
        with pytest.raises(InvalidArgumentError) as caught:
            one.begin("p2", {TOP: gradient(2)[:1, :1]}, {TOP: 1})
        assert caught.value.reason is Reason.BAD_SHAPE


def _encoded(name: str, values: Array) -> Encoded:
    return Encoded(name, push_codec(name).encode(values), values.shape)


@pytest.fixture
def bank() -> FakeBank:
    return FakeBank()


@pytest.fixture
def network(bank: FakeBank) -> InProcessNetwork:
    return InProcessNetwork(bank)


@pytest.fixture
def client(network: InProcessNetwork) -> Iterator[BankClient]:
    with BankClient.connect(network.GATEWAY, config=CONFIG, connector=network) as client:
        yield client


def total(bank: FakeBank, ref: BlockRef, before: Mapping[BlockRef, Array]) -> NDArray[np.float64]:
    """Return the sum of the gradients that were applied to a block."""
    moved = before[ref].astype(np.float64) - bank.held(ref).weight.astype(np.float64)
    return moved / SPEC.levels[ref.level - 1].learning_rate


@pytest.fixture
def before(bank: FakeBank) -> dict[BlockRef, Array]:
    return {ref: bank.held(ref).weight.copy() for ref in (TOP, OTHER)}


class TestCompressedPushes:
    @pytest.mark.parametrize(
        "compression",
        [Compression(wire="int8"), TENTH, Compression(wire="int8", error_feedback=False)],
        ids=lambda compression: f"{compression.wire}-{compression.error_feedback}",
    )
    def test_apply_what_they_send(
        self,
        bank: FakeBank,
        client: BankClient,
        before: dict[BlockRef, Array],
        compression: Compression,
    ) -> None:
        pushes = CompressedPushes(client, compression)
        answer = pushes.push({TOP: gradient(1)}, base={TOP: 0}, step=3)
        assert answer.versions == {TOP: 1}
        codec = compression.codec()
        expected = codec.decode(codec.encode(gradient(1)), SHAPE).astype(np.float64)
        np.testing.assert_allclose(total(bank, TOP, before), expected, rtol=1e-3, atol=1e-3)

    # However a push fails, everything is applied once in the end: nothing is lost, nothing counts
    # twice.
    @pytest.mark.parametrize("fault", [Fault.DROP_RESPONSE, Fault.UNAVAILABLE])
    @pytest.mark.parametrize("is_repeated", [True, False])
    def test_lose_nothing_and_count_nothing_twice(
        self,
        bank: FakeBank,
        network: InProcessNetwork,
        client: BankClient,
        before: dict[BlockRef, Array],
        fault: Fault,
        is_repeated: bool,
    ) -> None:
        pushes = CompressedPushes(client, TENTH)
        script = network.scripts["shard:1"]
        script.plan("push", fault, fault)
        with pytest.raises(UnavailableError):
            pushes.push({TOP: gradient(1)}, base={TOP: 0}, request_id="p1")
        if is_repeated:
            # The gradient given is of no account: what was sent first is sent again.
            again = pushes.push({TOP: gradient(7)}, base={TOP: 0}, request_id="p1")
            assert again.versions == {TOP: 1}
        pushes.push({TOP: gradient(2)}, base={TOP: 1})
        version = bank.held(TOP).version
        assert version == 2
        while np.count_nonzero(pushes_left(pushes)):
            zero = np.zeros(SHAPE, np.float32)
            (result,) = pushes.push({TOP: zero}, base={TOP: version}).results
            version = result.version
        whole = gradient(1).astype(np.float64) + gradient(2)
        np.testing.assert_allclose(total(bank, TOP, before), whole, rtol=1e-3, atol=1e-3)

    def test_a_wrong_push_is_forgotten(
        self, bank: FakeBank, client: BankClient, before: dict[BlockRef, Array]
    ) -> None:
        pushes = CompressedPushes(client, TENTH)
        with pytest.raises(InvalidArgumentError):
            pushes.push({TOP: gradient(1)}, base={TOP: 0}, learning_rate_scale=-1.0)
        pushes.push({TOP: gradient(2)}, base={TOP: 0})
        expected = Sparse(0.1).decode(Sparse(0.1).encode(gradient(2)), SHAPE)
        found = total(bank, TOP, before)
        np.testing.assert_allclose(found, expected.astype(np.float64), rtol=1e-3, atol=1e-3)

    def test_a_withheld_block_is_refused_and_the_other_is_not(
        self, bank: FakeBank, client: BankClient
    ) -> None:
        pushes = CompressedPushes(client, TENTH)
        bank.held(TOP).state = BlockState.WITHHELD
        answer = pushes.push({TOP: gradient(1), OTHER: gradient(2)}, base={TOP: 0, OTHER: 0})
        assert [result.reason for result in answer.refused] == [Reason.BLOCK_WITHHELD]
        assert pushes.feedback is not None
        assert pushes.feedback.num_bytes == 4 * SPEC.block_params(1)


def pushes_left(pushes: CompressedPushes) -> Array:
    assert pushes.feedback is not None
    return pushes.feedback._residuals[TOP].values


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"wire": "int4"}, Reason.BAD_DTYPE),
        ({"wire": "sparse", "share": 0.0}, Reason.BAD_CONFIG),
        ({"wire": "int8", "share": 0.1}, Reason.BAD_CONFIG),
        ({"max_residual_bytes": -1}, Reason.BAD_CONFIG),
    ],
)
def test_a_configuration_is_checked(options: dict[str, object], reason: Reason) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        Compression(**options)  # type: ignore[arg-type]
    assert caught.value.reason is reason
