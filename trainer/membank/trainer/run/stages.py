"""The stages of a run, each resumable: anchor, memories over a service, control, evaluation."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from membank.client import BankClient, ClientConfig
from membank.client.retriever import Retriever
from membank.trainer.corpus import Corpus, Fact
from membank.trainer.evaluation import (
    EvaluationPaths,
    PerplexityReport,
    RecallReport,
    evaluate_perplexity,
    evaluate_recall,
)
from membank.trainer.model import Anchor
from membank.trainer.run.config import RunConfig
from membank.trainer.run.directory import RunDirectory
from membank.trainer.run.prepare import trained_leaves
from membank.trainer.training import (
    GenericTraining,
    InProcessMemory,
    ProgressCallback,
    ServedMemory,
    StageResult,
    load_sequences,
    save_anchor,
    train_anchor,
    train_generic,
)
from membank.trainer.training.ray_train import (
    ServedTraining,
    ServedTrainingResult,
    train_served,
)
from membank.trainer.tree import embedder_from_config
from membank.wire.spec import BlockRef


def run_stage1(
    run: RunDirectory, config: RunConfig, *, on_progress: ProgressCallback | None = None
) -> StageResult:
    """Train the anchor, from where a stopped run left it; save it when it is done."""
    torch.set_num_threads(max(1, os.cpu_count() or 1))
    torch.manual_seed(config.seed)
    anchor = Anchor(config.anchor)
    result = train_anchor(
        anchor,
        load_sequences(run.anchor_sequences_file),
        config.stage1,
        checkpoint=run.stage1_dir / "checkpoint.safetensors",
        losses=run.stage1_dir / "losses.jsonl",
        on_progress=on_progress,
    )
    save_anchor(run.anchor_file, anchor)
    return result


def run_stage2(
    run: RunDirectory,
    config: RunConfig,
    *,
    endpoint: str,
    ray_address: str | None,
    num_workers: int,
    client: ClientConfig | None = None,
    on_progress: ProgressCallback | None = None,
) -> ServedTrainingResult:
    """Train the memories of a served bank with Ray workers, from where a stopped run left them."""
    training = ServedTraining(
        endpoint=endpoint,
        anchor=run.anchor_file.absolute(),
        sequences=run.memory_sequences_file.absolute(),
        config=config.stage2,
        run_dir=run.stage2_dir.absolute(),
        num_workers=num_workers,
        client=client or ClientConfig(),
        ray_address=ray_address,
    )
    return train_served(training, on_progress=on_progress)


def run_generic(
    run: RunDirectory, config: RunConfig, *, on_progress: ProgressCallback | None = None
) -> StageResult:
    """Train the control: one memory of a fetch's size, on exactly the sequences of stage 2."""
    rates = (config.generic_learning_rate,) * len(config.block_widths)
    training = GenericTraining(
        spec=config.bank_spec(fingerprint=""),
        anchor=run.anchor_file,
        sequences=run.memory_sequences_file,
        config=config.stage2,
        run_dir=run.generic_dir,
        learning_rates=rates,
        num_threads=max(1, os.cpu_count() or 1),
    )
    return train_generic(training, on_progress=on_progress)


def load_generic(run: RunDirectory) -> InProcessMemory:
    """Return the trained control."""
    return InProcessMemory.load(run.generic_dir / "generic.safetensors")


