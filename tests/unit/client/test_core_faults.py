"""The client when shards fail, move and are operated on, against a bank in this process."""

import asyncio
import json
from collections.abc import AsyncIterator

import numpy as np
import pytest

from core_rig import ACROSS, CONFIG, PATH, RETRY, base, gradients, ones
from fake_bank import FakeBank
from faults import Fault
from in_process import InProcessNetwork
from membank.client import AsyncBankClient, ClientConfig, RetryConfig, Transaction
from membank.wire.errors import (
    ConflictError,
    DeadlineError,
    InternalError,
    InvalidArgumentError,
    Reason,
    ResourceExhaustedError,
    UnavailableError,
)
from membank.wire.spec import BlockRef, BlockState


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


class TestRetries:
    @pytest.mark.parametrize("fault", [Fault.UNAVAILABLE, Fault.NOT_OWNER, Fault.OVERLOADED])
    async def test_go_on_until_the_service_is_back(
        self, network: InProcessNetwork, client: AsyncBankClient, fault: Fault
    ) -> None:
        network.scripts["shard:1"].plan("fetch", fault, fault)
        assert list(await client.fetch(PATH)) == list(PATH)
        assert network.scripts["shard:1"].num_calls("fetch") == 3

    @pytest.mark.parametrize(
        ("fault", "error"),
        [(Fault.UNAVAILABLE, UnavailableError), (Fault.OVERLOADED, ResourceExhaustedError)],
    )
    async def test_end_with_the_budget(
        self,
        network: InProcessNetwork,
        client: AsyncBankClient,
        fault: Fault,
        error: type[Exception],
    ) -> None:
        network.scripts["shard:1"].plan("fetch", *[fault] * 9)
        with pytest.raises(error):
            await client.fetch(PATH)
        assert network.scripts["shard:1"].num_calls("fetch") == RETRY.max_attempts

    async def test_end_with_the_deadline(self, network: InProcessNetwork) -> None:
        network.scripts["shard:1"].plan("fetch", *[Fault.UNAVAILABLE] * 99)
        config = ClientConfig(
            retry=RetryConfig(max_attempts=99, initial_backoff_s=1e9, max_backoff_s=1e9)
        )
        async with await AsyncBankClient.connect(
            network.GATEWAY, config=config, connector=network
        ) as client:
            with pytest.raises(UnavailableError):
                await client.fetch(PATH, timeout_s=1.0)
        # The first wait would already pass the deadline.
        assert network.scripts["shard:1"].num_calls("fetch") == 1

    @pytest.mark.parametrize(
        ("fault", "error"), [(Fault.SLOW, DeadlineError), (Fault.INTERNAL, InternalError)]
    )
    async def test_do_not_repeat_answers(
        self,
        network: InProcessNetwork,
        client: AsyncBankClient,
        fault: Fault,
        error: type[Exception],
    ) -> None:
        network.scripts["shard:1"].plan("push", fault)
        with pytest.raises(error):
            await client.push(gradients(PATH[0]), base=base(PATH[0]))
        assert network.scripts["shard:1"].num_calls("push") == 1

    async def test_prefer_the_answer_of_one_shard_to_the_silence_of_another(
        self, network: InProcessNetwork, client: AsyncBankClient
    ) -> None:
        network.scripts["shard:1"].plan("fetch", Fault.UNAVAILABLE)
        network.scripts["shard:2"].plan("fetch", Fault.INTERNAL)
        with pytest.raises(InternalError):
            await client.fetch_blocks(ACROSS)

    async def test_share_one_request_id_in_admin_calls(
        self, bank: FakeBank, network: InProcessNetwork, client: AsyncBankClient
    ) -> None:
        script = network.scripts[network.GATEWAY]
        script.plan("apply", Fault.UNAVAILABLE, Fault.DROP_RESPONSE)
        report = await client.withhold(PATH[1])
        assert (report.revision, bank.revision) == (1, 1)
        assert script.num_calls("apply") == 3
        assert len(set(script.request_ids)) == 1

    async def test_every_call_has_a_finite_deadline(self, client: AsyncBankClient) -> None:
        for timeout_s in (0.0, -1.0, float("inf"), float("nan")):
            with pytest.raises(InvalidArgumentError, match="timeout_s"):
                await client.fetch(PATH, timeout_s=timeout_s)


