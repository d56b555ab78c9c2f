"""Influence: what a block was trained on, it does; what is elsewhere, does nothing."""

from __future__ import annotations

import pytest

from membank.trainer.finding.influence import (
    InfluenceConfig,
    InfluenceReport,
    measure_influence,
)
from membank.trainer.training import InProcessMemory, leaf_path
from membank.wire.errors import InvalidArgumentError
from membank.wire.spec import BlockRef, BlockState, Path
from tiny_world import World


def _measure(
    world: World,
    memory: InProcessMemory,
    rows: list[int],
    paths: list[Path] | None = None,
    config: InfluenceConfig | None = None,
) -> InfluenceReport:
    used = [world.paths.holding[row] for row in rows] if paths is None else paths
    fetched = memory.fetch(list(world.spec.blocks()))
    texts = [world.documents[row].text for row in rows]
    return measure_influence(
        world.anchor, world.tokenizer, texts, used, fetched, world.spec, config
    )


def _nats(report: InfluenceReport) -> dict[BlockRef, float]:
    return {block.ref: block.nats_per_token or 0.0 for block in report.blocks}


def test_the_leaf_that_was_trained_on_a_fact_does_most_for_it(
    world: World, trained: InProcessMemory
) -> None:
    for row in range(len(world.documents)):
        right = world.paths.holding[row]
        on_right = _nats(_measure(world, trained, [row]))
        # The same text with each wrong leaf in turn: what is there does not help it as much.
        for leaf in {0, 1, 2, 3} - {world.leaves[row]}:
            wrong = leaf_path(world.spec, leaf)
            assert _nats(_measure(world, trained, [row], [wrong]))[wrong[-1]] < on_right[right[-1]]
        assert on_right[right[-1]] > 0.1
    report = _measure(world, trained, list(range(len(world.documents))))
    assert report.anchor_nats_per_token is not None
    assert report.memory_nats_per_token is not None
    assert report.memory_nats_per_token < report.anchor_nats_per_token - 0.5


def test_a_block_elsewhere_changes_nothing_bit_by_bit(
    world: World, trained: InProcessMemory
) -> None:
    rows = [row for row, leaf in enumerate(world.leaves) if leaf == 0]
    before = _measure(world, trained, [*rows, 2])
    other = next(ref for ref in world.spec.blocks() if ref == BlockRef(2, 3))
    try:
        trained.set_state(other, BlockState.WITHHELD)
        assert _measure(world, trained, [*rows, 2]) == before
    finally:
        trained.set_state(other, BlockState.ACTIVE)
    assert other not in {block.ref for block in before.blocks}


def test_influence_is_the_difference_that_leaving_a_block_out_makes(
    world: World, trained: InProcessMemory
) -> None:
    report = _measure(world, trained, [0])
    top, leaf = world.paths.holding[0]
    # Along a path without the leaf, the loss with "the whole path" is the one without the leaf.
    short = _measure(world, trained, [0], [(top,)])
    assert report.memory_nats_per_token is not None
    assert short.memory_nats_per_token is not None
    expected = short.memory_nats_per_token - report.memory_nats_per_token
    assert _nats(report)[leaf] == pytest.approx(expected, abs=1e-6)


def test_a_long_text_is_scored_in_pieces(world: World, trained: InProcessMemory) -> None:
    num_tokens = len(world.tokenizer.encode(world.documents[0].text))
    whole = _measure(world, trained, [0])
    cut = _measure(world, trained, [0], config=InfluenceConfig(seq_len=4))
    assert whole.num_tokens == num_tokens - 1
    assert cut.num_tokens == num_tokens - -(-num_tokens // 4)


def test_a_withheld_block_has_no_influence_and_neither_have_those_below(
    world: World, trained: InProcessMemory
) -> None:
    top, leaf = world.paths.holding[0]
    trained.set_state(top, BlockState.WITHHELD)
    try:
        report = _measure(world, trained, [0])
    finally:
        trained.set_state(top, BlockState.ACTIVE)
    found = {block.ref: block for block in report.blocks}
    assert (found[top].nats_per_token, found[leaf].nats_per_token) == (None, None)
    assert found[top].state is BlockState.WITHHELD
    assert found[leaf].state is BlockState.ACTIVE
    assert report.memory_nats_per_token == report.anchor_nats_per_token


def test_versions_are_those_that_were_measured(world: World, trained: InProcessMemory) -> None:
    versions = trained.fetch(list(world.spec.blocks())).versions
    for block in _measure(world, trained, [0, 5]).blocks:
        assert block.version == versions[block.ref] > 0


def test_texts_without_anything_to_score(world: World, trained: InProcessMemory) -> None:
    fetched = trained.fetch(list(world.spec.blocks()))
    report = measure_influence(
        world.anchor, world.tokenizer, ["", "a"], [world.paths.holding[0], ()], fetched, world.spec
    )
    assert (report.num_tokens, report.anchor_nats_per_token) == (0, None)
    assert all(block.nats_per_token is None for block in report.blocks)


def test_each_text_has_a_path(world: World, trained: InProcessMemory) -> None:
    with pytest.raises(InvalidArgumentError, match="1 texts and 2 paths"):
        _measure(world, trained, [0], [(), ()])
