"""Recipes: the paper's fetch and bank sizes, and what a plan counts."""

from __future__ import annotations

import pytest

from membank.trainer.model import RECIPES, MemoryConfig, plan


@pytest.mark.parametrize(
    ("recipe", "fetch_millions", "bank_billions", "bank_gigabytes"),
    [
        ("paper_160m", 18.1, 4.62, 9.2),
        ("paper_410m", 49.5, 12.68, 25.4),
        ("paper_1_4b", 153.4, 21.14, 42.3),
        ("gemma3_270m", 23.2, 5.95, 11.9),
        ("qwen2_5_0_5b", 43.4, 11.1, 22.2),
        ("llama3_2_1b", 102.2, 14.1, 28.2),
    ],
)
def test_plans_give_the_papers_sizes(
    recipe: str, fetch_millions: float, bank_billions: float, bank_gigabytes: float
) -> None:
    sizes = plan(RECIPES[recipe]())
    digits = 1 if recipe in ("qwen2_5_0_5b", "llama3_2_1b") else 2
    assert round(sizes.fetch_params / 1e6, 1) == fetch_millions
    assert round(sizes.bank_params / 1e9, digits) == bank_billions
    assert round(sizes.bank_bytes / 1e9, 1) == bank_gigabytes
    assert sizes.bank_bytes == 2 * sizes.bank_params
    assert sizes.optimizer_bytes == 8 * sizes.bank_params


def test_level_rows_match_the_papers_largest_example() -> None:
    rows = plan(RECIPES["paper_1_4b"]()).levels
    assert [row.num_blocks for row in rows] == [16, 256, 4096, 0]
    assert [round(row.block_bytes / 1e6, 1) for row in rows] == [226.5, 75.5, 4.7, 0.0]
    assert [round(row.level_bytes / 1e9, 1) for row in rows] == [3.6, 19.3, 19.3, 0.0]


@pytest.mark.parametrize(
    ("recipe", "width", "heads", "kv_heads", "head_dim", "ffn", "vocab", "layers", "extra"),
    [
        # extra: norms (and, for Qwen, the biases of queries, keys and values) of one layer
        ("gemma3_270m", 640, 4, 1, 256, 2048, 262_144, 18, 4 * 640 + 2 * 256),
        ("qwen2_5_0_5b", 896, 14, 2, 64, 4864, 151_936, 24, 2 * 896 + 896 + 2 * 128),
        ("llama3_2_1b", 2048, 32, 8, 64, 8192, 128_256, 16, 2 * 2048),
    ],
)
def test_public_anchors_follow_from_their_configurations(
    recipe: str,
    width: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    ffn: int,
    vocab: int,
    layers: int,
    extra: int,
) -> None:
    anchor = RECIPES[recipe]().anchor
    attention = 2 * width * head_dim * (heads + kv_heads)
    layer = attention + 3 * width * ffn + extra
    assert (anchor.num_layers, anchor.width) == (layers, width)
    assert anchor.num_params == vocab * width + layers * layer + width


def test_optimizer_bytes_follow_the_number_of_moments() -> None:
    recipe = RECIPES["paper_160m"]()
    bank_params = plan(recipe).bank_params
    assert plan(recipe, optimizer="sgd").optimizer_bytes == 0
    assert plan(recipe, optimizer="adagrad").optimizer_bytes == 4 * bank_params


def test_memory_shapes_are_checked() -> None:
    with pytest.raises(ValueError, match="equal"):
        MemoryConfig(block_widths=(1, 2), fan_outs=(16,))
    with pytest.raises(ValueError, match="block_widths"):
        MemoryConfig(block_widths=(0, 0), fan_outs=(16, 16))
    with pytest.raises(ValueError, match="fan_outs"):
        MemoryConfig(block_widths=(4,), fan_outs=(1,))


def test_demo_fetch_is_small_beside_the_anchor_and_the_bank_is_not() -> None:
    sizes = plan(RECIPES["demo"]())
    assert sizes.anchor_params == 591_456
    assert sizes.fetch_params == 36_864
    assert sizes.bank_params == 16 * 9_216 + 512 * 27_648
    assert sizes.bank_bytes == 4 * sizes.bank_params
    assert sizes.resident_bytes == 4 * (591_456 + 36_864)
