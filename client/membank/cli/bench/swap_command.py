"""`membank bench swap`: what replacing a path costs those who fetch it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated

import typer

from membank.cli.bench.display import Notice, shown_progress, swap_table
from membank.cli.bench.load_command import scratch_folder
from membank.cli.bench.load_options import CommandOptions
from membank.cli.bench.options import (
    BaselineOption,
    PlotOption,
    QuickOption,
    ResultOption,
    ScratchOption,
    SeedOption,
    StrictOption,
    TimeoutOption,
    ZipfOption,
)
from membank.cli.bench.presets import preset_spec
from membank.cli.bench.report import Outputs, publish
from membank.cli.bench.swap_load import SwapLoadConfig, SwapRun, run_swap_load
from membank.cli.bench.swap_results import SwapRow
from membank.cli.extras import needs_extra
from membank.cli.output import console
from membank.client import ClientConfig

_PRESET = "paper_160m"
_QUICK_PRESET = "100kb"
_QUICK = {"num_pairs": 2, "phase_s": 0.6, "every_s": 0.2}
_RESIDENT_BYTES = 2 << 30


@dataclass(frozen=True, kw_only=True)
class SwapOptions(CommandOptions):
    """What `swap` takes."""

    preset: Annotated[
        str | None,
        typer.Option(
            "--preset", metavar="NAME", help="The bank, as of fetch; default: paper_160m."
        ),
    ] = None
    clients: Annotated[
        int, typer.Option("--clients", min=1, max=64, help="Processes that fetch.")
    ] = 2
    pushers: Annotated[
        int, typer.Option("--pushers", min=0, max=64, help="Processes that push to other topics.")
    ] = 0
    leaves: Annotated[
        list[int] | None,
        typer.Option(
            "--leaves",
            min=1,
            help="Paths that are fetched, the swapped one the most; repeat; default: 1 and 8.",
        ),
    ] = None
    zipf: ZipfOption = 1.0
    pairs: Annotated[
        int | None, typer.Option("--pairs", min=1, help="Pairs of phases; default: 15.")
    ] = None
    phase: Annotated[
        float | None, typer.Option("--phase", min=0.1, help="Seconds of a phase; default: 4.")
    ] = None
    every: Annotated[
        float | None,
        typer.Option("--every", min=0.01, help="Seconds between two swaps; default: 1."),
    ] = None
    shards: Annotated[int, typer.Option("--shards", min=1, max=8, help="Shards.")] = 2
    same_host: Annotated[
        bool, typer.Option(help="Read through shared memory; --no-same-host: over the network.")
    ] = True
    seed: SeedOption = 0
    timeout: TimeoutOption = 30.0
    folder: ScratchOption = None
    json_file: ResultOption = None
    plot: PlotOption = None
    baseline: BaselineOption = None
    strict: StrictOption = False
    quick: QuickOption = False

    @property
    def preset_name(self) -> str:
        """The bank."""
        return self.preset or (_QUICK_PRESET if self.quick else _PRESET)

    def load_config(self, num_leaves: int) -> SwapLoadConfig:
        """Return how a run goes; errors as `SwapLoadConfig`."""
        given = {"num_pairs": self.pairs, "phase_s": self.phase, "every_s": self.every}
        chosen = {name: value for name, value in given.items() if value is not None}
        return SwapLoadConfig(
            **{**(_QUICK if self.quick else {}), **chosen},  # type: ignore[arg-type]  # by name
            num_readers=self.clients,
            num_pushers=self.pushers,
            num_leaves=num_leaves,
            zipf=self.zipf,
            seed=self.seed,
        )


def swap(options: SwapOptions) -> None:
    """Swap a path every second while clients fetch it: latencies without and with, failures, mixtures.

    A service of its own is started, with gateway and Ray. Phases without and with swaps take turns.
    Each fetch is looked at: it must be wholly from before or wholly from after a swap.

    Examples: ``membank bench swap --json swap.json --plot swap.png``,
    ``membank bench swap --pushers 1 --leaves 8 --no-same-host``.
    """
    outputs = Outputs(json_file=options.json_file, plot=options.plot, baseline=options.baseline)
    configs = [options.load_config(leaves) for leaves in options.leaves or (1, 8)]
    spec = preset_spec(options.preset_name)
    with scratch_folder(options.folder) as scratch:
        with shown_progress() as notice:
            rows = _measure(options, configs, scratch, notice)
        console.print(swap_table(rows))
        publish(
            "bench swap",
            [document for row in rows for document in row.to_json()],
            {
                **asdict(configs[0]),
                "num_leaves": [config.num_leaves for config in configs],
                "preset": options.preset_name,
                "dtype": spec.dtype,
                "shards": options.shards,
                "same_host": options.same_host,
                "quick": options.quick,
            },
            folder=scratch,
            outputs=outputs,
            quick=options.quick,
        )
    if any(row.errors or row.num_mixed for row in rows):
        raise typer.Exit(1)
    if options.strict and not all(row.passed for row in rows):
        raise typer.Exit(1)


def _measure(
    options: SwapOptions, configs: list[SwapLoadConfig], scratch: Path, notice: Notice
) -> list[SwapRow]:
    with needs_extra("service"):
        from membank.cli.bench.own_service import own_service
    spec = preset_spec(options.preset_name)
    client_config = ClientConfig(timeout_s=options.timeout)
    if not options.same_host:
        client_config = replace(client_config, same_host=None)
    notice("starting a service", 0, 1)
    rows = []
    with own_service(
        scratch, spec, num_shards=options.shards, resident_bytes=_RESIDENT_BYTES
    ) as service:
        for config in configs:
            run = run_swap_load(service.endpoint, client_config, config, notice)
            rows.append(_row(options, config, run))
    return rows


def _row(options: SwapOptions, config: SwapLoadConfig, run: SwapRun) -> SwapRow:
    spec = preset_spec(options.preset_name)
    sizes = [spec.weight_bytes(level) for level in range(1, spec.num_levels + 1)]
    way = "through shared memory" if options.same_host else "over the network"
    what = (
        f"fetches {way} of paths of {len(sizes)} blocks ({', '.join(map(str, sizes))} bytes as "
        f"{spec.dtype}) to {_counted(config.num_leaves, 'leaf', 'leaves')}, Zipf exponent "
        f"{config.zipf:g}, by {_counted(config.num_readers, 'process', 'processes')} from "
        f"{_counted(options.shards, 'shard', 'shards')}, while the first leaf's path is swapped "
        f"every {config.every_s:g} s / while it is not"
    )
    if config.num_pushers:
        pushers = _counted(config.num_pushers, "process pushes", "processes push")
        what += f"; {pushers} to other topics meanwhile"
    name = "-".join(
        (
            "swap",
            options.preset_name,
            _counted(config.num_readers, "client", "clients", by="-"),
            _counted(config.num_leaves, "leaf", "leaves", by="-"),
            *(["network"] if not options.same_host else []),
            *(["pushes"] if config.num_pushers else []),
        )
    )
    return SwapRow(name=name, what=what, run=run, path_bytes=sum(sizes))


def _counted(count: int, one: str, several: str, *, by: str = " ") -> str:
    return f"{count}{by}{one if count == 1 else several}"
