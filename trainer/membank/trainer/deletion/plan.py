"""What deleting documents from a bank takes: which topics go, which blocks are trained anew.

A pure function of where stage 2 put each document. Shape letter: N documents of the corpus.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

from membank.trainer.corpus import NO_LEAF
from membank.trainer.deletion.config import DeletionConfig, Scope
from membank.wire.errors import FailedPreconditionError, InvalidArgumentError, Reason
from membank.wire.spec import BankSpec, BlockRef, BlockState


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainedDocuments:
    """What stage 2 trained a bank on, and what of it is left."""

    leaf_N: NDArray[np.int64]
    """(N,) leaf that each document was trained on; `NO_LEAF` = none, or deleted before."""
    num_tokens_N: NDArray[np.int64]
    """(N,) tokens of each document, its end-of-text token included."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockPart:
    """What of a block's documents goes."""

    ref: BlockRef
    """The block."""
    version: int
    """Its version when the plan was made."""
    num_documents: int
    """Documents that it was trained on and that are still in it."""
    num_tokens: int
    """Their tokens."""
    removed_documents: int
    """Those of them that are to be deleted."""
    removed_tokens: int
    """Their tokens."""

    @property
    def share(self) -> float:
        """Part of the block's tokens that is to be deleted, 0 to 1."""
        return self.removed_tokens / self.num_tokens if self.num_tokens else 0.0

    def to_json(self) -> dict[str, object]:
        """Return the fields as JSON-able values."""
        return {**asdict(self), "ref": str(self.ref), "share": self.share}


@dataclass(frozen=True, kw_only=True, slots=True)
class DeletionPlan:
    """What deleting some documents takes."""

    removed: tuple[int, ...]
    """Documents that are in the bank and are to be deleted, by position in the corpus."""
    topics: tuple[BlockRef, ...]
    """Topics that go with all that is under them: leaves that these documents dominate, or topics
    of which nothing else is left."""
    deleted: tuple[BlockPart, ...]
    """Every block of these topics that holds documents, or what others put there."""
    retrained: tuple[BlockPart, ...]
    """Blocks that are trained anew, from their initial content, on what remains."""
    remaining: tuple[int, ...]
    """Documents that they are trained on, by position in the corpus."""

    @property
    def retrained_refs(self) -> frozenset[BlockRef]:
        """The blocks that are trained anew."""
        return frozenset(part.ref for part in self.retrained)

    @property
    def collateral_documents(self) -> int:
        """Documents that lose their leaf though nobody asked for it: the rest of deleted leaves."""
        leaf = max((part.ref.level for part in self.deleted), default=0)
        parts = [part for part in self.deleted if part.ref.level == leaf]
        return sum(part.num_documents - part.removed_documents for part in parts)

    def to_json(self) -> dict[str, object]:
        """Return what people and programs want to know of it."""
        return {
            "removed_documents": len(self.removed),
            "deleted_topics": [str(ref) for ref in self.topics],
            "deleted": [part.to_json() for part in self.deleted],
            "collateral_documents": self.collateral_documents,
            "retrained": [part.to_json() for part in self.retrained],
            "remaining_documents": len(self.remaining),
        }


def plan_deletion(
    spec: BankSpec,
    trained: TrainedDocuments,
    removed: Iterable[int],
    blocks: Mapping[BlockRef, tuple[int, BlockState]],
    config: DeletionConfig,
) -> DeletionPlan:
    """Plan the deletion of documents.

    Parameters
    ----------
    spec
        What the bank is.
    trained
        Where stage 2 put each document.
    removed
        The documents, by position in the corpus.
    blocks
        Version and state of every block of the level-1 topics concerned.
    config
        How to delete.

    Returns
    -------
    DeletionPlan
        The plan.

    Raises
    ------
    InvalidArgumentError
        The bank was trained on none of the documents, or they are deleted already, or every block
        that was is.
    FailedPreconditionError
        A block that is to be trained anew is withheld, or lies under one that is not active.
    """
    return _Planner(spec, trained, set(removed), blocks, config).plan()


