"""A bank that is read from its files, without a service (docs/client.md)."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property

from membank.client.bank_files import open_files
from membank.client.memory import FetchedBlocks, Memory
from membank.client.retriever import Embedder, Retriever, ScoredPath
from membank.client.streaming.board import LayerBoard
from membank.client.streaming.layers import AsyncLayeredMemory, LayeredMemory
from membank.wire.codec import fetch_codec
from membank.wire.crc import crc32c
from membank.wire.errors import InvalidArgumentError
from membank.wire.format import TreeDocument
from membank.wire.format.entries import NO_SLOT
from membank.wire.format.sealed import SealedReader
from membank.wire.format.stored import BankObjects, StoredBank
from membank.wire.records import Block, BlockHeader, Topic
from membank.wire.spec import BankSpec, BlockRef, BlockState, Path

_THREADS = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class StateRead:
    """Which state of a bank is read."""

    revision: int
    """Revision of all answers."""
    snapshot: str
    """Snapshot that is read; empty = what was consolidated when the bank was opened."""
    manifests: Mapping[int, int]
    """Number of the manifest of each partition; 0 = as initialised."""


class OpenedBank:
    """A bank as its files say, read-only; made by `BankClient.open`. Safe to share between threads.

    The names and answers are those of `BankClient`. The state is the one that was found when it was
    opened, `state`, and stays so. Of a bank that is being served this is what its shards have
    consolidated: updates that are only in a journal are not seen. And what its owners retire later
    is gone: then open it again, or a snapshot, which they keep.

    Parameters
    ----------
    objects
        The files of the bank.
    snapshot
        Snapshot to read; empty = the present state.
    embedder
        Embeds texts for `route`; None = the one that the bank's tree holds (``lsa`` only).
    """

    def __init__(
        self, objects: BankObjects, *, snapshot: str = "", embedder: Embedder | None = None
    ) -> None:
        self._bank = StoredBank(objects)
        self._state = self._bank.pinned(snapshot) if snapshot else self._bank.present()
        self._embedder = embedder

    @property
    def spec(self) -> BankSpec:
        """Spec of the bank."""
        return self._bank.spec

    @property
    def state(self) -> StateRead:
        """Which state is read."""
        return StateRead(
            revision=self._state.revision,
            snapshot=self._state.snapshot,
            manifests={
                partition: 0 if manifest is None else manifest.number
                for partition, manifest in self._state.manifests.items()
            },
        )

    def fetch(
        self,
        path: Sequence[BlockRef],
        *,
        dtype: str | None = None,
        held: Mapping[BlockRef, Block] | None = None,
    ) -> Memory:
        """Return the blocks of a path that may be used, as `BankClient.fetch` does.

        Parameters
        ----------
        path
            Blocks, usually from `route`.
        dtype
            Element type to get: float32, bfloat16 or float16; None = as kept in the bank. ``int8``
            gives, as float32, what a fetch over the wire in it does.
        held
            An earlier answer; a block whose version is still right is taken from there.

        Raises
        ------
        NotFoundError
            If one is no block of the bank.
        InvalidArgumentError
            If the dtype is unknown.
        CorruptionError
            If a file is damaged or missing; the error names it.
        """
        return Memory.of_path(self.spec, self.fetch_blocks(path, dtype=dtype, held=held))

    def fetch_blocks(
        self,
        refs: Iterable[BlockRef],
        *,
        dtype: str | None = None,
        held: Mapping[BlockRef, Block] | None = None,
    ) -> FetchedBlocks:
        """Return blocks for themselves, as `BankClient.fetch_blocks` does; errors as for `fetch`.

        Parameters
        ----------
        refs
            The blocks.
        dtype
            Element type to get; None = as kept in the bank.
        held
            An earlier answer.
        """
        wanted = list(dict.fromkeys(BlockRef(*ref) for ref in refs))
        for ref in wanted:
            self.spec.check_ref(ref)
        name = dtype or self.spec.dtype
        fetch_codec(name)

        def read(ref: BlockRef) -> Block:
            return self._read(ref, name, (held or {}).get(ref))

        with ThreadPoolExecutor(_THREADS, "membank-read") as threads:
            return FetchedBlocks(self._state.revision, threads.map(read, wanted))

    @contextmanager
    def stream(
        self, path: Sequence[BlockRef], *, layers_per_part: int = 1, dtype: str | None = None
    ) -> Iterator[LayeredMemory]:
        """Show a path layer by layer, as `BankClient.stream` does; here it is read whole first.

        Parameters
        ----------
        path
            Blocks, usually from `route`.
        layers_per_part
            Without effect.
        dtype
            Element type to get; None = as kept in the bank.

        Yields
        ------
        LayeredMemory
            The layers; errors are those of `fetch`, and come at once.
        """
        yield LayeredMemory(self._board(path, dtype))

    def _board(self, path: Sequence[BlockRef], dtype: str | None) -> LayerBoard:
        board = LayerBoard(self.spec, path)
        board.fill(self.fetch_blocks(path, dtype=dtype))
        return board

    def topics(self, parent: BlockRef | None = None, *, depth: int = 0) -> tuple[Topic, ...]:
        """Return topics with labels, states, versions and sizes, by level and cluster.

        Parameters
        ----------
        parent
            Only this topic and those under it; None = all.
        depth
            Levels to descend below the parent; 0 = all.

        Raises
        ------
        NotFoundError
            If the bank has no such topic, or no tree.
        """
        if parent is not None:
            self.spec.check_ref(parent)
        top = 0 if parent is None else parent.level
        refs = self.spec.blocks() if parent is None else self.spec.subtree(parent)
        return tuple(self._topic(ref) for ref in refs if not depth or ref.level <= top + depth)

    @cached_property
    def tree(self) -> TreeDocument:
        """Topic labels and retriever, those in force; errors as for `route`."""
        return self._bank.tree()

    @cached_property
    def retriever(self) -> Retriever:
        """What routes texts; errors as for `route`."""
        return Retriever.from_tree(self.tree, embedder=self._embedder)

    def route(self, text: str, *, beams: int = 1) -> Path:
        """Return the path of a text, as `BankClient.route` does.

        Parameters
        ----------
        text
            The text.
        beams
            Paths to follow at the same time, >= 1.

        Raises
        ------
        NotFoundError
            If the bank has no tree.
        FailedPreconditionError
            If it has no retriever, or its embedder is not the client's to build.
        """
        return self.retriever.route(text) if beams == 1 else self.route_beam(text, beams)[0].path

    def route_beam(self, text: str, beams: int) -> tuple[ScoredPath, ...]:
        """Return up to `beams` paths of a text, nearest first; otherwise as `route`.

        Parameters
        ----------
        text
            The text.
        beams
            Paths to keep at each level, >= 1.
        """
        if beams < 1:
            raise InvalidArgumentError(f"beams is {beams}; accepted: >= 1")
        return tuple(self.retriever.route_beam(text, beams))

    def _read(self, ref: BlockRef, dtype: str, held: Block | None) -> Block:
        entry = self._bank.entry(self._state, ref)
        header = BlockHeader(ref=ref, version=entry.version, state=entry.state, dtype=dtype)
        if entry.state is not BlockState.ACTIVE:
            return Block(header=header, weight=None)
        usable = held is not None and held.weight is not None and held.header.dtype == dtype
        if held is not None and usable and held.version == entry.version:
            return held
        stored = self._bank.weight(ref, entry)
        # The very numbers that a shard would send, and what a client would make of them.
        codec = fetch_codec(dtype)
        payload = codec.encode(stored)
        weight = codec.decode(payload, stored.shape)
        weight.flags.writeable = False
        is_checked = dtype == self.spec.dtype and entry.slot != NO_SLOT
        crc = entry.crcs[0] if is_checked else crc32c(payload)
        return Block(
            header=replace(header, shape=weight.shape, num_bytes=payload.nbytes, crc32c=crc),
            weight=weight,
        )

    def _topic(self, ref: BlockRef) -> Topic:
        entry = self._bank.entry(self._state, ref)
        return Topic(
            ref=ref,
            label=self.tree.labels.get(ref, ""),
            state=entry.state,
            version=entry.version,
            step=entry.step,
            num_bytes=self.spec.weight_bytes(ref.level),
            num_documents=self.tree.num_documents.get(ref, 0),
            partition=self.spec.partition_of(ref),
        )


class AsyncOpenedBank:
    """`OpenedBank` for an event loop: the same names, which read in threads.

    Parameters
    ----------
    opened
        The bank.
    """

    def __init__(self, opened: OpenedBank) -> None:
        self._opened = opened

    @property
    def spec(self) -> BankSpec:
        """Spec of the bank."""
        return self._opened.spec

    @property
    def state(self) -> StateRead:
        """Which state is read."""
        return self._opened.state

    async def fetch(
        self,
        path: Sequence[BlockRef],
        *,
        dtype: str | None = None,
        held: Mapping[BlockRef, Block] | None = None,
    ) -> Memory:
        """Return the blocks of a path that may be used; see `OpenedBank.fetch`."""
        return await asyncio.to_thread(self._opened.fetch, path, dtype=dtype, held=held)

    async def fetch_blocks(
        self,
        refs: Iterable[BlockRef],
        *,
        dtype: str | None = None,
        held: Mapping[BlockRef, Block] | None = None,
    ) -> FetchedBlocks:
        """Return blocks for themselves; see `OpenedBank.fetch_blocks`."""
        return await asyncio.to_thread(self._opened.fetch_blocks, refs, dtype=dtype, held=held)

    @asynccontextmanager
    async def stream(
        self, path: Sequence[BlockRef], *, layers_per_part: int = 1, dtype: str | None = None
    ) -> AsyncIterator[AsyncLayeredMemory]:
        """Show a path layer by layer; see `OpenedBank.stream`."""
        yield AsyncLayeredMemory(await asyncio.to_thread(self._opened._board, path, dtype))

    async def topics(self, parent: BlockRef | None = None, *, depth: int = 0) -> tuple[Topic, ...]:
        """Return topics; see `OpenedBank.topics`."""
        return await asyncio.to_thread(self._opened.topics, parent, depth=depth)

    async def route(self, text: str, *, beams: int = 1) -> Path:
        """Return the path of a text; see `OpenedBank.route`."""
        return await asyncio.to_thread(self._opened.route, text, beams=beams)

    async def route_beam(self, text: str, beams: int) -> tuple[ScoredPath, ...]:
        """Return up to `beams` paths of a text; see `OpenedBank.route_beam`."""
        return await asyncio.to_thread(self._opened.route_beam, text, beams)


def open_bank(
    where: str | os.PathLike[str],
    *,
    snapshot: str = "",
    keyring: str | os.PathLike[str] = "",
    embedder: Embedder | None = None,
) -> OpenedBank:
    """Open the bank at `where`; see `BankClient.open`."""
    files = open_files(where)
    if keyring:
        files = SealedReader(files, open_files(keyring))
    return OpenedBank(files, snapshot=snapshot, embedder=embedder)
