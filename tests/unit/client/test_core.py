"""The logic over a whole bank, with shards in this process and scripted faults."""

from collections.abc import AsyncIterator

import numpy as np
import pytest
from numpy.typing import NDArray

from core_rig import ACROSS, CONFIG, PATH, base, gradients, ones
from fake_bank import SPEC, FakeBank
from faults import Fault
from in_process import InProcessNetwork
from membank.client import AsyncBankClient, ClientConfig, Memory
from membank.wire.codec import PUSH_CODECS, Encoded, Sparse, push_codec
from membank.wire.errors import (
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
    Reason,
    UnavailableError,
)
from membank.wire.spec import BlockRef, BlockState, dtype_of


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


class TestConnect:
    async def test_learns_the_bank(self, bank: FakeBank, client: AsyncBankClient) -> None:
        assert client.spec == bank.spec
        assert await client.info() == bank.info()

    async def test_any_shard_will_do(self, bank: FakeBank, network: InProcessNetwork) -> None:
        async with await AsyncBankClient.connect("shard:2", connector=network) as client:
            memory = await client.fetch(PATH)
        assert list(memory) == list(PATH)

    async def test_a_service_without_a_bank_is_accepted(self) -> None:
        network = InProcessNetwork(FakeBank(spec=None))
        async with await AsyncBankClient.connect(network.GATEWAY, connector=network) as client:
            with pytest.raises(NotFoundError):
                _ = client.spec
            with pytest.raises(NotFoundError):
                await client.fetch(PATH)
            created = await client.create_bank(SPEC)
            assert created.bank_id != SPEC.bank_id
            assert (await client.info()).spec == created

    async def test_a_service_without_the_named_bank_is_not(self) -> None:
        network = InProcessNetwork(FakeBank(spec=None))
        with pytest.raises(NotFoundError):
            await AsyncBankClient.connect(
                network.GATEWAY, config=ClientConfig(bank="other"), connector=network
            )

    async def test_nobody_there(self, network: InProcessNetwork) -> None:
        network.scripts[network.GATEWAY].plan("get_bank", *[Fault.UNAVAILABLE] * 5)
        with pytest.raises(UnavailableError):
            await AsyncBankClient.connect(network.GATEWAY, config=CONFIG, connector=network)
        assert network.scripts[network.GATEWAY].num_calls("get_bank") == 5
        assert network.transports[network.GATEWAY].is_closed

    async def test_a_closed_client_says_so(self, client: AsyncBankClient) -> None:
        await client.close()
        with pytest.raises(FailedPreconditionError, match="closed"):
            await client.info()

    async def test_another_bank_at_the_same_address_is_noticed(
        self, bank: FakeBank, client: AsyncBankClient
    ) -> None:
        bank.become("fake-2")
        with pytest.raises(FailedPreconditionError, match="another bank"):
            await client.info()


