"""The attack: fine-tune what is left on a part of what was removed, and see how fast the rest returns.

A model from which knowledge is really gone recovers no faster than one that was trained without it
(arXiv 2406.13356). Everything that is left is attacked: all weights of a dense model, and of a bank
whose topic is deleted the anchor, which is then all that answers.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TypeVar

import numpy as np
import torch

from membank.trainer.model import Anchor
from membank.trainer.removal.baselines import (
    Documents,
    document_log_probs,
    negative_log_likelihood,
)
from membank.trainer.removal.config import RelearningConfig

Point = TypeVar("Point")


def relearn(
    model: Anchor,
    documents: Documents,
    config: RelearningConfig,
    *,
    seed: int,
    measure: Callable[[Anchor], Point],
) -> list[Point]:
    """Fine-tune a copy of a model, all of its weights, and measure it on the way.

    Parameters
    ----------
    model
        The model; it is left alone.
    documents
        The part of the forgotten documents that the attacker has.
    config
        How to train, and when to measure.
    seed
        Seed of the order; the same for every model, so that curves differ by the model alone.
    measure
        Called with the model after each of `config.steps`.

    Returns
    -------
    list
        What `measure` returned, in the order of `config.steps`.
    """
    trained = copy.deepcopy(model).requires_grad_(True)
    optimizer = torch.optim.AdamW(
        trained.parameters(), lr=config.learning_rate, weight_decay=0.0, fused=True
    )
    rng = np.random.Generator(np.random.PCG64([seed, 29]))
    points: list[Point] = []
    for step in range(config.steps[-1] + 1):
        if step in config.steps:
            points.append(measure(trained))
        if step == config.steps[-1]:
            break
        drawn = rng.choice(
            len(documents), size=min(config.batch_size, len(documents)), replace=False
        )
        loss = negative_log_likelihood(
            *document_log_probs(trained, [documents[row] for row in drawn])
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return points
