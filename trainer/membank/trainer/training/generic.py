"""The generic control: one block per level for all sequences, trained on exactly the same ones."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from membank.trainer.training.checkpoint import InProcessCheckpoint, load_anchor
from membank.trainer.training.in_process import InProcessMemory, generic_spec
from membank.trainer.training.memory_stage import MemoryStageConfig, train_memories
from membank.trainer.training.prefetch import PrefetchConfig
from membank.trainer.training.progress import ProgressCallback, StageResult
from membank.trainer.training.schedule import check_range
from membank.trainer.training.sequences import load_sequences
from membank.wire.spec import BankSpec


@dataclass(frozen=True, kw_only=True, slots=True)
class GenericTraining:
    """One run of the generic control; it pickles, so that another process can do it."""

    spec: BankSpec
    """The bank that it is the control of."""
    anchor: Path
    """File of `save_anchor`."""
    sequences: Path
    """File of `save_sequences`, the same as of the bank's own training."""
    config: MemoryStageConfig
    """How to train; the same as of the bank's own training."""
    run_dir: Path
    """Folder for the memory and its losses; a run that is started again goes on from there."""
    learning_rates: tuple[float, ...] | None = None
    """Learning rate of each level; None takes those of `spec`."""
    num_threads: int = 1
    """Threads, at least 1."""
    checkpoint_every_steps: int = 500
    """Steps between checkpoints, at least 1."""

    def __post_init__(self) -> None:
        for name in ("num_threads", "checkpoint_every_steps"):
            check_range(name, getattr(self, name), 1, float("inf"), open_high=True)

    @property
    def memory_path(self) -> Path:
        """File of the trained memory (`InProcessMemory.load`)."""
        return Path(self.run_dir) / "generic.safetensors"

    @property
    def losses_path(self) -> Path:
        """File with its losses (`read_losses`)."""
        return Path(self.run_dir) / "generic.losses.jsonl"


def train_generic(
    job: GenericTraining, *, on_progress: ProgressCallback | None = None
) -> StageResult:
    """Train the generic memory in this process and leave it in `job.memory_path`.

    Parameters
    ----------
    job
        What to train; give it to a process pool to run it beside the bank's own training.
    on_progress
        Told about twice a second.

    Returns
    -------
    StageResult
        What this process did.

    Raises
    ------
    MembankError
        A file cannot be read, or belongs to another run.
    """
    torch.set_num_threads(job.num_threads)
    memory = InProcessMemory(generic_spec(job.spec, learning_rates=job.learning_rates))
    return train_memories(
        load_anchor(job.anchor),
        memory,
        load_sequences(job.sequences),
        # Nothing travels: threads would only be in the way. The result is the same.
        replace(job.config, prefetch=PrefetchConfig(depth=0)),
        checkpoint=InProcessCheckpoint(
            job.memory_path, memory, every_steps=job.checkpoint_every_steps
        ),
        losses=job.losses_path,
        on_progress=on_progress,
    )
