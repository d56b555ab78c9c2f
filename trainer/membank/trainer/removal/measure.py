"""The study, top to bottom: train, delete, retrain, unlearn, relearn; every stage that is done stays done."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from membank.trainer.removal.bank_stages import AnchorKind, BankStages
from membank.trainer.removal.config import RemovalConfig
from membank.trainer.removal.deletion import BankHost
from membank.trainer.removal.dense_stages import DenseStages
from membank.trainer.removal.knowledge import Examiner
from membank.trainer.removal.material import make_material
from membank.trainer.removal.stages import StageStore
from membank.trainer.removal.training import ModelTrainer, ProgressOf
from membank.trainer.removal.world import Notice, SeedWorld
from membank.trainer.run import RunDirectory, prepare_run


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
            By seed and label, what the stages found: ``shared`` and ``blind`` (banks), ``dense``,
            ``relearning``, and the names of the ``facts`` in the order of every truth ratio;
            `membank.trainer.removal.report` makes sense of it.
        """
        self._store.once("prepared", self._prepare)
        return {seed: self._measure(self._world(seed)) for seed in seeds}

    def _prepare(self) -> Mapping[str, object]:
        self._notice("tokenizer and topic tree")
        return asdict(prepare_run(self._run, self._config.run))

    def _world(self, seed: int) -> SeedWorld:
        run, config, tokenizer = self._run, self._config, self._run.tokenizer()
        leaves = np.array(run.read_json(run.leaves_file))
        material = make_material(run.corpus(), leaves, config, seed=seed)
        return SeedWorld(
            seed=seed,
            config=config,
            store=self._store,
            host=self._host,
            tokenizer=tokenizer,
            tree=run.tree(),
            material=material,
            examiner=Examiner(tokenizer, config, material),
            trainer=ModelTrainer(run, config, material, seed=seed, progress=self._progress),
            notice=self._notice,
        )

    def _measure(self, world: SeedWorld) -> dict[str, Any]:
        shared, blind = (BankStages(world, kind) for kind in AnchorKind)
        dense = DenseStages(world)

        def relearning(label: str) -> dict[str, Any]:
            return {
                "bank, topic deleted": world.curve(shared.models.anchor, label),
                "bank, retrained": world.curve(shared.without(label).anchor, label),
            }

        found: dict[str, Any] = {}
        for topic in world.material.topics:
            label = topic.label
            found[label] = {
                "facts": [f"{q.fact.relation} {q.fact.doc_id}" for q in topic.questions],
                "num_facts": len(topic.questions),
                "num_members": len(topic.members),
                "num_held_out": len(topic.held_out),
                "clusters": [str(cluster) for cluster in topic.clusters],
                "shared": shared.run(label),
                "dense": dense.run(label),
                "relearning": world.once(
                    f"{label}/relearning",
                    lambda label=label: relearning(label),  # type: ignore[misc]
                ),
                "blind": blind.run(label),
            }
        return found
