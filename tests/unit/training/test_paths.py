"""From paths to the memory of a batch, and from it to gradients per distinct block."""

from __future__ import annotations

import pytest
import torch

from membank.trainer.model import Anchor, next_token_loss
from membank.trainer.training import InProcessMemory, distinct_blocks, generic_spec, join, leaf_path
from membank.wire.spec import BankSpec, BlockRef, BlockState, Path


def _paths(spec: BankSpec, *leaves: int) -> list[Path]:
    return [leaf_path(spec, leaf) for leaf in leaves]


def test_a_leaf_has_one_block_per_level(spec: BankSpec) -> None:
    assert leaf_path(spec, 4) == (BlockRef(1, 1), BlockRef(2, 4))
    assert leaf_path(generic_spec(spec), 4) == (BlockRef(1, 0), BlockRef(2, 0))
    assert distinct_blocks(_paths(spec, 4, 3, 4)) == (
        BlockRef(1, 1),
        BlockRef(2, 3),
        BlockRef(2, 4),
    )


def test_gradients_of_shared_blocks_are_sums_over_their_sequences(
    spec: BankSpec, anchor: Anchor
) -> None:
    anchor.requires_grad_(False)
    memory = InProcessMemory(spec)
    tokens = torch.randint(0, 32, (3, 8), generator=torch.Generator().manual_seed(0))
    leaves = (0, 1, 1)
    paths = _paths(spec, *leaves)
    fetched = memory.fetch(distinct_blocks(paths))
    together = join(spec, paths, fetched, trained=True)
    loss, count = next_token_loss(anchor(tokens, None, together.memory), tokens)
    (loss * count).backward()
    expected: dict[BlockRef, torch.Tensor] = {}
    for row, path in enumerate(paths):
        alone = join(spec, [path], fetched, trained=True)
        loss, count = next_token_loss(
            anchor(tokens[row : row + 1], None, alone.memory), tokens[row : row + 1]
        )
        (loss * count).backward()
        for ref, gradient in alone.gradients().items():
            expected[ref] = expected.get(ref, torch.zeros(())) + gradient
    found = together.gradients()
    assert set(found) == set(expected) == set(distinct_blocks(paths))
    for ref, gradient in found.items():
        torch.testing.assert_close(gradient, expected[ref], atol=1e-5, rtol=1e-4)
    assert any(bool(gradient.abs().sum() > 0) for gradient in found.values())


@pytest.mark.parametrize("level", [1, 2])
def test_a_path_ends_at_its_first_absent_block(spec: BankSpec, anchor: Anchor, level: int) -> None:
    memory = InProcessMemory(spec)
    (path,) = _paths(spec, 2)
    memory.set_state(path[level - 1], BlockState.DELETED)
    batch = join(spec, [path], memory.fetch(path))
    assert batch.refs == tuple((ref,) if ref.level < level else () for ref in path)
    tokens = torch.zeros(1, 4, dtype=torch.int64)
    if level == 1:
        assert torch.equal(anchor(tokens, None, batch.memory), anchor(tokens))


def test_empty_and_short_paths_are_fine(spec: BankSpec, anchor: Anchor) -> None:
    memory = InProcessMemory(spec)
    paths: list[Path] = [(), leaf_path(spec, 0)[:1], leaf_path(spec, 5)]
    batch = join(spec, paths, memory.fetch(distinct_blocks(paths)))
    assert [len(refs) for refs in batch.refs] == [2, 1]
    assert anchor(torch.zeros(3, 4, dtype=torch.int64), None, batch.memory).isfinite().all()
