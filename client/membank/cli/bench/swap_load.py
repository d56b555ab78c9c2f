"""Swaps of a whole path while clients fetch it: phases without and with swaps take turns."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection

from membank.cli.bench.child_process import Child
from membank.cli.bench.display import Notice
from membank.cli.bench.swap_clients import SwapClientTask, TimedCalls, run_pusher, run_reader
from membank.cli.bench.swap_marks import MAX_MARK, MarkedContents
from membank.client import BankClient, ClientConfig
from membank.wire.errors import FailedPreconditionError, InvalidArgumentError, Reason
from membank.wire.spec import BankSpec, BlockRef

_START_TIMEOUT_S = 120.0
# Between the word to stop and the report lies at most one call, which has a deadline.
_GRACE_S = 60.0
_WARM_UP_S = 1.0
_MOST_LEAVES_LOOKED_AT = 4096


@dataclass(frozen=True, kw_only=True, slots=True)
class SwapLoadConfig:
    """How a run goes."""

    num_pairs: int = 15
    """Pairs of phases, one without and one with swaps, >= 1."""
    phase_s: float = 4.0
    """Seconds of each phase, > 0."""
    every_s: float = 1.0
    """Seconds between the beginnings of two swaps, > 0 and at most `phase_s`; where a swap takes
    longer, the next one begins when it is done."""
    num_readers: int = 2
    """Processes that fetch, >= 1."""
    num_pushers: int = 0
    """Processes that push to paths of other topics."""
    num_leaves: int = 1
    """Leaves that are fetched, by Zipf; the first one's path is swapped, >= 1."""
    zipf: float = 1.0
    """Exponent of their popularity, >= 0."""
    seed: int = 0
    """Seed of contents and order, >= 0."""

    def __post_init__(self) -> None:
        for name in ("num_pairs", "num_readers", "num_leaves"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), ">= 1")
        _require(self.phase_s > 0, "phase_s", self.phase_s, "> 0")
        _require(0 < self.every_s <= self.phase_s, "every_s", self.every_s, "at most phase_s")
        most = int(self.num_pairs * (self.phase_s / self.every_s + 1)) + 1
        _require(most <= MAX_MARK, "num_pairs", self.num_pairs, f"at most {MAX_MARK} swaps in all")


@dataclass(frozen=True, slots=True)
class Span:
    """A time, on the clock that all processes share."""

    begin: float
    """Its beginning, in seconds."""
    end: float
    """Its end, not included."""

    @property
    def seconds(self) -> float:
        """How long it is."""
        return self.end - self.begin


@dataclass(kw_only=True, slots=True)
class SwapRun:
    """What was seen in one run."""

    quiet: list[Span] = field(default_factory=list)
    """Phases without swaps, in order."""
    swapping: list[Span] = field(default_factory=list)
    """Phases with swaps, each after the quiet one of the same number."""
    swaps: list[Span] = field(default_factory=list)
    """The swaps, as their caller saw them."""
    readers: list[TimedCalls] = field(default_factory=list)
    """What each reader did."""
    pushers: list[TimedCalls] = field(default_factory=list)
    """What each pusher did."""


class Swapper:
    """Swaps the blocks of a path, again and again, each time with the next mark.

    Parameters
    ----------
    bank
        A connected client.
    leaf
        End of the path.
    seed
        Seed of the contents.
    """

    def __init__(self, bank: BankClient, leaf: BlockRef, seed: int) -> None:
        self._bank = bank
        self._path = bank.spec.path_to(leaf)
        self._contents = MarkedContents(bank.spec, self._path, seed)
        self._mark = 0
        self.versions = dict(bank.fetch(self._path).versions)
        """Versions of the path's blocks after the last swap."""

    def swap(self) -> Span:
        """Swap all blocks, from the versions that the last swap left; return when that was.

        Raises
        ------
        MembankError
            What the service answers; also if somebody else changed a block (ConflictError).
        """
        weights = self._contents.marked(self._mark + 1)
        begin = time.monotonic()
        report = self._bank.swap(weights, expected=self.versions)
        end = time.monotonic()
        self._mark += 1
        self.versions = {change.ref: change.version_after for change in report.changes}
        return Span(begin, end)