class TestPlacement:
    async def test_is_learnt_again_from_a_shard_that_moved(
        self, bank: FakeBank, network: InProcessNetwork, client: AsyncBankClient
    ) -> None:
        await client.fetch(PATH)
        network.remove("shard:1")
        network.place("shard-0", bank.shards[0], "shard:9")
        assert list(await client.fetch_blocks(ACROSS)) == list(ACROSS)
        assert network.scripts["shard:9"].num_calls("fetch") == 1
        # The part of the other shard was answered at the first attempt.
        assert network.scripts["shard:2"].num_calls("fetch") == 1
        assert network.transports["shard:1"].is_closed

    async def test_is_learnt_from_a_shard_where_the_gateway_is_down(
        self, bank: FakeBank, network: InProcessNetwork, client: AsyncBankClient
    ) -> None:
        network.scripts[network.GATEWAY].plan("get_bank", *[Fault.UNAVAILABLE] * 99)
        network.remove("shard:1")
        network.place("shard-0", bank.shards[0], "shard:9")
        assert list(await client.fetch(PATH)) == list(PATH)

    async def test_an_older_one_is_ignored(
        self, bank: FakeBank, network: InProcessNetwork, client: AsyncBankClient
    ) -> None:
        bank.generation -= 1
        bank.endpoints["shard-0"] = "nowhere:1"
        await client.info()
        assert list(await client.fetch(PATH)) == list(PATH)

    async def test_one_refresh_serves_all_that_need_one(
        self, network: InProcessNetwork, client: AsyncBankClient
    ) -> None:
        network.scripts["shard:1"].plan("fetch", Fault.NOT_OWNER, Fault.NOT_OWNER)
        before = network.scripts[network.GATEWAY].num_calls("get_bank")
        await asyncio.gather(client.fetch(PATH), client.fetch(PATH))
        assert network.scripts[network.GATEWAY].num_calls("get_bank") == before + 1

    async def test_a_partition_without_shard_is_waited_for(
        self, bank: FakeBank, network: InProcessNetwork, client: AsyncBankClient
    ) -> None:
        bank.endpoints["shard-0"] = ""
        bank.generation += 1
        await client.info()
        with pytest.raises(UnavailableError, match="no shard serves partition 0"):
            await client.fetch(PATH)
        network.place("shard-0", bank.shards[0], "shard:1")
        assert list(await client.fetch(PATH)) == list(PATH)


