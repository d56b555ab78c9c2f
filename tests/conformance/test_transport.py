"""What every transport does, checked against the bank behind its back."""

from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import aclosing
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from fake_bank import SPEC, FakeBank
from fake_service import FakeService
from fake_shard import FakeShard
from in_process import InProcessTransport
from layer_notes import LayerNotes
from membank.client import ClientConfig, GrpcTransport, Transport
from membank.client.transport.same_host import SameHostCounters, same_host_connector
from membank.wire.codec import fetch_codec, push_codec
from membank.wire.crc import crc32c
from membank.wire.errors import (
    InvalidArgumentError,
    NotFoundError,
    Reason,
    UnavailableError,
)
from membank.wire.records import (
    Block,
    Gradient,
    TransactionReport,
    Update,
)
from membank.wire.spec import Array, BlockRef, BlockState, dtype_of
from membank.wire.steps import Swap, Withhold

TIMEOUT_S = 10.0
TOPIC = BlockRef(1, 0)
LEAF = BlockRef(2, 1)
OTHER = BlockRef(1, 1)


class TransportSuite:
    """Inherited for each transport; subclasses connect to the gateway or to a shard of `bank`."""

    @pytest.fixture
    def bank(self) -> FakeBank:
        return FakeBank(tree=b"tree" * 100)

    @pytest.fixture
    def shard(self, bank: FakeBank) -> FakeShard:
        return bank.shard_of(TOPIC)

    @pytest.fixture
    def gateway(self) -> Transport:
        raise NotImplementedError

    @pytest.fixture
    def transport(self) -> Transport:
        raise NotImplementedError

    async def test_get_bank(self, bank: FakeBank, gateway: Transport, transport: Transport) -> None:
        for one in (gateway, transport):
            assert await one.get_bank(timeout_s=TIMEOUT_S) == bank.info()

    async def test_get_tree(self, bank: FakeBank, gateway: Transport) -> None:
        assert await gateway.get_tree(timeout_s=TIMEOUT_S) == bank.tree_bytes

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
    async def test_fetch_returns_what_the_shard_keeps(
        self, bank: FakeBank, shard: FakeShard, transport: Transport, dtype: str
    ) -> None:
        shard.blocks[LEAF].version = 3
        bank.transact("nothing", (), lambda ref, kept: None)
        answer = await transport.fetch([LEAF, TOPIC], dtype=dtype, timeout_s=TIMEOUT_S)
        assert answer.revision == 1
        assert [(block.ref, block.version) for block in answer.blocks] == [(LEAF, 3), (TOPIC, 0)]
        for block in answer.blocks:
            assert block.weight is not None
            assert block.weight.dtype == dtype_of(dtype)
            kept = shard.blocks[block.ref].weight.astype(dtype_of(dtype))
            assert block.weight.tobytes() == kept.tobytes()
            assert block.weight.shape == SPEC.block_shape(block.ref.level)
            assert not block.weight.flags.writeable

    async def test_fetch_in_an_encoding_returns_float32(
        self, shard: FakeShard, transport: Transport
    ) -> None:
        codec = fetch_codec("int8")
        buffer = np.zeros(SPEC.block_shape(2), np.float32)
        answer = await transport.fetch(
            [TOPIC, LEAF], dtype="int8", into={LEAF: buffer}, timeout_s=TIMEOUT_S
        )
        for block in answer.blocks:
            kept = shard.blocks[block.ref].weight
            assert block.weight is not None
            assert block.weight.dtype == np.float32
            payload = codec.encode(kept)
            np.testing.assert_array_equal(block.weight, codec.decode(payload, kept.shape))
            assert not block.weight.flags.writeable
            # What came is not the kept block, and says so.
            assert block.header.dtype == "int8"
            assert block.header.num_bytes == payload.nbytes
            assert block.header.crc32c == crc32c(payload)

    async def test_fetch_in_an_encoding_that_there_is_not(self, transport: Transport) -> None:
        with pytest.raises(InvalidArgumentError) as caught:
            await transport.fetch([TOPIC], dtype="sparse", timeout_s=TIMEOUT_S)
        assert caught.value.reason is Reason.BAD_DTYPE

    async def test_fetch_sends_no_content_that_is_held(self, transport: Transport) -> None:
        answer = await transport.fetch([TOPIC, LEAF], held_versions=[0, None], timeout_s=TIMEOUT_S)
        unchanged, sent = answer.blocks
        assert (unchanged.header.unchanged, unchanged.weight) == (True, None)
        assert not sent.header.unchanged
        assert sent.weight is not None

    async def test_fetch_sends_no_content_of_an_older_version(
        self, shard: FakeShard, transport: Transport
    ) -> None:
        shard.blocks[TOPIC].version = 5
        answer = await transport.fetch([TOPIC], held_versions=[4], timeout_s=TIMEOUT_S)
        assert answer.blocks[0].weight is not None

    @pytest.mark.parametrize("state", [BlockState.WITHHELD, BlockState.DELETED])
    async def test_fetch_tells_of_inactive_blocks(
        self, shard: FakeShard, transport: Transport, state: BlockState
    ) -> None:
        shard.blocks[TOPIC].state = state
        answer = await transport.fetch([TOPIC, LEAF], timeout_s=TIMEOUT_S)
        assert [block.header.state for block in answer.blocks] == [state, BlockState.ACTIVE]
        assert [block.weight is None for block in answer.blocks] == [True, False]

    async def test_fetch_below_a_revision_is_refused(self, transport: Transport) -> None:
        with pytest.raises(UnavailableError) as caught:
            await transport.fetch([TOPIC], min_revision=7, timeout_s=TIMEOUT_S)
        assert caught.value.reason is Reason.BEHIND_REVISION

    async def test_fetch_of_what_another_shard_owns_is_refused(self, transport: Transport) -> None:
        with pytest.raises(UnavailableError) as caught:
            await transport.fetch([OTHER], timeout_s=TIMEOUT_S)
        assert caught.value.reason is Reason.NOT_OWNER

    async def test_fetch_of_an_unknown_block(self, transport: Transport) -> None:
        with pytest.raises(NotFoundError) as caught:
            await transport.fetch([BlockRef(1, 99)], timeout_s=TIMEOUT_S)
        assert caught.value.reason is Reason.UNKNOWN_CLUSTER

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
    @pytest.mark.parametrize("layers_per_part", [1, 2, 99])
    async def test_fetch_layers_tells_of_layers_that_are_there(
        self,
        bank: FakeBank,
        shard: FakeShard,
        transport: Transport,
        dtype: str,
        layers_per_part: int,
    ) -> None:
        shard.blocks[LEAF].version = 3
        bank.transact("nothing", (), lambda ref, kept: None)
        heard = LayerNotes()
        await transport.fetch_layers(
            [LEAF, TOPIC],
            heard,
            layers_per_part=layers_per_part,
            dtype=dtype,
            min_revision=1,
            timeout_s=TIMEOUT_S,
        )
        assert list(heard.blocks) == [LEAF, TOPIC]
        for note in heard.notes:
            kept = shard.blocks[note.ref].weight.astype(dtype_of(dtype))
            assert note.layers is not None
            assert note.layers.dtype == dtype_of(dtype)
            assert note.layers.tobytes() == kept[: note.num_layers].tobytes()
            assert (note.revision, note.version) == (1, shard.blocks[note.ref].version)
        for ref, block in heard.blocks.items():
            counts = heard.counts(ref)
            assert counts == sorted(set(counts))
            assert counts[-1] == SPEC.num_layers
            assert block.weight is not None
            assert not block.weight.flags.writeable
            assert block.header.num_bytes == block.weight.nbytes
            assert (block.header.first_layer, block.header.num_layers) == (0, 0)

    async def test_fetch_layers_into_the_callers_memory(
        self, shard: FakeShard, transport: Transport
    ) -> None:
        buffer = np.zeros(SPEC.block_shape(2), np.float32)
        heard = LayerNotes()
        await transport.fetch_layers(
            [TOPIC, LEAF], heard, layers_per_part=1, into={LEAF: buffer}, timeout_s=TIMEOUT_S
        )
        np.testing.assert_array_equal(buffer, shard.blocks[LEAF].weight)
        weight = heard.blocks[LEAF].weight
        assert weight is not None
        assert np.shares_memory(weight, buffer)

    @pytest.mark.parametrize("state", [BlockState.WITHHELD, BlockState.DELETED])
    async def test_fetch_layers_tells_of_inactive_blocks(
        self, shard: FakeShard, transport: Transport, state: BlockState
    ) -> None:
        shard.blocks[TOPIC].state = state
        heard = LayerNotes()
        await transport.fetch_layers([TOPIC, LEAF], heard, layers_per_part=1, timeout_s=TIMEOUT_S)
        assert heard.blocks[TOPIC].header.state is state
        assert heard.blocks[TOPIC].weight is None
        assert heard.counts(TOPIC) == [0]
        assert heard.counts(LEAF)[-1] == SPEC.num_layers

    async def test_fetch_layers_fails_as_a_fetch_does(self, transport: Transport) -> None:
        heard = LayerNotes()
        with pytest.raises(UnavailableError) as caught:
            await transport.fetch_layers(
                [TOPIC], heard, layers_per_part=1, min_revision=7, timeout_s=TIMEOUT_S
            )
        assert caught.value.reason is Reason.BEHIND_REVISION
        with pytest.raises(NotFoundError):
            await transport.fetch_layers(
                [BlockRef(1, 99)], heard, layers_per_part=1, timeout_s=TIMEOUT_S
            )
        assert not heard.notes

    async def test_fetch_layers_ends_with_what_its_listener_raises(
        self, transport: Transport
    ) -> None:
        class Refusing(LayerNotes):
            def take(self, revision: int, block: Block, num_layers: int) -> None:
                raise ArithmeticError("enough")

        with pytest.raises(ArithmeticError):
            await transport.fetch_layers(
                [TOPIC], Refusing(), layers_per_part=1, timeout_s=TIMEOUT_S
            )
        # And the transport goes on.
        answer = await transport.fetch([TOPIC], timeout_s=TIMEOUT_S)
        assert answer.blocks[0].weight is not None

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
    async def test_push_applies_each_gradient(
        self, shard: FakeShard, transport: Transport, dtype: str
    ) -> None:
        before = {ref: shard.blocks[ref].weight.astype(np.float32) for ref in (TOPIC, LEAF)}
        gradient = np.full(SPEC.block_shape(1), 2.0, dtype_of(dtype))
        update = _update(Gradient(ref=TOPIC, base_version=0, values=gradient))
        answer = await transport.push(replace(update, learning_rate_scale=0.5), timeout_s=TIMEOUT_S)
        assert not answer.duplicate
        assert [(r.ref, r.accepted, r.version) for r in answer.results] == [(TOPIC, True, 1)]
        np.testing.assert_array_equal(shard.blocks[TOPIC].weight, before[TOPIC] - 0.5)
        np.testing.assert_array_equal(shard.blocks[LEAF].weight, before[LEAF])

    @pytest.mark.parametrize("name", ["int8", "sparse"])
    async def test_push_takes_what_an_encoding_made_of_a_gradient(
        self, shard: FakeShard, transport: Transport, name: str
    ) -> None:
        before = shard.blocks[TOPIC].weight.astype(np.float32)
        codec = push_codec(name)
        values = np.random.default_rng(0).standard_normal(SPEC.block_shape(1), np.float32)
        payload = codec.encode(values)
        update = _update(Gradient(ref=TOPIC, base_version=0, values=payload, encoding=name))
        answer = await transport.push(update, timeout_s=TIMEOUT_S)
        assert [(r.ref, r.accepted, r.version) for r in answer.results] == [(TOPIC, True, 1)]
        rate = np.float64(SPEC.levels[0].learning_rate)
        applied = rate * codec.decode(payload, values.shape).astype(np.float32)
        after = shard.blocks[TOPIC].weight.astype(np.float32)
        np.testing.assert_allclose(after, before - applied, rtol=1e-5)

    async def test_push_is_applied_once_per_request_id(
        self, shard: FakeShard, transport: Transport
    ) -> None:
        update = _update(Gradient(ref=TOPIC, base_version=0, values=_ones(TOPIC)))
        first = await transport.push(update, timeout_s=TIMEOUT_S)
        second = await transport.push(update, timeout_s=TIMEOUT_S)
        assert (first.duplicate, second.duplicate) == (False, True)
        assert first.results == second.results
        assert shard.blocks[TOPIC].version == 1

    async def test_push_says_why_a_gradient_was_refused(
        self, shard: FakeShard, transport: Transport
    ) -> None:
        shard.blocks[TOPIC].version = SPEC.max_staleness + 1
        shard.blocks[BlockRef(2, 0)].state = BlockState.WITHHELD
        gradients = [
            Gradient(ref=ref, base_version=0, values=_ones(ref))
            for ref in (TOPIC, BlockRef(2, 0), LEAF)
        ]
        answer = await transport.push(_update(*gradients), timeout_s=TIMEOUT_S)
        reasons = [result.reason for result in answer.results]
        assert reasons == [Reason.STALE_VERSION, Reason.BLOCK_WITHHELD, None]
        assert [refused.ref for refused in answer.refused] == [TOPIC, BlockRef(2, 0)]
        assert answer.versions == {TOPIC: SPEC.max_staleness + 1, BlockRef(2, 0): 0, LEAF: 1}

    async def test_watch_misses_nothing_once_it_is_on(
        self, bank: FakeBank, shard: FakeShard, transport: Transport
    ) -> None:
        async with aclosing(transport.watch([TOPIC], admin_only=True)) as answers:
            assert (await anext(answers)).events == ()
            shard.push(_update(Gradient(ref=TOPIC, base_version=0, values=_ones(TOPIC))))
            bank.apply([Withhold(topic=TOPIC)], request_id="", dry_run=False)
            (event,) = (await anext(answers)).events
        assert (event.ref, event.version, event.state) == (TOPIC, 2, BlockState.WITHHELD)

    async def test_a_fetch_of_a_snapshot(
        self, bank: FakeBank, shard: FakeShard, gateway: Transport, transport: Transport
    ) -> None:
        then = {ref: bank.held(ref).weight.copy() for ref in (TOPIC, LEAF)}
        await gateway.create_snapshot("one", request_id="s", timeout_s=TIMEOUT_S)
        await _swap(gateway, {ref: _ones(ref) for ref in then}, {})
        shard.blocks[LEAF].state = BlockState.WITHHELD
        answer = await transport.fetch(
            [TOPIC, LEAF], min_revision=1, snapshot="one", timeout_s=TIMEOUT_S
        )
        topic, leaf = answer.blocks
        assert (answer.revision, topic.version, leaf.version) == (0, 0, 1)
        np.testing.assert_array_equal(topic.weight, then[TOPIC])
        assert (leaf.weight, leaf.header.state) == (None, BlockState.WITHHELD)

    async def test_a_snapshot_that_is_given_up(
        self, bank: FakeBank, gateway: Transport, transport: Transport
    ) -> None:
        snapshot = await gateway.create_snapshot("one", request_id="s", timeout_s=TIMEOUT_S)
        given_up = await gateway.delete_snapshot("one", request_id="d", timeout_s=TIMEOUT_S)
        assert given_up == (snapshot, 1)
        assert await gateway.list_snapshots(timeout_s=TIMEOUT_S) == ()
        with pytest.raises(NotFoundError) as caught:
            await transport.fetch([TOPIC], snapshot="one", timeout_s=TIMEOUT_S)
        assert caught.value.reason is Reason.UNKNOWN_SNAPSHOT