def run_swap_load(
    endpoint: str, client_config: ClientConfig, config: SwapLoadConfig, notice: Notice
) -> SwapRun:
    """Let clients fetch while the path of one leaf is swapped in every other phase.

    Parameters
    ----------
    endpoint
        Address of the gateway.
    client_config
        How to connect.
    config
        How it goes.
    notice
        Told how far it is.

    Returns
    -------
    SwapRun
        All calls and swaps.

    Raises
    ------
    MembankError
        What kept a client from connecting, or a swap from being done.
    """
    with ExitStack() as stack:
        bank = stack.enter_context(BankClient.connect(endpoint, config=client_config))
        owners = {o.partition: o.endpoint for o in bank.info().placement.owners}
        leaves = spread_leaves(bank.spec, owners, config.num_leaves)
        swapper = Swapper(bank, leaves[0], config.seed)
        swapper.swap()
        for leaf in leaves:
            bank.fetch(bank.spec.path_to(leaf))
        task = SwapClientTask(
            endpoint=endpoint,
            config=client_config,
            client=0,
            leaves=leaves,
            zipf=config.zipf,
            seed=config.seed,
            versions=swapper.versions,
        )
        readers = _start(stack, run_reader, task, config.num_readers, "reader")
        elsewhere = replace(task, leaves=apart_leaves(bank.spec, leaves[0], config.num_leaves))
        pushers = _start(stack, run_pusher, elsewhere, config.num_pushers, "pusher")
        for child in (*readers, *pushers):
            child.receive(_START_TIMEOUT_S)
        for child in (*readers, *pushers):
            child.send("go")
        run = SwapRun()
        _take_turns(run, swapper, config, notice)
        for child in (*readers, *pushers):
            child.send("stop")
        silence_s = client_config.timeout_s + _GRACE_S
        run.readers = [_calls(child, silence_s) for child in readers]
        run.pushers = [_calls(child, silence_s) for child in pushers]
    return run


def spread_leaves(
    spec: BankSpec, owners: Mapping[int, str], num_leaves: int
) -> tuple[BlockRef, ...]:
    """Return leaves spread evenly over the bank, the first one's path over many shards.

    A swap that is one shard's alone would not show whether several agree.

    Parameters
    ----------
    spec
        The bank.
    owners
        Shard of each partition.
    num_leaves
        Leaves that are wanted, >= 1.

    Returns
    -------
    tuple of BlockRef
        At most as many as the bank has.
    """
    there = spec.num_clusters(spec.num_levels)
    count = min(num_leaves, there)

    def num_shards(cluster: int) -> int:
        path = spec.path_to(BlockRef(spec.num_levels, cluster))
        return len({owners.get(spec.partition_of(ref)) for ref in path})

    first = max(range(min(there, _MOST_LEAVES_LOOKED_AT)), key=num_shards)
    clusters = ((first + index * there // count) % there for index in range(count))
    return tuple(BlockRef(spec.num_levels, cluster) for cluster in clusters)


def apart_leaves(spec: BankSpec, leaf: BlockRef, num_leaves: int) -> tuple[BlockRef, ...]:
    """Return leaves whose paths share no block with that of `leaf`.

    Raises
    ------
    FailedPreconditionError
        If there are none, as the bank has one topic at its first level.
    """
    path = set(spec.path_to(leaf))
    there = spec.num_clusters(spec.num_levels)
    # From the end: the first leaves are the ones that are fetched.
    found = [
        other
        for index in range(there - 1, -1, -max(1, there // (4 * num_leaves)))
        if path.isdisjoint(spec.path_to(other := BlockRef(spec.num_levels, index)))
    ]
    if not found:
        raise FailedPreconditionError(
            f"every path of bank {spec.name} has a block of the swapped one; push to another bank",
            metadata={"bank": spec.name},
        )
    return tuple(found[:num_leaves])


def _start(
    stack: ExitStack,
    target: Callable[[SwapClientTask, Connection], None],
    task: SwapClientTask,
    count: int,
    name: str,
) -> list[Child]:
    children = []
    for number in range(count):
        child = Child(f"{name} {number}", target, replace(task, client=number))
        stack.callback(child.end, _GRACE_S)
        children.append(child)
    return children


def _calls(child: Child, silence_s: float) -> TimedCalls:
    message = child.receive(silence_s)
    assert isinstance(message, TimedCalls)
    return message


def _take_turns(run: SwapRun, swapper: Swapper, config: SwapLoadConfig, notice: Notice) -> None:
    time.sleep(min(_WARM_UP_S, config.phase_s))
    for pair in range(config.num_pairs):
        notice("phases without and with swaps", pair, config.num_pairs)
        begin = time.monotonic()
        _wait_until(begin + config.phase_s)
        middle = time.monotonic()
        run.quiet.append(Span(begin, middle))
        run.swaps += _swap_for(config, swapper, middle)
        run.swapping.append(Span(middle, time.monotonic()))


def _swap_for(config: SwapLoadConfig, swapper: Swapper, begin: float) -> list[Span]:
    """Swap every now and then for a phase; what a swap leaves behind belongs to the phase too."""
    swaps: list[Span] = []
    due = begin
    while due + config.every_s <= begin + config.phase_s * (1 + _ROUNDING):
        _wait_until(due)
        swaps.append(swapper.swap())
        # After a swap that took longer, the next one begins at once, and has its whole interval.
        due = max(due + config.every_s, time.monotonic())
    _wait_until(max(begin + config.phase_s, swaps[-1].begin + config.every_s))
    return swaps


_ROUNDING = 1e-6
"""Share of a phase by which the sum of its intervals may seem longer than it is."""


def _wait_until(moment: float) -> None:
    time.sleep(max(0.0, moment - time.monotonic()))


def _require(ok: bool, name: str, value: object, accepted: str) -> None:
    if not ok:
        raise InvalidArgumentError(
            f"{name} is {value!r}; accepted: {accepted}",
            reason=Reason.BAD_CONFIG,
            metadata={"field": name, "value": str(value)},
        )
