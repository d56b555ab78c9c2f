"""Layers are used while later ones are on their way, and what fails fails at its layer."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace

import numpy as np
import pytest

from core_rig import ACROSS, CONFIG, PATH
from fake_bank import SPEC, FakeBank
from fake_service import FakeService
from faults import Fault, FaultScript
from in_process import InProcessNetwork
from membank.client import (
    AsyncBankClient,
    AsyncLayeredMemory,
    BankClient,
    CacheConfig,
    ClientConfig,
    LayeredMemory,
)
from membank.client.loop_thread import loop_thread
from membank.client.streaming.board import LayerBoard
from membank.wire.errors import (
    CorruptionError,
    DeadlineError,
    FailedPreconditionError,
    InvalidArgumentError,
    MembankError,
    NotFoundError,
    Reason,
    UnavailableError,
)
from membank.wire.spec import Array, BlockRef, BlockState

NUM_LAYERS = 5
DEEP = replace(SPEC, num_layers=NUM_LAYERS)
TOPIC, LEAF = PATH
SHARD = "shard:1"


class Gate:
    """Holds an answer back before one of its parts."""

    def __init__(self, part: int) -> None:
        self._part = part
        self.reached = threading.Event()
        self.opened = threading.Event()

    def __call__(self, number: int, payload: bytes) -> bytes:
        if number == self._part:
            self.reached.set()
            assert self.opened.wait(10)
        return payload

    async def wait(self) -> None:
        """Wait until all parts before it are sent."""
        assert await asyncio.to_thread(self.reached.wait, 10)


@pytest.fixture
def bank() -> FakeBank:
    return FakeBank(spec=DEEP)


@pytest.fixture
def service(bank: FakeBank) -> Iterator[FakeService]:
    service = FakeService(bank)
    yield service
    service.close()


@pytest.fixture
def script(bank: FakeBank, service: FakeService) -> FaultScript:
    """What happens to the calls of the shard that `PATH` lies on."""
    return service.scripts[bank.shard_of(TOPIC).shard_id]


@pytest.fixture(params=["past grpcio", "over grpcio"])
def config(request: pytest.FixtureRequest) -> ClientConfig:
    return CONFIG if request.param == "past grpcio" else replace(CONFIG, max_data_connections=0)


@pytest.fixture
async def client(service: FakeService, config: ClientConfig) -> AsyncIterator[AsyncBankClient]:
    async with await AsyncBankClient.connect(service.endpoint, config=config) as client:
        yield client


def kept(bank: FakeBank, ref: BlockRef, number: int) -> Array:
    layer: Array = bank.held(ref).weight[number]
    return layer


def receiving() -> list[str]:
    """Return the tasks that still receive a stream."""
    return [task.get_name() for task in asyncio.all_tasks() if "stream" in task.get_name()]


async def check_layers(bank: FakeBank, memory: AsyncLayeredMemory, *numbers: int) -> None:
    for number in numbers:
        layer = await memory.layer(number)
        assert list(layer) == list(PATH)
        for ref, array in layer.items():
            assert not array.flags.writeable
            np.testing.assert_array_equal(array, kept(bank, ref, number))


class TestLayers:
    @pytest.mark.parametrize("layers_per_part", [1, 2, NUM_LAYERS, 1 << 40])
    async def test_are_those_of_the_blocks(
        self, bank: FakeBank, client: AsyncBankClient, layers_per_part: int
    ) -> None:
        bank.held(LEAF).version = 3
        async with client.stream(PATH, layers_per_part=layers_per_part) as memory:
            assert memory.num_layers == NUM_LAYERS
            head = await memory.head()
            assert (head.revision, head.ended_at) == (0, None)
            assert head.versions == {TOPIC: 0, LEAF: 3}
            await check_layers(bank, memory, *range(NUM_LAYERS))
            whole = await memory.memory()
        fetched = await client.fetch(PATH)
        assert (whole.versions, whole.revision) == (fetched.versions, fetched.revision)
        for ref, weight in whole.weights.items():
            np.testing.assert_array_equal(weight, fetched.weights[ref])

    async def test_can_be_used_while_later_ones_are_held_back(
        self, bank: FakeBank, script: FaultScript, client: AsyncBankClient
    ) -> None:
        gate = script.spoil_part = Gate(3)
        async with client.stream(PATH) as memory:
            await check_layers(bank, memory, 0, 1, 2)
            await gate.wait()
            later = asyncio.create_task(memory.layer(3))
            whole = asyncio.create_task(memory.memory())
            # What is there stays there, whoever waits for what.
            await check_layers(bank, memory, 2, 0)
            assert not later.done()
            assert not whole.done()
            gate.opened.set()
            np.testing.assert_array_equal((await later)[LEAF], kept(bank, LEAF, 3))
            assert list(await whole) == list(PATH)

    async def test_land_in_the_callers_memory(
        self, bank: FakeBank, client: AsyncBankClient
    ) -> None:
        buffers = {ref: np.zeros(DEEP.block_shape(ref.level), np.float32) for ref in PATH}
        async with client.stream(PATH, into=buffers) as memory:
            for number in range(NUM_LAYERS):
                for ref, array in (await memory.layer(number)).items():
                    assert np.shares_memory(array, buffers[ref])
        for ref, buffer in buffers.items():
            np.testing.assert_array_equal(buffer, bank.held(ref).weight)

    async def test_come_in_another_element_type(
        self, bank: FakeBank, client: AsyncBankClient
    ) -> None:
        async with client.stream(PATH, dtype="float16") as memory:
            layer = await memory.layer(NUM_LAYERS - 1)
        expected = kept(bank, TOPIC, NUM_LAYERS - 1).astype(np.float16)
        np.testing.assert_array_equal(layer[TOPIC], expected)

    @pytest.mark.parametrize(
        ("ended_at", "usable"), [(TOPIC, []), (LEAF, [TOPIC])], ids=["topic", "leaf"]
    )
    async def test_end_where_the_path_does(
        self, bank: FakeBank, client: AsyncBankClient, ended_at: BlockRef, usable: list[BlockRef]
    ) -> None:
        bank.held(ended_at).state = BlockState.WITHHELD
        async with client.stream(PATH) as memory:
            assert (await memory.head()).ended_at == ended_at
            for number in range(NUM_LAYERS):
                assert list(await memory.layer(number)) == usable
            whole = await memory.memory()
        assert (list(whole), whole.ended_at) == (usable, ended_at)

    async def test_of_several_shards_come_side_by_side(
        self, bank: FakeBank, service: FakeService, client: AsyncBankClient
    ) -> None:
        gate = Gate(2)
        service.scripts[bank.shard_of(ACROSS[1]).shard_id].spoil_part = gate
        async with client.stream(ACROSS) as memory:
            assert list(await memory.layer(1)) == list(ACROSS)
            await gate.wait()
            later = asyncio.create_task(memory.layer(2))
            await memory.layer(0)
            assert not later.done()
            gate.opened.set()
            for ref, array in (await later).items():
                np.testing.assert_array_equal(array, kept(bank, ref, 2))

    async def test_of_nothing(self, client: AsyncBankClient) -> None:
        async with client.stream(()) as memory:
            assert await memory.layer(0) == {}
            assert not await memory.memory()


class TestFailures:
    async def test_damage_hides_its_layer_and_later_ones(
        self, bank: FakeBank, script: FaultScript, client: AsyncBankClient
    ) -> None:
        script.spoil_part = lambda number, payload: (
            bytes([payload[0] ^ 1]) + payload[1:] if number == 2 else payload
        )
        async with client.stream(PATH) as memory:
            await check_layers(bank, memory, 0, 1)
            for number in (2, 3, 4):
                with pytest.raises(CorruptionError, match="layers 2 to 2"):
                    await memory.layer(number)
            with pytest.raises(CorruptionError):
                await memory.memory()
            await check_layers(bank, memory, 0, 1)
        assert script.num_calls("FetchBlocks") == 1
        await client.fetch(PATH)

    async def test_a_shard_that_dies_hides_what_had_not_come(
        self, bank: FakeBank, service: FakeService, script: FaultScript, client: AsyncBankClient
    ) -> None:
        gate = script.spoil_part = Gate(2)
        shard = bank.shard_of(TOPIC)
        async with client.stream(PATH) as memory:
            await check_layers(bank, memory, 0, 1)
            await gate.wait()
            stopping = asyncio.create_task(asyncio.to_thread(service.stop_server, shard.shard_id))
            with pytest.raises(UnavailableError):
                await memory.layer(2)
            gate.opened.set()
            await stopping
            await check_layers(bank, memory, 0, 1)
            # Its successor could have another version.
            service.start_shard(shard)
            with pytest.raises(UnavailableError):
                await memory.layer(4)
        assert script.num_calls("FetchBlocks") == 1
        async with client.stream(PATH) as memory:
            await check_layers(bank, memory, *range(NUM_LAYERS))

    @pytest.mark.parametrize(
        "fault", [Fault.UNAVAILABLE, Fault.NOT_OWNER, Fault.OVERLOADED, Fault.CUT]
    )
    async def test_calls_are_made_again_until_the_first_layers_have_come(
        self, bank: FakeBank, script: FaultScript, client: AsyncBankClient, fault: Fault
    ) -> None:
        script.plan("FetchBlocks", fault, fault)
        async with client.stream(PATH) as memory:
            await check_layers(bank, memory, *range(NUM_LAYERS))
        assert script.num_calls("FetchBlocks") == 3

    async def test_an_attempt_shows_nothing_of_the_one_before(
        self, bank: FakeBank, service: FakeService, client: AsyncBankClient
    ) -> None:
        other = service.scripts[bank.shard_of(ACROSS[1]).shard_id]
        first = bank.held(ACROSS[0])
        changed = False

        def change_then_break(number: int, payload: bytes) -> bytes:
            # The other shard has answered with what is replaced here, or does so later.
            nonlocal changed
            if not changed:
                changed = True
                first.weight = first.weight + 1
                first.version += 1
                raise UnavailableError("away")
            return payload

        other.spoil_part = change_then_break
        async with client.stream(ACROSS) as memory:
            assert (await memory.head()).versions[ACROSS[0]] == 1
            for number in range(NUM_LAYERS):
                layer = (await memory.layer(number))[ACROSS[0]]
                np.testing.assert_array_equal(layer, first.weight[number])

    async def test_the_deadline_is_that_of_all_layers(
        self, bank: FakeBank, script: FaultScript, client: AsyncBankClient
    ) -> None:
        gate = script.spoil_part = Gate(1)
        async with client.stream(PATH, timeout_s=0.5) as memory:
            await check_layers(bank, memory, 0)
            with pytest.raises(DeadlineError):
                await memory.layer(1)
            await check_layers(bank, memory, 0)
            gate.opened.set()

    async def test_leaving_early_gives_the_rest_up(
        self, bank: FakeBank, script: FaultScript, client: AsyncBankClient
    ) -> None:
        gate = script.spoil_part = Gate(2)
        buffers = {TOPIC: np.zeros(DEEP.block_shape(1), np.float32)}
        async with client.stream(PATH, into=buffers) as memory:
            await check_layers(bank, memory, 0)
            await gate.wait()
            assert receiving()
        assert not receiving()
        as_left = buffers[TOPIC].copy()
        gate.opened.set()
        await check_layers(bank, memory, 0)
        with pytest.raises(FailedPreconditionError, match="left"):
            await memory.layer(2)
        assert list(await client.fetch(PATH)) == list(PATH)
        np.testing.assert_array_equal(buffers[TOPIC], as_left)

    async def test_an_error_of_the_caller_passes_through(
        self, script: FaultScript, client: AsyncBankClient
    ) -> None:
        gate = script.spoil_part = Gate(1)

        async def use() -> None:
            async with client.stream(PATH) as memory:
                await memory.layer(0)
                raise ArithmeticError

        with pytest.raises(ArithmeticError):
            await use()
        gate.opened.set()
        assert not receiving()

    async def test_closing_the_client_ends_it(
        self, bank: FakeBank, script: FaultScript, client: AsyncBankClient
    ) -> None:
        gate = script.spoil_part = Gate(1)
        async with client.stream(PATH) as memory:
            await check_layers(bank, memory, 0)
            await client.close()
            with pytest.raises(UnavailableError):
                await memory.layer(1)
            gate.opened.set()

    async def test_what_is_wrong_is_refused_at_once(self, client: AsyncBankClient) -> None:
        small = np.zeros(3, np.float32)
        for path, options, error in (
            ([BlockRef(1, 99)], {}, NotFoundError),
            (PATH, {"layers_per_part": 0}, InvalidArgumentError),
            (PATH, {"dtype": "int8"}, InvalidArgumentError),
            (PATH, {"dtype": "float31"}, InvalidArgumentError),
            (PATH, {"into": {TOPIC: small}}, InvalidArgumentError),
        ):
            with pytest.raises(error):
                async with client.stream(path, **options):
                    raise AssertionError("entered")
        async with client.stream(PATH) as memory:
            for number in (-1, NUM_LAYERS):
                with pytest.raises(InvalidArgumentError):
                    await memory.layer(number)


@asynccontextmanager
async def in_process(
    bank: FakeBank, config: ClientConfig = CONFIG
) -> AsyncIterator[tuple[InProcessNetwork, AsyncBankClient]]:
    network = InProcessNetwork(bank)
    async with await AsyncBankClient.connect(
        network.GATEWAY, config=config, connector=network
    ) as client:
        yield network, client


class TestRevisions:
    async def test_that_differ_are_fetched_whole(self, bank: FakeBank) -> None:
        async with in_process(bank) as (network, client):
            bank.shards[1].lags = True
            bank.transact("add", ACROSS, lambda ref, held: None)
            async with client.stream(ACROSS) as memory:
                head = await memory.head()
                assert head.revision == 1
                assert head.versions == dict.fromkeys(ACROSS, 1)
                for ref, array in (await memory.layer(NUM_LAYERS - 1)).items():
                    np.testing.assert_array_equal(array, kept(bank, ref, NUM_LAYERS - 1))
            assert network.scripts[SHARD].num_calls("fetch_layers") == 1
            assert network.scripts[SHARD].num_calls("fetch") >= 1

    async def test_never_go_back(self, bank: FakeBank) -> None:
        async with in_process(bank) as (_, client):
            bank.shards[1].lags = True
            bank.transact("nothing", (), lambda ref, held: None)
            async with client.stream(PATH) as memory:
                assert (await memory.head()).revision == 1
            # Of a shard that is behind; asked again, it has caught up.
            async with client.stream([ACROSS[1]]) as memory:
                assert (await memory.head()).revision == 1

    async def test_of_a_snapshot(self, bank: FakeBank) -> None:
        async with in_process(bank) as (_, client):
            before = kept(bank, TOPIC, 0).copy()
            bank.create_snapshot("one")
            bank.held(TOPIC).weight = bank.held(TOPIC).weight + 1
            async with client.stream(PATH, snapshot="one") as memory:
                np.testing.assert_array_equal((await memory.layer(0))[TOPIC], before)
            async with client.stream(PATH) as memory:
                np.testing.assert_array_equal((await memory.layer(0))[TOPIC], before + 1)
            async with client.stream(PATH, snapshot="two") as memory:
                with pytest.raises(NotFoundError) as caught:
                    await memory.head()
                assert caught.value.reason is Reason.UNKNOWN_SNAPSHOT


async def test_a_cache_is_asked_first(bank: FakeBank) -> None:
    config = replace(CONFIG, cache=CacheConfig(max_bytes=1 << 20))
    async with in_process(bank, config) as (network, client):
        buffers = {LEAF: np.zeros(DEEP.block_shape(2), np.float32)}
        for _ in range(2):
            async with client.stream(PATH, into=buffers) as memory:
                await check_layers(bank, memory, *range(NUM_LAYERS))
        assert network.scripts[SHARD].num_calls("fetch_layers") == 0
        assert client.cache_stats is not None
        assert client.cache_stats.num_confirmed == len(PATH)
        np.testing.assert_array_equal(buffers[LEAF], bank.held(LEAF).weight)


async def test_a_defect_is_not_waited_for(bank: FakeBank) -> None:
    async with in_process(bank) as (network, client):
        network.scripts[SHARD].plan("fetch_layers", Fault.INTERNAL)
        async with client.stream(PATH) as memory:
            with pytest.raises(MembankError, match="defect"):
                await memory.head()


class TestBoard:
    @pytest.fixture
    def board(self, bank: FakeBank) -> LayerBoard:
        """A board on which the first layers of a path are, and one is missing of each."""
        board = LayerBoard(DEEP, PATH)
        for block in bank.shard_of(TOPIC).fetch(PATH).blocks:
            board.part([block.ref]).take(3, block, NUM_LAYERS - 1)
        return board

    def test_what_was_shown_is_not_begun_anew(self, board: LayerBoard) -> None:
        # Such as by grpcio, where a port for data broke off in the midst of an answer.
        with pytest.raises(UnavailableError):
            board.part([TOPIC]).restart()
        assert board.memory(NUM_LAYERS - 1) is not None

    def test_nothing_is_shown_before_all_blocks_are_there(self, bank: FakeBank) -> None:
        board = LayerBoard(DEEP, PATH)
        (block,) = bank.shard_of(TOPIC).fetch([TOPIC]).blocks
        board.part([TOPIC]).take(0, block, NUM_LAYERS)
        assert board.memory(0) is None
        board.part([TOPIC]).restart()
        assert board.memory(0) is None

    def test_nobody_is_woken_for_layers_of_others(self, bank: FakeBank, board: LayerBoard) -> None:
        woken: list[str] = []
        assert board.memory(NUM_LAYERS, otherwise=lambda: woken.append("last")) is None
        topic, leaf = bank.shard_of(TOPIC).fetch(PATH).blocks
        board.part([TOPIC]).take(3, topic, NUM_LAYERS)
        assert not woken
        board.part([LEAF]).take(3, leaf, NUM_LAYERS)
        assert woken == ["last"]
        assert board.is_whole

    def test_a_failure_wakes_everybody_and_hides_nothing(self, board: LayerBoard) -> None:
        woken: list[str] = []
        board.memory(NUM_LAYERS, otherwise=lambda: woken.append("last"))
        board.fail(ArithmeticError())
        board.fail(KeyError())
        assert woken == ["last"]
        assert board.memory(NUM_LAYERS - 1) is not None
        with pytest.raises(ArithmeticError):
            board.wait(NUM_LAYERS)


class TestSync:
    def test_layers_come_to_the_callers_thread(
        self, bank: FakeBank, service: FakeService, script: FaultScript
    ) -> None:
        gate = script.spoil_part = Gate(2)
        with BankClient.connect(service.endpoint) as client, client.stream(PATH) as memory:
            assert memory.head().versions == {TOPIC: 0, LEAF: 0}
            np.testing.assert_array_equal(memory.layer(1)[LEAF], kept(bank, LEAF, 1))
            assert gate.reached.wait(10)
            opening = threading.Timer(0.0, gate.opened.set)
            opening.start()
            np.testing.assert_array_equal(memory.layer(4)[TOPIC], kept(bank, TOPIC, 4))
            assert list(memory.memory()) == list(PATH)
            opening.join()

    def test_leaving_early(self, service: FakeService, script: FaultScript) -> None:
        gate = script.spoil_part = Gate(1)
        with BankClient.connect(service.endpoint) as client:
            with client.stream(PATH) as memory:
                first = memory.layer(0)
            gate.opened.set()
            assert memory.layer(0).keys() == first.keys()
            with pytest.raises(FailedPreconditionError):
                memory.layer(1)
            assert list(client.fetch(PATH)) == list(PATH)

    def test_is_not_waited_for_where_it_is_received(self) -> None:
        memory = LayeredMemory(LayerBoard(DEEP, PATH))

        async def wait() -> None:
            memory.layer(0)

        with pytest.raises(FailedPreconditionError, match="AsyncBankClient"):
            loop_thread().run(wait())
