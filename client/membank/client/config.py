"""Configuration of the client: deadlines, retries, bounds, cache, TLS and credentials."""

from __future__ import annotations

import hmac
import math
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import NoReturn

from membank.wire.errors import FailedPreconditionError, InvalidArgumentError, Reason


class Secret:
    """A credential that shows itself to nobody: not to `repr`, logs or pickle.

    Parameters
    ----------
    value
        The credential; surrounding white space is dropped.
    """

    __slots__ = ("_value",)

    def __init__(self, value: str) -> None:
        self._value = value.strip()

    def reveal(self) -> str:
        """Return the credential."""
        return self._value

    def __repr__(self) -> str:
        return "Secret(***)"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Secret):
            return NotImplemented
        return hmac.compare_digest(self._value.encode(), other._value.encode())

    def __hash__(self) -> int:
        return hash((Secret, self._value))

    def __copy__(self) -> Secret:
        return self

    def __deepcopy__(self, memo: dict[int, object]) -> Secret:
        # `dataclasses.asdict` copies deeply; the copy would otherwise go through pickle.
        return self

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "a credential does not pickle; give token_file instead of token, and have the file on "
            "every machine that the configuration is sent to"
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class RetryConfig:
    """When and how often a call that found no service is made again.

    Only UNAVAILABLE is retried, and an overload that says when to come again: everything else is an
    answer. A mutation is retried with the same
    request id, so that a service that did apply it does not apply it twice.
    """

    max_attempts: int = 200
    """Most attempts of one call, the first included; 1 = never retry. The deadline of the call
    usually ends the retries first."""
    initial_backoff_s: float = 0.05
    """Upper bound of the first wait, in seconds, > 0; waits are drawn from 0 to the bound."""
    max_backoff_s: float = 2.0
    """Bound that the doubled waits stop at, in seconds, >= `initial_backoff_s`."""

    def __post_init__(self) -> None:
        _require(self.max_attempts >= 1, "max_attempts", self.max_attempts, ">= 1")
        ok = 0 < self.initial_backoff_s < math.inf
        _require(ok, "initial_backoff_s", self.initial_backoff_s, "finite, > 0")
        ok = self.initial_backoff_s <= self.max_backoff_s < math.inf
        _require(ok, "max_backoff_s", self.max_backoff_s, "finite, >= initial_backoff_s")


@dataclass(frozen=True, kw_only=True, slots=True)
class TlsConfig:
    """How the client knows that it talks to the right service."""

    root_certificates: Path | None = None
    """PEM file with the certificates to trust; None = those of the operating system."""
    server_name: str | None = None
    """Name that the certificate must bear; None = the host that is called. For shards that are
    called by address and share one certificate."""

    def __post_init__(self) -> None:
        if self.root_certificates is not None:
            object.__setattr__(self, "root_certificates", Path(self.root_certificates))


