"""The dense model's side: unlearn a topic by each method, and retrain without it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict
from functools import cached_property
from typing import Any

import numpy as np

from membank.trainer.model import Anchor
from membank.trainer.removal.bank_stages import AnchorKind
from membank.trainer.removal.baselines import unlearn
from membank.trainer.removal.scoring import Model
from membank.trainer.removal.world import SeedWorld


class DenseStages:
    """The stages of the dense model, which goes on from the shared anchors of the bank's side.

    Parameters
    ----------
    world
        What they work on.
    """

    def __init__(self, world: SeedWorld) -> None:
        self._world = world

    def run(self, label: str) -> dict[str, Any]:
        """Return what the stages of a topic found: before, retrained, and each method."""
        once = self._world.once
        return {
            "before": once(f"{label}/dense-before", lambda: self._known(self._all, label)),
            "retrained": once(f"{label}/dense-retrained", lambda: self._retrain(label)),
            "methods": {
                method: once(
                    f"{label}/dense-{method.replace(' ', '-')}",
                    lambda method=method: self._unlearn(method, label),  # type: ignore[misc]
                )
                for method in self._world.config.unlearning.methods
            },
        }

    @cached_property
    def _all(self) -> Anchor:
        world = self._world
        model, _ = world.trainer.dense(
            self._world.folder / f"{AnchorKind.SHARED}-anchor" / "all",
            world.material.trained,
            f"seed {world.seed}, all topics",
        )
        return model

    def _known(self, model: Anchor, label: str) -> dict[str, object]:
        examiner, asked = self._world.examiner, Model(anchor=model)
        return {
            "served": examiner.examine(asked, None, label).to_json(),
            "utility": asdict(examiner.utility(asked, None, label)),
        }

    def _retrain(self, label: str) -> Mapping[str, object]:
        world = self._world
        model, seconds = world.trainer.dense(
            world.folder / f"{AnchorKind.SHARED}-anchor" / f"without-{label}",
            world.material.without(label),
            f"seed {world.seed}, without {label}",
        )
        return {
            **self._known(model, label),
            "seconds": seconds,
            "relearning": world.curve(model, label),
        }

    def _unlearn(self, method: str, label: str) -> Mapping[str, object]:
        world, settings = self._world, self._world.config.unlearning
        epochs: list[dict[str, object]] = []
        last: list[Anchor] = []
        # Loaded before the clock runs: a study that goes on finds some of it at hand and some not.
        model = self._all
        forget = world.documents(world.material.topic(label).members.tolist())
        retain = world.documents(np.flatnonzero(world.material.without(label)).tolist())
        seconds, begun = 0.0, time.perf_counter()

        def after_epoch(epoch: int, trained: Anchor) -> None:
            # What measuring takes is no part of the time of unlearning.
            nonlocal seconds, begun
            seconds += time.perf_counter() - begun
            if epoch in settings.shown_epochs:
                epochs.append({"epoch": epoch, "seconds": seconds, **self._known(trained, label)})
            last[:] = [trained]
            begun = time.perf_counter()

        unlearn(
            model,
            method,
            forget,
            retain,
            settings,
            seed=world.seed,
            after_epoch=after_epoch,
        )
        return {"epochs": epochs, "relearning": world.curve(last[0], label)}