class Evaluator:
    """Asks a served bank the questions of a run, under every memory condition.

    Parameters
    ----------
    run, config
        The run.
    """

    def __init__(self, run: RunDirectory, config: RunConfig) -> None:
        self._config = config
        self._corpus: Corpus = run.corpus()
        self._tokenizer = run.tokenizer()
        self._anchor = run.anchor()
        self._generic = load_generic(run) if _exists(run.generic_dir) else None
        self._leaves = [int(leaf) for leaf in _as_list(run.read_json(run.leaves_file))]

    @property
    def facts(self) -> list[Fact]:
        """The questions: every fact of the asked relations."""
        asked = self._config.asked_relations
        return [fact for fact in self._corpus.facts if fact.relation in asked]

    def recall(
        self, client: BankClient, *, on_progress: Callable[[int, int], None] | None = None
    ) -> RecallReport:
        """Return recall of the asked facts, with the bank as it is now."""
        facts = self.facts
        positions = [self._corpus.index[fact.doc_id] for fact in facts]
        return evaluate_recall(
            self._anchor,
            self._tokenizer,
            facts,
            memory=ServedMemory(client),
            generic=self._generic,
            paths=self._paths(client, [fact.prompt for fact in facts], positions),
            seed=self._config.seed,
            on_progress=on_progress,
        )

    def perplexity(
        self, client: BankClient, *, max_documents_per_topic: int = 16
    ) -> PerplexityReport:
        """Return perplexity per true topic of the trained documents, with the bank as it is now."""
        trained = self._trained_positions()
        documents = [self._corpus.documents[position] for position in trained]
        texts = [document.text for document in documents]
        return evaluate_perplexity(
            self._anchor,
            self._tokenizer,
            texts,
            topics=[document.labels[0] if document.labels else "" for document in documents],
            memory=ServedMemory(client),
            generic=self._generic,
            paths=self._paths(client, texts, trained),
            seq_len=self._config.seq_len,
            max_documents_per_topic=max_documents_per_topic,
            seed=self._config.seed,
        )

    def anchor_recall(self) -> RecallReport:
        """Return recall of the anchor alone, under the condition of that name.

        The other conditions are those of a bank that was never trained, which adds nothing.
        """
        spec = self._config.bank_spec(fingerprint="")
        facts = self.facts
        path = spec.path_to(BlockRef(spec.num_levels, 0))
        return evaluate_recall(
            self._anchor,
            self._tokenizer,
            facts,
            memory=InProcessMemory(spec),
            generic=None,
            paths=EvaluationPaths(
                routed=(path,) * len(facts), holding=(path,) * len(facts), leaves=(0,)
            ),
        )

    def holding_topics(self, relation: str) -> tuple[BlockRef, ...]:
        """Return the level-1 topics that hold the documents of a relation's facts."""
        below = 1
        for fan_out in self._config.tree.all_fan_outs[1:]:
            below *= fan_out
        leaves = {
            self._leaves[self._corpus.index[f.doc_id]] for f in self._corpus.facts_of(relation)
        }
        return tuple(BlockRef(1, cluster) for cluster in sorted({leaf // below for leaf in leaves}))

    def _paths(
        self, client: BankClient, texts: Sequence[str], positions: Sequence[int]
    ) -> EvaluationPaths:
        spec = client.info().spec
        document = client.tree()
        retriever = Retriever.from_tree(document, embedder=embedder_from_config(document))
        holding = [
            spec.path_to(BlockRef(spec.num_levels, self._leaves[position]))
            for position in positions
        ]
        trained = {self._leaves[position] for position in self._trained_positions()}
        return EvaluationPaths(
            routed=tuple(retriever.route_all(list(texts))),
            holding=tuple(holding),
            leaves=tuple(sorted(trained)),
        )

    def _trained_positions(self) -> list[int]:
        leaves, _ = trained_leaves(self._corpus, np.array(self._leaves), self._config)
        return [position for position, leaf in enumerate(leaves) if leaf >= 0]


def longer_anchor(config: RunConfig) -> RunConfig:
    """Return the study's control: the anchor trained for the tokens of both stages together."""
    tokens = config.stage1.num_tokens + config.stage2.num_tokens
    return replace(config, stage1=replace(config.stage1, num_tokens=tokens))


def _exists(path: Path) -> bool:
    return (path / "generic.safetensors").is_file()


def _as_list(value: object) -> list[int]:
    assert isinstance(value, list)  # we wrote it
    return value