class _Planner:
    def __init__(
        self,
        spec: BankSpec,
        trained: TrainedDocuments,
        removed: set[int],
        blocks: Mapping[BlockRef, tuple[int, BlockState]],
        config: DeletionConfig,
    ) -> None:
        self._spec = spec
        self._blocks = blocks
        self._config = config
        self._leaf_N = trained.leaf_N
        self._tokens_N = trained.num_tokens_N
        self._removed_N = np.zeros(len(self._leaf_N), dtype=bool)
        self._removed_N[sorted(removed)] = True
        self._removed_N &= self._leaf_N != NO_LEAF

    def plan(self) -> DeletionPlan:
        if not self._removed_N.any():
            raise InvalidArgumentError(
                "the bank was trained on none of these documents, or they are deleted already; "
                "there is nothing to delete",
                reason=Reason.BAD_ARGUMENT,
            )
        paths = [self._spec.path_to(leaf) for leaf in self._leaves(self._removed_N)]
        affected = sorted({ref for path in paths for ref in path if not self._is_deleted(ref)})
        gone = {ref for ref in affected if self._goes(ref)}
        topics = [ref for ref in gone if not gone.intersection(self._spec.path_to(ref)[:-1])]
        retrained = sorted(self._candidates(affected, gone))
        for ref in retrained:
            self._check_usable(ref, gone)
        if not (topics or retrained):
            raise InvalidArgumentError(
                "every block that was trained on these documents is deleted already; there is nothing "
                "to delete",
                reason=Reason.BAD_ARGUMENT,
            )
        remaining_N = self._under(retrained) & ~self._removed_N
        return DeletionPlan(
            removed=_positions(self._removed_N),
            topics=tuple(sorted(topics)),
            deleted=tuple(
                self._part(ref)
                for topic in sorted(topics)
                for ref in sorted(self._spec.subtree(topic))
                if self._documents(ref).any() or self._holds_other(ref)
            ),
            retrained=tuple(self._part(ref) for ref in retrained),
            remaining=_positions(remaining_N),
        )

    def _goes(self, ref: BlockRef) -> bool:
        part = self._part(ref)
        if part.removed_documents == part.num_documents:
            return True
        # Only a leaf is dominated: what is above it serves the others of its topic.
        return ref.level == self._spec.num_levels and part.share >= self._config.threshold

    def _candidates(self, affected: list[BlockRef], gone: set[BlockRef]) -> Iterator[BlockRef]:
        if self._config.scope is Scope.TOPICS:
            tops = {ref for ref in affected if ref.level == 1}
            wanted: Iterable[BlockRef] = (r for top in tops for r in self._spec.subtree(top))
        else:
            wanted = affected
        for ref in wanted:
            if gone.intersection(self._spec.path_to(ref)) or self._is_deleted(ref):
                continue
            if (self._documents(ref) & ~self._removed_N).any():
                yield ref

    def _check_usable(self, ref: BlockRef, gone: set[BlockRef]) -> None:
        for above in self._spec.path_to(ref):
            state = self._blocks[above][1]
            if state is BlockState.ACTIVE or above in gone:
                continue
            mend = (
                f"membank restore {above}, then delete the documents"
                if state is BlockState.WITHHELD
                else f"membank delete {ref}: no reader comes to what is under a deleted block"
            )
            raise FailedPreconditionError(
                f"block {ref} cannot be trained anew: {above} is {state.name.lower()}; {mend}",
                reason=Reason.BLOCK_WITHHELD
                if state is BlockState.WITHHELD
                else Reason.BLOCK_DELETED,
                metadata={"block": str(above)},
            )

    def _part(self, ref: BlockRef) -> BlockPart:
        inside_N = self._documents(ref)
        removed_N = inside_N & self._removed_N
        return BlockPart(
            ref=ref,
            version=self._blocks[ref][0],
            num_documents=int(inside_N.sum()),
            num_tokens=int(self._tokens_N[inside_N].sum()),
            removed_documents=int(removed_N.sum()),
            removed_tokens=int(self._tokens_N[removed_N].sum()),
        )

    def _documents(self, ref: BlockRef) -> NDArray[np.bool_]:
        below = self._spec.num_clusters(self._spec.num_levels) // self._spec.num_clusters(ref.level)
        inside_N = (self._leaf_N // below == ref.cluster) & (self._leaf_N != NO_LEAF)
        return np.asarray(inside_N, dtype=bool)

    def _under(self, refs: Iterable[BlockRef]) -> NDArray[np.bool_]:
        under_N = np.zeros(len(self._leaf_N), dtype=bool)
        for ref in refs:
            under_N |= self._documents(ref)
        return under_N

    def _leaves(self, mask_N: NDArray[np.bool_]) -> list[BlockRef]:
        found = np.unique(self._leaf_N[mask_N])
        return [BlockRef(self._spec.num_levels, int(leaf)) for leaf in found]

    def _holds_other(self, ref: BlockRef) -> bool:
        """Return whether a block was changed though no document is in it: imported, or grown."""
        version, state = self._blocks[ref]
        return version > 0 and state is not BlockState.DELETED

    def _is_deleted(self, ref: BlockRef) -> bool:
        return self._blocks[ref][1] is BlockState.DELETED


def _positions(mask_N: NDArray[np.bool_]) -> tuple[int, ...]:
    return tuple(int(position) for position in np.flatnonzero(mask_N))
