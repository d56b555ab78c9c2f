"""Training: stage 1 (the anchor) and stage 2 (the memories, fetched from and pushed to a bank).

`membank.trainer.training.ray_train` runs stage 2 on Ray workers; it is imported by itself, so that
everything here works without Ray.
"""

from membank.trainer.training.anchor_stage import AnchorStageConfig, train_anchor
from membank.trainer.training.checkpoint import (
    AnchorCheckpoint,
    InProcessCheckpoint,
    PositionCheckpoint,
    StageCheckpoint,
    anchor_fingerprint,
    load_anchor,
    save_anchor,
)
from membank.trainer.training.generic import GenericTraining, train_generic
from membank.trainer.training.in_process import InProcessMemory, generic_spec
from membank.trainer.training.memory_stage import MemoryStageConfig, train_memories
from membank.trainer.training.order import SequenceOrder
from membank.trainer.training.paths import BatchMemory, distinct_blocks, join, leaf_path
from membank.trainer.training.prefetch import PrefetchConfig, PrefetchingMemory
from membank.trainer.training.progress import (
    LossLog,
    LossRecord,
    Phase,
    Progress,
    ProgressCallback,
    StageResult,
    read_losses,
)
from membank.trainer.training.sequences import load_sequences, save_sequences
from membank.trainer.training.served import ServedMemory, as_fetched
from membank.trainer.training.source import Acknowledged, Fetched, MemorySource

__all__ = [
    "Acknowledged",
    "AnchorCheckpoint",
    "AnchorStageConfig",
    "BatchMemory",
    "Fetched",
    "GenericTraining",
    "InProcessCheckpoint",
    "InProcessMemory",
    "LossLog",
    "LossRecord",
    "MemorySource",
    "MemoryStageConfig",
    "Phase",
    "PositionCheckpoint",
    "PrefetchConfig",
    "PrefetchingMemory",
    "Progress",
    "ProgressCallback",
    "SequenceOrder",
    "ServedMemory",
    "StageCheckpoint",
    "StageResult",
    "anchor_fingerprint",
    "as_fetched",
    "distinct_blocks",
    "generic_spec",
    "join",
    "leaf_path",
    "load_anchor",
    "load_sequences",
    "read_losses",
    "save_anchor",
    "save_sequences",
    "train_anchor",
    "train_generic",
    "train_memories",
]
