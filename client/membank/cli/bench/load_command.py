"""`membank bench fetch`, `push` and `mixed`: load on a service, and what it costs."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import typer

from membank.cli.bench.display import (
    Notice,
    load_table,
    pairs_table,
    print_load_remarks,
    shown_progress,
)
from membank.cli.bench.load import Target, run_load
from membank.cli.bench.load_options import (
    FetchOptions,
    LoadOptions,
    MixedOptions,
    PushOptions,
    command,
)
from membank.cli.bench.report import Outputs, publish
from membank.cli.bench.results import LoadRow
from membank.cli.bench.targets import embedded_target, served_target
from membank.cli.bench.workload import Traffic
from membank.cli.connection import client_config
from membank.cli.extras import needs_extra
from membank.cli.output import console
from membank.wire.errors import InvalidArgumentError, MembankError, Reason


def register(group: typer.Typer) -> None:
    """Add this module's commands to the group `membank bench`."""
    group.command("fetch")(command(FetchOptions, _fetch))
    group.command("push")(command(PushOptions, _push))
    group.command("mixed")(command(MixedOptions, _mixed))


def _fetch(options: FetchOptions) -> None:
    """Fetch paths: latency, bytes per second, CPU and memory of clients and shards.

    Examples: ``membank bench fetch --preset 1mb --preset 40mb --clients 1 --clients 4``,
    ``membank bench fetch --bank localhost:7600 --duration 60 --json now.json --baseline then.json``,
    ``membank bench fetch --quick --requests 10000 --strict`` (does memory stay flat?).
    """
    if options.scale:
        _compare_scales(options, options.outputs())
    else:
        _run("bench fetch", options, 0.0, options.outputs())


def _push(options: PushOptions) -> None:
    """Push gradients of paths: the shards run the optimizer and journal before they answer.

    A bank that was not made to be measured is left alone: its blocks would be trained on noise.

    Examples: ``membank bench push --preset paper_410m``,
    ``membank bench push --bank localhost:7600 --create`` (a service without a bank).
    """
    _run("bench push", options, 1.0, options.outputs())


def _mixed(options: MixedOptions) -> None:
    """Fetch and push at random, each push to the path fetched last, as a trainer does.

    Examples: ``membank bench mixed --push-share 0.1 --clients 4``,
    ``membank bench mixed --preset paper_160m --duration 60 --plot mixed.png``.
    """
    _run("bench mixed", options, options.push_share, options.outputs())


def _run(name: str, options: LoadOptions, push_share: float, outputs: Outputs) -> None:
    options.check()
    traffic = options.traffic(push_share)
    rows: list[LoadRow] = []
    failure: MembankError | None = None
    with scratch_folder(options.folder) as scratch:
        try:
            with shown_progress() as notice:
                for preset in options.preset_names:
                    with _target(options, preset, traffic, scratch, notice) as target:
                        for num_clients in options.clients or [1]:
                            rows += _run_once(target, traffic, num_clients, notice)
        except MembankError as err:
            if not rows:
                raise
            # What was measured before is not lost with what could not be.
            failure = err
        console.print(load_table(rows))
        print_load_remarks(rows)
        config = {"touch_bytes": options.touch_bytes, "shards": options.shards, **asdict(traffic)}
        publish(
            name,
            [row.to_json() for row in rows],
            {**config, "bank": options.bank, "timeout_s": options.timeout, "quick": options.quick},
            folder=scratch,
            outputs=outputs,
            quick=options.quick,
        )
    if failure is not None:
        raise failure
    if any(row.gave_up for row in rows) or (options.strict and not all(r.is_good for r in rows)):
        raise typer.Exit(1)


@contextmanager
def _target(
    options: LoadOptions, preset: str, traffic: Traffic, scratch: Path, notice: Notice
) -> Iterator[Target]:
    config = client_config(options.token_file, options.ca_file)
    config = replace(config, timeout_s=options.timeout)
    if options.bank is not None:
        yield served_target(
            options.bank,
            traffic,
            config,
            may_change=options.may_change,
            scratch_preset=preset if options.create else None,
            touch_bytes=options.touch_bytes,
            notice=notice,
        )
        return
    with embedded_target(
        preset,
        traffic,
        config,
        folder=scratch / preset,
        num_shards=options.shards,
        touch_bytes=options.touch_bytes,
        notice=notice,
    ) as target:
        yield target


def _run_once(target: Target, traffic: Traffic, num_clients: int, notice: Notice) -> list[LoadRow]:
    plural = "s" if num_clients > 1 else ""
    label = f"{target.name}, {num_clients} client{plural}"
    return run_load(target, traffic, num_clients, lambda _, done, total: notice(label, done, total))


def _compare_scales(options: LoadOptions, outputs: Outputs) -> None:
    if options.bank is not None:
        raise InvalidArgumentError(
            "--scale makes its own banks; leave --bank out", reason=Reason.BAD_CONFIG
        )
    with needs_extra("service"):
        from membank.cli.bench.scales import compare_scales
    with scratch_folder(options.folder) as scratch:
        with shown_progress() as notice:
            row = compare_scales(scratch, seed=options.seed, quick=options.quick, notice=notice)
        console.print(pairs_table([row]))
        config = {"seed": options.seed, "quick": options.quick}
        publish(
            "bench fetch --scale", [row.to_json()], config,
            folder=scratch, outputs=outputs, quick=options.quick,
        )  # fmt: skip
    if options.strict and row.passed is False:
        raise typer.Exit(1)


@contextmanager
def scratch_folder(folder: Path | None) -> Iterator[Path]:
    """Make a folder of one's own in `folder`, or among the temporary files, and remove it after."""
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="membank-bench-", dir=folder) as scratch:
        yield Path(scratch)
