"""Packed sequences as a worker gets them: from a file, as tensors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from membank.trainer.corpus import PackedSequences
from membank.trainer.training.files import read_tensors, write_tensors
from membank.wire.errors import CorruptionError, Reason

_KIND = "membank.sequences"
_FIELDS = ("tokens_NT", "doc_ids_NT", "leaf_N", "source_NT")


def save_sequences(path: Path, sequences: PackedSequences) -> None:
    """Write packed sequences to one safetensors file, atomically."""
    tensors = {name: torch.from_numpy(getattr(sequences, name)) for name in _FIELDS}
    write_tensors(path, tensors, kind=_KIND, meta="{}")


def load_sequences(path: Path) -> PackedSequences:
    """Read packed sequences.

    Raises
    ------
    NotFoundError
        There is no such file.
    CorruptionError
        It is damaged or something else.
    """
    tensors, _ = read_tensors(path, kind=_KIND)
    try:
        return PackedSequences(**{name: tensors[name].numpy() for name in _FIELDS})
    except KeyError as err:
        raise CorruptionError(
            f"{path} lacks {err}; pack the sequences again", reason=Reason.SPEC_CORRUPT
        ) from err


def batch_tensors(
    sequences: PackedSequences, rows_B: NDArray[np.int64], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return tokens and segments of some sequences, (B, T) int64 each, on `device`."""
    tokens_BT = torch.from_numpy(sequences.tokens_NT[rows_B].astype(np.int64))
    segments_BT = torch.from_numpy(sequences.doc_ids_NT[rows_B].astype(np.int64))
    return tokens_BT.to(device), segments_BT.to(device)
