"""The synchronous client: `AsyncBankClient` behind one background thread, with no logic of its own.

What is called most, and waits for shards alone, runs in its caller's thread where it can.
"""

from __future__ import annotations

import functools
import inspect
import os
import time
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Any, Concatenate, ParamSpec, Self, TypeVar

from membank.client.cache.blocks import CacheStats
from membank.client.config import ClientConfig
from membank.client.core import AsyncBankClient
from membank.client.inline import NeedsLoopError, run_inline
from membank.client.loop_thread import loop_thread, may_block
from membank.client.memory import FetchedBlocks
from membank.client.opened import OpenedBank, open_bank
from membank.client.retriever import Embedder
from membank.client.session import new_request_id
from membank.client.streaming.layers import AsyncLayeredMemory, LayeredMemory
from membank.client.transaction import Transaction
from membank.client.transport.contract import Connector
from membank.client.transport.same_host import SameHostStats
from membank.client.watching import Changes
from membank.wire.errors import FailedPreconditionError
from membank.wire.spec import Array, BankSpec, BlockRef

P = ParamSpec("P")
T = TypeVar("T")

_LEAST_S = 0.001


def _sync(
    method: Callable[Concatenate[AsyncBankClient, P], Coroutine[Any, Any, T]],
) -> Callable[Concatenate[BankClient, P], T]:
    """Return the sync twin of a method: same parameters, docstring, result and errors."""

    @functools.wraps(method)
    def call(self: BankClient, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return self._run(method(self._core, *args, **kwargs))

    return call


def _sync_here(
    method: Callable[Concatenate[AsyncBankClient, P], Coroutine[Any, Any, T]],
) -> Callable[Concatenate[BankClient, P], T]:
    """As `_sync`, of a method that takes `timeout_s` and may be tried in the caller's thread."""
    begin: Callable[..., Coroutine[Any, Any, T]] = method
    has_request_id = "request_id" in inspect.signature(method).parameters

    @functools.wraps(method)
    def call(self: BankClient, /, *args: P.args, **kwargs: P.kwargs) -> T:
        if not self._is_here():
            return self._run(method(self._core, *args, **kwargs))
        # Whatever the first attempt would use up, or make anew, is the same in both.
        again = [_reusable(arg) for arg in args]
        options: dict[str, Any] = {name: _reusable(arg) for name, arg in kwargs.items()}
        if has_request_id:
            options["request_id"] = options.get("request_id") or new_request_id()
        began = time.monotonic()
        try:
            return run_inline(begin(self._core, *again, **options))
        except NeedsLoopError:
            options["timeout_s"] = self._left_s(options.get("timeout_s"), since=began)
        return self._run(begin(self._core, *again, **options))

    return call


def _reusable(arg: object) -> object:
    """Return an argument that may be read twice."""
    return list(arg) if isinstance(arg, Iterator) else arg


class BankClient:
    """A bank as seen over the network.

    Made by `connect`, and a context manager. Every call blocks, may be made from any thread, and is
    that of `AsyncBankClient` with the same name, parameters and errors.

    Parameters
    ----------
    core
        The asynchronous client, made on the loop thread of this process.
    runs_inline
        Its transports bear `run_inline`: they call `require_loop` before they do what needs a loop.

    Notes
    -----
    All clients of a process share one background event loop. A client does not survive a fork: in
    the child every call raises `FailedPreconditionError`. It does not pickle; send the endpoint and
    the configuration, and connect there.
    """

    def __init__(self, core: AsyncBankClient, *, runs_inline: bool = False) -> None:
        self._core = core
        # A cache belongs to the loop, on which it also hears of changes.
        self._runs_inline = runs_inline and core.config.cache is None
        self._pid = os.getpid()

    @classmethod
    def connect(
        cls,
        endpoint: str,
        *,
        config: ClientConfig | None = None,
        embedder: Embedder | None = None,
        connector: Connector | None = None,
    ) -> Self:
        """Connect to a service and learn its bank; see `AsyncBankClient.connect`.

        Parameters
        ----------
        endpoint
            Address, ``host:port``, of the gateway, or of any shard (admin calls need the gateway).
        config
            Configuration; None = the defaults.
        embedder
            Embeds texts for `route`; None = the one that the bank's tree holds (``lsa`` only).
        connector
            Connects to endpoints; None = over gRPC.
        """
        core = loop_thread().run(
            AsyncBankClient.connect(endpoint, config=config, embedder=embedder, connector=connector)
        )
        return cls(core, runs_inline=connector is None)

    @classmethod
    def open(
        cls,
        where: str | os.PathLike[str],
        *,
        snapshot: str = "",
        keyring: str | os.PathLike[str] = "",
        embedder: Embedder | None = None,
    ) -> OpenedBank:
        """Open a bank from its files, read-only, without a service: for notebooks and devices.

        Nothing is written and nobody is kept from writing. Of a bank that is being served, what its
        shards have consolidated is read: updates that are only in a journal are not seen.
        `OpenedBank.state` says which state it is; it stays the same.

        Parameters
        ----------
        where
            Path of a directory, which needs numpy alone, or any URL that fsspec serves.
        snapshot
            Snapshot to read; empty = the present state.
        keyring
            Path or URL of the keyring, of a sealed bank.
        embedder
            Embeds texts for `route`; None = the one that the bank's tree holds (``lsa`` only).

        Raises
        ------
        NotFoundError
            If there is no bank (NOT_A_BANK), or no such snapshot (UNKNOWN_SNAPSHOT).
        FailedPreconditionError
            If a newer membank wrote it (FORMAT_TOO_NEW), a package is missing to read the URL
            (MISSING_EXTRA), or the keyring is not the one that it needs (KEYRING_NEEDED,
            KEYRING_MISMATCH, BANK_NOT_SEALED).
        CorruptionError
            If a file is damaged or missing; the error names it.
        """
        return open_bank(where, snapshot=snapshot, keyring=keyring, embedder=embedder)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections; without effect in a process that was forked off."""
        if self._pid == os.getpid():
            self._run(self._core.close())

    @property
    def endpoint(self) -> str:
        """Address that the client was given."""
        return self._core.endpoint

    @property
    def config(self) -> ClientConfig:
        """Configuration of the client."""
        return self._core.config

    @property
    def spec(self) -> BankSpec:
        """Spec of the bank, as learnt; `NotFoundError` where the service has no bank yet."""
        return self._core.spec

    @property
    def cache_stats(self) -> CacheStats | None:
        """What the cache did and holds; None where there is none, or nothing was fetched yet."""
        return self._core.cache_stats

    @property
    def same_host_stats(self) -> SameHostStats:
        """What went through shared memory, and why what did not."""
        return self._core.same_host_stats

    info = _sync(AsyncBankClient.info)
    tree = _sync(AsyncBankClient.tree)
    retriever = _sync(AsyncBankClient.retriever)
    route = _sync(AsyncBankClient.route)
    route_beam = _sync(AsyncBankClient.route_beam)
    fetch = _sync_here(AsyncBankClient.fetch)
    fetch_blocks = _sync_here(AsyncBankClient.fetch_blocks)
    push = _sync_here(AsyncBankClient.push)

    create_bank = _sync(AsyncBankClient.create_bank)
    topics = _sync(AsyncBankClient.topics)
    describe = _sync(AsyncBankClient.describe)
    apply = _sync(AsyncBankClient.apply)
    swap = _sync(AsyncBankClient.swap)
    withhold = _sync(AsyncBankClient.withhold)
    restore = _sync(AsyncBankClient.restore)
    delete = _sync(AsyncBankClient.delete)
    export = _sync(AsyncBankClient.export)
    export_to = _sync(AsyncBankClient.export_to)
    store_pack = _sync(AsyncBankClient.store_pack)
    packs = _sync(AsyncBankClient.packs)
    delete_pack = _sync(AsyncBankClient.delete_pack)
    import_pack = _sync(AsyncBankClient.import_pack)
    import_stored = _sync(AsyncBankClient.import_stored)
    snapshot = _sync(AsyncBankClient.snapshot)
    snapshots = _sync(AsyncBankClient.snapshots)
    delete_snapshot = _sync(AsyncBankClient.delete_snapshot)
    rollback = _sync(AsyncBankClient.rollback)
    collect_garbage = _sync(AsyncBankClient.collect_garbage)
    stats = _sync(AsyncBankClient.stats)
    audit = _sync(AsyncBankClient.audit)
    receipt = _sync(AsyncBankClient.receipt)

    def watch(
        self, refs: Iterable[BlockRef] = (), *, admin_only: bool = False
    ) -> Iterator[Changes]:
        """Yield changes of blocks from now on; see `AsyncBankClient.watch`.

        Parameters
        ----------
        refs
            Blocks of interest; empty = all.
        admin_only
            True leaves out changes by gradient updates.
        """
        changes = self._core.watch(refs, admin_only=admin_only)

        async def next_or_none() -> Changes | None:
            return await anext(changes, None)

        try:
            while (item := self._run(next_or_none())) is not None:
                yield item
        finally:
            # After a fork, or while the process ends, there is no loop left to close it on.
            with suppress(FailedPreconditionError):
                self._run(changes.aclose())

    @contextmanager
    def stream(
        self,
        path: Sequence[BlockRef],
        *,
        layers_per_part: int = 1,
        dtype: str | None = None,
        into: Mapping[BlockRef, Array] | None = None,
        snapshot: str | None = None,
        timeout_s: float | None = None,
    ) -> Iterator[LayeredMemory]:
        """Fetch the blocks of a path layer by layer; see `AsyncBankClient.stream`.

        Parameters
        ----------
        path
            Blocks, usually from `route`.
        layers_per_part
            Layers that travel together and become usable together, >= 1.
        dtype
            Element type to get: float32, bfloat16 or float16; None = as kept in the bank.
        into
            As for `fetch_blocks`.
        snapshot
            As for `fetch`.
        timeout_s
            Deadline of the last layer, however slowly layers are used.
        """
        stream = self._core.stream(
            path,
            layers_per_part=layers_per_part,
            dtype=dtype,
            into=into,
            snapshot=snapshot,
            timeout_s=timeout_s,
        )
        memory: AsyncLayeredMemory = self._run(stream.__aenter__())
        try:
            yield memory.in_threads()
        finally:
            # After a fork, or while the process ends, there is nothing left to leave.
            with suppress(FailedPreconditionError):
                self._run(stream.__aexit__(None, None, None))

    @contextmanager
    def borrow(
        self, refs: Iterable[BlockRef], *, timeout_s: float | None = None
    ) -> Iterator[FetchedBlocks]:
        """Look at blocks where the shard keeps them; see `AsyncBankClient.borrow`.

        Parameters
        ----------
        refs
            The blocks.
        timeout_s
            Deadline of getting them.
        """
        wanted = list(refs)
        began = time.monotonic()
        run: Callable[[Coroutine[Any, Any, Any]], Any] = (
            run_inline if self._is_here() else self._run
        )
        lease = self._core.borrow(wanted, timeout_s=timeout_s)
        try:
            blocks: FetchedBlocks = run(lease.__aenter__())
        except NeedsLoopError:
            run = self._run
            lease = self._core.borrow(wanted, timeout_s=self._left_s(timeout_s, since=began))
            blocks = run(lease.__aenter__())
        try:
            yield blocks
        finally:
            # In a process that was forked off meanwhile they are its parent's, which still reads them.
            if self._pid == os.getpid():
                run(lease.__aexit__(None, None, None))

    @contextmanager
    def transaction(
        self,
        *,
        dry_run: bool = False,
        request_id: str | None = None,
        timeout_s: float | None = None,
    ) -> Iterator[Transaction]:
        """Collect steps and apply them as one; see `AsyncBankClient.transaction`.

        Parameters
        ----------
        dry_run
            True only finds out what would change.
        request_id
            Id of the request.
        timeout_s
            Deadline of applying them.
        """
        transaction = Transaction(dry_run=dry_run)
        yield transaction
        if transaction.steps:
            transaction.applied = self.apply(
                transaction.steps, dry_run=dry_run, request_id=request_id, timeout_s=timeout_s
            )

    def _is_here(self) -> bool:
        return self._runs_inline and may_block()

    def _left_s(self, timeout_s: float | None, *, since: float) -> float:
        """Return what is left of a call's seconds; at least some, so that it fails as it would."""
        allowed = self._core.config.timeout_s if timeout_s is None else timeout_s
        return max(allowed - (time.monotonic() - since), _LEAST_S)

    def _run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        try:
            return loop_thread().run(coroutine)
        except FailedPreconditionError:
            coroutine.close()
            raise

    def __reduce__(self) -> tuple[Any, ...]:
        raise TypeError(
            "a BankClient does not pickle; send its endpoint and config, and connect there"
        )