class TestFetch:
    async def test_blocks_of_several_shards_in_order(
        self, bank: FakeBank, network: InProcessNetwork, client: AsyncBankClient
    ) -> None:
        blocks = await client.fetch_blocks(ACROSS)
        assert list(blocks) == list(ACROSS)
        for ref, weight in blocks.weights.items():
            np.testing.assert_array_equal(weight, bank.held(ref).weight)
        assert network.scripts["shard:1"].refs == [(ACROSS[0], ACROSS[2])]
        assert network.scripts["shard:2"].refs == [(ACROSS[1], ACROSS[3])]

    async def test_dtype(self, client: AsyncBankClient) -> None:
        memory = await client.fetch(PATH, dtype="bfloat16")
        assert {weight.dtype for weight in memory.weights.values()} == {dtype_of("bfloat16")}

    async def test_int8_gives_float32_close_to_what_is_kept(
        self, bank: FakeBank, client: AsyncBankClient
    ) -> None:
        memory = await client.fetch(PATH, dtype="int8")
        for ref, weight in memory.weights.items():
            kept = bank.held(ref).weight.astype(np.float32)
            assert weight.dtype == np.float32
            np.testing.assert_allclose(
                weight.astype(np.float32), kept, atol=np.abs(kept).max() / 253
            )

    async def test_what_is_held_in_an_encoding_is_not_the_block(
        self, bank: FakeBank, client: AsyncBankClient
    ) -> None:
        rough = await client.fetch(PATH, dtype="int8")
        exact = await client.fetch(PATH, held=rough)
        for ref, weight in exact.weights.items():
            np.testing.assert_array_equal(weight, bank.held(ref).weight)
        again = await client.fetch(PATH, dtype="int8", held=rough)
        assert all(again[ref] is rough[ref] for ref in PATH)

    async def test_a_block_named_twice_travels_once(
        self, network: InProcessNetwork, client: AsyncBankClient
    ) -> None:
        blocks = await client.fetch_blocks([PATH[0], PATH[1], PATH[0]])
        assert list(blocks) == list(PATH)
        assert network.scripts["shard:1"].refs == [PATH]

    async def test_nothing_costs_nothing(
        self, network: InProcessNetwork, client: AsyncBankClient
    ) -> None:
        assert len(await client.fetch_blocks([])) == 0
        assert network.scripts["shard:1"].calls == []

    async def test_held_blocks_are_reused(self, bank: FakeBank, client: AsyncBankClient) -> None:
        first = await client.fetch_blocks(ACROSS)
        await client.push(gradients(ACROSS[1]), base=first.versions)
        second = await client.fetch_blocks(ACROSS, held=first)
        assert [second[ref] is first[ref] for ref in ACROSS] == [True, False, True, True]
        assert second.versions == {**first.versions, ACROSS[1]: 1}
        np.testing.assert_array_equal(second[ACROSS[1]].weight, bank.held(ACROSS[1]).weight)

    async def test_blocks_held_in_another_dtype_are_not_reused(
        self, client: AsyncBankClient
    ) -> None:
        held = await client.fetch(PATH, dtype="float16")
        again = await client.fetch(PATH, held=held)
        assert {weight.dtype for weight in again.weights.values()} == {dtype_of("float32")}

    async def test_a_block_held_as_withheld_is_fetched_after_its_restoration(
        self, client: AsyncBankClient
    ) -> None:
        await client.withhold(PATH[1])
        held = await client.fetch_blocks(PATH)
        await client.restore(PATH[1])
        assert (await client.fetch(PATH, held=held)).ended_at is None

    @pytest.mark.parametrize("ref", [BlockRef(1, 4), BlockRef(3, 0), BlockRef(0, 0)])
    async def test_unknown_blocks(self, client: AsyncBankClient, ref: BlockRef) -> None:
        with pytest.raises(NotFoundError):
            await client.fetch([PATH[0], ref])

    async def test_unknown_dtype(self, client: AsyncBankClient) -> None:
        with pytest.raises(InvalidArgumentError) as caught:
            await client.fetch(PATH, dtype="int4")
        assert caught.value.reason is Reason.BAD_DTYPE

    async def test_answers_are_bounded_before_anything_is_sent(
        self, network: InProcessNetwork
    ) -> None:
        config = ClientConfig(max_answer_bytes=SPEC.weight_bytes(1))
        async with await AsyncBankClient.connect(
            network.GATEWAY, config=config, connector=network
        ) as client:
            await client.fetch(PATH[:1])
            with pytest.raises(InvalidArgumentError) as caught:
                await client.fetch(PATH)
        assert caught.value.reason is Reason.MESSAGE_TOO_LARGE
        assert network.scripts["shard:1"].num_calls("fetch") == 1

    async def test_large_fetches_are_cut_into_requests(self, network: InProcessNetwork) -> None:
        config = ClientConfig(max_request_bytes=SPEC.weight_bytes(1) + SPEC.weight_bytes(2))
        refs = [BlockRef(1, 0), BlockRef(2, 0), BlockRef(2, 1), BlockRef(2, 4), BlockRef(1, 2)]
        async with await AsyncBankClient.connect(
            network.GATEWAY, config=config, connector=network
        ) as client:
            assert list(await client.fetch_blocks(refs)) == refs
        assert network.scripts["shard:1"].refs == [tuple(refs[:2]), tuple(refs[2:4]), (refs[4],)]


