"""What has come of blocks that are fetched layer by layer: noted by who receives, read by who waits."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from membank.client.memory import FetchedBlocks, Memory
from membank.wire.errors import UnavailableError
from membank.wire.records import Block
from membank.wire.spec import BankSpec, BlockRef


class RevisionsDifferError(Exception):
    """Shards answer from different revisions, so that no layer may be used. Never leaves a client."""


class LayerBoard:
    """The blocks of a path, with how many layers of each are there. Safe to use from any thread.

    Nothing is shown before the first layers of all blocks are there, of one revision; from then on
    the board is *settled*: what it shows does not change any more, and nothing is begun anew.

    Parameters
    ----------
    spec
        Spec of the bank.
    refs
        The blocks, none twice.
    when_settled
        Called with the revision, by the thread that receives the last of these, before any layer is
        shown; what it raises ends the answer. None = nobody needs it.
    """

    # `_lock` guards all that follows it. Who waits leaves a callback, which is called for the layers
    # that it waits for alone: to be woken for each layer would slow down the thread that receives.

    def __init__(
        self,
        spec: BankSpec,
        refs: Sequence[BlockRef],
        when_settled: Callable[[int], None] | None = None,
    ) -> None:
        self._spec = spec
        self._refs = tuple(refs)
        self._when_settled = when_settled
        self._lock = threading.Lock()
        self._revisions: dict[BlockRef, int] = {}
        self._blocks: dict[BlockRef, Block] = {}
        self._num_here: dict[BlockRef, int] = {}
        self._memory: Memory | None = None
        self._num_ready = 0
        self._error: BaseException | None = None
        self._waiting: list[tuple[int, Callable[[], None]]] = []

    @property
    def num_layers(self) -> int:
        """Layers of each block."""
        return self._spec.num_layers

    @property
    def is_settled(self) -> bool:
        """Whether anything may have been used."""
        return self._memory is not None

    @property
    def is_whole(self) -> bool:
        """Whether all layers are there."""
        return self._num_ready == self.num_layers

    def part(self, refs: Sequence[BlockRef]) -> BoardPart:
        """Return what hears of some of the blocks, those of one answer."""
        return BoardPart(self, tuple(refs))

    def fail(self, error: BaseException) -> None:
        """Say that nothing more will come, and why; what is there already stays."""
        with self._lock:
            if self._error is None and not self.is_whole:
                self._error = error
            self._tell()

    def fill(self, fetched: FetchedBlocks) -> None:
        """Take all blocks at once, in place of whatever came before the board was settled."""
        with self._lock:
            self._memory = Memory.of_path(self._spec, fetched)
            self._num_ready = self.num_layers
            self._tell()

    def memory(
        self, num_layers: int, *, otherwise: Callable[[], None] | None = None
    ) -> Memory | None:
        """Return the blocks once their first `num_layers` are there; None = they are not yet.

        Parameters
        ----------
        num_layers
            0 to `num_layers` of the board; 0 asks for a settled board.
        otherwise
            Where they are not, it is called once, from any thread, when they are, or will not be.

        Raises
        ------
        Exception
            Why they will not come: a `MembankError`, unless there is a defect.
        """
        with self._lock:
            memory = self._shown(num_layers)
            if memory is None and otherwise is not None:
                self._waiting.append((num_layers, otherwise))
            return memory

    def wait(self, num_layers: int) -> Memory:
        """Wait in this thread, and return what `memory` does."""
        while True:
            ready = threading.Event()
            if (memory := self.memory(num_layers, otherwise=ready.set)) is not None:
                return memory
            ready.wait()

    def _shown(self, num_layers: int) -> Memory | None:
        if self._memory is not None and self._num_ready >= num_layers:
            return self._memory
        if self._error is not None:
            raise self._error
        return None

    def _restart(self, refs: Sequence[BlockRef]) -> None:
        with self._lock:
            if self.is_settled:
                raise UnavailableError(
                    "the blocks broke off after some of their layers had come; fetch them again"
                )
            for ref in refs:
                for noted in (self._revisions, self._blocks, self._num_here):
                    noted.pop(ref, None)

    def _take(self, revision: int, block: Block, num_layers: int) -> None:
        with self._lock:
            self._blocks[block.ref] = block
            self._num_here[block.ref] = num_layers
            self._revisions[block.ref] = revision
            if self._memory is None:
                if len(self._blocks) < len(self._refs):
                    return
                self._settle()
            self._count()

    def _settle(self) -> None:
        if len(set(self._revisions.values())) > 1:
            raise RevisionsDifferError
        revision = next(iter(self._revisions.values()))
        if self._when_settled is not None:
            self._when_settled(revision)
        fetched = FetchedBlocks(revision, (self._blocks[ref] for ref in self._refs))
        # Of blocks that may not be used, no layer is waited for.
        self._memory = Memory.of_path(self._spec, fetched)
        self._num_ready = -1

    def _count(self) -> None:
        assert self._memory is not None
        ready = min((self._num_here[ref] for ref in self._memory), default=self.num_layers)
        if ready > self._num_ready:
            self._num_ready = ready
            self._tell()

    def _tell(self) -> None:
        ready = self.num_layers if self._error is not None else self._num_ready
        waiting, self._waiting = self._waiting, []
        for num_layers, callback in waiting:
            if num_layers <= ready:
                callback()
            else:
                self._waiting.append((num_layers, callback))


class BoardPart:
    """Notes on a board what comes of some blocks.

    Parameters
    ----------
    board
        The board.
    refs
        The blocks.
    """

    def __init__(self, board: LayerBoard, refs: tuple[BlockRef, ...]) -> None:
        self._board = board
        self._refs = refs

    def restart(self) -> None:
        """Forget what came of an earlier attempt.

        Raises
        ------
        UnavailableError
            If the board is settled.
        """
        self._board._restart(self._refs)

    def take(self, revision: int, block: Block, num_layers: int) -> None:
        """Note the first layers of a block.

        Raises
        ------
        RevisionsDifferError
            If these are the last that the board waits for, and not all are of one revision.
        """
        self._board._take(revision, block, num_layers)
