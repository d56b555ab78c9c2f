"""Where blocks land that come layer by layer, and who hears of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import numpy.typing as npt

from membank.client.transport.contract import FetchAnswer, LayerListener
from membank.client.transport.landing import Landing
from membank.client.transport.payloads import malformed
from membank.wire.buffers import BufferPool
from membank.wire.errors import InvalidArgumentError, Reason
from membank.wire.records import Block, BlockHeader
from membank.wire.spec import Array, BlockRef


@dataclass(slots=True)
class _Arriving:
    """A block, of which parts may be here."""

    header: BlockHeader
    """That of the whole block."""
    memory: npt.NDArray[np.uint8] | None = None
    weight: Array | None = None
    num_announced: int = 0
    num_here: int = 0

    @property
    def num_layers(self) -> int:
        return self.header.shape[0] if self.header.num_bytes else 0


class LayeredLanding(Landing):
    """Places the parts of each block in one piece of memory, in their order.

    Parameters
    ----------
    pool
        Where memory comes from that is not the caller's.
    into
        The caller's buffers; None = none.
    listener
        Hears of each part once it is here.
    max_bytes
        Most bytes that all blocks together may have.
    where
        Who answers, for errors.

    Notes
    -----
    A block that comes whole, from a service that cannot cut it, is one part.
    """

    takes_parts = True

    def __init__(
        self,
        pool: BufferPool,
        into: Mapping[BlockRef, Array] | None,
        listener: LayerListener,
        *,
        max_bytes: int,
        where: str,
    ) -> None:
        super().__init__(pool, into)
        self._listener = listener
        self._max_bytes = max_bytes
        self._where = where
        self._arriving: dict[BlockRef, _Arriving] = {}
        self._num_bytes = 0

    def begin(self) -> None:
        """Forget what came of an earlier attempt; raises what the listener does."""
        self._arriving = {}
        self._num_bytes = 0
        self._listener.restart()

    def when_arrived(self, header: BlockHeader, revision: int) -> Callable[[], None]:
        """Return what tells of the layers of a header once they are here.

        Raises
        ------
        CorruptionError
            If they are not those that come next.
        InvalidArgumentError
            If the blocks have more bytes than the bound.
        """
        block = self._arriving.get(header.ref)
        if block is None:
            block = self._arriving[header.ref] = _Arriving(_whole(header))
            self._bound(block.header.num_bytes)
        self._check_follows(block, header)
        block.num_announced += header.num_layers or block.num_layers
        return partial(self._arrived, block, block.num_announced, revision)

    def place(self, header: BlockHeader) -> npt.NDArray[np.uint8]:
        """Return the memory for the bytes of a header, within that of its block."""
        block = self._arriving[header.ref]
        if block.memory is None:
            block.memory = super().place(block.header)
        start = block.header.num_bytes // block.num_layers * header.first_layer
        return block.memory[start : start + header.num_bytes]

    def blocks(
        self, arrived: Sequence[tuple[BlockHeader, npt.NDArray[np.uint8] | None]]
    ) -> tuple[Block, ...]:
        """Return the blocks, in the order of their first headers."""
        for ref, block in self._arriving.items():
            if block.num_here < block.num_layers:
                problem = f"{block.num_here} of {block.num_layers} layers of block {ref}"
                raise malformed(self._where, problem)
        return tuple(
            Block(header=block.header, weight=block.weight) for block in self._arriving.values()
        )

    def _arrived(self, block: _Arriving, num_layers: int, revision: int) -> None:
        if block.weight is None and block.memory is not None:
            block.weight = self.weight(block.header, block.memory)
        block.num_here = num_layers
        self._listener.take(revision, Block(header=block.header, weight=block.weight), num_layers)

    def _check_follows(self, block: _Arriving, header: BlockHeader) -> None:
        last = header.first_layer + (header.num_layers or block.num_layers)
        is_next = header.first_layer == block.num_announced and last <= block.num_layers
        # Not the size and the CRC, which are those of the part.
        is_same = _identity(header) == _identity(block.header)
        if not (is_next and is_same):
            raise malformed(
                self._where,
                f"layers {header.first_layer} to {last - 1} of block {header.ref} do not follow "
                f"the first {block.num_announced}",
            )

    def _bound(self, num_bytes: int) -> None:
        # Before any memory is taken: the assembler knows of the parts alone.
        self._num_bytes += num_bytes
        if self._num_bytes > self._max_bytes:
            raise InvalidArgumentError(
                f"{self._where}: the blocks have more than max_answer_bytes, {self._max_bytes}; "
                "stream fewer at a time",
                reason=Reason.MESSAGE_TOO_LARGE,
                metadata={"max_bytes": str(self._max_bytes)},
            )


def tell_whole(listener: LayerListener, answer: FetchAnswer) -> None:
    """Tell `listener` of blocks that came whole."""
    listener.restart()
    for block in answer.blocks:
        num_layers = 0 if block.weight is None else len(block.weight)
        listener.take(answer.revision, block, num_layers)


def _whole(header: BlockHeader) -> BlockHeader:
    """Return the header of the block whose first part `header` announces."""
    if not header.num_layers:
        return header
    num_layers = header.shape[0]
    return replace(
        header,
        num_bytes=header.num_bytes // header.num_layers * num_layers,
        # Of the whole block it is not known: parts are checked one by one.
        crc32c=header.crc32c if header.num_layers == num_layers else 0,
        first_layer=0,
        num_layers=0,
    )


def _identity(header: BlockHeader) -> tuple[object, ...]:
    return (header.version, header.state, header.dtype, header.shape, header.unchanged)
