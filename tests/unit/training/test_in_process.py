"""Memory in this process: initial content, lazy optimizers, refusals, and its file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from membank.trainer.training import InProcessMemory, generic_spec
from membank.wire.errors import CorruptionError, InvalidArgumentError, NotFoundError, Reason
from membank.wire.format import initial_weight
from membank.wire.spec import BankSpec, BlockRef, BlockState, OptimizerKind, OptimizerSpec

A, B = BlockRef(2, 0), BlockRef(2, 5)


def _gradients(spec: BankSpec, refs: Sequence[BlockRef], seed: int) -> dict[BlockRef, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {ref: torch.randn(spec.block_shape(ref.level), generator=generator) for ref in refs}


def _push(memory: InProcessMemory, refs: Sequence[BlockRef], step: int, scale: float = 1.0) -> None:
    versions = memory.fetch(refs).versions
    memory.push(_gradients(memory.spec, refs, step), versions, step=step, learning_rate_scale=scale)


def test_blocks_start_as_the_format_says(spec: BankSpec) -> None:
    fetched = InProcessMemory(spec).fetch([A, B])
    for ref in (A, B):
        assert torch.equal(fetched.weights[ref], torch.from_numpy(initial_weight(spec, ref)))
        assert fetched.versions[ref] == 0


def _torch_optimizer(
    kind: OptimizerKind, weight: Tensor, rate: float, spec: OptimizerSpec
) -> torch.optim.Optimizer:
    decay = spec.weight_decay
    match kind:
        case OptimizerKind.ADAMW:
            betas = (spec.beta1, spec.beta2)
            return torch.optim.AdamW([weight], rate, betas=betas, eps=spec.eps, weight_decay=decay)
        case OptimizerKind.ADAGRAD:
            return torch.optim.Adagrad([weight], rate, eps=spec.eps, weight_decay=decay)
        case OptimizerKind.SGD:
            return torch.optim.SGD([weight], rate, momentum=spec.beta1, weight_decay=decay)


@pytest.mark.parametrize("kind", OptimizerKind)
def test_each_block_steps_as_a_tensor_with_an_optimizer_of_its_own(
    spec: BankSpec, kind: OptimizerKind
) -> None:
    spec = replace(spec, optimizer=OptimizerSpec(kind=kind, weight_decay=0.01))
    memory = InProcessMemory(spec)
    rate = spec.levels[1].learning_rate
    # A is stepped at every step, B at every third: B must not decay in between.
    for ref, every in ((A, 1), (B, 3)):
        weight = torch.from_numpy(initial_weight(spec, ref)).requires_grad_()
        optimizer = _torch_optimizer(kind, weight, rate, spec.optimizer)
        for step in range(9):
            if step % every == 0:
                scale = 1 - step / 20
                optimizer.param_groups[0]["lr"] = rate * scale
                weight.grad = _gradients(spec, [ref], step)[ref]
                optimizer.step()
                _push(memory, [ref], step, scale)
        fetched = memory.fetch([ref])
        torch.testing.assert_close(fetched.weights[ref], weight.detach())
        assert fetched.versions[ref] == 9 // every


def test_a_push_changes_its_blocks_and_no_other(spec: BankSpec) -> None:
    memory = InProcessMemory(spec)
    every = list(spec.blocks())
    before = memory.fetch(every)
    kept = {ref: weight.clone() for ref, weight in before.weights.items()}
    _push(memory, [A], 0)
    after = memory.fetch(every)
    changed = {ref for ref in every if not torch.equal(kept[ref], after.weights[ref])}
    assert changed == {A}
    assert {ref for ref in every if after.versions[ref]} == {A}
    # What was fetched before the push does not change under its reader.
    assert all(torch.equal(before.weights[ref], kept[ref]) for ref in every)


def test_weights_are_kept_in_the_dtype_of_the_bank(spec: BankSpec) -> None:
    memory = InProcessMemory(replace(spec, dtype="bfloat16"))
    _push(memory, [A], 0)
    weight = memory.fetch([A]).weights[A]
    assert weight.dtype is torch.float32
    assert torch.equal(weight, weight.bfloat16().float())


def test_stale_and_withheld_gradients_are_refused_and_change_nothing(spec: BankSpec) -> None:
    memory = InProcessMemory(replace(spec, max_staleness=1))
    for step in range(2):
        _push(memory, [A, B], step)
    memory.set_state(B, BlockState.WITHHELD)
    before = memory.fetch([A, B])
    assert before.absent == {B: BlockState.WITHHELD}
    assert set(before.weights) == {A}
    gradients = _gradients(spec, [A, B], 7)
    (push,) = memory.push(gradients, {A: 0, B: 2}, step=2)
    assert [(r.accepted, r.reason) for r in push.results] == [
        (False, Reason.STALE_VERSION),
        (False, Reason.BLOCK_WITHHELD),
    ]
    memory.set_state(B, BlockState.ACTIVE)
    after = memory.fetch([A, B])
    assert after.versions == {A: 2, B: 2}
    assert torch.equal(after.weights[A], before.weights[A])


@pytest.mark.parametrize("bad", ["shape", "nan", "level", "cluster"])
def test_a_bad_push_is_refused_whole(spec: BankSpec, bad: str) -> None:
    memory = InProcessMemory(spec)
    gradients = _gradients(spec, [A, B], 0)
    match bad:
        case "shape":
            gradients[B] = gradients[B][:, :, :1]
        case "nan":
            gradients[B][0, 0, 0, 0] = torch.nan
        case "level":
            gradients[BlockRef(3, 0)] = gradients.pop(B)
        case "cluster":
            gradients[BlockRef(2, 6)] = gradients.pop(B)
    with pytest.raises((InvalidArgumentError, NotFoundError)):
        memory.push(gradients, dict.fromkeys(gradients, 0), step=0)
    assert memory.fetch([A]).versions[A] == 0


def test_a_file_brings_everything_back_bit_for_bit(spec: BankSpec, tmp_path: Path) -> None:
    memory = InProcessMemory(spec)
    for step in range(3):
        _push(memory, [A, B], step)
    memory.set_state(B, BlockState.DELETED)
    memory.save(tmp_path / "memory.safetensors")
    loaded = InProcessMemory.load(tmp_path / "memory.safetensors")
    assert loaded.num_steps == 3
    assert loaded.spec == spec
    for either in (memory, loaded):
        either.set_state(B, BlockState.ACTIVE)
        _push(either, [A, B], 3)
    ours, theirs = memory.fetch([A, B]), loaded.fetch([A, B])
    assert ours.versions == theirs.versions == {A: 4, B: 4}
    assert all(torch.equal(ours.weights[ref], theirs.weights[ref]) for ref in (A, B))


def test_a_damaged_file_is_a_clear_error(spec: BankSpec, tmp_path: Path) -> None:
    path = tmp_path / "memory.safetensors"
    with pytest.raises(NotFoundError):
        InProcessMemory.load(path)
    InProcessMemory(spec).save(path)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(CorruptionError, match="delete it"):
        InProcessMemory.load(path)


def test_a_generic_memory_has_one_block_per_level_and_the_size_of_a_fetch(spec: BankSpec) -> None:
    generic = generic_spec(spec, learning_rates=(1e-3, 2e-3))
    assert generic.num_blocks == spec.num_levels
    levels = range(1, spec.num_levels + 1)
    assert [generic.block_shape(n) for n in levels] == [spec.block_shape(n) for n in levels]
    assert [level.learning_rate for level in generic.levels] == [1e-3, 2e-3]
    with pytest.raises(InvalidArgumentError, match="2 levels"):
        generic_spec(spec, learning_rates=(1e-3,))
