"""An answer is the same, bit by bit, whether its memory was fetched whole or came layer by layer."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fake_bank import FakeBank
from fake_service import FakeService
from membank.client import BankClient, FetchedBlocks
from membank.trainer.corpus import Corpus, Tokenizer
from membank.trainer.model import Anchor, LevelBlocks, MemoryBatch, generate
from membank.trainer.run import RunDirectory
from membank.trainer.run.answer import Answerer
from membank.trainer.run.streamed_memory import StreamedMemory
from membank.trainer.tree import TreeConfig, build_tree
from membank.wire.errors import CorruptionError
from membank.wire.format import encode_tree
from membank.wire.spec import BlockState
from tiny_world import World, make_world

PROMPT = "The number of ada is"


@pytest.fixture(scope="module")
def world() -> World:
    return make_world()


@pytest.fixture
def bank(world: World) -> FakeBank:
    corpus = Corpus(name="tiny", documents=world.documents, facts=world.facts)
    tree = build_tree(corpus, TreeConfig(fan_outs=(2, 2))).document()
    bank = FakeBank(spec=replace(world.spec, num_partitions=4), tree=encode_tree(tree))
    rng = np.random.default_rng(0)
    for ref in bank.spec.blocks():
        # As they are made they would add nothing.
        held = bank.held(ref)
        held.weight = rng.standard_normal(held.weight.shape, np.float32)
    return bank


@pytest.fixture
def service(bank: FakeBank) -> Iterator[FakeService]:
    service = FakeService(bank)
    yield service
    service.close()


@pytest.fixture
def client(service: FakeService) -> Iterator[BankClient]:
    with BankClient.connect(service.endpoint) as client:
        yield client


class TinyRun(RunDirectory):
    """A run whose anchor and tokenizer are those of the tiny world."""

    def __init__(self, world: World) -> None:
        super().__init__(Path("tiny"))
        self._world = world

    def anchor(self) -> Anchor:
        return self._world.anchor

    def tokenizer(self) -> Tokenizer:
        return self._world.tokenizer


def whole(fetched: FetchedBlocks) -> MemoryBatch:
    return MemoryBatch(
        [
            LevelBlocks(
                blocks_KLPRD=torch.tensor(weight)[None], index_B=torch.zeros(1, dtype=torch.long)
            )
            for weight in fetched.weights.values()
        ]
    )


def completed(world: World, fetched: FetchedBlocks, num_tokens: int = 8) -> str:
    tokens = world.tokenizer.encode(PROMPT)
    memory = whole(fetched) if fetched else None
    (completion,) = generate(
        world.anchor,
        [tokens],
        memory,
        max_new_tokens=num_tokens,
        stop_token=world.tokenizer.eot_id,
    )
    return world.tokenizer.decode(completion).split("\n")[0]


@pytest.mark.parametrize("num_levels", [1, 2])
def test_each_layer_has_the_very_weights_of_the_blocks(
    world: World, client: BankClient, num_levels: int
) -> None:
    path = world.paths.routed[0][:num_levels]
    batch = whole(client.fetch(path))
    tokens_BT = torch.arange(12)[None]
    with client.stream(path) as stream:
        streamed = StreamedMemory(stream)
        for number in range(stream.num_layers):
            ours, theirs = streamed.layer(number), batch.layer(number)
            assert ours is not None
            assert theirs is not None
            assert torch.equal(ours.weights_GPRD, theirs.weights_GPRD)
            assert ours.group_size == theirs.group_size
            assert streamed.layer(number) is ours
        with torch.inference_mode():
            logits = world.anchor(tokens_BT, None, streamed)
            assert torch.equal(logits, world.anchor(tokens_BT, None, batch))
            assert not torch.equal(logits, world.anchor(tokens_BT))


def test_an_answer_says_what_it_rests_on(world: World, bank: FakeBank, client: BankClient) -> None:
    answer = Answerer(TinyRun(world)).ask(client, PROMPT, max_new_tokens=8)
    fetched = client.fetch(client.route(PROMPT))
    assert answer.text == completed(world, fetched)
    assert [(block.ref, block.version) for block in answer.blocks] == [
        (str(ref), version) for ref, version in fetched.versions.items()
    ]
    assert all(block.label for block in answer.blocks)
    assert (answer.ended_at, answer.revision) == (None, 0)
    assert answer.fetch_ms > 0
    assert 0 <= answer.waited_ms < 1e4
    assert answer.to_json().keys() >= {"route_ms", "fetch_ms", "waited_ms"}


def test_a_path_that_ends_at_once_leaves_the_anchor(
    world: World, bank: FakeBank, client: BankClient
) -> None:
    topic = client.route(PROMPT)[0]
    bank.held(topic).state = BlockState.WITHHELD
    answer = Answerer(TinyRun(world)).ask(client, PROMPT, max_new_tokens=8)
    assert (answer.blocks, answer.ended_at) == ((), str(topic))
    alone = Answerer(TinyRun(world)).ask(client, PROMPT, max_new_tokens=8, with_memory=False)
    assert answer.text == alone.text
    assert (alone.blocks, alone.fetch_ms, alone.waited_ms) == ((), 0.0, 0.0)


def test_the_anchor_computes_while_later_layers_are_held_back(
    world: World, bank: FakeBank, service: FakeService, client: BankClient
) -> None:
    held, opened = threading.Event(), threading.Event()

    def hold_back(number: int, payload: bytes) -> bytes:
        if number == 1:
            held.set()
            assert opened.wait(10)
        return payload

    for script in service.scripts.values():
        script.spoil_part = hold_back
    expected = completed(world, client.fetch(client.route(PROMPT)))
    computed = threading.Event()
    first = world.anchor.blocks[0].register_forward_hook(lambda *_: computed.set())
    try:
        with ThreadPoolExecutor(1) as thread:
            asked = thread.submit(Answerer(TinyRun(world)).ask, client, PROMPT, max_new_tokens=8)
            assert held.wait(10)
            assert computed.wait(10)
            assert not asked.done()
            opened.set()
            answer = asked.result(10)
    finally:
        first.remove()
    assert answer.text == expected


def test_damage_of_a_late_layer_ends_the_answer(
    world: World, service: FakeService, client: BankClient
) -> None:
    for script in service.scripts.values():
        script.spoil_part = lambda number, payload: (
            bytes([payload[0] ^ 1]) + payload[1:] if number == 1 else payload
        )
    with pytest.raises(CorruptionError):
        Answerer(TinyRun(world)).ask(client, PROMPT)
