"""The study, top to bottom: train, delete, retrain, unlearn, relearn; every stage that is done stays done."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from membank.trainer.model import Anchor
from membank.trainer.removal.baselines import unlearn
from membank.trainer.removal.config import RemovalConfig
from membank.trainer.removal.deletion import BankHost, delete_topic, install, router_of
from membank.trainer.removal.knowledge import Examiner, Router
from membank.trainer.removal.material import Material, TopicMaterial, make_material
from membank.trainer.removal.relearning import relearn
from membank.trainer.removal.scoring import Model, ZeroedBlocks
from membank.trainer.removal.stages import StageStore
from membank.trainer.removal.training import Models, ModelTrainer, ProgressOf
from membank.trainer.run import RunDirectory, prepare_run
from membank.trainer.training import ServedMemory
from membank.wire.format import decode_tree, encode_tree

Notice = Callable[[str], None]
"""Told what is being done."""


class RemovalStudy:
    """One study in one directory.

    Parameters
    ----------
    folder
        Where all of it is kept; a study that was stopped goes on from there.
    config
        What to run.
    host
        Serves the banks that topics are deleted from.
    progress
        Shows the progress of a training.
    notice
        Told what is being done.

    Raises
    ------
    FailedPreconditionError
        The directory holds another study.
    """

    def __init__(
        self,
        folder: Path,
        config: RemovalConfig,
        host: BankHost,
        *,
        progress: ProgressOf,
        notice: Notice = lambda _: None,
    ) -> None:
        self._store = StageStore(folder, config.to_json())
        self._config = config
        self._host = host
        self._progress = progress
        self._notice = notice
        self._run = RunDirectory(folder / "shared")

    def run(self, seeds: Sequence[int]) -> dict[int, dict[str, Any]]:
        """Measure, seed by seed.

        Parameters
        ----------
        seeds
            Seeds of models, orders and held-out documents. Tokenizer and tree are the same for all.

        Returns
        -------
        dict
            What every stage found, by seed; `membank.trainer.removal.report` makes sense of it.
        """
        self._store.once("prepared", self._prepare)
        return {seed: self._seed(seed) for seed in seeds}

    def _prepare(self) -> Mapping[str, object]:
        self._notice("tokenizer and topic tree")
        return asdict(prepare_run(self._run, self._config.run))

    def _seed(self, seed: int) -> dict[str, Any]:
        leaves = np.array(self._run.read_json(self._run.leaves_file))
        material = make_material(self._run.corpus(), leaves, self._config, seed=seed)
        return _SeedStudy(
            self._store,
            self._config,
            self._host,
            run=self._run,
            material=material,
            seed=seed,
            progress=self._progress,
            notice=self._notice,
        ).run()


class _SeedStudy:
    """The stages of one seed."""

    def __init__(
        self,
        store: StageStore,
        config: RemovalConfig,
        host: BankHost,
        *,
        run: RunDirectory,
        material: Material,
        seed: int,
        progress: ProgressOf,
        notice: Notice,
    ) -> None:
        self._store = store
        self._config = config
        self._host = host
        self._run = run
        self._material = material
        self._seed = seed
        self._notice = notice
        self._name = f"seed-{seed}"
        self._tokenizer = run.tokenizer()
        self._examiner = Examiner(self._tokenizer, config, material)
        self._trainer = ModelTrainer(run, config, material, seed=seed, progress=progress)
        self._retrained: dict[str, Models] = {}

    def run(self) -> dict[str, Any]:
        """Return what all stages found."""
        labels = [topic.label for topic in self._material.topics]
        return {
            "before": self._store.once(f"{self._name}/before", self._before),
            "topics": {label: self._topic(label) for label in labels},
        }

    def _topic(self, label: str) -> dict[str, Any]:
        def once(stage: str, compute: Callable[[str], Mapping[str, object]]) -> dict[str, Any]:
            def tell() -> Mapping[str, object]:
                self._notice(f"seed {self._seed}, {label}: {stage}")
                return compute(label)

            return self._store.once(f"{self._name}/{label}/{stage}", tell)

        return {
            "delete": once("delete", self._delete),
            "retrained": once("retrained", self._retrain),
            "leak": once("leak", self._leak),
            "relearning": once("relearning", self._relearn),
            "methods": {
                method: once(method.replace(" ", "-"), partial(self._unlearn, method))
                for method in self._config.unlearning.methods
            },
        }

    # The stages.

    def _before(self) -> Mapping[str, object]:
        models, router = self._all, router_of(self._run.tree())
        self._notice(f"seed {self._seed}: what is known before")
        bank, dense = _bank_model(models), Model(anchor=models.dense)
        return {
            "seconds": models.seconds,
            "topics": {
                topic.label: {
                    "num_facts": len(topic.questions),
                    "num_members": len(topic.members),
                    "num_held_out": len(topic.held_out),
                    "clusters": [str(cluster) for cluster in topic.clusters],
                    "bank": self._examiner.examine(bank, router, topic.label).to_json(),
                    "dense": self._examiner.examine(dense, None, topic.label).to_json(),
                    "bank_utility": asdict(self._examiner.utility(bank, router, topic.label)),
                    "dense_utility": asdict(self._examiner.utility(dense, None, topic.label)),
                }
                for topic in self._material.topics
            },
        }

    def _delete(self, label: str) -> Mapping[str, object]:
        topic = self._material.topic(label)
        folder = self._folder(label) / "bank"
        prompts = self._prompts()
        with self._host.serve(folder, self._trainer.spec, self._run.tree()) as client:
            install(client, self._all.bank)
            report = delete_topic(
                client,
                self._all.anchor,
                topic.clusters,
                folder=folder,
                forget=[question.fact.prompt for question in topic.questions],
                prompts=prompts,
            )
            tree = client.tree()
            model, router = (
                Model(anchor=self._all.anchor, bank=ServedMemory(client)),
                router_of(tree),
            )
            result = {
                "report": asdict(report),
                "served": self._examiner.examine(model, router, label).to_json(),
                "utility": asdict(self._examiner.utility(model, router, label)),
            }
        # What the service routes by afterwards; the retrained bank is asked by the same.
        self._tree_file(label).write_bytes(encode_tree(tree))
        ended = self._examiner.examine(Model(anchor=self._all.anchor), None, label)
        return {**result, "ended": ended.to_json()}

    def _retrain(self, label: str) -> Mapping[str, object]:
        models = self._without(label)
        model, router = _bank_model(models), self._router_after(label)
        dense = Model(anchor=models.dense)
        return {
            "seconds": models.seconds,
            "served": self._examiner.examine(model, router, label).to_json(),
            "ended": self._examiner.examine(Model(anchor=models.anchor), None, label).to_json(),
            "utility": asdict(self._examiner.utility(model, router, label)),
            "dense": self._examiner.examine(dense, None, label).to_json(),
            "dense_utility": asdict(self._examiner.utility(dense, None, label)),
        }

    def _leak(self, label: str) -> Mapping[str, object]:
        before, after = router_of(self._run.tree()), self._router_after(label)
        bank = _bank_model(self._all)
        zeroed = Model(anchor=self._all.anchor, bank=ZeroedBlocks(self._all.bank))
        conditions: dict[str, tuple[Model, Router | None]] = {
            "fetched": (bank, before),
            "parent block alone": (bank, lambda texts: [path[:1] for path in before(texts)]),
            "neighbour's blocks": (bank, after),
            "zeroed blocks": (zeroed, before),
            "anchor alone": (Model(anchor=self._all.anchor), None),
            "retrained, neighbour's blocks": (_bank_model(self._without(label)), after),
            "retrained, anchor alone": (Model(anchor=self._without(label).anchor), None),
        }
        return {
            name: self._examiner.examine(model, router, label).to_json()
            for name, (model, router) in conditions.items()
        }

    def _relearn(self, label: str) -> Mapping[str, object]:
        retrained = self._without(label)
        return {
            "bank, topic deleted": self._curve(self._all.anchor, label),
            "bank, retrained": self._curve(retrained.anchor, label),
            "dense, retrained": self._curve(retrained.dense, label),
        }

    def _unlearn(self, method: str, label: str) -> Mapping[str, object]:
        topic, settings = self._material.topic(label), self._config.unlearning
        epochs: list[dict[str, object]] = []
        last: list[Anchor] = []
        seconds = 0.0
        begun = time.perf_counter()

        def after_epoch(epoch: int, model: Anchor) -> None:
            nonlocal seconds, begun
            seconds += time.perf_counter() - begun
            if epoch in settings.shown_epochs:
                epochs.append(
                    {
                        "epoch": epoch,
                        "seconds": seconds,
                        "dense": self._examiner.examine(Model(anchor=model), None, label).to_json(),
                        "utility": asdict(self._examiner.utility(Model(anchor=model), None, label)),
                    }
                )
            last[:] = [model]
            begun = time.perf_counter()

        unlearn(
            self._all.dense,
            method,
            self._documents(topic.members),
            self._documents(np.flatnonzero(self._material.without(label))),
            settings,
            seed=self._seed,
            after_epoch=after_epoch,
        )
        return {"epochs": epochs, "relearning": self._curve(last[0], label)}

    # What they share.

    @cached_property
    def _all(self) -> Models:
        return self._trainer.train(
            self._store.folder / self._name / "all",
            self._material.trained,
            f"seed {self._seed}, all topics",
        )

    def _without(self, label: str) -> Models:
        if label not in self._retrained:
            self._retrained[label] = self._trainer.train(
                self._folder(label) / "retrained",
                self._material.without(label),
                f"seed {self._seed}, without {label}",
            )
        return self._retrained[label]

    def _folder(self, label: str) -> Path:
        return self._store.folder / self._name / label

    def _tree_file(self, label: str) -> Path:
        return self._folder(label) / "tree-after.safetensors"

    def _router_after(self, label: str) -> Router:
        file = self._tree_file(label)
        return router_of(decode_tree(file.read_bytes(), key=str(file)))

    def _prompts(self) -> dict[str, list[int]]:
        """Return the prompts that a deletion must not change, and those that it must."""
        texts = [q.fact.prompt for topic in self._material.topics for q in topic.questions]
        documents = self._material.corpus.documents
        # Texts of every topic of the corpus, trained subtrees or not.
        texts += [document.text for document in documents[:: max(1, len(documents) // 200)]]
        encoded = self._tokenizer.encode_batch(texts)
        longest = self._config.run.seq_len
        return {text: ids[:longest] for text, ids in zip(texts, encoded, strict=True) if ids}

    def _documents(self, positions: np.ndarray) -> list[list[int]]:
        texts = [self._material.corpus.documents[int(row)].text for row in positions]
        longest = self._config.run.seq_len
        return [
            [*ids, self._tokenizer.eot_id][:longest]
            for ids in self._tokenizer.encode_batch(texts)
            if ids
        ]

    def _curve(self, model: Anchor, label: str) -> dict[str, object]:
        """Return how fast a model recovers the facts that the attacker does not train on."""
        topic, settings = self._material.topic(label), self._config.relearning
        shown, hidden = _split(topic, settings.share, self._seed)
        positions = [self._material.corpus.index[topic.questions[row].fact.doc_id] for row in shown]
        points = relearn(
            model,
            self._documents(np.array(positions)),
            settings,
            seed=self._seed,
            measure=lambda trained: self._examiner.answers_of(Model(anchor=trained), label, hidden),
        )
        return {
            "steps": list(settings.steps),
            "recall": [recall for recall, _ in points],
            "answer_loss": [loss for _, loss in points],
        }


def _bank_model(models: Models) -> Model:
    return Model(anchor=models.anchor, bank=models.bank)


def _split(topic: TopicMaterial, share: float, seed: int) -> tuple[list[int], list[int]]:
    """Return the questions whose documents the attacker has, and the others."""
    rng = np.random.Generator(np.random.PCG64([seed, 31]))
    order = rng.permutation(len(topic.questions)).tolist()
    count = min(len(order) - 1, max(1, round(share * len(order))))
    return sorted(order[:count]), sorted(order[count:])
