"""Memories: what they add, to which sequence, and where their gradients go."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from membank.trainer.model import (
    Anchor,
    AnchorConfig,
    LevelBlocks,
    MemoryBatch,
    generate,
    init_block,
    next_token_loss,
)
from membank.trainer.model.memory import LayerMemory, add_memory

TINY = AnchorConfig(num_layers=2, width=16, num_heads=2, head_dim=6, ffn_width=24, vocab_size=40)
WIDTHS = (3, 5)


@pytest.fixture
def model() -> Anchor:
    torch.manual_seed(0)
    return Anchor(TINY).requires_grad_(False)


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(0, 40, (4, 9), generator=torch.Generator().manual_seed(1))


def _blocks(num: int, width: int) -> torch.Tensor:
    return torch.randn(num, TINY.num_layers, 3, width, TINY.width).mul_(0.3).requires_grad_()


def _memory(blocks: list[torch.Tensor], *paths: list[int]) -> MemoryBatch:
    return MemoryBatch(
        [
            LevelBlocks(blocks_KLPRD=b, index_B=torch.tensor(path))
            for b, path in zip(blocks, paths, strict=True)
        ]
    )


def test_memory_equals_widening_the_feed_forward_network(
    model: Anchor, tokens: torch.Tensor
) -> None:
    blocks = [_blocks(1, r).detach() for r in WIDTHS]
    fetched = model(tokens, None, _memory(blocks, [0] * 4, [0] * 4))
    wide_config = AnchorConfig(
        num_layers=2, width=16, num_heads=2, head_dim=6, ffn_width=24 + 8, vocab_size=40
    )
    wide = Anchor(wide_config).requires_grad_(False)
    state = model.state_dict()
    for layer in range(TINY.num_layers):
        gate, up, down = torch.cat([b[0, layer] for b in blocks], dim=1)
        name = f"blocks.{layer}.ffn"
        state[f"{name}.gate.weight"] = torch.cat([state[f"{name}.gate.weight"], gate])
        state[f"{name}.up.weight"] = torch.cat([state[f"{name}.up.weight"], up])
        state[f"{name}.down.weight"] = torch.cat([state[f"{name}.down.weight"], down.T], dim=1)
    wide.load_state_dict(state)
    torch.testing.assert_close(fetched, wide(tokens))


@pytest.mark.parametrize(
    "paths",
    [
        ([0, 0, 0, 0], [1, 1, 1, 1]),
        ([0, 0, 0, 0], [0, 0, 2, 2]),
        ([0, 1, 0, 1], [0, 1, 2, 1]),
        ([0, 0, 0, 1], [1, 1, 1, 0]),
        ([0, -1, 1, 0], [-1, -1, 0, 2]),
    ],
    ids=["one path", "equal runs", "each its own", "unequal runs", "missing blocks"],
)
def test_a_batch_equals_its_sequences_one_by_one(
    model: Anchor, tokens: torch.Tensor, paths: tuple[list[int], list[int]]
) -> None:
    batched = [_blocks(2, 3), _blocks(3, 5)]
    single = [b.detach().clone().requires_grad_() for b in batched]
    logits = model(tokens, None, _memory(batched, *paths))
    rows = [
        model(tokens[i : i + 1], None, _memory(single, *([path[i]] for path in paths)))
        for i in range(len(tokens))
    ]
    torch.testing.assert_close(logits, torch.cat(rows))
    weight = torch.randn_like(logits)
    (logits * weight).sum().backward()
    (torch.cat(rows) * weight).sum().backward()
    for got, expected in zip(batched, single, strict=True):
        torch.testing.assert_close(got.grad, expected.grad, atol=1e-4, rtol=1e-4)


def test_unused_blocks_get_no_gradient(model: Anchor, tokens: torch.Tensor) -> None:
    blocks = [_blocks(3, 4)]
    model(tokens, None, _memory(blocks, [2, -1, 2, -1])).sum().backward()
    gradient = blocks[0].grad
    assert gradient is not None
    assert not gradient[:2].any()
    assert gradient[2].any()


def test_a_new_block_changes_nothing_and_learns(model: Anchor, tokens: torch.Tensor) -> None:
    block = init_block(2, 4, 16, generator=torch.Generator().manual_seed(3))[None].requires_grad_()
    logits = model(tokens, None, _memory([block], [0] * 4))
    assert torch.equal(logits, model(tokens))
    loss, _ = next_token_loss(logits, tokens)
    loss.backward()
    assert block.grad is not None
    assert not block.grad[0, :, :2].any()
    assert block.grad[0, :, 2].any()


def test_no_block_at_any_level_equals_the_anchor(model: Anchor, tokens: torch.Tensor) -> None:
    memory = _memory([_blocks(1, 3), _blocks(1, 5)], [-1] * 4, [-1] * 4)
    assert torch.equal(model(tokens, None, memory), model(tokens))


def test_memory_formula_of_one_layer() -> None:
    x, weights = torch.randn(1, 2, 16), torch.randn(1, 3, 4, 16)
    m1, m2, m3 = weights[0]
    expected = (functional.silu(x @ m1.T) * (x @ m2.T)) @ m3
    got = add_memory(x, LayerMemory(weights_GPRD=weights, group_size=1))
    torch.testing.assert_close(got, expected)


def test_bad_shapes_and_indices_are_refused() -> None:
    with pytest.raises(ValueError, match="shape"):
        LevelBlocks(blocks_KLPRD=torch.zeros(1, 2, 2, 3, 16), index_B=torch.zeros(1).long())
    with pytest.raises(ValueError, match=r"-1\.\.0"):
        LevelBlocks(blocks_KLPRD=torch.zeros(1, 2, 3, 3, 16), index_B=torch.ones(1).long())
    with pytest.raises(ValueError, match="disagree"):
        _memory([_blocks(1, 3), _blocks(1, 3)], [0, 0], [0])


def test_generation_is_greedy_and_padding_does_not_reach_it(model: Anchor) -> None:
    prompts = [[1, 2, 3, 4], [5], [6, 7]]
    memory = _memory([_blocks(2, 3).detach()], [0, 1, -1])
    together = generate(model, prompts, memory, max_new_tokens=3)
    for i, prompt in enumerate(prompts):
        tokens = list(prompt)
        alone = MemoryBatch(
            [
                LevelBlocks(blocks_KLPRD=x.blocks_KLPRD, index_B=x.index_B[i : i + 1])
                for x in memory.levels
            ]
        )
        for _ in range(3):
            tokens.append(int(model(torch.tensor([tokens]), None, alone)[0, -1].argmax()))
        assert together[i] == tokens[len(prompt) :]


def test_generation_ends_before_the_stop_token(model: Anchor) -> None:
    [free] = generate(model, [[1, 2]], max_new_tokens=3)
    [stopped] = generate(model, [[1, 2]], max_new_tokens=3, stop_token=free[1])
    assert stopped == free[: free.index(free[1])]
    with pytest.raises(ValueError, match="no tokens"):
        generate(model, [[1], []], max_new_tokens=1)
