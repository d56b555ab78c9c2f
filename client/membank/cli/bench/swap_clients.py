"""The processes beside swaps: readers that time and check every fetch, and pushers."""

from __future__ import annotations

import time
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection

import numpy as np

from membank.cli.bench.client_process import MAX_ERRORS_IN_A_ROW
from membank.cli.bench.swap_marks import MixtureDetector, Sightings
from membank.cli.bench.workload import ZipfPaths
from membank.client import BankClient, ClientConfig
from membank.wire.errors import FailedPreconditionError, MembankError
from membank.wire.spec import BankSpec, BlockRef, Path

_GRADIENT_STD = 1e-3


@dataclass(frozen=True, kw_only=True, slots=True)
class SwapClientTask:
    """What one process does until it is told to stop."""

    endpoint: str
    """Address of a shard or the gateway."""
    config: ClientConfig
    """How to connect."""
    client: int
    """Number of this one among its like, from 0."""
    leaves: tuple[BlockRef, ...]
    """Leaves whose paths are asked for, in the order of their popularity."""
    zipf: float
    """Exponent of that popularity."""
    seed: int
    """Seed of the order."""
    versions: Mapping[BlockRef, int]
    """Version that each swapped block has with mark 1."""


@dataclass(kw_only=True, slots=True)
class TimedCalls:
    """One process's calls of one kind."""

    begins: array[float] = field(default_factory=lambda: array("d"))
    """Beginning of each call that succeeded, on the clock that all processes share, in seconds."""
    seconds: array[float] = field(default_factory=lambda: array("d"))
    """Time that it took."""
    errors: Counter[str] = field(default_factory=Counter)
    """Failed calls, and gradients that were refused, by reason."""
    last_error: str = ""
    """What the last of them said."""
    gave_up: bool = False
    """Whether too many failed in a row."""
    seen: Sightings = field(default_factory=Sightings)
    """What a reader saw of swaps."""


def run_reader(task: SwapClientTask, pipe: Connection) -> None:
    """Fetch paths, one after the other, and look whether each is wholly of one swap.

    Sends "ready", begins at a word, ends at the next one, and sends its `TimedCalls`.
    """
    with BankClient.connect(task.endpoint, config=task.config) as bank:
        paths = _paths(bank.spec, task)
        detector = MixtureDetector(task.versions)

        def fetch() -> float:
            path = next(paths)
            begin = time.monotonic()
            memory = bank.fetch(path)
            seconds = time.monotonic() - begin
            detector.check(memory.weights, memory.versions)
            return seconds

        calls = _call_until_told(fetch, pipe)
        calls.seen = detector.seen
        pipe.send(calls)
        pipe.recv()


def run_pusher(task: SwapClientTask, pipe: Connection) -> None:
    """Push gradients to paths, one after the other; speaks as `run_reader` does."""
    with BankClient.connect(task.endpoint, config=task.config) as bank:
        spec = bank.spec
        paths = _paths(spec, task)
        rng = np.random.Generator(np.random.PCG64([task.seed, task.client, 2]))
        gradients = {
            level: (
                rng.standard_normal(spec.block_shape(level), np.float32) * _GRADIENT_STD
            ).astype(spec.numpy_dtype)
            for level in range(1, spec.num_levels + 1)
        }
        versions = {
            ref: version
            for leaf in task.leaves
            for ref, version in bank.fetch(spec.path_to(leaf)).versions.items()
        }

        def push() -> float:
            path = next(paths)
            base = {ref: versions[ref] for ref in path}
            begin = time.monotonic()
            answer = bank.push({ref: gradients[ref.level] for ref in path}, base=base)
            seconds = time.monotonic() - begin
            versions.update(answer.versions)
            if answer.refused:
                raise FailedPreconditionError(f"{len(answer.refused)} gradients were refused")
            return seconds

        pipe.send(_call_until_told(push, pipe))
        pipe.recv()


def _paths(spec: BankSpec, task: SwapClientTask) -> Iterator[Path]:
    return iter(ZipfPaths(spec, task.leaves, task.zipf, (task.seed, task.client)))


def _call_until_told(call: Callable[[], float], pipe: Connection) -> TimedCalls:
    """Make calls between two words in `pipe`; each returns its seconds."""
    calls = TimedCalls()
    pipe.send("ready")
    pipe.recv()
    errors_in_a_row = 0
    while not pipe.poll():
        begin = time.monotonic()
        try:
            seconds = call()
        except MembankError as err:
            calls.errors[err.reason.value] += 1
            calls.last_error = str(err)
            errors_in_a_row += 1
            if errors_in_a_row == MAX_ERRORS_IN_A_ROW:
                calls.gave_up = True
                break
            continue
        errors_in_a_row = 0
        calls.begins.append(begin)
        calls.seconds.append(seconds)
    pipe.recv()
    return calls
