"""Greedy completion of prompts, as recall of facts is measured."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from membank.trainer.model.anchor import Anchor
from membank.trainer.model.memory import MemoryOfLayers


@torch.inference_mode()
def generate(
    model: Anchor,
    prompts: Sequence[Sequence[int]],
    memory: MemoryOfLayers | None = None,
    *,
    max_new_tokens: int,
    stop_token: int | None = None,
) -> list[list[int]]:
    """Complete each prompt with its most likely tokens.

    Parameters
    ----------
    model : Anchor
        The anchor; its mode and weights are left alone.
    prompts : sequence of sequence of int
        Token ids, none empty; lengths may differ.
    memory : MemoryOfLayers, optional
        One path per prompt, fetched once and kept for the whole completion.
    max_new_tokens : int
        Number of tokens to add at most, per prompt.
    stop_token : int, optional
        Token at which a completion ends; it is not part of the result. None never stops early.

    Returns
    -------
    list of list of int
        The new tokens of each prompt, at most ``max_new_tokens`` of them.

    Raises
    ------
    ValueError
        If a prompt is empty.

    Notes
    -----
    Every step runs the whole sequence again: completions of facts are a few tokens long, and the
    result then needs no second attention path to be trusted. Prompts are padded on the right, which
    a causal model cannot see.
    """
    lengths = [len(prompt) for prompt in prompts]
    if not lengths:
        return []
    if min(lengths) == 0:
        raise ValueError("a prompt has no tokens; each must have at least one")
    device = model.embedding.weight.device
    tokens_BT = torch.zeros(len(prompts), max(lengths) + max_new_tokens, dtype=torch.int64)
    for row, prompt in zip(tokens_BT, prompts, strict=True):
        row[: len(prompt)] = torch.tensor(list(prompt), dtype=torch.int64)
    tokens_BT = tokens_BT.to(device)
    ends_B = torch.tensor(lengths, device=device)
    rows_B = torch.arange(len(prompts), device=device)
    for step in range(max_new_tokens):
        logits_BTV = model(tokens_BT[:, : max(lengths) + step], None, memory)
        tokens_BT[rows_B, ends_B + step] = logits_BTV[rows_B, ends_B + step - 1].argmax(-1)
    return [
        _until(row[length : length + max_new_tokens].tolist(), stop_token)
        for row, length in zip(tokens_BT, lengths, strict=True)
    ]


def _until(tokens: list[int], stop_token: int | None) -> list[int]:
    return tokens if stop_token not in tokens else tokens[: tokens.index(stop_token)]
