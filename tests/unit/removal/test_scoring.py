"""Scores against the model's own logits, with and without memory."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from membank.trainer.removal.scoring import (
    Continuation,
    Model,
    ZeroedBlocks,
    complete,
    last_logits,
    score,
)
from membank.trainer.training import InProcessMemory, join
from membank.wire.spec import BlockRef, BlockState
from tiny_world import World, make_world


@pytest.fixture(scope="module")
def world() -> World:
    return make_world()


@pytest.fixture(scope="module")
def bank(world: World) -> InProcessMemory:
    """Return a bank whose blocks do something: one step with random gradients."""
    memory = InProcessMemory(replace(world.spec, init_std=0.2))
    refs = list(world.spec.blocks())
    generator = torch.Generator().manual_seed(1)
    gradients = {
        ref: torch.randn(world.spec.block_shape(ref.level), generator=generator) for ref in refs
    }
    memory.push(gradients, dict.fromkeys(refs, 0), step=0)
    return memory


def texts_of(world: World) -> list[Continuation]:
    return [
        Continuation(
            prompt=tuple(world.tokenizer.encode(fact.prompt)),
            tokens=tuple(world.tokenizer.encode(f" {fact.answer}.")),
        )
        for fact in world.facts
    ]


def test_scores_are_those_of_each_text_alone(world: World, bank: InProcessMemory) -> None:
    paths = list(world.paths.routed)
    found = score(Model(anchor=world.anchor, bank=bank), texts_of(world), paths)
    for text, path, scores in zip(texts_of(world), paths, found, strict=True):
        ids = torch.tensor([[*text.prompt, *text.tokens]])
        memory = join(bank.spec, [path], bank.fetch(path)).memory
        with torch.no_grad():
            log_probs = world.anchor(ids, None, memory)[0].log_softmax(-1)
        first = len(text.prompt) - 1
        expected = [float(log_probs[first + i, token]) for i, token in enumerate(text.tokens)]
        np.testing.assert_allclose(scores.log_probs, expected, atol=1e-4)
        likeliest = log_probs[first:-1].argmax(-1).tolist()
        assert scores.hits.tolist() == [a == b for a, b in zip(likeliest, text.tokens, strict=True)]
        assert scores.loss == pytest.approx(-np.mean(expected), abs=1e-4)


def test_zeroed_blocks_add_nothing_and_the_other_topics_stay(
    world: World, bank: InProcessMemory
) -> None:
    paths = list(world.paths.routed)
    gone = paths[0][0]
    assert {path[0] for path in paths} > {gone}
    with_memory = score(Model(anchor=world.anchor, bank=bank), texts_of(world), paths)
    emptied = Model(anchor=world.anchor, bank=ZeroedBlocks(bank, [gone]))
    zeroed = score(emptied, texts_of(world), paths)
    alone = score(Model(anchor=world.anchor), texts_of(world))
    for path, one, whole, none in zip(paths, zeroed, with_memory, alone, strict=True):
        assert np.abs(whole.log_probs - none.log_probs).max() > 0.01
        expected = none if path[0] == gone else whole
        np.testing.assert_allclose(one.log_probs, expected.log_probs, atol=1e-5)


def test_a_deleted_block_ends_the_path(world: World, bank: InProcessMemory) -> None:
    emptied = InProcessMemory(bank.spec)
    emptied.restore(bank)
    emptied.set_state(BlockRef(1, 0), BlockState.DELETED)
    try:
        rows = [n for n, path in enumerate(world.paths.routed) if path[0] == BlockRef(1, 0)]
        texts = [texts_of(world)[row] for row in rows]
        paths = [world.paths.routed[row] for row in rows]
        ended = score(Model(anchor=world.anchor, bank=emptied), texts, paths)
        alone = score(Model(anchor=world.anchor), texts)
        for one, other in zip(ended, alone, strict=True):
            np.testing.assert_allclose(one.log_probs, other.log_probs, atol=1e-5)
    finally:
        emptied.set_state(BlockRef(1, 0), BlockState.ACTIVE)


def test_last_logits_see_a_change_of_the_smallest_kind(world: World, bank: InProcessMemory) -> None:
    prompts = [world.tokenizer.encode(world.facts[0].prompt)]
    paths = [world.paths.routed[0]]
    model = Model(anchor=world.anchor, bank=bank)
    (before,) = last_logits(model, prompts, paths)
    (again,) = last_logits(model, prompts, paths)
    assert torch.equal(before, again)
    changed = InProcessMemory(bank.spec)
    changed.restore(bank)
    leaf = paths[0][-1]
    changed.push(
        {leaf: torch.ones(bank.spec.block_shape(leaf.level))},
        {leaf: changed.fetch([leaf]).versions[leaf]},
        step=1,
        learning_rate_scale=1e-3,
    )
    (after,) = last_logits(Model(anchor=world.anchor, bank=changed), prompts, paths)
    assert not torch.equal(before, after)


def test_completions_come_in_the_order_of_the_prompts(world: World, bank: InProcessMemory) -> None:
    prompts = [world.tokenizer.encode(fact.prompt) for fact in world.facts]
    paths = list(world.paths.routed)
    model = Model(anchor=world.anchor, bank=bank)
    together = complete(model, prompts, paths, max_new_tokens=3, stop_token=world.tokenizer.eot_id)
    for prompt, path, found in zip(prompts, paths, together, strict=True):
        (alone,) = complete(
            model, [prompt], [path], max_new_tokens=3, stop_token=world.tokenizer.eot_id
        )
        assert found == alone
