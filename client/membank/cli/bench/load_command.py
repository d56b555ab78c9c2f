"""`membank bench fetch`, `push` and `mixed`: load on a service, and what it costs."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated

import typer

from membank.cli.bench.display import (
    Notice,
    load_table,
    pairs_table,
    print_load_remarks,
    shown_progress,
)
from membank.cli.bench.load import Target, run_load
from membank.cli.bench.options import (
    BaselineOption,
    BenchBankOption,
    ChangeOption,
    ClientsOption,
    CreateOption,
    DtypeOption,
    DurationOption,
    PlotOption,
    PresetOption,
    QuickOption,
    RequestsOption,
    ResultOption,
    ScratchOption,
    SeedOption,
    ShardsOption,
    StrictOption,
    TimeoutOption,
    TouchOption,
    ZipfOption,
)
from membank.cli.bench.presets import preset_spec
from membank.cli.bench.report import Outputs, publish
from membank.cli.bench.results import LoadRow
from membank.cli.bench.targets import embedded_target, served_target
from membank.cli.bench.workload import Traffic
from membank.cli.connection import CaOption, TokenOption, client_config
from membank.cli.extras import needs_extra
from membank.cli.output import console
from membank.wire.errors import InvalidArgumentError, MembankError, Reason

_DURATION_S = 10.0
_QUICK_REQUESTS = 200
_TOUCH_MB = 512.0
_QUICK_TOUCH_MB = 8.0
_PRESETS = ("4mb",)
_QUICK_PRESETS = ("100kb",)


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadOptions:
    """What the commands have in common; fields are named as the options are."""

    bank: str | None
    presets: list[str] | None
    create: bool
    clients: list[int] | None
    requests: int | None
    duration: float | None
    zipf: float
    dtype: str | None
    touch_mb: float | None
    seed: int
    shards: int
    timeout: float
    folder: Path | None
    strict: bool
    quick: bool
    token_file: Path | None
    ca_file: Path | None
    may_change: bool = False

    def traffic(self, push_share: float) -> Traffic:
        """Return what the clients do.

        Raises
        ------
        InvalidArgumentError
            If an option is out of range.
        """
        requests, duration = self.requests, self.duration
        if requests is None and duration is None:
            requests, duration = (_QUICK_REQUESTS, None) if self.quick else (None, _DURATION_S)
        return Traffic(
            push_share=push_share,
            num_requests=requests,
            duration_s=math.inf if duration is None else duration,
            zipf=self.zipf,
            dtype=self.dtype,
            seed=self.seed,
        )

    @property
    def touch_bytes(self) -> int:
        """Bytes that a run touches at most."""
        default = _QUICK_TOUCH_MB if self.quick else _TOUCH_MB
        return int(1e6 * (default if self.touch_mb is None else self.touch_mb))

    @property
    def preset_names(self) -> tuple[str, ...]:
        """Presets to run, in their order."""
        return tuple(self.presets or (_QUICK_PRESETS if self.quick else _PRESETS))

    def check(self) -> None:
        """Raise `InvalidArgumentError` where options do not go together."""
        for name in self.preset_names:
            preset_spec(name)
        if self.bank is None and (self.create or self.may_change):
            raise InvalidArgumentError(
                "--create and --yes-change-this-bank are about the service at --bank; name one",
                reason=Reason.BAD_CONFIG,
            )
        if self.bank is not None and self.presets and not self.create:
            raise InvalidArgumentError(
                "--preset is for a bank made to be measured; leave it or --bank out, or say --create",
                reason=Reason.BAD_CONFIG,
            )
        if self.bank is not None and len(self.preset_names) > 1:
            raise InvalidArgumentError(
                "a service has one bank; give one --preset with --create", reason=Reason.BAD_CONFIG
            )


def fetch(
    preset: PresetOption = None,
    bank: BenchBankOption = None,
    clients: ClientsOption = None,
    requests: RequestsOption = None,
    duration: DurationOption = None,
    zipf: ZipfOption = 1.0,
    dtype: DtypeOption = None,
    touch_mb: TouchOption = None,
    shards: ShardsOption = 1,
    scale: Annotated[
        bool,
        typer.Option(
            "--scale",
            help="Instead: fetch paths of a bank of 65,536 leaves beside one of 256, in turn.",
        ),
    ] = False,
    create: CreateOption = False,
    timeout: TimeoutOption = 30.0,
    seed: SeedOption = 0,
    folder: ScratchOption = None,
    json_file: ResultOption = None,
    plot: PlotOption = None,
    baseline: BaselineOption = None,
    strict: StrictOption = False,
    quick: QuickOption = False,
    token_file: TokenOption = None,
    ca_file: CaOption = None,
) -> None:
    """Fetch paths: latency, bytes per second, CPU and memory of clients and shards.

    Examples: ``membank bench fetch --preset 1mb --preset 40mb --clients 1 --clients 4``,
    ``membank bench fetch --bank localhost:7600 --duration 60 --json now.json --baseline then.json``,
    ``membank bench fetch --quick --requests 10000 --strict`` (does memory stay flat?).
    """
    options = LoadOptions(
        bank=bank, presets=preset, create=create, clients=clients, requests=requests,
        duration=duration, zipf=zipf, dtype=dtype, touch_mb=touch_mb, seed=seed, shards=shards,
        timeout=timeout, folder=folder, strict=strict, quick=quick, token_file=token_file,
        ca_file=ca_file,
    )  # fmt: skip
    outputs = Outputs(json_file=json_file, plot=plot, baseline=baseline)
    if scale:
        _compare_scales(options, outputs)
    else:
        _run("bench fetch", options, 0.0, outputs)


def push(
    preset: PresetOption = None,
    bank: BenchBankOption = None,
    yes: ChangeOption = False,
    clients: ClientsOption = None,
    requests: RequestsOption = None,
    duration: DurationOption = None,
    zipf: ZipfOption = 1.0,
    dtype: DtypeOption = None,
    touch_mb: TouchOption = None,
    shards: ShardsOption = 1,
    create: CreateOption = False,
    timeout: TimeoutOption = 30.0,
    seed: SeedOption = 0,
    folder: ScratchOption = None,
    json_file: ResultOption = None,
    plot: PlotOption = None,
    baseline: BaselineOption = None,
    strict: StrictOption = False,
    quick: QuickOption = False,
    token_file: TokenOption = None,
    ca_file: CaOption = None,
) -> None:
    """Push gradients of paths: the shards run the optimizer and journal before they answer.

    A bank that was not made to be measured is left alone: its blocks would be trained on noise.

    Examples: ``membank bench push --preset paper_410m``,
    ``membank bench push --bank localhost:7600 --create`` (a service without a bank).
    """
    options = LoadOptions(
        bank=bank, presets=preset, create=create, clients=clients, requests=requests,
        duration=duration, zipf=zipf, dtype=dtype, touch_mb=touch_mb, seed=seed, shards=shards,
        timeout=timeout, folder=folder, strict=strict, quick=quick, token_file=token_file,
        ca_file=ca_file, may_change=yes,
    )  # fmt: skip
    outputs = Outputs(json_file=json_file, plot=plot, baseline=baseline)
    _run("bench push", options, 1.0, outputs)


def mixed(
    preset: PresetOption = None,
    bank: BenchBankOption = None,
    yes: ChangeOption = False,
    push_share: Annotated[
        float, typer.Option(min=0.001, max=0.999, help="Share of the calls that are pushes.")
    ] = 0.5,
    clients: ClientsOption = None,
    requests: RequestsOption = None,
    duration: DurationOption = None,
    zipf: ZipfOption = 1.0,
    dtype: DtypeOption = None,
    touch_mb: TouchOption = None,
    shards: ShardsOption = 1,
    create: CreateOption = False,
    timeout: TimeoutOption = 30.0,
    seed: SeedOption = 0,
    folder: ScratchOption = None,
    json_file: ResultOption = None,
    plot: PlotOption = None,
    baseline: BaselineOption = None,
    strict: StrictOption = False,
    quick: QuickOption = False,
    token_file: TokenOption = None,
    ca_file: CaOption = None,
) -> None:
    """Fetch and push at random, each push to the path fetched last, as a trainer does.

    Examples: ``membank bench mixed --push-share 0.1 --clients 4``,
    ``membank bench mixed --preset paper_160m --duration 60 --plot mixed.png``.
    """
    options = LoadOptions(
        bank=bank, presets=preset, create=create, clients=clients, requests=requests,
        duration=duration, zipf=zipf, dtype=dtype, touch_mb=touch_mb, seed=seed, shards=shards,
        timeout=timeout, folder=folder, strict=strict, quick=quick, token_file=token_file,
        ca_file=ca_file, may_change=yes,
    )  # fmt: skip
    outputs = Outputs(json_file=json_file, plot=plot, baseline=baseline)
    _run("bench mixed", options, push_share, outputs)


def _run(command: str, options: LoadOptions, push_share: float, outputs: Outputs) -> None:
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
            command,
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
