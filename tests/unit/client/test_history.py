"""Clients and earlier states: reading a snapshot, going back to one, giving one up."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from fake_bank import SPEC, FakeBank
from faults import Fault
from in_process import InProcessNetwork
from membank.client import AsyncBankClient, ClientConfig, RetryConfig
from membank.wire.errors import (
    ConflictError,
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
    Reason,
    UnavailableError,
)
from membank.wire.records import Garbage, GarbageKind
from membank.wire.spec import BlockRef, BlockState
from membank.wire.steps import Delete

# Of both shards.
ACROSS = (BlockRef(1, 0), BlockRef(1, 1), BlockRef(2, 1), BlockRef(2, 3))
RETRY = RetryConfig(max_attempts=5, initial_backoff_s=0.001, max_backoff_s=0.002)
CONFIG = ClientConfig(timeout_s=5.0, retry=RETRY)


@pytest.fixture
def bank() -> FakeBank:
    return FakeBank()


@pytest.fixture
def network(bank: FakeBank) -> InProcessNetwork:
    return InProcessNetwork(bank)


@pytest.fixture
async def client(network: InProcessNetwork) -> AsyncIterator[AsyncBankClient]:
    async with await AsyncBankClient.connect(
        network.GATEWAY, config=CONFIG, connector=network
    ) as client:
        yield client


@pytest.fixture
async def pinned(network: InProcessNetwork) -> AsyncIterator[AsyncBankClient]:
    """A client that is pinned to the snapshot "then" for its life."""
    async with await AsyncBankClient.connect(
        network.GATEWAY, config=replace(CONFIG, snapshot="then"), connector=network
    ) as client:
        yield client


def ones(ref: BlockRef) -> NDArray[np.float32]:
    return np.ones(SPEC.block_shape(ref.level), np.float32)


def train(bank: FakeBank, request_id: str) -> None:
    bank.swap({ref: 7 * ones(ref) for ref in ACROSS}, {}, request_id=request_id, dry_run=False)


class TestPinned:
    async def test_a_process_serves_one_state_for_its_life(
        self, bank: FakeBank, client: AsyncBankClient, pinned: AsyncBankClient
    ) -> None:
        then = await client.fetch_blocks(ACROSS)
        await client.snapshot("then")
        for number in range(3):
            train(bank, f"t{number}")
            found = await pinned.fetch_blocks(ACROSS)
            assert found.revision == then.revision
            assert found.versions == then.versions
            for ref in ACROSS:
                np.testing.assert_array_equal(found.weights[ref], then.weights[ref])
        assert (await pinned.fetch(ACROSS, snapshot="")).revision == 3

    async def test_a_single_fetch_reads_another_snapshot(
        self, bank: FakeBank, client: AsyncBankClient
    ) -> None:
        await client.snapshot("then")
        train(bank, "t")
        assert (await client.fetch(ACROSS)).revision == 1
        then = await client.fetch(ACROSS, snapshot="then")
        assert (then.revision, set(then.versions.values())) == (0, {0})
        # The client is none the older for it.
        assert (await client.fetch(ACROSS)).revision == 1

    async def test_held_blocks_are_told_apart_by_version(
        self, bank: FakeBank, client: AsyncBankClient
    ) -> None:
        await client.snapshot("then")
        then = await client.fetch_blocks(ACROSS, snapshot="then")
        train(bank, "t")
        now = await client.fetch_blocks(ACROSS, held=then)
        sent = sum(shard.num_weights_sent for shard in bank.shards)
        again = await client.fetch_blocks(ACROSS, held=then, snapshot="then")
        assert sum(shard.num_weights_sent for shard in bank.shards) == sent
        other = await client.fetch_blocks(ACROSS, held=now, snapshot="then")
        assert sum(shard.num_weights_sent for shard in bank.shards) == sent + len(ACROSS)
        for ref in ACROSS:
            np.testing.assert_array_equal(again.weights[ref], then.weights[ref])
            np.testing.assert_array_equal(other.weights[ref], then.weights[ref])

    async def test_what_this_client_withheld_is_not_read(
        self, bank: FakeBank, client: AsyncBankClient
    ) -> None:
        await client.snapshot("then")
        bank.shards[1].lags = True
        # The shard has not heard of it when it is asked first.
        await client.withhold(BlockRef(1, 1))
        found = await client.fetch_blocks(ACROSS, snapshot="then")
        assert found.states[BlockRef(1, 1)] is BlockState.WITHHELD
        memory = await client.fetch(ACROSS, snapshot="then")
        assert memory.ended_at == BlockRef(1, 1)
        assert set(memory) == {BlockRef(1, 0), BlockRef(2, 1)}

    async def test_an_unknown_snapshot_is_an_answer(
        self, network: InProcessNetwork, client: AsyncBankClient, pinned: AsyncBankClient
    ) -> None:
        for fetch in (client.fetch(ACROSS, snapshot="then"), pinned.fetch(ACROSS)):
            with pytest.raises(NotFoundError) as caught:
                await fetch
            assert caught.value.reason is Reason.UNKNOWN_SNAPSHOT
        # Nothing is tried again.
        assert network.scripts["shard:1"].num_calls("fetch") == 2

    async def test_one_that_is_replaced_while_it_is_read_is_not_mixed(
        self, bank: FakeBank, network: InProcessNetwork, client: AsyncBankClient
    ) -> None:
        await client.snapshot("then")

        def replace_it() -> None:
            if "then" in bank.snapshots and bank.revision == 0:
                bank.delete_snapshot("then", request_id="d")
                train(bank, "t")
                bank.create_snapshot("then")

        network.after_fetch = replace_it
        with pytest.raises(ConflictError) as caught:
            await client.fetch_blocks(ACROSS, snapshot="then")
        assert caught.value.reason is Reason.UNKNOWN_SNAPSHOT
        assert (await client.fetch_blocks(ACROSS, snapshot="then")).revision == 2

    async def test_one_that_is_made_anew_is_refused_by_who_is_pinned_for_life(
        self, bank: FakeBank, client: AsyncBankClient, pinned: AsyncBankClient
    ) -> None:
        await client.snapshot("then")
        await pinned.fetch(ACROSS)
        await client.delete_snapshot("then")
        with pytest.raises(NotFoundError):
            await pinned.fetch(ACROSS)
        train(bank, "t")
        await client.snapshot("then")
        for _ in range(2):
            with pytest.raises(FailedPreconditionError, match="connect anew") as caught:
                await pinned.fetch(ACROSS)
            assert caught.value.reason is Reason.UNKNOWN_SNAPSHOT
        # Who names it in the call takes what it means now.
        assert (await client.fetch(ACROSS, snapshot="then")).revision == 2

    async def test_a_fetch_of_nothing(self, client: AsyncBankClient) -> None:
        await client.snapshot("then")
        assert len(await client.fetch([], snapshot="then")) == 0

    async def test_a_shard_that_moved_is_found_again(
        self, network: InProcessNetwork, bank: FakeBank, client: AsyncBankClient
    ) -> None:
        await client.snapshot("then")
        train(bank, "t")
        network.scripts["shard:2"].plan("fetch", Fault.UNAVAILABLE, Fault.DROP_RESPONSE)
        found = await client.fetch_blocks(ACROSS, snapshot="then")
        assert set(found.versions.values()) == {0}


class TestOperations:
    async def test_back_to_a_revision(self, bank: FakeBank, client: AsyncBankClient) -> None:
        then = await client.fetch_blocks(ACROSS)
        train(bank, "t")
        listed = await client.audit(retained_only=True)
        assert [record.revision for record in listed] == []
        train(bank, "t2")
        assert [r.revision for r in await client.audit(retained_only=True)] == [1]
        report = await client.rollback(0, topic=ACROSS[0], only_block=True)
        assert [change.ref for change in report.changes] == [ACROSS[0]]
        # It is seen by whoever made it.
        now = await client.fetch_blocks(ACROSS)
        np.testing.assert_array_equal(now.weights[ACROSS[0]], then.weights[ACROSS[0]])
        np.testing.assert_array_equal(now.weights[ACROSS[2]], 7.0)

    async def test_a_snapshot_is_given_up_once(
        self, bank: FakeBank, network: InProcessNetwork, client: AsyncBankClient
    ) -> None:
        snapshot = await client.snapshot("then")
        network.scripts[network.GATEWAY].plan("delete_snapshot", Fault.DROP_RESPONSE)
        assert await client.delete_snapshot("then") == snapshot
        assert bank.revision == 1
        # The client asks for nothing older than that from now on.
        bank.shards[0].lags = True
        assert (await client.fetch(ACROSS)).revision == 1

    async def test_garbage(self, bank: FakeBank, client: AsyncBankClient) -> None:
        bank.garbage = (Garbage(kind=GarbageKind.TREE, num_objects=1, num_bytes=9, keys=("k",)),)
        dry = await client.collect_garbage(dry_run=True)
        assert (dry.garbage, dry.num_bytes, bank.keep_revisions) == (bank.garbage, 9, None)
        wet = await client.collect_garbage(keep_revisions=4)
        assert (wet.garbage, bank.keep_revisions) == (dry.garbage, 4)
        assert (await client.collect_garbage()).garbage == ()
        with pytest.raises(InvalidArgumentError):
            await client.collect_garbage(keep_revisions=0)

    async def test_garbage_of_a_service_that_is_down(
        self, network: InProcessNetwork, client: AsyncBankClient
    ) -> None:
        network.scripts[network.GATEWAY].plan("collect_garbage", *[Fault.UNAVAILABLE] * 9)
        with pytest.raises(UnavailableError):
            await client.collect_garbage()
        ids = network.scripts[network.GATEWAY].request_ids
        assert len(ids) == RETRY.max_attempts
        assert len(set(ids)) == 1


async def test_the_receipt_of_a_deletion_can_be_had_again(client: AsyncBankClient) -> None:
    applied = await client.apply([Delete(topic=BlockRef(1, 0))])
    assert applied.receipt
    assert await client.receipt(applied.report.revision) == applied.receipt
    with pytest.raises(NotFoundError) as caught:
        await client.receipt(applied.report.revision + 1)
    assert caught.value.reason is Reason.UNKNOWN_RECEIPT
    with pytest.raises(InvalidArgumentError):
        await client.receipt(-1)
