"""The bank's side of the study: delete a topic from a served bank, and retrain the bank without it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from enum import StrEnum
from functools import cached_property
from pathlib import Path
from typing import Any

from membank.trainer.removal.deletion import delete_topic, install, router_among, router_of
from membank.trainer.removal.knowledge import Router
from membank.trainer.removal.scoring import Model, ZeroedBlocks
from membank.trainer.removal.training import Models
from membank.trainer.removal.world import SeedWorld
from membank.trainer.training import ServedMemory
from membank.trainer.training.files import write_atomically
from membank.wire.format import decode_tree, encode_tree


class AnchorKind(StrEnum):
    """What the anchor of a bank was trained on."""

    SHARED = "shared"
    """All documents, those of the topics too, as in the paper."""
    BLIND = "blind"
    """None of the topics' documents: they are in their blocks alone."""


class BankStages:
    """The stages of one kind of bank.

    Parameters
    ----------
    world
        What they work on.
    kind
        What the anchor was trained on.
    """

    def __init__(self, world: SeedWorld, kind: AnchorKind) -> None:
        self._world = world
        self._kind = kind
        self._retrained: dict[str, Models] = {}

    def run(self, label: str) -> dict[str, Any]:
        """Return what the stages of a topic found: before, delete, retrained, leak."""

        def once(stage: str, compute: Callable[[str], Mapping[str, object]]) -> dict[str, Any]:
            return self._world.once(f"{label}/{self._kind}-{stage}", lambda: compute(label))

        return {
            "before": once("before", self._before),
            "delete": once("delete", self._delete),
            "retrained": once("retrained", self._retrain),
            "leak": once("leak", self._leak),
        }

    @cached_property
    def models(self) -> Models:
        """The bank that knows every topic."""
        return self._train(self._folder / "all", None)

    def without(self, label: str) -> Models:
        """Return the bank that was trained without a topic."""
        if label not in self._retrained:
            folder = self._folder / f"without-{label}"
            self._retrained[label] = self._train(folder, label)
        return self._retrained[label]

    # The stages.

    def _before(self, label: str) -> Mapping[str, object]:
        examiner, router = self._world.examiner, router_of(self._world.tree)
        model = _model(self.models)
        return {
            "seconds": self.models.seconds,
            "served": examiner.examine(model, router, label).to_json(),
            "utility": asdict(examiner.utility(model, router, label)),
        }

    def _delete(self, label: str) -> Mapping[str, object]:
        world, topic = self._world, self._world.material.topic(label)
        folder = self._folder / f"served-{label}"
        with world.host.serve(folder, world.trainer.spec, world.tree) as client:
            install(client, self.models.bank)
            report = delete_topic(
                client,
                self.models.anchor,
                topic.clusters,
                folder=folder,
                forget=[question.fact.prompt for question in topic.questions],
                prompts=world.prompts(),
            )
            tree = client.tree()
            # What the service routes by afterwards; the retrained bank is asked by the same.
            write_atomically(self._tree_file(label), encode_tree(tree))
            model = Model(anchor=self.models.anchor, bank=ServedMemory(client))
            return {"report": asdict(report), **self._asked_afterwards(model, label)}

    def _retrain(self, label: str) -> Mapping[str, object]:
        models = self.without(label)
        return {"seconds": models.seconds, **self._asked_afterwards(_model(models), label)}

    def _leak(self, label: str) -> Mapping[str, object]:
        """Ask with what lies in other places than the deleted blocks; other ways are measured above."""
        router = router_of(self._world.tree)
        models = self.models
        parent = Model(anchor=models.anchor, bank=models.bank)
        # Its own blocks alone: what is routed elsewhere reads there what it reads after a deletion.
        gone = self._world.material.topic(label).clusters
        zeroed = Model(anchor=models.anchor, bank=ZeroedBlocks(models.bank, gone))
        conditions: dict[str, tuple[Model, Router]] = {
            "parent": (parent, lambda texts: [path[:1] for path in router(texts)]),
            "zeroed": (zeroed, router),
        }
        return {
            name: self._world.examiner.examine(model, way, label).to_json()
            for name, (model, way) in conditions.items()
        }

    # What they share.

    def _asked_afterwards(self, model: Model, label: str) -> dict[str, object]:
        """Ask by the tree that a deletion leaves, and as if texts went to the nearest other topic."""
        examiner, file = self._world.examiner, self._tree_file(label)
        router = router_of(decode_tree(file.read_bytes(), key=str(file)))
        others = [
            cluster
            for topic in self._world.material.topics
            if topic.label != label
            for cluster in topic.clusters
        ]
        neighbour = router_among(self._world.tree, others)
        return {
            "served": examiner.examine(model, router, label).to_json(),
            "neighbour": examiner.examine(model, neighbour, label).to_json(),
            "utility": asdict(examiner.utility(model, router, label)),
        }

    def _train(self, folder: Path, label: str | None) -> Models:
        world = self._world
        material, trainer = world.material, world.trainer
        included = material.trained if label is None else material.without(label)
        what = "all topics" if label is None else f"without {label}"
        title = f"seed {world.seed}, {self._kind} anchor, {what}"
        if self._kind is AnchorKind.SHARED:
            return trainer.bank(folder, included, title)
        # It never sees a topic, so it is the same whichever one is left out.
        anchor = self._folder / "all"
        seconds = trainer.anchor(anchor, material.blind(), title)
        models = trainer.bank(folder, included, title, anchor=anchor)
        return (
            replace(models, seconds={**models.seconds, "anchor": seconds}) if not label else models
        )

    @property
    def _folder(self) -> Path:
        return self._world.folder / f"{self._kind}-anchor"

    def _tree_file(self, label: str) -> Path:
        return self._folder / f"tree-without-{label}.safetensors"


def _model(models: Models) -> Model:
    return Model(anchor=models.anchor, bank=models.bank)
