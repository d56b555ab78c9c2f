"""What a fetch returns: blocks by name, with their versions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from membank.wire.records import Block
from membank.wire.spec import Array, BankSpec, BlockRef, BlockState


class FetchedBlocks(Mapping[BlockRef, Block]):
    """Blocks of one revision, in the order of the request.

    Parameters
    ----------
    revision
        Revision that all of them are of.
    blocks
        The blocks; a withheld or deleted one has no weight.

    Notes
    -----
    Immutable; weights are read-only arrays that fetches may share. Copy one to write into it.
    """

    def __init__(self, revision: int, blocks: Iterable[Block]) -> None:
        self.revision = revision
        self._blocks = {block.ref: block for block in blocks}

    def __getitem__(self, ref: BlockRef) -> Block:
        return self._blocks[ref]

    def __iter__(self) -> Iterator[BlockRef]:
        return iter(self._blocks)

    def __len__(self) -> int:
        return len(self._blocks)

    def __repr__(self) -> str:
        inside = ", ".join(f"{ref}@{block.version}" for ref, block in self._blocks.items())
        return f"{type(self).__name__}(revision={self.revision}, {inside})"

    @property
    def versions(self) -> dict[BlockRef, int]:
        """Version of each block; what a push of gradients computed on them calls `base`."""
        return {ref: block.version for ref, block in self._blocks.items()}

    @property
    def weights(self) -> dict[BlockRef, Array]:
        """Weight of each active block, (L, P, R, D) in the dtype that was asked for."""
        return {
            ref: block.weight for ref, block in self._blocks.items() if block.weight is not None
        }

    @property
    def states(self) -> dict[BlockRef, BlockState]:
        """State of each block."""
        return {ref: block.header.state for ref, block in self._blocks.items()}


class Memory(FetchedBlocks):
    """The blocks of a path that may be used: active, and with nothing missing above them.

    Parameters
    ----------
    revision
        Revision that all of them are of.
    blocks
        The blocks, each active.
    ended_at
        First block of the request that is withheld or deleted; None where the path is whole.
    """

    def __init__(
        self, revision: int, blocks: Iterable[Block], *, ended_at: BlockRef | None = None
    ) -> None:
        super().__init__(revision, blocks)
        self.ended_at = ended_at

    @classmethod
    def of_path(cls, spec: BankSpec, fetched: FetchedBlocks) -> Memory:
        """Return what may be used of `fetched`.

        A block is left out where it, or a block above it that was asked for too, is withheld or
        deleted: nothing is rerouted.
        """
        ended = {ref for ref, state in fetched.states.items() if state is not BlockState.ACTIVE}
        usable = (
            block for ref, block in fetched.items() if not ended.intersection(spec.path_to(ref))
        )
        ended_at = next((ref for ref in fetched if ref in ended), None)
        return cls(fetched.revision, usable, ended_at=ended_at)
