"""Finds what a served bank holds of documents, with the run that it was trained by."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from membank.client import BankClient
from membank.client.retriever import Retriever
from membank.trainer.corpus import NO_LEAF, Document
from membank.trainer.finding.documents import NamedDocument
from membank.trainer.finding.influence import (
    InfluenceConfig,
    InfluenceReport,
    measure_influence,
)
from membank.trainer.finding.matching import match_documents
from membank.trainer.finding.routing import RoutingCount, count_routes
from membank.trainer.run import RunDirectory, RunMaterial, load_config
from membank.trainer.training import as_fetched, leaf_path
from membank.trainer.tree import embedder_from_config
from membank.wire.errors import InvalidArgumentError, Reason
from membank.wire.spec import BlockRef


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """What a bank holds of some texts."""

    revision: int
    """Revision of the bank that every block was read at."""
    num_documents: int
    """Texts: of what was named, what has a text."""
    unknown: tuple[str, ...]
    """What was named by an id that the corpus does not have, in words; left out."""
    routing: RoutingCount
    """Where a reader of the texts is sent."""
    trained: tuple[tuple[BlockRef, int], ...]
    """Texts that stage 2 of the run trained each block on; a text of no corpus is in none."""
    influence: InfluenceReport
    """What the blocks do for the texts: each on the path that it was trained on, or else is routed
    to."""

    def to_json(self) -> dict[str, object]:
        """Return the fields as JSON-able values."""
        return {
            "revision": self.revision,
            "num_documents": self.num_documents,
            "unknown": list(self.unknown),
            "routing": self.routing.to_json(),
            "trained": {str(ref): count for ref, count in self.trained},
            "influence": self.influence.to_json(),
        }


class Finder:
    """Holds what measuring needs: anchor, tokenizer, and where stage 2 put each document.

    Parameters
    ----------
    run
        The run that the bank belongs to.

    Raises
    ------
    NotFoundError
        The run was not prepared, or its anchor is not trained.
    """

    def __init__(self, run: RunDirectory) -> None:
        self._run = run
        self._anchor = run.anchor()
        self._config = InfluenceConfig(seq_len=load_config(run).seq_len)

    def find(self, client: BankClient, documents: Sequence[NamedDocument]) -> Found:
        """Route documents, count where they were trained, and measure every block concerned.

        Parameters
        ----------
        client
            The served bank.
        documents
            Texts, or ids of the run's corpus.

        Raises
        ------
        FailedPreconditionError
            The bank belongs to another run, or has no retriever.
        InvalidArgumentError
            Nothing that was named has a text.
        """
        spec = client.info().spec
        self._run.check_fingerprint(spec.fingerprint)
        material = RunMaterial(self._run, spec.bank_id)
        texts, leaves, unknown = self._texts(documents, material)
        tree = client.tree()
        retriever = Retriever.from_tree(tree, embedder=embedder_from_config(tree))
        routing = count_routes(retriever, [text.embed_text or text.text for text in texts])
        trained = [() if leaf == NO_LEAF else leaf_path(spec, leaf) for leaf in leaves]
        paths = [own or routed for own, routed in zip(trained, routing.paths, strict=True)]
        answer = client.fetch_blocks(sorted({r for path in paths for r in path}), dtype="float32")
        influence = measure_influence(
            self._anchor,
            material.tokenizer,
            [text.text for text in texts],
            paths,
            as_fetched(answer),
            spec,
            self._config,
        )
        counts = Counter(ref for path in trained for ref in path)
        return Found(
            revision=answer.revision,
            num_documents=len(texts),
            unknown=unknown,
            routing=routing,
            trained=tuple(sorted(counts.items())),
            influence=influence,
        )

    def _texts(
        self, documents: Sequence[NamedDocument], material: RunMaterial
    ) -> tuple[list[NamedDocument], list[int], tuple[str, ...]]:
        """Return what has a text, the leaf that each was trained on, and what has none."""
        corpus, leaf_N = material.corpus, material.leaf_N
        matched = match_documents(documents, corpus)
        texts: list[NamedDocument] = []
        leaves: list[int] = []
        unknown: list[str] = []
        for named, positions in zip(documents, matched.positions, strict=True):
            if not positions and not named.text:
                unknown.append(f"{named.named}: corpus {corpus.name} has no such id")
                continue
            # Of equal documents the first that was trained: any stands for the others.
            trained = [int(leaf_N[p]) for p in positions if leaf_N[p] != NO_LEAF]
            texts.append(_with_text(named, [corpus.documents[p] for p in positions]))
            leaves.append(trained[0] if trained else NO_LEAF)
        if not texts:
            raise InvalidArgumentError(
                f"nothing that was named has a text: {unknown[0]}", reason=Reason.BAD_ARGUMENT
            )
        return texts, leaves, tuple(unknown)


def _with_text(named: NamedDocument, found: Sequence[Document]) -> NamedDocument:
    if not found:
        return named
    return replace(named, text=found[0].text, embed_text=found[0].embed_text)