class TestPathEnds:
    @pytest.mark.parametrize("state", [BlockState.WITHHELD, BlockState.DELETED])
    async def test_at_an_inactive_leaf(
        self, bank: FakeBank, client: AsyncBankClient, state: BlockState
    ) -> None:
        bank.held(PATH[1]).state = state
        memory = await client.fetch(PATH)
        assert (list(memory), memory.ended_at) == ([PATH[0]], PATH[1])

    async def test_above_everything_under_an_inactive_block(
        self, bank: FakeBank, client: AsyncBankClient
    ) -> None:
        bank.held(PATH[0]).state = BlockState.WITHHELD
        memory = await client.fetch(PATH)
        assert (list(memory), memory.ended_at) == ([], PATH[0])
        assert (memory.versions, memory.weights) == ({}, {})

    async def test_other_paths_of_the_same_fetch_go_on(
        self, bank: FakeBank, client: AsyncBankClient
    ) -> None:
        bank.held(BlockRef(1, 0)).state = BlockState.DELETED
        memory = await client.fetch(ACROSS)
        assert list(memory) == [BlockRef(1, 1), BlockRef(2, 3)]
        assert memory.ended_at == BlockRef(1, 0)

    async def test_a_batch_keeps_them_with_their_state(
        self, bank: FakeBank, client: AsyncBankClient
    ) -> None:
        bank.held(PATH[0]).state = BlockState.WITHHELD
        blocks = await client.fetch_blocks(PATH)
        assert not isinstance(blocks, Memory)
        assert blocks.states == {PATH[0]: BlockState.WITHHELD, PATH[1]: BlockState.ACTIVE}
        assert list(blocks.weights) == [PATH[1]]


class TestRevisions:
    async def test_a_fetch_never_mixes_two(
        self, bank: FakeBank, network: InProcessNetwork, client: AsyncBankClient
    ) -> None:
        bank.shards[1].lags = True
        bank.swap({ref: 7 * ones(ref) for ref in ACROSS}, {}, request_id="s", dry_run=False)
        blocks = await client.fetch_blocks(ACROSS)
        assert blocks.revision == 1
        assert set(blocks.versions.values()) == {1}
        for weight in blocks.weights.values():
            np.testing.assert_array_equal(weight, 7.0)
        # First at its own revision, then too early, then caught up.
        assert network.scripts["shard:2"].num_calls("fetch") == 3
        assert network.scripts["shard:1"].num_calls("fetch") == 1

    async def test_the_second_round_holds_what_the_first_sent(
        self, bank: FakeBank, client: AsyncBankClient
    ) -> None:
        bank.shards[1].lags = True
        bank.swap({ACROSS[0]: ones(ACROSS[0])}, {}, request_id="s", dry_run=False)
        sent = bank.shards[1].num_weights_sent
        await client.fetch_blocks(ACROSS)
        assert bank.shards[1].num_weights_sent == sent + 2

    async def test_own_changes_are_seen(self, bank: FakeBank, client: AsyncBankClient) -> None:
        bank.shards[1].lags = True
        await client.swap({BlockRef(1, 1): ones(BlockRef(1, 1))})
        memory = await client.fetch([BlockRef(1, 1)])
        assert memory.versions == {BlockRef(1, 1): 1}

    async def test_reads_do_not_go_back(self, bank: FakeBank, client: AsyncBankClient) -> None:
        bank.shards[1].lags = True
        bank.swap(gradients(*ACROSS), {}, request_id="s", dry_run=False)
        await client.fetch([BlockRef(1, 0)])
        assert (await client.fetch([BlockRef(1, 1)])).versions == {BlockRef(1, 1): 1}

    async def test_a_gateway_that_is_behind_does_not_turn_reads_back(
        self, bank: FakeBank, client: AsyncBankClient
    ) -> None:
        bank.shards[1].lags = True
        await client.swap({BlockRef(1, 1): ones(BlockRef(1, 1))})
        bank.revision = 0
        await client.info()
        assert (await client.fetch([BlockRef(1, 1)])).versions == {BlockRef(1, 1): 1}

    async def test_shards_that_never_agree_end_the_fetch(self, network: InProcessNetwork) -> None:
        bank = network.bank
        network.after_fetch = lambda: bank.transact("again", (), lambda ref, kept: None)
        async with await AsyncBankClient.connect(
            network.GATEWAY, config=CONFIG, connector=network
        ) as client:
            with pytest.raises(UnavailableError, match="agree") as caught:
                await client.fetch_blocks(ACROSS)
        assert caught.value.reason is Reason.BEHIND_REVISION


