"""What is measured: a server, the ways to it, and what a client must be able to do."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from importlib import metadata
from pathlib import Path
from typing import Protocol

from benchmarks.peers.blocks import Array, Blocks


class NotRunError(Exception):
    """A contestant, or one work of it, cannot be measured here; the message says why."""


class Work(StrEnum):
    """What a client can be asked to do."""

    FETCH = "fetch"
    """Return one block, or several by one request, as arrays in the client's memory."""
    PUSH = "push"
    """Apply a gradient to a block and return once that is done."""
    CONDITIONAL = "conditional"
    """Fetch blocks of which the client holds the current version."""


class Reach(StrEnum):
    """How far a contestant reaches, which says with whom it is compared."""

    NETWORK = "network"
    """Through sockets that could as well lead to another machine."""
    SAME_HOST = "same host"
    """Over memory or sockets of one machine; the client ends up with a copy of its own."""
    VIEW = "view"
    """Over memory of one machine, without a copy: nothing is touched until the block is used."""
    FLOOR = "floor"
    """No store at all: what the machine allows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class About:
    """What a server is and how it is set up."""

    version: str
    """Name and version."""
    setup: str
    """How it is set up, and what is left at its default."""
    docs: str
    """Where its own documentation recommends that."""
    optimizer: str = ""
    """What a push does, where; empty = there is none."""
    keeps: str = "in memory only"
    """What an acknowledged push survives."""


class Server(Protocol):
    """A server in processes of its own."""

    @property
    def name(self) -> str:
        """Name, unique in a run."""

    def about(self) -> About:
        """Say what it is.

        Raises
        ------
        NotRunError
            If it is not installed.
        """

    def start(self, folder: Path, num_clients: int, environment: Mapping[str, str]) -> str:
        """Start it and return what `Contestant.connect` needs to find it.

        Parameters
        ----------
        folder
            Empty directory for its files.
        num_clients
            How many processes will connect, at one time.
        environment
            Variables that all its processes must have, by which they are found.

        Raises
        ------
        NotRunError
            If it does not come up.
        """

    def stop(self) -> None:
        """End its processes; nothing happens where there are none."""


class Client(Protocol):
    """A connection, used by one measuring process from one thread."""

    def load(self, blocks: Mapping[str, Array]) -> None:
        """Store blocks; not timed."""

    def fetch(self, keys: Sequence[str]) -> Sequence[Array]:
        """Return the contents of blocks, asked for by one request.

        Arrays are valid until the next call: a client that can receive into memory of the caller's
        does so. They may be flat.
        """

    def push(self, key: str, gradient: Array) -> None:
        """Apply a gradient to a block; learning rate and so on are those of `rules`."""

    def fetch_unchanged(self, keys: Sequence[str]) -> None:
        """Fetch blocks again that have not changed since the last call."""

    def close(self) -> None:
        """Disconnect."""


class ClientBase:
    """What most clients have in common: nothing to close, and no conditional fetch."""

    def push(self, key: str, gradient: Array) -> None:
        # docstring inherited
        raise NotImplementedError

    def fetch_unchanged(self, keys: Sequence[str]) -> None:
        # docstring inherited
        raise NotImplementedError

    def close(self) -> None:
        # docstring inherited
        return


@dataclass(frozen=True, kw_only=True, slots=True)
class Access:
    """What a measuring process needs to connect."""

    address: str
    """What `Server.start` returned."""
    blocks: Blocks
    """The blocks of the run."""
    number: int
    """Number of the process among those that connect to the same server, from 0."""


@dataclass(frozen=True, kw_only=True)
class Contestant:
    """One way to get at the blocks of a server."""

    name: str
    """Name, unique in a run."""
    server: Server
    """The server; contestants may share one."""
    connect: Callable[[Access], Client]
    """Connects; called in a measuring process, may raise `NotRunError`."""
    reach: Reach
    """With whom it is compared."""
    note: str
    """How this way is used."""
    works: frozenset[Work] = frozenset({Work.FETCH, Work.PUSH})
    """What it can do."""
    many_clients: bool = False
    """Whether it is also measured with several clients at a time."""
    push_rule: str = "adagrad"
    """Rule that its pushes follow, by its name in `rules`."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Environment variables of its measuring processes."""


def version_of(package: str) -> str | None:
    """Return the version of an installed package; None = it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