class Eviction(StrEnum):
    """Which block makes room for another one."""

    LRU = "lru"
    """The one that was asked for longest ago."""
    LFU = "lfu"
    """The one that was asked for least often, where it counts less the longer ago that was. A block
    that has changed is counted anew."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DiskTierConfig:
    """What the cache keeps in files once its memory has no room for it (docs/client.md)."""

    directory: Path
    """Directory of one client at a time, made if missing. On a local disk: it is locked, and it is
    to be faster than the network. A client that comes after another one goes on with its files."""
    max_bytes: int = 8 << 30
    """Most bytes that the files have together, >= 1."""
    levels: tuple[int, ...] = ()
    """Levels (from 1) whose blocks are kept in files; () = all."""
    direct_levels: tuple[int, ...] = ()
    """Levels whose blocks go into files as soon as they are fetched and take no memory from those of
    other levels; each must be one of `levels`, where these are given."""
    max_queued_bytes: int = 256 << 20
    """Most bytes of weights that wait to be written, >= 1; what would exceed it is not kept."""
    pause_s: float = 30.0
    """Seconds without writing after a disk was full or failed, finite, >= 0."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "directory", Path(self.directory))
        _require(self.max_bytes >= 1, "max_bytes", self.max_bytes, ">= 1")
        _require(self.max_queued_bytes >= 1, "max_queued_bytes", self.max_queued_bytes, ">= 1")
        _require(0 <= self.pause_s < math.inf, "pause_s", self.pause_s, "finite, >= 0")
        _require_levels("levels", self.levels)
        object.__setattr__(self, "levels", tuple(self.levels))
        _require_levels("direct_levels", self.direct_levels)
        object.__setattr__(self, "direct_levels", tuple(self.direct_levels))
        ok = not self.levels or set(self.direct_levels) <= set(self.levels)
        _require(ok, "direct_levels", self.direct_levels, f"some of levels, {self.levels}")


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheConfig:
    """What the client keeps of the blocks that it has fetched (docs/client.md)."""

    max_bytes: int = 1 << 30
    """Most bytes of weights that are kept, >= 1."""
    max_staleness_s: float = 0.0
    """Seconds for which a block is used without asking the service, as long as no change was heard
    of; finite, >= 0. At 0 it is asked every time, and what has not changed does not travel."""
    pinned_levels: tuple[int, ...] = ()
    """Levels (from 1) whose blocks never make room for those of others."""
    eviction: Eviction = Eviction.LRU
    """Which block goes first where room is needed."""
    disk: DiskTierConfig | None = None
    """Where blocks go that memory has no room for; None = nowhere, they are fetched again."""

    def __post_init__(self) -> None:
        _require(self.max_bytes >= 1, "max_bytes", self.max_bytes, ">= 1")
        ok = 0 <= self.max_staleness_s < math.inf
        _require(ok, "max_staleness_s", self.max_staleness_s, "finite, >= 0")
        _require_levels("pinned_levels", self.pinned_levels)
        object.__setattr__(self, "pinned_levels", tuple(self.pinned_levels))
        if self.disk is not None:
            ok = set(self.pinned_levels).isdisjoint(self.disk.direct_levels)
            _require(ok, "pinned_levels", self.pinned_levels, "no level of disk.direct_levels")
        known = tuple(kind.value for kind in Eviction)
        _require(self.eviction in known, "eviction", self.eviction, ", ".join(known))
        object.__setattr__(self, "eviction", Eviction(self.eviction))


