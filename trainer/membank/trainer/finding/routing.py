"""Where texts are routed, counted per topic: the retriever alone, no model and no run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from membank.client.retriever import Retriever
from membank.wire.spec import BlockRef, Path


@dataclass(frozen=True, kw_only=True, slots=True)
class RoutedBlock:
    """A block, and how many of the texts the retriever sends to it."""

    ref: BlockRef
    """The block."""
    num_documents: int
    """Texts whose path holds it."""
    share: float
    """The same as a part of all texts, 0 to 1."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RoutingCount:
    """Paths of texts, and how many of them each block received."""

    paths: tuple[Path, ...]
    """Path of each text, in order; empty where the retriever leads nowhere."""
    blocks: tuple[RoutedBlock, ...]
    """Every block of these paths, coarsest level first, in a level the busiest first."""

    @property
    def num_unrouted(self) -> int:
        """Texts without any block."""
        return sum(not path for path in self.paths)

    def to_json(self) -> dict[str, object]:
        """Return the counts as JSON-able values."""
        return {
            "num_documents": len(self.paths),
            "num_unrouted": self.num_unrouted,
            "paths": [[str(ref) for ref in path] for path in self.paths],
            "blocks": [{**asdict(block), "ref": str(block.ref)} for block in self.blocks],
        }


def count_routes(retriever: Retriever, texts: Sequence[str]) -> RoutingCount:
    """Route texts and count what each block received.

    Parameters
    ----------
    retriever
        The bank's.
    texts
        What is embedded: a query as it stands, a document with its title before it.

    Returns
    -------
    RoutingCount
        Paths and counts. They say where a reader of these texts is sent, not what is held there.
    """
    paths = tuple(retriever.route_all(list(texts)))
    counts = Counter(ref for path in paths for ref in path)
    ordered = sorted(counts, key=lambda ref: (ref.level, -counts[ref], ref.cluster))
    return RoutingCount(
        paths=paths,
        blocks=tuple(
            RoutedBlock(ref=ref, num_documents=counts[ref], share=counts[ref] / len(paths))
            for ref in ordered
        ),
    )
