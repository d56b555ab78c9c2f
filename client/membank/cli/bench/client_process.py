"""One client of a run: connects, waits for the others, calls until told enough, reports."""

from __future__ import annotations

import time
from array import array
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection

import numpy as np

from membank.cli.bench.workload import (
    Operation,
    Traffic,
    ZipfPaths,
    travelling_bytes,
    wire_codec,
)
from membank.client import BankClient, ClientConfig
from membank.wire.errors import MembankError
from membank.wire.spec import Array, BlockRef, Path

MAX_ERRORS_IN_A_ROW = 10
"""Failed calls, one after the other, after which a client gives up."""

_REPORT_EVERY_S = 0.2
_GRADIENT_STD = 1e-3


@dataclass(frozen=True, kw_only=True, slots=True)
class ClientTask:
    """What one client does."""

    endpoint: str
    """Address of a shard or the gateway."""
    config: ClientConfig
    """How to connect."""
    traffic: Traffic
    """What all clients do."""
    client: int
    """Number of this one, from 0."""
    num_clients: int
    """How many there are."""
    leaves: tuple[BlockRef, ...]
    """Leaves in the order of their popularity."""
    versions: Mapping[BlockRef, int]
    """Versions of the blocks above them, and theirs, that the first pushes are based on."""


@dataclass(kw_only=True, slots=True)
class Calls:
    """What became of one client's calls of one kind."""

    seconds: array[float] = field(default_factory=lambda: array("d"))
    """Time of each that succeeded, in their order."""
    num_bytes: int = 0
    """Payload bytes that those moved."""
    num_gradients: int = 0
    """Gradients that were pushed."""
    num_refused: int = 0
    """Gradients that were refused, as too old for instance."""


@dataclass(kw_only=True, slots=True)
class ClientReport:
    """What one client did."""

    calls: dict[Operation, Calls]
    """By kind."""
    errors: Counter[str] = field(default_factory=Counter)
    """Failed calls by reason."""
    last_error: str = ""
    """What the last one said."""
    gave_up: bool = False
    """Whether too many failed in a row."""
    begin: float = 0.0
    """Beginning, on the clock that all processes of a machine share."""
    end: float = 0.0
    """End, on the same clock."""


def run_client(task: ClientTask, pipe: Connection) -> None:
    """Do `task` in a process of its own.

    Sends "ready" and waits for a word; sends numbers of calls done, then a `ClientReport`; and
    stays until `pipe` is closed, so that its memory and CPU time can be read.
    """
    with BankClient.connect(task.endpoint, config=task.config) as bank:
        caller = Caller(bank, task)
        pipe.send("ready")
        pipe.recv()
        pipe.send(caller.run(pipe.send))
        pipe.recv()


class Caller:
    """Makes the calls of one client.

    Parameters
    ----------
    bank
        A connected client.
    task
        What to do.
    """

    def __init__(self, bank: BankClient, task: ClientTask) -> None:
        self._bank = bank
        self._traffic = task.traffic
        self._num_requests = task.traffic.requests_of(task.client, task.num_clients)
        seed = task.traffic.seed
        self._paths = iter(
            ZipfPaths(bank.spec, task.leaves, task.traffic.zipf, (seed, task.client))
        )
        self._rng = np.random.Generator(np.random.PCG64([seed, task.client, 1]))
        self._versions = dict(task.versions)
        self._fetched: Path | None = None
        self._gradients: dict[int, Array] = {}
        self._num_bytes = travelling_bytes(bank.spec, task.traffic)
        codec = wire_codec(bank.spec, task.traffic)
        # What travels as an element type is made of it; an encoding is part of the call.
        self._wire = None if codec.name == codec.dtype.name else codec.name
        if Operation.PUSH in task.traffic.operations:
            for level in range(1, bank.spec.num_levels + 1):
                values = self._rng.standard_normal(bank.spec.block_shape(level), np.float32)
                values *= _GRADIENT_STD
                self._gradients[level] = values.astype(codec.dtype, copy=False)
        self.report = ClientReport(calls={kind: Calls() for kind in task.traffic.operations})
        """What was done so far."""

    def run(self, tell: Callable[[int], object]) -> ClientReport:
        """Make all calls, telling now and then how many are done."""
        report = self.report
        report.begin = told = time.monotonic()
        until = report.begin + self._traffic.duration_s
        num_done = errors_in_a_row = 0
        while self._num_requests is None or num_done < self._num_requests:
            now = time.monotonic()
            if now >= until:
                break
            if now - told >= _REPORT_EVERY_S:
                tell(num_done)
                told = now
            errors_in_a_row = 0 if self._call() else errors_in_a_row + 1
            num_done += 1
            if errors_in_a_row == MAX_ERRORS_IN_A_ROW:
                report.gave_up = True
                break
        report.end = time.monotonic()
        return report

    def _call(self) -> bool:
        """Make one call; return whether it succeeded."""
        pushes = bool(self._rng.random() < self._traffic.push_share)
        kind = Operation.PUSH if pushes else Operation.FETCH
        path = self._next_path(kind)
        calls = self.report.calls[kind]
        begin = time.perf_counter()
        try:
            num_bytes = self._push(path, calls) if pushes else self._fetch(path)
        except MembankError as err:
            self.report.errors[err.reason.value] += 1
            self.report.last_error = str(err)
            return False
        calls.seconds.append(time.perf_counter() - begin)
        calls.num_bytes += num_bytes
        return True

    def _next_path(self, kind: Operation) -> Path:
        # As a trainer does: what is pushed was fetched before. Without fetches, any path will do.
        if kind is Operation.PUSH and self._fetched is not None:
            return self._fetched
        return next(self._paths)

    def _fetch(self, path: Sequence[BlockRef]) -> int:
        memory = self._bank.fetch(path, dtype=self._traffic.dtype)
        self._versions.update(memory.versions)
        self._fetched = tuple(memory)
        return sum(self._num_bytes[ref.level] for ref in memory.weights)

    def _push(self, path: Sequence[BlockRef], calls: Calls) -> int:
        gradients = {ref: self._gradients[ref.level] for ref in path}
        base = {ref: self._versions[ref] for ref in path}
        answer = self._bank.push(gradients, base=base, wire=self._wire)
        self._versions.update(answer.versions)
        calls.num_gradients += len(gradients)
        calls.num_refused += len(answer.refused)
        return sum(self._num_bytes[ref.level] for ref in path)