@dataclass(frozen=True, kw_only=True, slots=True)
class SameHostConfig:
    """How shards on this machine are called through shared memory (docs/client.md)."""

    max_connections: int = 4
    """Most calls to one shard at a time, >= 1; further ones wait for their turn."""

    def __post_init__(self) -> None:
        _require(self.max_connections >= 1, "max_connections", self.max_connections, ">= 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class ClientConfig:
    """Configuration of a client. It pickles unless it holds a `token`."""

    bank: str = ""
    """Name of the bank; empty = the one that the service serves."""
    snapshot: str = ""
    """Snapshot that every fetch reads; empty = the present state. For a process that serves one
    state however the bank is trained meanwhile. Texts are routed by the tree that is in force."""
    timeout_s: float = 60.0
    """Deadline of a fetch, push or question, retries included, in seconds."""
    admin_timeout_s: float = 300.0
    """Deadline of a change of the bank, an export or an import, retries included, in seconds."""
    connect_timeout_s: float = 10.0
    """Deadline of the first answer at `connect`, retries included, in seconds."""
    retry: RetryConfig = field(default_factory=RetryConfig)
    """Retries."""
    cache: CacheConfig | None = None
    """What is kept of the blocks that were fetched; None = nothing."""
    same_host: SameHostConfig | None = field(default_factory=SameHostConfig)
    """How shards on this machine are called through shared memory; None = over gRPC alone."""
    max_data_connections: int = 8
    """Most connections to one shard that fetches and pushes have for themselves, >= 0; they carry one
    call at a time, at about the speed of the network. 0 = none: all share the connection of all
    calls."""
    tls: TlsConfig | None = None
    """None = no TLS; a credential is then sent to this machine alone."""
    token: Secret | str | None = None
    """Bearer token; a `str` is wrapped. Not together with `token_file`."""
    token_file: Path | None = None
    """File whose first word is the bearer token, comments (#) aside; the service's own token file
    will do. Read when a connection is made, so that it may be renewed."""
    max_answer_bytes: int = 4 << 30
    """Most bytes that the answer to one call may have: a fetch, the tree document, a pack
    that is exported into memory."""
    max_push_bytes: int = 4 << 30
    """Most bytes that the gradients of one push, or the blocks of one swap, may have."""
    pooled_bytes: int = 256 << 20
    """Most bytes of memory of fetched blocks that are kept, once nobody refers to them, for those
    that are fetched next; 0 = none. About what one step fetches: fresh memory costs more time than
    the copy into it."""
    max_request_bytes: int = 64 << 20
    """Bytes at which a fetch from one shard is cut into several requests."""
    max_revision_rounds: int = 8
    """Most times that the shards behind are asked again so that a fetch is of one revision."""
    keepalive_s: float = 30.0
    """Silence after which a connection in use is probed, in seconds; the service must permit it."""
    keepalive_timeout_s: float = 10.0
    """Time for the answer to a probe, in seconds; then the connection counts as broken."""

    def __post_init__(self) -> None:
        for name in ("timeout_s", "admin_timeout_s", "connect_timeout_s"):
            _require_positive(name, getattr(self, name))
        for name in ("keepalive_s", "keepalive_timeout_s"):
            _require_positive(name, getattr(self, name))
        for name in (
            "max_answer_bytes",
            "max_push_bytes",
            "max_request_bytes",
            "max_revision_rounds",
        ):
            _require(getattr(self, name) >= 1, name, getattr(self, name), ">= 1")
        _require(self.pooled_bytes >= 0, "pooled_bytes", self.pooled_bytes, ">= 0")
        ok = self.max_data_connections >= 0
        _require(ok, "max_data_connections", self.max_data_connections, ">= 0")
        if isinstance(self.token, str):
            object.__setattr__(self, "token", Secret(self.token))
        if self.token_file is not None:
            object.__setattr__(self, "token_file", Path(self.token_file))
        both = self.token is not None and self.token_file is not None
        _require(not both, "token", "***", "either token or token_file")

    def read_token(self) -> Secret | None:
        """Return the bearer token, read anew where it comes from a file; None = no credentials.

        Raises
        ------
        FailedPreconditionError
            If the file cannot be read or is empty.
        """
        if self.token_file is None:
            return Secret(self.token) if isinstance(self.token, str) else self.token
        try:
            lines = self.token_file.read_text().splitlines()
        except OSError as err:
            raise FailedPreconditionError(
                f"token file {self.token_file}: {err.strerror}; write the token there",
                reason=Reason.NO_CREDENTIALS,
            ) from err
        words = [line.split()[0] for line in lines if line.strip() and not line.startswith("#")]
        if not words:
            raise FailedPreconditionError(
                f"token file {self.token_file} holds no token; write one there",
                reason=Reason.NO_CREDENTIALS,
            )
        return Secret(words[0])


def _require_levels(name: str, levels: tuple[int, ...]) -> None:
    ok = all(level >= 1 for level in levels)
    _require(ok, name, levels, "levels, which count from 1")


def _require_positive(name: str, value: float) -> None:
    _require(0 < value < math.inf, name, value, "finite, > 0")


def _require(ok: bool, name: str, value: object, accepted: str) -> None:
    if not ok:
        raise InvalidArgumentError(
            f"{name} is {value!r}; accepted: {accepted}",
            reason=Reason.BAD_CONFIG,
            metadata={"field": name, "value": str(value)},
        )
