"""Texts of different lengths as one batch, and what each of their tokens costs a model.

Shape suffixes: B texts, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from membank.trainer.model import Anchor, MemoryBatch

_NOT_SCORED = -100


def padded(texts: Sequence[Sequence[int]]) -> Tensor:
    """Return (B, T) int64: tokens, filled up on the right, which a causal model cannot see."""
    longest = max(len(text) for text in texts)
    tokens_BT = torch.zeros(len(texts), longest, dtype=torch.int64)
    for row, text in zip(tokens_BT, texts, strict=True):
        row[: len(text)] = torch.tensor(list(text), dtype=torch.int64)
    return tokens_BT


def token_losses(
    anchor: Anchor, texts: Sequence[Sequence[int]], memory: MemoryBatch | None
) -> Tensor:
    """Return the loss of each token but the first, given those before it, in nats.

    Parameters
    ----------
    anchor
        The anchor.
    texts
        Tokens of B texts.
    memory
        Memory of each of them, on the anchor's device; None = none.

    Returns
    -------
    Tensor
        (B, T - 1) float32 on the anchor's device; 0 behind the end of a text.
    """
    device = anchor.embedding.weight.device
    tokens_BT = padded(texts).to(device)
    lengths_B = torch.tensor([len(text) for text in texts], device=device)
    is_filling_BT = torch.arange(tokens_BT.shape[1], device=device) >= lengths_B[:, None]
    logits_BTV = anchor(tokens_BT, None, memory)
    return functional.cross_entropy(
        logits_BTV[:, :-1].mT.float(),
        tokens_BT.masked_fill(is_filling_BT, _NOT_SCORED)[:, 1:],
        ignore_index=_NOT_SCORED,
        reduction="none",
    )
