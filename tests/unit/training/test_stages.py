"""Both stages: they learn, they resume, and prefetch and control change nothing that they must not."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from membank.trainer.corpus import PackedSequences
from membank.trainer.model import Anchor
from membank.trainer.training import (
    Acknowledged,
    AnchorStageConfig,
    Fetched,
    InProcessCheckpoint,
    InProcessMemory,
    MemoryStageConfig,
    Phase,
    PositionCheckpoint,
    PrefetchConfig,
    Progress,
    anchor_fingerprint,
    generic_spec,
    load_anchor,
    read_losses,
    save_anchor,
    train_anchor,
    train_memories,
)
from membank.trainer.training.memory_stage import RefusalCount
from membank.wire.errors import (
    CorruptionError,
    FailedPreconditionError,
    InvalidArgumentError,
    Reason,
)
from membank.wire.records import UpdateResult
from membank.wire.spec import BankSpec, BlockRef, BlockState
from wrapped_memory import WrappedMemory

STAGE_1 = AnchorStageConfig(num_tokens=30 * 4 * 12, batch_size=4, learning_rate=3e-3)
STAGE_2 = MemoryStageConfig(
    num_tokens=30 * 6 * 12, batch_size=6, run_length=2, prefetch=PrefetchConfig(depth=0)
)


class Killed(Exception):
    """Ends a run in its middle, as a signal would."""


def _kill_at(step: int) -> Callable[[Progress], None]:
    def on_progress(progress: Progress) -> None:
        if progress.step == step:
            raise Killed

    return on_progress


def _ticking() -> Callable[[], float]:
    now = [0.0]

    def clock() -> float:
        now[0] += 1.0
        return now[0]

    return clock


def _losses(path: Path) -> list[float]:
    records = read_losses(path)
    assert [record.step for record in records] == list(range(len(records)))
    return [record.loss for record in records]


def test_stage_1_learns(anchor: Anchor, sequences: PackedSequences, tmp_path: Path) -> None:
    result = train_anchor(anchor, sequences, STAGE_1, losses=tmp_path / "losses.jsonl")
    losses = _losses(tmp_path / "losses.jsonl")
    assert result.num_steps == len(losses) == 30
    assert result.num_tokens == STAGE_1.num_tokens
    assert losses[-1] < losses[0] - 0.3


def test_stage_1_resumes_with_the_losses_of_an_uninterrupted_run(
    anchor: Anchor, sequences: PackedSequences, tmp_path: Path
) -> None:
    start = {name: tensor.clone() for name, tensor in anchor.state_dict().items()}
    config = replace(STAGE_1, checkpoint_every_s=0)
    train_anchor(anchor, sequences, config, losses=tmp_path / "straight")
    straight = anchor_fingerprint(anchor)

    checkpoint, losses = tmp_path / "state", tmp_path / "resumed"
    anchor.load_state_dict(start)
    with pytest.raises(Killed):
        train_anchor(
            anchor,
            sequences,
            config,
            checkpoint=checkpoint,
            losses=losses,
            on_progress=_kill_at(11),
            clock=_ticking(),
        )
    anchor.load_state_dict(start)  # a new process knows the start alone
    result = train_anchor(anchor, sequences, config, checkpoint=checkpoint, losses=losses)
    assert 0 < result.first_step <= 11
    assert _losses(tmp_path / "resumed") == _losses(tmp_path / "straight")
    assert anchor_fingerprint(anchor) == straight
    # And once more: nothing is left to do.
    assert (
        train_anchor(anchor, sequences, config, checkpoint=checkpoint, losses=losses).num_tokens
        == 0
    )
    assert anchor_fingerprint(anchor) == straight


def test_a_checkpoint_of_another_run_is_refused(
    anchor: Anchor, sequences: PackedSequences, tmp_path: Path
) -> None:
    checkpoint = tmp_path / "state"
    train_anchor(anchor, sequences, STAGE_1, checkpoint=checkpoint)
    with pytest.raises(FailedPreconditionError, match="another run"):
        train_anchor(anchor, sequences, replace(STAGE_1, seed=1), checkpoint=checkpoint)
    checkpoint.write_bytes(b"no safetensors")
    with pytest.raises(CorruptionError, match="delete it"):
        train_anchor(anchor, sequences, STAGE_1, checkpoint=checkpoint)


def test_an_anchor_file_brings_back_the_anchor_frozen(anchor: Anchor, tmp_path: Path) -> None:
    save_anchor(tmp_path / "anchor", anchor)
    loaded = load_anchor(tmp_path / "anchor")
    assert anchor_fingerprint(loaded) == anchor_fingerprint(anchor)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


def test_stage_2_trains_the_blocks_and_leaves_the_anchor_alone(
    anchor: Anchor, sequences: PackedSequences, spec: BankSpec, tmp_path: Path
) -> None:
    before = anchor_fingerprint(anchor)
    memory = InProcessMemory(spec)
    result = train_memories(anchor, memory, sequences, STAGE_2, losses=tmp_path / "losses")
    losses = _losses(tmp_path / "losses")
    assert result.num_steps == len(losses) == 30
    assert sum(losses[-5:]) < sum(losses[:5]) - 1
    assert anchor_fingerprint(anchor) == before
    assert all(version > 0 for version in memory.fetch(list(spec.blocks())).versions.values())


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_prefetch_gives_the_same_losses_and_blocks(
    anchor: Anchor, sequences: PackedSequences, spec: BankSpec, tmp_path: Path, depth: int
) -> None:
    plain, prefetched = InProcessMemory(spec), InProcessMemory(spec)
    train_memories(anchor, plain, sequences, STAGE_2, losses=tmp_path / "plain")
    config = replace(STAGE_2, prefetch=PrefetchConfig(depth=depth))
    train_memories(anchor, prefetched, sequences, config, losses=tmp_path / "prefetched")
    assert _losses(tmp_path / "plain") == _losses(tmp_path / "prefetched")
    ours, theirs = (memory.fetch(list(spec.blocks())) for memory in (plain, prefetched))
    assert ours.versions == theirs.versions
    assert all(torch.equal(ours.weights[ref], theirs.weights[ref]) for ref in spec.blocks())


def test_generic_memory_equals_a_bank_with_a_single_leaf(
    anchor: Anchor, sequences: PackedSequences, spec: BankSpec, tmp_path: Path
) -> None:
    generic = InProcessMemory(generic_spec(spec))
    train_memories(anchor, generic, sequences, STAGE_2, losses=tmp_path / "generic")
    # The same sequences in the same order, told that all of them are of leaf 0 of a one-leaf bank.
    levels = tuple(replace(level, fan_out=1) for level in spec.levels)
    single = InProcessMemory(replace(spec, name="single", levels=levels, num_partitions=1))
    train_memories(anchor, single, sequences, STAGE_2, losses=tmp_path / "single")
    assert _losses(tmp_path / "generic") == _losses(tmp_path / "single")
    assert single.num_steps == 30
    fetched = InProcessMemory(spec)
    train_memories(anchor, fetched, sequences, STAGE_2, losses=tmp_path / "fetched")
    assert _losses(tmp_path / "fetched") != _losses(tmp_path / "generic")


@pytest.mark.parametrize("depth", [0, 2])
def test_stage_2_in_process_resumes_with_the_losses_of_an_uninterrupted_run(
    anchor: Anchor, sequences: PackedSequences, spec: BankSpec, tmp_path: Path, depth: int
) -> None:
    config = replace(STAGE_2, prefetch=PrefetchConfig(depth=depth))
    straight = InProcessMemory(spec)
    train_memories(anchor, straight, sequences, config, losses=tmp_path / "straight")

    first = InProcessMemory(spec)
    with pytest.raises(Killed):
        train_memories(
            anchor,
            first,
            sequences,
            config,
            checkpoint=InProcessCheckpoint(tmp_path / "memory", first, every_steps=4),
            losses=tmp_path / "resumed",
            on_progress=_kill_at(14),
            clock=_ticking(),
        )
    second = InProcessMemory(spec)
    result = train_memories(
        anchor,
        second,
        sequences,
        config,
        checkpoint=InProcessCheckpoint(tmp_path / "memory", second, every_steps=4),
        losses=tmp_path / "resumed",
    )
    assert 0 < result.first_step <= 14
    assert _losses(tmp_path / "resumed") == _losses(tmp_path / "straight")


def test_a_worker_goes_on_from_its_position_with_the_bank_as_it_is(
    anchor: Anchor, sequences: PackedSequences, spec: BankSpec, tmp_path: Path
) -> None:
    straight = InProcessMemory(spec)
    train_memories(anchor, straight, sequences, STAGE_2, losses=tmp_path / "straight")

    bank = InProcessMemory(spec)  # outlives the worker, as a served bank does
    position = PositionCheckpoint(tmp_path / "position")
    with pytest.raises(Killed):
        train_memories(
            anchor,
            bank,
            sequences,
            STAGE_2,
            checkpoint=position,
            losses=tmp_path / "resumed",
            on_progress=_kill_at(14),
            clock=_ticking(),
        )
    result = train_memories(
        anchor, bank, sequences, STAGE_2, checkpoint=position, losses=tmp_path / "resumed"
    )
    assert result.first_step == 14
    assert _losses(tmp_path / "resumed") == _losses(tmp_path / "straight")
    with pytest.raises(FailedPreconditionError, match="another run"):
        train_memories(anchor, bank, sequences, replace(STAGE_2, seed=9), checkpoint=position)


def test_workers_together_see_every_sequence(
    anchor: Anchor, sequences: PackedSequences, spec: BankSpec
) -> None:
    bank = InProcessMemory(spec)
    results = [
        train_memories(anchor, bank, sequences, STAGE_2, rank=rank, world_size=2)
        for rank in range(2)
    ]
    assert [result.num_steps for result in results] == [15, 15]
    assert sum(result.num_tokens for result in results) == STAGE_2.num_tokens


class Slow(WrappedMemory):
    """Memory that takes 5 seconds for a fetch and 7 for a push, by a clock of its own."""

    def __init__(self, source: InProcessMemory) -> None:
        super().__init__(source)
        self.now_s = 0.0

    def fetch(self, refs: Sequence[BlockRef]) -> Fetched:
        self.now_s += 5
        return super().fetch(refs)

    def push(
        self,
        gradients: Mapping[BlockRef, Tensor],
        versions: Mapping[BlockRef, int],
        *,
        step: int,
        learning_rate_scale: float = 1.0,
        first: Sequence[BlockRef] = (),
        then: Callable[[], None] | None = None,
    ) -> tuple[Acknowledged, ...]:
        self.now_s += 7
        return super().push(
            gradients,
            versions,
            step=step,
            learning_rate_scale=learning_rate_scale,
            first=first,
            then=then,
        )


def test_a_result_says_what_the_time_of_a_step_went_into(
    anchor: Anchor, sequences: PackedSequences, spec: BankSpec
) -> None:
    memory = Slow(InProcessMemory(spec))
    result = train_memories(anchor, memory, sequences, STAGE_2, clock=lambda: memory.now_s)
    assert result.seconds == 30 * (5 + 7)
    expected = dict.fromkeys(Phase, 0.0) | {Phase.FETCH: 30 * 5.0, Phase.PUSH: 30 * 7.0}
    assert dict(result.phase_seconds) == expected
    assert result.to_json()["phase_seconds"] == expected


class WithheldMeanwhile(WrappedMemory):
    """Memory of which a block is withheld between one fetch and its push."""

    def __init__(self, source: InProcessMemory, ref: BlockRef, step: int) -> None:
        super().__init__(source)
        self._withhold = partial(source.set_state, ref, BlockState.WITHHELD)
        self._step = step

    def push(
        self,
        gradients: Mapping[BlockRef, Tensor],
        versions: Mapping[BlockRef, int],
        *,
        step: int,
        learning_rate_scale: float = 1.0,
        first: Sequence[BlockRef] = (),
        then: Callable[[], None] | None = None,
    ) -> tuple[Acknowledged, ...]:
        if step == self._step:
            self._withhold()
        return super().push(
            gradients,
            versions,
            step=step,
            learning_rate_scale=learning_rate_scale,
            first=first,
            then=then,
        )


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_refused_gradients_are_counted_and_training_goes_on_without_the_block(
    anchor: Anchor, sequences: PackedSequences, spec: BankSpec, depth: int
) -> None:
    memory = InProcessMemory(spec)
    ref = BlockRef(1, 0)  # every batch has sequences of this topic
    config = replace(STAGE_2, prefetch=PrefetchConfig(depth=depth))
    result = train_memories(anchor, WithheldMeanwhile(memory, ref, 3), sequences, config)
    assert result.num_steps == 30
    # Once: from the next fetch on, paths end above it and nothing is pushed to it.
    assert result.refused == (("BLOCK_WITHHELD", 1),)
    assert memory.fetch([ref]).versions[ref] == 3


@pytest.mark.parametrize(("max_share", "ends"), [(0.4, True), (0.5, False), (1.0, False)])
def test_too_many_refusals_end_the_stage(max_share: float, ends: bool) -> None:
    count = RefusalCount(max_share, window=10)

    def push(accepted: bool) -> None:
        reason = None if accepted else Reason.STALE_VERSION
        result = UpdateResult(ref=BlockRef(1, 0), accepted=accepted, version=0, reason=reason)
        count.count(Acknowledged(step=0, results=(result,)))

    for number in range(9):
        push(accepted=number % 2 == 1)
    if ends:
        with pytest.raises(FailedPreconditionError, match="max_staleness"):
            push(accepted=True)
    else:
        push(accepted=True)
    assert count.total == 5


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_tokens", 0),
        ("run_length", 0),
        ("warmup_fraction", 1.0),
        ("final_scale", 1.5),
    ],
)
def test_settings_out_of_range_name_the_field(field: str, value: float) -> None:
    with pytest.raises(InvalidArgumentError, match=field):
        replace(STAGE_2, **{field: value})  # type: ignore[arg-type]