class TestInProcessTransport(TransportSuite):
    @pytest.fixture
    def gateway(self, bank: FakeBank) -> Transport:
        return InProcessTransport(bank)

    @pytest.fixture
    def transport(self, bank: FakeBank, shard: FakeShard) -> Transport:
        return InProcessTransport(bank, shard)


class TestGrpcTransport(TransportSuite):
    @pytest.fixture
    def service(self, bank: FakeBank) -> Iterator[FakeService]:
        service = FakeService(bank)
        yield service
        service.close()

    @pytest.fixture
    async def gateway(self, service: FakeService) -> AsyncIterator[Transport]:
        transport = GrpcTransport(service.endpoint, ClientConfig())
        yield transport
        await transport.close()

    @pytest.fixture
    async def transport(
        self, bank: FakeBank, shard: FakeShard, service: FakeService
    ) -> AsyncIterator[Transport]:
        transport = GrpcTransport(bank.endpoints[shard.shard_id], ClientConfig())
        yield transport
        await transport.close()
        assert not transport.direct_stats.fallbacks


class TestGrpcioTransport(TestGrpcTransport):
    """Fetches and pushes over the channel of all other calls."""

    @pytest.fixture
    async def transport(
        self, bank: FakeBank, shard: FakeShard, service: FakeService
    ) -> AsyncIterator[Transport]:
        config = ClientConfig(max_data_connections=0)
        transport = GrpcTransport(bank.endpoints[shard.shard_id], config)
        yield transport
        await transport.close()
        assert transport.direct_stats.num_fetches == 0


