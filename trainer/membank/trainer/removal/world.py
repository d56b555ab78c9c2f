"""What the stages of one seed share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from membank.trainer.corpus import Tokenizer
from membank.trainer.model import Anchor
from membank.trainer.removal.config import RemovalConfig
from membank.trainer.removal.deletion import BankHost
from membank.trainer.removal.knowledge import Examiner
from membank.trainer.removal.material import Material, TopicMaterial
from membank.trainer.removal.relearning import relearn
from membank.trainer.removal.scoring import Model
from membank.trainer.removal.stages import StageStore
from membank.trainer.removal.training import ModelTrainer
from membank.wire.format import TreeDocument

Notice = Callable[[str], None]
"""Told what is being done."""


@dataclass(frozen=True, kw_only=True)
class SeedWorld:
    """Everything that the stages of one seed work on."""

    seed: int
    """The seed."""
    config: RemovalConfig
    """The study."""
    store: StageStore
    """Results of stages."""
    host: BankHost
    """Serves banks."""
    tokenizer: Tokenizer
    """The vocabulary."""
    tree: TreeDocument
    """The tree before any deletion."""
    material: Material
    """Documents and topics."""
    examiner: Examiner
    """Asks models."""
    trainer: ModelTrainer
    """Trains models."""
    notice: Notice
    """Told what is being done."""

    @property
    def folder(self) -> Path:
        """Directory of the seed's models and results."""
        return self.store.folder / f"seed-{self.seed}"

    def once(self, stage: str, compute: Callable[[], Mapping[str, object]]) -> dict[str, Any]:
        """Return the result of a stage of this seed, computed unless an earlier run did."""

        def tell() -> Mapping[str, object]:
            self.notice(f"seed {self.seed}: {stage}")
            return compute()

        return self.store.once(f"{self.folder.name}/{stage}", tell)

    def documents(self, positions: Sequence[int]) -> list[list[int]]:
        """Return the tokens of documents with their end-of-text, cut to a sequence's length."""
        texts = [self.material.corpus.documents[row].text for row in positions]
        longest = self.config.run.seq_len
        return [
            [*ids, self.tokenizer.eot_id][:longest]
            for ids in self.tokenizer.encode_batch(texts)
            if ids
        ]

    def prompts(self) -> dict[str, list[int]]:
        """Return the tokens of prompts and texts that a deletion is looked at with, by text.

        Facts of every topic of the study, and texts of the whole corpus, trained subtrees or not.
        """
        texts = [q.fact.prompt for topic in self.material.topics for q in topic.questions]
        documents = self.material.corpus.documents
        texts += [document.text for document in documents[:: max(1, len(documents) // 200)]]
        longest = self.config.run.seq_len
        encoded = self.tokenizer.encode_batch(texts)
        return {text: ids[:longest] for text, ids in zip(texts, encoded, strict=True) if ids}

    def curve(self, model: Anchor, label: str) -> dict[str, object]:
        """Return how fast a model recovers the facts of a topic that the attacker does not have."""
        topic, settings = self.material.topic(label), self.config.relearning
        shown, hidden = split_questions(topic, settings.share, self.seed)
        hidden = hidden[: settings.max_facts]
        index = self.material.corpus.index
        points = relearn(
            model,
            self.documents([index[topic.questions[row].fact.doc_id] for row in shown]),
            settings,
            seed=self.seed,
            measure=lambda trained: self.examiner.answers_of(Model(anchor=trained), label, hidden),
        )
        return {
            "steps": list(settings.steps),
            "recall": [recall for recall, _ in points],
            "answer_loss": [loss for _, loss in points],
        }


def split_questions(topic: TopicMaterial, share: float, seed: int) -> tuple[list[int], list[int]]:
    """Return the questions whose documents an attacker has, and the others; at least one of each."""
    rng = np.random.Generator(np.random.PCG64([seed, 31]))
    order: list[int] = rng.permutation(len(topic.questions)).tolist()
    count = min(len(order) - 1, max(1, round(share * len(order))))
    return order[:count], order[count:]
