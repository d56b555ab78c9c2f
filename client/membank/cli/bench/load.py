"""Runs clients against a service, each in a process of its own, and gathers what they saw."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from multiprocessing.connection import wait

import numpy as np

from membank.cli.bench.child_process import Child
from membank.cli.bench.client_process import ClientReport, ClientTask, run_client
from membank.cli.bench.process_watch import ProcessFigures, ProcessWatch
from membank.cli.bench.results import Latencies, LoadRow
from membank.cli.bench.workload import (
    Operation,
    Traffic,
    choose_leaves,
    in_batches,
    touched_blocks,
    travelling_bytes,
    wire_codec,
)
from membank.client import BankClient, ClientConfig
from membank.wire.spec import BankSpec, BlockRef

Notice = Callable[[str, float, float], None]
"""Takes what is being done, how much of it is done, and all of it, in any unit."""

_WARM_UP_BYTES = 64 << 20
# Content that was never written is computed at the first fetch, at tens of MB a second.
_WARM_UP_TIMEOUT_S = 600.0
_MIN_CALLS_FOR_GROWTH = 1000
_START_TIMEOUT_S = 120.0
# Between two signs of life of a client lies at most one call, which has a deadline.
_GRACE_S = 60.0
_SAMPLE_EVERY_S = 0.1


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """A service, and what of its bank is touched."""

    name: str
    """What it is called in the names of rows."""
    endpoint: str
    """Address of a shard or the gateway."""
    config: ClientConfig
    """How to connect."""
    server_pids: tuple[int, ...]
    """Processes of its shards, where they are on this machine; else empty."""
    spec: BankSpec
    """Its bank."""
    leaves: tuple[BlockRef, ...]
    """Leaves that are asked for, in the order of their popularity."""
    versions: Mapping[BlockRef, int]
    """Versions of all blocks on their paths, at the end of the warm-up."""
    warm_up_s: float
    """Seconds that the warm-up took."""


def prepare(
    name: str,
    endpoint: str,
    config: ClientConfig,
    traffic: Traffic,
    *,
    touch_bytes: int,
    server_pids: Sequence[int] = (),
    notice: Notice,
) -> Target:
    """Choose what is touched, and touch all of it once: the run finds it in the shards' memory.

    Where pushes will be made, each block is pushed a gradient of zeros too, so that its optimizer
    state exists.

    Parameters
    ----------
    name
        What the service is called in the names of rows.
    endpoint, config
        Where it is, and how to connect.
    traffic
        What will be done.
    touch_bytes
        Bytes of the blocks, and for pushes of their optimizer state, that are touched at most.
    server_pids
        Processes of its shards on this machine.
    notice
        Told of the warm-up.
    """
    with BankClient.connect(endpoint, config=_for_warm_up(config)) as bank:
        spec = bank.spec
        leaves = choose_leaves(
            spec,
            max_bytes=touch_bytes,
            with_optimizer=Operation.PUSH in traffic.operations,
            seed=traffic.seed,
        )
        refs = touched_blocks(spec, leaves)
        versions: dict[BlockRef, int] = {}
        begin = time.monotonic()
        for batch in in_batches(spec, refs, _WARM_UP_BYTES):
            notice("warm-up", len(versions), len(refs))
            versions.update(_touch(bank, batch, traffic))
        seconds = time.monotonic() - begin
    return Target(
        name=name,
        endpoint=endpoint,
        config=config,
        server_pids=tuple(server_pids),
        spec=spec,
        leaves=leaves,
        versions=versions,
        warm_up_s=seconds,
    )


def run_load(target: Target, traffic: Traffic, num_clients: int, notice: Notice) -> list[LoadRow]:
    """Let `num_clients` processes do `traffic` together.

    Parameters
    ----------
    target
        What to do it to.
    traffic
        What to do.
    num_clients
        Processes, at least 1.
    notice
        Told how far the run is.

    Returns
    -------
    list of LoadRow
        One for each kind of call.

    Raises
    ------
    MembankError
        What kept a client from connecting.
    InternalError
        If a client died.
    """
    with ExitStack() as stack:
        clients = [
            _start_client(stack, target, traffic, number, num_clients)
            for number in range(num_clients)
        ]
        for client in clients:
            client.receive(_START_TIMEOUT_S)
        watches = (
            ProcessWatch([client.pid for client in clients]),
            ProcessWatch(target.server_pids),
        )
        for client in clients:
            client.send("go")
        reports = _gather(clients, watches, traffic, target.config.timeout_s + _GRACE_S, notice)
        figures = [watch.figures() for watch in watches]
    if sum(map(_num_calls, reports)) < _MIN_CALLS_FOR_GROWTH:
        # Caches and pools still fill; to call that a leak would be wrong.
        figures = [group and replace(group, rss_growth_bytes=None) for group in figures]
    return [
        _row(target, traffic, operation, reports, client=figures[0], server=figures[1])
        for operation in traffic.operations
    ]


def _for_warm_up(config: ClientConfig) -> ClientConfig:
    """Return `config` with no more retries than a call of the run has time for.

    A call of the warm-up may take minutes, as it has much to compute. A shard that is not there is to
    be said as soon as in the run, and not be looked for in all of these minutes.
    """
    attempts, waited_s, bound_s = 1, 0.0, config.retry.initial_backoff_s
    while waited_s < config.timeout_s and attempts < config.retry.max_attempts:
        attempts, waited_s = attempts + 1, waited_s + bound_s
        bound_s = min(2 * bound_s, config.retry.max_backoff_s)
    return replace(config, retry=replace(config.retry, max_attempts=attempts))


def _touch(bank: BankClient, refs: Sequence[BlockRef], traffic: Traffic) -> Mapping[BlockRef, int]:
    """Bring blocks into the memory of their shards and return their versions."""
    fetched = bank.fetch_blocks(refs, dtype=traffic.dtype, timeout_s=_WARM_UP_TIMEOUT_S)
    if Operation.PUSH not in traffic.operations:
        return fetched.versions
    gradients = {ref: np.zeros_like(weight) for ref, weight in fetched.weights.items()}
    pushed = bank.push(gradients, base=fetched.versions, timeout_s=_WARM_UP_TIMEOUT_S)
    return {**fetched.versions, **pushed.versions}


def _start_client(
    stack: ExitStack, target: Target, traffic: Traffic, number: int, num_clients: int
) -> Child:
    task = ClientTask(
        endpoint=target.endpoint,
        config=target.config,
        traffic=traffic,
        client=number,
        num_clients=num_clients,
        leaves=target.leaves,
        versions=target.versions,
    )
    client = Child(f"client {number}", run_client, task)
    stack.callback(client.end, _GRACE_S)
    return client


def _num_calls(report: ClientReport) -> int:
    return sum(len(calls.seconds) for calls in report.calls.values())


def _row(
    target: Target,
    traffic: Traffic,
    operation: Operation,
    reports: Sequence[ClientReport],
    *,
    client: ProcessFigures | None,
    server: ProcessFigures | None,
) -> LoadRow:
    """Add up what the clients report of one kind of call."""
    calls = [report.calls[operation] for report in reports]
    num_clients = len(reports)
    return LoadRow(
        name=_row_name(target.name, traffic, operation, num_clients),
        what=_describe(target, traffic, operation, num_clients),
        operation=operation,
        seconds=max(report.end for report in reports) - min(report.begin for report in reports),
        latencies=Latencies(seconds=np.concatenate([np.array(c.seconds) for c in calls])),
        num_bytes=sum(c.num_bytes for c in calls),
        num_gradients=sum(c.num_gradients for c in calls),
        num_refused=sum(c.num_refused for c in calls),
        run_bytes=sum(c.num_bytes for report in reports for c in report.calls.values()),
        errors=sum((report.errors for report in reports), Counter()),
        last_error=next((report.last_error for report in reports if report.last_error), ""),
        gave_up=any(report.gave_up for report in reports),
        client=client,
        server=server,
        warm_up_s=target.warm_up_s,
    )


def _gather(
    clients: Sequence[Child],
    watches: Sequence[ProcessWatch],
    traffic: Traffic,
    silence_s: float,
    notice: Notice,
) -> list[ClientReport]:
    """Wait for the reports of all clients, looking at the processes meanwhile."""
    by_pipe = {client.pipe: client for client in clients}
    heard = dict.fromkeys(clients, time.monotonic())
    done = dict.fromkeys(clients, 0)
    reports: dict[Child, ClientReport] = {}
    begin = time.monotonic()
    while len(reports) < len(clients):
        missing = [client for client in clients if client not in reports]
        for pipe in wait([client.pipe for client in missing], _SAMPLE_EVERY_S):
            client = by_pipe[pipe]  # type: ignore[index]  # wait returns what it was given
            message = client.receive(silence_s)
            heard[client] = time.monotonic()
            if isinstance(message, ClientReport):
                reports[client] = message
            elif isinstance(message, int):
                done[client] = message
        for watch in watches:
            watch.sample()
        for client in missing:
            if client not in reports and time.monotonic() - heard[client] > silence_s:
                client.receive(0.0)  # raises: it has been silent for too long
        if traffic.num_requests is not None:
            notice("", sum(done.values()), traffic.num_requests)
        else:
            notice("", min(time.monotonic() - begin, traffic.duration_s), traffic.duration_s)
    return [reports[client] for client in clients]


def _row_name(target: str, traffic: Traffic, operation: Operation, num_clients: int) -> str:
    clients = f"{num_clients}-client{'s' if num_clients > 1 else ''}"
    if len(traffic.operations) > 1:
        return f"mixed-{target}-{clients}-{operation.value}"
    return f"{operation.value}-{target}-{clients}"


def _describe(target: Target, traffic: Traffic, operation: Operation, num_clients: int) -> str:
    spec = target.spec
    path = spec.path_to(target.leaves[0])
    num_bytes = travelling_bytes(spec, traffic)
    sizes = [num_bytes[ref.level] for ref in path]
    verb = "fetches of" if operation is Operation.FETCH else "pushes of gradients for"
    among = f", {100 * traffic.push_share:g} % of calls are pushes" * (len(traffic.operations) > 1)
    return (
        f"{verb} one path of {len(path)} blocks ({', '.join(map(str, sizes))} bytes as {wire_codec(spec, traffic).name})"
        f" by {num_clients} processes; {len(target.leaves)} of "
        f"{spec.num_clusters(spec.num_levels)} leaves, Zipf exponent {traffic.zipf:g}, each "
        f"touched once before{among}"
    )