class TestDataPortTransport(TestGrpcTransport):
    """Fetches and pushes over the port that a shard has for them."""

    @pytest.fixture
    def service(self, bank: FakeBank) -> Iterator[FakeService]:
        service = FakeService(bank, data_port=True)
        yield service
        service.close()

    @pytest.fixture
    async def transport(
        self, bank: FakeBank, shard: FakeShard, service: FakeService
    ) -> AsyncIterator[Transport]:
        transport = GrpcTransport(bank.endpoints[shard.shard_id], ClientConfig())
        # Tells it of the port.
        await transport.fetch([TOPIC], timeout_s=TIMEOUT_S)
        before = transport.direct_stats
        yield transport
        await transport.close()
        after = transport.direct_stats
        assert (before.num_fetches, before.num_data_port) == (1, 0)
        assert after.num_data_port == after.num_fetches - 1 + after.num_pushes
        assert (after.num_data_port_failures, after.fallbacks) == (0, {})


class TestSameHostTransport(TestGrpcTransport):
    """The data path through shared memory."""

    @pytest.fixture
    def service(self, bank: FakeBank) -> Iterator[FakeService]:
        service = FakeService(bank, same_host=True)
        yield service
        service.close()

    @pytest.fixture
    async def transport(
        self, bank: FakeBank, shard: FakeShard, service: FakeService
    ) -> AsyncIterator[Transport]:
        counters = SameHostCounters()
        connect = same_host_connector(ClientConfig(), counters)
        transport = connect(bank.endpoints[shard.shard_id])
        yield transport
        await transport.close()
        assert not counters.stats.fallbacks


@pytest.mark.parametrize("kind", [GrpcTransport, InProcessTransport])
def test_has_the_whole_surface(kind: type) -> None:
    surface = {name for name in dir(Transport) if not name.startswith("_")}
    assert {name for name in surface if callable(getattr(kind, name, None))} == surface


def _ones(ref: BlockRef) -> NDArray[np.float32]:
    return np.ones(SPEC.block_shape(ref.level), np.float32)


def _update(*gradients: Gradient) -> Update:
    return Update(request_id="push-1", step=4, gradients=gradients)


async def _swap(
    gateway: Transport,
    weights: Mapping[BlockRef, Array],
    expected: Mapping[BlockRef, int],
    request_id: str = "swap-1",
) -> TransactionReport:
    steps = [
        Swap(ref=ref, weight=weight, expected_version=expected.get(ref))
        for ref, weight in weights.items()
    ]
    applied = await gateway.apply(steps, request_id=request_id, dry_run=False, timeout_s=TIMEOUT_S)
    return applied.report