class TestAdmin:
    async def test_transaction_is_one_call(
        self, bank: FakeBank, network: InProcessNetwork, client: AsyncBankClient
    ) -> None:
        async with client.transaction() as transaction:
            transaction.swap(ACROSS[0], ones(ACROSS[0]), expected_version=0)
            transaction.swap(ACROSS[1], ones(ACROSS[1]))
            assert bank.revision == 0
        assert transaction.report is not None
        assert (transaction.report.revision, len(transaction.report.changes)) == (1, 2)
        assert network.scripts[network.GATEWAY].num_calls("apply") == 1

    async def test_transaction_that_fails_changes_nothing(
        self, bank: FakeBank, client: AsyncBankClient
    ) -> None:
        async def swap_of_a_stale_version() -> None:
            async with client.transaction() as transaction:
                transaction.swap(ACROSS[0], ones(ACROSS[0]))
                transaction.swap(ACROSS[1], ones(ACROSS[1]), expected_version=7)

        async def swap_that_is_given_up() -> None:
            async with client.transaction() as transaction:
                transaction.swap(ACROSS[0], ones(ACROSS[0]))
                raise RuntimeError("given up")

        with pytest.raises(ConflictError):
            await swap_of_a_stale_version()
        with pytest.raises(RuntimeError, match="given up"):
            await swap_that_is_given_up()
        assert bank.revision == 0

    def test_transaction_takes_a_block_once(self) -> None:
        transaction = Transaction()
        transaction.swap(ACROSS[0], ones(ACROSS[0]))
        with pytest.raises(InvalidArgumentError, match="already, by swap"):
            transaction.delete(ACROSS[0])
        transaction.place(ACROSS[0], label="iron")
        with pytest.raises(InvalidArgumentError, match="already, by place"):
            transaction.place(ACROSS[0], label="steel")
        assert [step.kind for step in transaction.steps] == ["swap", "place"]

    async def test_transaction_says_what_was_done(
        self, bank: FakeBank, client: AsyncBankClient
    ) -> None:
        before = {ref: bank.held(ref).weight.astype(np.float32) for ref in ACROSS}
        async with client.transaction(dry_run=True) as dry:
            dry.delete(PATH[0])
        assert dry.report is not None
        assert (dry.report.dry_run, dry.receipt, bank.revision) == (True, b"", 0)
        async with client.transaction(request_id="t") as transaction:
            transaction.blend(ACROSS[0], ACROSS[1], share=0.25)
            transaction.copy(ACROSS[0], ACROSS[1], expected_version=0, expected_source_version=0)
            transaction.withhold(BlockRef(1, 2), only_block=True)
            transaction.delete(BlockRef(1, 3))
            transaction.place(BlockRef(1, 2), remove_centroid=True)
        assert transaction.report is not None
        assert (transaction.report.revision, list(bank.reports)) == (1, ["t"])
        assert json.loads(transaction.receipt) == {"deleted": ["1/3"]}
        blended = 0.75 * before[ACROSS[0]] + 0.25 * before[ACROSS[1]]
        np.testing.assert_array_equal(bank.held(ACROSS[0]).weight, blended)
        np.testing.assert_array_equal(bank.held(ACROSS[1]).weight, before[ACROSS[0]])
        async with client.transaction() as again:
            again.scale(ACROSS[0], 2.0)
            again.zero(ACROSS[1])
            again.restore(BlockRef(1, 2))
        np.testing.assert_array_equal(bank.held(ACROSS[0]).weight, 2 * blended)
        assert not bank.held(ACROSS[1]).weight.any()
        assert bank.held(BlockRef(1, 2)).state is BlockState.ACTIVE

    async def test_transaction_without_a_step_asks_nobody(
        self, bank: FakeBank, client: AsyncBankClient
    ) -> None:
        async with client.transaction() as transaction:
            pass
        assert (transaction.applied, transaction.report, bank.revision) == (None, None, 0)

    async def test_export_survives_an_attempt_that_was_cut(
        self, bank: FakeBank, network: InProcessNetwork, client: AsyncBankClient
    ) -> None:
        network.scripts[network.GATEWAY].plan("export", Fault.DROP_RESPONSE)
        assert await client.export(PATH[0]) == bank.export(PATH[0])

    async def test_import_survives_a_lost_answer(
        self, bank: FakeBank, network: InProcessNetwork, client: AsyncBankClient
    ) -> None:
        pack = await client.export(PATH[0])
        network.scripts[network.GATEWAY].plan("import_pack", Fault.DROP_RESPONSE)
        answer = await client.import_pack(pack)
        assert (answer.topic, bank.revision) == (PATH[0], 1)

    async def test_swap_is_checked_before_it_is_sent(
        self, network: InProcessNetwork, client: AsyncBankClient
    ) -> None:
        with pytest.raises(InvalidArgumentError) as caught:
            await client.swap({PATH[0]: ones(PATH[1])})
        assert caught.value.reason is Reason.BAD_SHAPE
        with pytest.raises(InvalidArgumentError, match="no steps"):
            await client.swap({})
        assert network.scripts[network.GATEWAY].num_calls("apply") == 0
