"""What a run knows of the documents that its bank was trained on."""

from __future__ import annotations

from collections.abc import Collection
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from membank.trainer.corpus import NO_LEAF
from membank.trainer.run.directory import RunDirectory
from membank.trainer.run.prepare import trained_leaves
from membank.trainer.run.presets import load_config
from membank.trainer.training import load_sequences
from membank.trainer.tree import TopicTree, topic_labels
from membank.wire.spec import BlockRef


class RunMaterial:
    """Corpus, tokens, leaves and anchor of a run.

    Parameters
    ----------
    run
        The run.
    bank_id
        The bank: documents that were deleted from it before are no part of the material.

    Raises
    ------
    NotFoundError
        The run was not prepared.
    """

    def __init__(self, run: RunDirectory, bank_id: str) -> None:
        self.run = run
        self.config = load_config(run)
        self.corpus = run.corpus()
        self.tokenizer = run.tokenizer()
        self.placed_N: NDArray[np.int64] = np.asarray(run.read_json(run.leaves_file), np.int64)
        """(documents,) leaf of each, trained or not."""
        deleted = run.deleted_documents.of(bank_id)
        self._here_N = np.array(
            [d.doc_id not in deleted for d in self.corpus.documents], dtype=bool
        )
        trained_N, _ = trained_leaves(self.corpus, self.placed_N, self.config)
        self.leaf_N: NDArray[np.int64] = np.where(self._here_N, trained_N, NO_LEAF)
        """(documents,) leaf that each was trained on; `NO_LEAF` = none, or deleted before."""

    @cached_property
    def tokens(self) -> list[list[int]]:
        """Tokens of each document, without end-of-text."""
        return self.tokenizer.encode_batch([document.text for document in self.corpus.documents])

    @cached_property
    def run_leaf_N(self) -> NDArray[np.int64]:
        """(sequences,) leaf of each sequence of stage 2."""
        return load_sequences(self.run.memory_sequences_file).leaf_N

    @property
    def num_tokens_N(self) -> NDArray[np.int64]:
        """(documents,) tokens of each document, its end-of-text token included."""
        return np.array([len(ids) + 1 for ids in self.tokens], dtype=np.int64)

    def labels_without(self, removed: Collection[int]) -> dict[BlockRef, str]:
        """Return labels of all topics as they are without some documents."""
        kept_N = self._here_N.copy()
        kept_N[sorted(removed)] = False
        rows = [int(row) for row in np.flatnonzero(kept_N)]
        tree = TopicTree(
            self.config.tree.fan_outs,
            tuple(np.asarray(level) for level in self.run.tree().centroids),
            self.placed_N[kept_N],
        )
        return topic_labels([self.corpus.documents[row] for row in rows], tree)
