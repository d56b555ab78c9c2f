"""From a corpus to everything that training needs: tokenizer, topic tree, packed sequences."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from membank.trainer.corpus import NO_LEAF, Corpus, pack_sequences, train_tokenizer
from membank.trainer.run.config import RunConfig
from membank.trainer.run.directory import RunDirectory, open_corpus
from membank.trainer.training import save_sequences
from membank.trainer.tree import (
    LevelScore,
    MiniLmEmbedder,
    RoutingScore,
    build_tree,
    routing_report,
    topic_scores,
)
from membank.wire.errors import FailedPreconditionError, InvalidArgumentError, Reason

Notice = Callable[[str], None]
"""Called with the name of what is being made."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Prepared:
    """What preparing a run gave, in figures."""

    num_documents: int
    """Documents of the corpus."""
    num_tokens: int
    """Tokens of the corpus, one end-of-text token per document included."""
    num_trained_tokens: int
    """Tokens of the documents that stage 2 trains on."""
    trained_topics: tuple[int, ...]
    """Level-1 clusters that stage 2 trains; empty = all."""
    topic_scores: tuple[LevelScore, ...]
    """Agreement of each level of the tree with the corpus's own labels."""
    routing: tuple[RoutingScore, ...]
    """Per relation: share of prompts routed to their document's cluster, per level."""


def prepare_run(
    run: RunDirectory, config: RunConfig, *, notice: Notice = lambda _: None
) -> Prepared:
    """Make and save tokenizer, tree and packed sequences.

    Parameters
    ----------
    run
        Where they are kept.
    config
        The run's configuration; it is saved too, with the tokenizer's vocabulary.
    notice
        Told what is being made.

    Returns
    -------
    Prepared
        Sizes and scores; also saved as ``prepared.json``.

    Raises
    ------
    FailedPreconditionError
        If the run has been trained: another tokenizer under a trained anchor would go unnoticed
        until its answers are read.
    """
    if run.is_trained:
        raise FailedPreconditionError(
            f"{run.path} has been trained on its tokenizer and tree; prepare another directory "
            "(--run), or remove this one first",
            reason=Reason.BAD_CONFIG,
            metadata={"run": str(run.path)},
        )
    notice("corpus")
    corpus = open_corpus(config.corpus)
    notice("tokenizer")
    texts = [document.text for document in corpus.documents]
    tokenizer = train_tokenizer(texts, config.vocab_size)
    tokens = tokenizer.encode_batch(texts)
    notice("topic tree")
    built = build_tree(corpus, config.tree, embedder=_embedder(config.embedder))
    leaves, topics = trained_leaves(corpus, built.tree.leaf_N, config)
    notice("sequences")
    pack = partial(
        pack_sequences, tokens, seq_len=config.seq_len, eot_id=tokenizer.eot_id, seed=config.seed
    )
    save_sequences(run.anchor_sequences_file, pack())
    save_sequences(run.memory_sequences_file, pack(leaves=leaves))
    tokenizer.save(run.tokenizer_file)
    run.save_tree(built.document())
    run.write_json(run.leaves_file, built.tree.leaf_N.tolist())
    run.write_json(run.config_file, config.with_vocab_size(tokenizer.vocab_size).to_json())
    lengths = [len(ids) + 1 for ids in tokens]
    prepared = Prepared(
        num_documents=len(texts),
        num_tokens=sum(lengths),
        num_trained_tokens=sum(n for n, leaf in zip(lengths, leaves, strict=True) if leaf >= 0),
        trained_topics=topics,
        topic_scores=tuple(topic_scores(corpus.documents, built.tree)),
        routing=tuple(routing_report(built.retriever, built.tree, corpus)),
    )
    run.write_json(run.prepared_file, asdict(prepared))
    return prepared


def trained_leaves(
    corpus: Corpus, leaf_N: NDArray[np.int64], config: RunConfig
) -> tuple[NDArray[np.int64], tuple[int, ...]]:
    """Return the leaf of each document that stage 2 trains on, and the level-1 clusters.

    Parameters
    ----------
    corpus
        The corpus, N documents.
    leaf_N
        Leaf of each document, -1 = none.
    config
        Says whether only the subtrees of asked relations are trained.

    Returns
    -------
    leaves_N
        `leaf_N` with `NO_LEAF` where a document is left out.
    topics
        The trained level-1 clusters; empty = all.

    Raises
    ------
    InvalidArgumentError
        If only asked subtrees are to be trained and the corpus has no fact of those relations.
    """
    if not config.only_asked_subtrees:
        return leaf_N, ()
    topic_N = np.where(leaf_N >= 0, leaf_N // math.prod(config.tree.all_fan_outs[1:]), -1)
    asked = [fact for fact in corpus.facts if fact.relation in config.asked_relations]
    topics = tuple(sorted({int(topic_N[corpus.index[fact.doc_id]]) for fact in asked} - {-1}))
    if not topics:
        raise InvalidArgumentError(
            f"corpus {config.corpus!r} states no fact of {', '.join(config.asked_relations)}; "
            "train all subtrees instead",
            reason=Reason.BAD_CONFIG,
        )
    return np.where(np.isin(topic_N, topics), leaf_N, NO_LEAF), topics


def _embedder(name: str) -> MiniLmEmbedder | None:
    kind, _, model = name.partition(":")
    match kind:
        case "lsa":
            return None
        case "minilm":
            return MiniLmEmbedder(model) if model else MiniLmEmbedder()
    raise InvalidArgumentError(
        f"unknown embedder {name!r}; use lsa, minilm or minilm:PATH", reason=Reason.BAD_CONFIG
    )
