"""Fetched blocks land where their caller says, or in memory that nobody else sees."""

from __future__ import annotations

import gc
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest

from fake_bank import SPEC, FakeBank
from fake_service import FakeService
from faults import Fault
from membank.client import (
    AsyncBankClient,
    CacheConfig,
    ClientConfig,
    GrpcTransport,
    RetryConfig,
)
from membank.wire.buffers import MIN_POOLED_BYTES, BufferPool
from membank.wire.errors import InvalidArgumentError, MembankError, Reason
from membank.wire.spec import Array, BlockRef, BlockState, LevelSpec

A, B = BlockRef(1, 0), BlockRef(1, 1)
# Blocks of 96 KiB and 48 KiB: large enough for the pool.
WIDE = replace(
    SPEC,
    width=1024,
    levels=(LevelSpec(fan_out=4, block_width=4), LevelSpec(fan_out=2, block_width=2)),
)
CONFIG = ClientConfig(
    same_host=None, retry=RetryConfig(initial_backoff_s=0.001, max_backoff_s=0.02)
)


@pytest.fixture
def bank() -> FakeBank:
    return FakeBank(spec=WIDE)


@pytest.fixture
def service(bank: FakeBank) -> Iterator[FakeService]:
    service = FakeService(bank)
    yield service
    service.close()


@pytest.fixture(params=["plain", "cached"])
async def client(
    service: FakeService, request: pytest.FixtureRequest
) -> AsyncIterator[AsyncBankClient]:
    config = replace(CONFIG, cache=CacheConfig() if request.param == "cached" else None)
    async with await AsyncBankClient.connect(service.endpoint, config=config) as client:
        yield client


def buffer(ref: BlockRef, dtype: npt.DTypeLike = np.float32) -> Array:
    return np.full(WIDE.block_shape(ref.level), 7, dtype)


def change(bank: FakeBank, ref: BlockRef, value: float) -> None:
    held = bank.held(ref)
    held.weight = np.full_like(held.weight, value)
    held.version += 1


