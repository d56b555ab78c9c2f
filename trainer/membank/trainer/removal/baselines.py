"""Unlearning by gradients, on a dense model: what a bank's deletion is compared with.

Losses, with a model p_theta, the model before p_ref, forget documents F and retained ones R:

- gradient ascent: ``+E_F log p_theta`` per token;
- GradDiff: the same ``+ lambda * NLL_R`` (both as in TOFU, arXiv 2401.06121);
- NPO (arXiv 2404.05868): ``-(2 / beta) E_F log sigma(-beta log(p_theta / p_ref))`` of whole
  documents, ``+ lambda * NLL_R`` as OpenUnlearning trains it.

Shape suffixes: B documents, T tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from membank.trainer.evaluation.token_losses import padded
from membank.trainer.model import Anchor
from membank.trainer.removal.config import UnlearningConfig
from membank.wire.errors import InvalidArgumentError

Documents = Sequence[Sequence[int]]
"""Token ids of documents, each with two tokens or more."""


def document_log_probs(model: Anchor, documents: Documents) -> tuple[Tensor, Tensor]:
    """Return the log-probability of each document after its first token, and the tokens scored.

    Parameters
    ----------
    model
        The model; gradients reach its weights.
    documents
        B documents.

    Returns
    -------
    log_probs_B
        (B,) float32, in nats: a sum over tokens.
    counts_B
        (B,) float32: how many tokens it is a sum of.
    """
    tokens_BT = padded(documents)
    lengths_B = torch.tensor([len(document) for document in documents])
    scored_BT = torch.arange(1, tokens_BT.shape[1]) < lengths_B[:, None]
    log_probs_BTV = model(tokens_BT)[:, :-1].float().log_softmax(-1)
    log_probs_BT = log_probs_BTV.gather(2, tokens_BT[:, 1:, None])[:, :, 0]
    return (log_probs_BT * scored_BT).sum(1), scored_BT.sum(1).float()


def negative_log_likelihood(log_probs_B: Tensor, counts_B: Tensor) -> Tensor:
    """Return the mean loss over all tokens of some documents, in nats per token."""
    return -log_probs_B.sum() / counts_B.sum()


def npo_loss(log_probs_B: Tensor, reference_B: Tensor, *, beta: float) -> Tensor:
    """Return ``-(2 / beta) E log sigma(-beta log(p_theta / p_ref))``, in nats.

    Parameters
    ----------
    log_probs_B, reference_B
        (B,) log-probability of each document, from the model and from the one before.
    beta
        How soon the gradient of a document fades once it has become unlikely, > 0; near 0 the loss
        is that of gradient ascent, plus a constant.
    """
    return (2.0 / beta) * functional.softplus(beta * (log_probs_B - reference_B)).mean()


def unlearn(
    model: Anchor,
    method: str,
    forget: Documents,
    retain: Documents,
    config: UnlearningConfig,
    *,
    seed: int,
    after_epoch: Callable[[int, Anchor], None],
) -> None:
    """Unlearn documents, all weights of the model trained; the model itself is left alone.

    Parameters
    ----------
    model
        The model that knows them.
    method
        One of `METHODS`.
    forget
        What to unlearn.
    retain
        What to keep; as many of them as of `forget` are drawn in each step.
    config
        How to train.
    seed
        Seed of the order.
    after_epoch
        Called with the number of each epoch, from 1, and the model as it is then.

    Raises
    ------
    InvalidArgumentError
        There is no such method.
    """
    losses = {
        "gradient ascent": _ascent,
        "GradDiff": _ascent,
        "NPO": _npo,
    }
    if method not in losses:
        raise InvalidArgumentError(f"unknown method {method!r}; use one of {', '.join(losses)}")
    before, trained = model, copy.deepcopy(model).requires_grad_(True)
    weight = 0.0 if method == "gradient ascent" else config.retain_weight
    optimizer = torch.optim.AdamW(
        trained.parameters(), lr=config.learning_rate, weight_decay=0.0, fused=True
    )
    rng = np.random.Generator(np.random.PCG64([seed, 23]))
    for epoch in range(1, config.epochs + 1):
        order = rng.permutation(len(forget))
        for start in range(0, len(forget), config.batch_size):
            rows = order[start : start + config.batch_size]
            loss = losses[method](trained, before, [forget[row] for row in rows], config.beta)
            if weight:
                drawn = rng.integers(len(retain), size=len(rows))
                kept = document_log_probs(trained, [retain[row] for row in drawn])
                loss = loss + weight * negative_log_likelihood(*kept)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
            optimizer.step()
        after_epoch(epoch, trained)


def _ascent(model: Anchor, before: Anchor, documents: Documents, beta: float) -> Tensor:
    del before, beta
    return -negative_log_likelihood(*document_log_probs(model, documents))


def _npo(model: Anchor, before: Anchor, documents: Documents, beta: float) -> Tensor:
    log_probs_B, _ = document_log_probs(model, documents)
    with torch.no_grad():
        reference_B, _ = document_log_probs(before, documents)
    return npo_loss(log_probs_B, reference_B, beta=beta)
