"""The memory of a path that is used layer by layer, while it comes."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import dataclass

from membank.client.loop_thread import loop_thread
from membank.client.memory import Memory
from membank.client.streaming.board import LayerBoard
from membank.wire.errors import FailedPreconditionError, InvalidArgumentError
from membank.wire.spec import Array, BlockRef


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryHead:
    """What is known of a memory once its first layers are there."""

    revision: int
    """Revision that all blocks are of."""
    versions: dict[BlockRef, int]
    """Version of each block that may be used, in the order of the path."""
    ended_at: BlockRef | None
    """First block of the path that is withheld or deleted; None where the path is whole."""


class AsyncLayeredMemory:
    """The blocks of a path, layer by layer; made by `AsyncBankClient.stream`.

    Layers that are there are there for good. Every method waits, and raises what keeps the rest from
    coming: what `AsyncBankClient.fetch` raises, at the first layer that cannot come and at all
    later ones.

    Parameters
    ----------
    board
        What has come.
    """

    def __init__(self, board: LayerBoard) -> None:
        self._board = board

    @property
    def num_layers(self) -> int:
        """Layers of each block."""
        return self._board.num_layers

    async def head(self) -> MemoryHead:
        """Wait until the first layers are there, and with them versions and where the path ends."""
        return _head(await self._memory(0))

    async def layer(self, number: int) -> dict[BlockRef, Array]:
        """Wait for a layer of all blocks.

        Parameters
        ----------
        number
            The layer, from 0.

        Returns
        -------
        dict of Array
            For each block that may be used, in the order of the path, its (P, R, D) of this layer in
            the dtype that was asked for: a read-only view of the block.

        Raises
        ------
        InvalidArgumentError
            If there is no such layer.
        CorruptionError
            If its bytes, or those of a layer before it, were damaged on the way.
        """
        _check(number, self._board)
        return _layer(await self._memory(number + 1), number)

    async def memory(self) -> Memory:
        """Wait for all layers, and return the blocks as `AsyncBankClient.fetch` does."""
        return await self._memory(self._board.num_layers)

    def in_threads(self) -> LayeredMemory:
        """Return the same memory for threads other than that of the event loop."""
        return LayeredMemory(self._board)

    async def _memory(self, num_layers: int) -> Memory:
        loop = asyncio.get_running_loop()
        while True:
            changed = asyncio.Event()

            def tell(changed: asyncio.Event = changed) -> None:
                with suppress(RuntimeError):  # the loop has ended, and with it who waited
                    loop.call_soon_threadsafe(changed.set)

            if (memory := self._board.memory(num_layers, otherwise=tell)) is not None:
                return memory
            await changed.wait()


class LayeredMemory:
    """The blocks of a path, layer by layer; made by `BankClient.stream`.

    As `AsyncLayeredMemory`, but its methods block. They may be called from any thread.

    Parameters
    ----------
    board
        What has come.
    """

    def __init__(self, board: LayerBoard) -> None:
        self._board = board

    @property
    def num_layers(self) -> int:
        """Layers of each block."""
        return self._board.num_layers

    def head(self) -> MemoryHead:
        """Wait until the first layers are there; see `AsyncLayeredMemory.head`."""
        return _head(self._memory(0))

    def layer(self, number: int) -> dict[BlockRef, Array]:
        """Wait for a layer of all blocks; see `AsyncLayeredMemory.layer`.

        Parameters
        ----------
        number
            The layer, from 0.
        """
        _check(number, self._board)
        return _layer(self._memory(number + 1), number)

    def memory(self) -> Memory:
        """Wait for all layers; see `AsyncLayeredMemory.memory`."""
        return self._memory(self._board.num_layers)

    def _memory(self, num_layers: int) -> Memory:
        if (memory := self._board.memory(num_layers)) is not None:
            return memory
        # Raises in a process that was forked off, where nothing comes any more.
        if loop_thread().is_current():
            raise FailedPreconditionError(
                "a layer was waited for on the event loop that receives it; use AsyncBankClient there"
            )
        return self._board.wait(num_layers)


def _check(number: int, board: LayerBoard) -> None:
    if not 0 <= number < board.num_layers:
        raise InvalidArgumentError(
            f"there is no layer {number}; the blocks have layers 0 to {board.num_layers - 1}"
        )


def _head(memory: Memory) -> MemoryHead:
    return MemoryHead(revision=memory.revision, versions=memory.versions, ended_at=memory.ended_at)


def _layer(memory: Memory, number: int) -> dict[BlockRef, Array]:
    return {ref: weight[number] for ref, weight in memory.weights.items()}