class TestCallersBuffers:
    async def test_hold_the_weights_afterwards(
        self, bank: FakeBank, client: AsyncBankClient
    ) -> None:
        into = {A: buffer(A), BlockRef(1, 3): buffer(B)}
        fetched = await client.fetch_blocks([A, B], into=into)
        np.testing.assert_array_equal(into[A], bank.held(A).weight)
        np.testing.assert_array_equal(fetched.weights[B], bank.held(B).weight)
        assert (into[BlockRef(1, 3)] == 7).all()  # of a block that was not asked for
        assert np.shares_memory(fetched.weights[A], into[A])
        with pytest.raises(ValueError, match="read-only"):
            fetched.weights[A][...] = 0
        assert into[A].flags.writeable

    async def test_hold_them_in_the_dtype_asked_for(
        self, bank: FakeBank, client: AsyncBankClient
    ) -> None:
        into = {A: buffer(A, ml_dtypes.bfloat16)}
        await client.fetch([A], dtype="bfloat16", into=into)
        np.testing.assert_array_equal(into[A], bank.held(A).weight.astype(ml_dtypes.bfloat16))

    async def test_hold_what_did_not_travel_too(
        self, bank: FakeBank, service: FakeService, client: AsyncBankClient
    ) -> None:
        first = await client.fetch_blocks([A, B])
        change(bank, B, 3.0)
        into = {A: buffer(A), B: buffer(B)}
        second = await client.fetch_blocks([A, B], held=first, into=into)
        for ref in (A, B):
            np.testing.assert_array_equal(into[ref], bank.held(ref).weight)
            assert np.shares_memory(second.weights[ref], into[ref])
        assert (first.weights[B] != 3.0).any()

    async def test_may_be_those_of_the_blocks_that_are_held(
        self, bank: FakeBank, client: AsyncBankClient
    ) -> None:
        into = {A: buffer(A), B: buffer(B)}
        held = await client.fetch_blocks([A, B], into=into)
        change(bank, A, 5.0)
        await client.fetch_blocks([A, B], held=held, into=into)
        for ref in (A, B):
            np.testing.assert_array_equal(into[ref], bank.held(ref).weight)

    async def test_may_change_places(self, bank: FakeBank, client: AsyncBankClient) -> None:
        slots = [buffer(A), buffer(B)]
        held = await client.fetch_blocks([A, B], into=dict(zip((A, B), slots, strict=True)))
        fetched = await client.fetch_blocks(
            [A, B], held=held, into=dict(zip((B, A), slots, strict=True))
        )
        np.testing.assert_array_equal(slots[1], bank.held(A).weight)
        np.testing.assert_array_equal(slots[0], bank.held(B).weight)
        np.testing.assert_array_equal(fetched.weights[A], bank.held(A).weight)

    async def test_hold_what_is_decoded(self, bank: FakeBank, client: AsyncBankClient) -> None:
        into = {A: buffer(A)}
        fetched = await client.fetch_blocks([A, B], dtype="int8", into=into)
        assert np.shares_memory(fetched.weights[A], into[A])
        kept = bank.held(A).weight.astype(np.float32)
        np.testing.assert_allclose(into[A].astype(np.float32), kept, atol=np.abs(kept).max() / 253)
        assert fetched.weights[B].dtype == np.float32

    async def test_are_of_the_type_that_the_weights_will_have(
        self, client: AsyncBankClient
    ) -> None:
        with pytest.raises(InvalidArgumentError, match="int8 are of float32") as caught:
            await client.fetch_blocks([A], dtype="int8", into={A: buffer(A, np.int8)})
        assert caught.value.reason is Reason.BAD_DTYPE

    async def test_stay_as_they_are_without_a_weight(
        self, bank: FakeBank, client: AsyncBankClient
    ) -> None:
        bank.held(A).state = BlockState.WITHHELD
        into = {A: buffer(A)}
        fetched = await client.fetch_blocks([A], into=into)
        assert fetched[A].weight is None
        assert (into[A] == 7).all()

    async def test_are_the_cache_s_business_never(
        self, bank: FakeBank, client: AsyncBankClient
    ) -> None:
        into = {A: buffer(A)}
        await client.fetch_blocks([A], into=into)
        into[A][...] = 9
        np.testing.assert_array_equal(
            (await client.fetch_blocks([A])).weights[A], bank.held(A).weight
        )

    async def test_are_right_where_the_stream_was_cut(
        self, bank: FakeBank, service: FakeService, client: AsyncBankClient
    ) -> None:
        service.scripts["shard-0"].plan("FetchBlocks", Fault.CUT)
        into = {A: buffer(A)}
        await client.fetch_blocks([A], into=into)
        np.testing.assert_array_equal(into[A], bank.held(A).weight)

    @pytest.mark.parametrize(
        ("bad", "reason", "message"),
        [
            (np.empty((2, 3), np.float32), Reason.BAD_SHAPE, "has shape"),
            (buffer(A, np.float16), Reason.BAD_DTYPE, "fetched as float32"),
            (np.asfortranarray(buffer(A)), None, "C-contiguous"),
            (np.broadcast_to(np.float32(0), WIDE.block_shape(1)), None, "read-only"),
        ],
    )
    async def test_that_do_not_fit_are_refused(
        self,
        service: FakeService,
        client: AsyncBankClient,
        bad: Array,
        reason: Reason | None,
        message: str,
    ) -> None:
        with pytest.raises(InvalidArgumentError, match=message) as caught:
            await client.fetch_blocks([A], into={A: bad})
        assert reason in (None, caught.value.reason)
        assert service.scripts["shard-0"].num_calls("FetchBlocks") == 0

    async def test_that_overlap_are_refused(self, client: AsyncBankClient) -> None:
        one = buffer(A)
        with pytest.raises(InvalidArgumentError, match="overlap"):
            await client.fetch_blocks([A, B], into={A: one, B: one})


class TestPooledMemory:
    @pytest.fixture
    def pool(self) -> BufferPool:
        return BufferPool(1 << 20)

    @pytest.fixture
    async def transport(
        self, service: FakeService, pool: BufferPool
    ) -> AsyncIterator[GrpcTransport]:
        transport = GrpcTransport(service.bank.endpoints["shard-0"], CONFIG, pool=pool)
        yield transport
        await transport.close()

    async def test_is_used_again_when_nobody_refers_to_the_weight(
        self, bank: FakeBank, pool: BufferPool, transport: GrpcTransport
    ) -> None:
        num_bytes = bank.held(A).weight.nbytes
        assert num_bytes >= MIN_POOLED_BYTES
        answer = await transport.fetch([A], timeout_s=5.0)
        weight = answer.blocks[0].weight
        del answer
        gc.collect()
        assert pool.idle_bytes == 0
        change(bank, A, 3.0)
        await transport.fetch([A], timeout_s=5.0)
        assert weight is not None
        assert (weight != 3.0).any()
        del weight
        gc.collect()
        assert pool.idle_bytes == 2 * num_bytes
        await transport.fetch([A], timeout_s=5.0)
        gc.collect()
        assert pool.idle_bytes == 2 * num_bytes

    @pytest.mark.parametrize("fault", [Fault.CUT, Fault.SHORT, Fault.WRONG_CRC])
    async def test_comes_back_from_a_fetch_that_failed(
        self,
        bank: FakeBank,
        service: FakeService,
        pool: BufferPool,
        transport: GrpcTransport,
        fault: Fault,
    ) -> None:
        service.scripts["shard-0"].plan("FetchBlocks", fault)
        with pytest.raises(MembankError) as caught:
            await transport.fetch([A], timeout_s=5.0)
        del caught
        gc.collect()
        assert pool.idle_bytes == bank.held(A).weight.nbytes