class TestPush:
    async def test_is_split_under_one_request_id(
        self, bank: FakeBank, network: InProcessNetwork, client: AsyncBankClient
    ) -> None:
        answer = await client.push(
            gradients(*ACROSS), base=base(*ACROSS), step=3, learning_rate_scale=0.5
        )
        assert [result.ref for result in answer.results] == list(ACROSS)
        assert answer.versions == dict.fromkeys(ACROSS, 1)
        scripts = [network.scripts["shard:1"], network.scripts["shard:2"]]
        assert [script.refs for script in scripts] == [
            [(ACROSS[0], ACROSS[2])],
            [(ACROSS[1], ACROSS[3])],
        ]
        assert scripts[0].request_ids == scripts[1].request_ids
        assert len(scripts[0].request_ids[0]) == 36

    async def test_touches_only_its_blocks(self, bank: FakeBank, client: AsyncBankClient) -> None:
        before = {ref: bank.held(ref).weight.tobytes() for ref in SPEC.blocks()}
        await client.push(gradients(PATH[1]), base=base(PATH[1]))
        changed = {ref for ref in before if bank.held(ref).weight.tobytes() != before[ref]}
        assert changed == {PATH[1]}

    @pytest.mark.parametrize("wire", PUSH_CODECS)
    async def test_travels_as_it_is_told(
        self, bank: FakeBank, client: AsyncBankClient, wire: str
    ) -> None:
        before = bank.held(PATH[1]).weight.astype(np.float32)
        values = np.random.default_rng(0).standard_normal(SPEC.block_shape(2), np.float32)
        codec = push_codec(wire)
        applied = codec.decode(codec.encode(values), values.shape).astype(np.float32)
        answer = await client.push({PATH[1]: values}, base=base(PATH[1]), wire=wire)
        assert answer.versions == {PATH[1]: 1}
        rate = SPEC.levels[1].learning_rate
        np.testing.assert_allclose(
            bank.held(PATH[1]).weight.astype(np.float32),
            before - rate * applied,
            rtol=1e-5,
            atol=1e-7,
        )

    async def test_takes_what_is_encoded_already(
        self, bank: FakeBank, client: AsyncBankClient
    ) -> None:
        ref = PATH[1]
        encoded = Encoded("sparse", Sparse().encode(ones(ref)), SPEC.block_shape(2))
        before = bank.held(ref).weight.astype(np.float32)
        await client.push({ref: encoded}, base=base(ref))
        rate = SPEC.levels[1].learning_rate
        after = bank.held(ref).weight.astype(np.float32)
        np.testing.assert_allclose(after, before - np.float32(rate), rtol=1e-5, atol=1e-7)
        wrong = Encoded("sparse", encoded.payload, (1, 2))
        with pytest.raises(InvalidArgumentError) as caught:
            await client.push({ref: wrong}, base={ref: 1})
        assert caught.value.reason is Reason.BAD_SHAPE

    async def test_in_an_unknown_encoding_is_refused(self, client: AsyncBankClient) -> None:
        with pytest.raises(InvalidArgumentError) as caught:
            await client.push(gradients(PATH[1]), base=base(PATH[1]), wire="int4")
        assert caught.value.reason is Reason.BAD_DTYPE

    async def test_of_nothing(self, network: InProcessNetwork, client: AsyncBankClient) -> None:
        answer = await client.push({}, base={})
        assert (answer.results, answer.duplicate) == ((), False)
        assert network.scripts["shard:1"].calls == []

    async def test_after_an_unknown_outcome_is_applied_once(
        self, bank: FakeBank, network: InProcessNetwork, client: AsyncBankClient
    ) -> None:
        network.scripts["shard:1"].plan("push", Fault.DROP_RESPONSE)
        answer = await client.push(gradients(*ACROSS), base=base(*ACROSS))
        assert answer.duplicate
        assert answer.versions == dict.fromkeys(ACROSS, 1)
        assert len(set(network.scripts["shard:1"].request_ids)) == 1
        assert network.scripts["shard:1"].num_calls("push") == 2
        # The part that was answered is not sent again.
        assert network.scripts["shard:2"].num_calls("push") == 1

    async def test_with_the_same_request_id_is_applied_once(
        self, bank: FakeBank, client: AsyncBankClient
    ) -> None:
        for is_repeated in (False, True):
            answer = await client.push(gradients(PATH[0]), base=base(PATH[0]), request_id="mine")
            assert answer.duplicate is is_repeated
        assert bank.held(PATH[0]).version == 1

    async def test_refusals_are_answers(self, bank: FakeBank, client: AsyncBankClient) -> None:
        bank.held(PATH[0]).version = SPEC.max_staleness + 1
        answer = await client.push(gradients(*PATH), base=base(*PATH))
        assert [result.accepted for result in answer.results] == [False, True]
        assert answer.refused[0].reason is Reason.STALE_VERSION

    @pytest.mark.parametrize(
        ("values", "reason"),
        [
            (np.ones((1, 3, 2, 8), np.float32), Reason.BAD_SHAPE),
            (np.ones(SPEC.block_shape(2), np.float64), Reason.BAD_DTYPE),
            (np.ones(SPEC.block_shape(2), np.int32), Reason.BAD_DTYPE),
        ],
    )
    async def test_of_a_wrong_array_is_refused_as_a_whole(
        self,
        bank: FakeBank,
        client: AsyncBankClient,
        values: NDArray[np.generic],
        reason: Reason,
    ) -> None:
        with pytest.raises(InvalidArgumentError) as caught:
            await client.push({ACROSS[0]: ones(ACROSS[0]), PATH[1]: values}, base=base(*ACROSS))
        assert caught.value.reason is reason
        assert bank.held(ACROSS[0]).version == 0

    async def test_needs_base_versions(self, client: AsyncBankClient) -> None:
        with pytest.raises(InvalidArgumentError, match="no base version for block 2/1"):
            await client.push(gradients(*PATH), base=base(PATH[0]))

    @pytest.mark.parametrize("scale", [-1.0, float("nan"), float("inf")])
    async def test_needs_a_sane_scale(self, client: AsyncBankClient, scale: float) -> None:
        with pytest.raises(InvalidArgumentError, match="learning_rate_scale"):
            await client.push(gradients(*PATH), base=base(*PATH), learning_rate_scale=scale)

    async def test_is_bounded(self, network: InProcessNetwork) -> None:
        config = ClientConfig(max_push_bytes=100)
        async with await AsyncBankClient.connect(
            network.GATEWAY, config=config, connector=network
        ) as client:
            with pytest.raises(InvalidArgumentError) as caught:
                await client.push(gradients(PATH[0]), base=base(PATH[0]))
        assert caught.value.reason is Reason.MESSAGE_TOO_LARGE
