"""Options that several benchmarks take."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from membank.cli.bench.presets import BLOCK_PRESETS, PAPER_PRESETS
from membank.wire.codec import FETCH_CODECS

BenchBankOption = Annotated[
    str | None,
    typer.Option(
        "--bank",
        metavar="HOST:PORT",
        envvar="MEMBANK_BANK",
        help="Service to measure; without one, a bank is made and served for it.",
    ),
]
PresetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--preset",
        metavar="NAME",
        help="What the bank made for it is like; repeat for several. Blocks of "
        f"{', '.join(BLOCK_PRESETS)}, or a model of the paper: {', '.join(PAPER_PRESETS)}.",
    ),
]
CreateOption = Annotated[
    bool,
    typer.Option(
        "--create",
        help="Make the bank of --preset in the service at --bank, if it has none; it stays there.",
    ),
]
ClientsOption = Annotated[
    list[int] | None,
    typer.Option("--clients", min=1, max=256, help="Client processes; repeat to compare numbers."),
]
RequestsOption = Annotated[
    int | None,
    typer.Option(min=1, help="Calls of all clients together after which a run ends."),
]
DurationOption = Annotated[
    float | None,
    typer.Option(
        min=0.01, help="Seconds after which a run ends; default: 10, or no limit with --requests."
    ),
]
ZipfOption = Annotated[
    float,
    typer.Option(
        "--zipf", min=0, max=16, help="Exponent of the topics' popularity; 0 = all alike."
    ),
]
DtypeOption = Annotated[
    str | None,
    typer.Option(
        "--dtype",
        help=f"What travels: {', '.join(FETCH_CODECS)}; default: the bank's element type.",
    ),
]
TouchOption = Annotated[
    float | None,
    typer.Option(
        "--touch-mb",
        min=0.001,
        help="MB of blocks that a run touches at most (for pushes with optimizer state), one path "
        "always; default: 512.",
    ),
]
SeedOption = Annotated[int, typer.Option("--seed", min=0, help="Seed of topics and their order.")]
ShardsOption = Annotated[
    int, typer.Option("--shards", min=1, max=8, help="Shards of a bank made for it.")
]
TimeoutOption = Annotated[
    float,
    typer.Option("--timeout", min=0.1, help="Seconds that a call may take, retries included."),
]
ScratchOption = Annotated[
    Path | None,
    typer.Option("--dir", help="Directory for a bank made for it; without one, a temporary one."),
]
ResultOption = Annotated[
    Path | None, typer.Option("--json", metavar="FILE", help="Write the results here.")
]
PlotOption = Annotated[
    Path | None,
    typer.Option("--plot", metavar="FILE", help="Draw the latencies here (.png, .svg, .pdf)."),
]
BaselineOption = Annotated[
    Path | None,
    typer.Option(
        "--baseline", metavar="FILE", help="Results of an earlier run to compare with, row by row."
    ),
]
StrictOption = Annotated[
    bool,
    typer.Option(
        "--strict",
        help="Exit with 1 where a call failed, memory grew or a target is missed.",
    ),
]
QuickOption = Annotated[
    bool,
    typer.Option("--quick", help="Tiny sizes: shows that it works, claims nothing."),
]
ChangeOption = Annotated[
    bool,
    typer.Option(
        "--yes-change-this-bank",
        help="Push noise to the bank at --bank although it was not made to be measured.",
    ),
]
