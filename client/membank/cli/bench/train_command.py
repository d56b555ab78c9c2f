"""`membank bench train`: what the service costs a training step."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from membank.cli.bench.display import pairs_table, shown_progress
from membank.cli.bench.load_command import scratch_folder
from membank.cli.bench.options import (
    BaselineOption,
    QuickOption,
    ResultOption,
    ScratchOption,
    SeedOption,
)
from membank.cli.bench.report import Outputs, publish
from membank.cli.extras import needs_extra
from membank.cli.output import console
from membank.wire.errors import InvalidArgumentError, Reason


def train(
    model: Annotated[
        list[str] | None,
        typer.Option(
            "--model",
            help="demo or demo-10x, which is about ten times as large; repeat; default: both.",
        ),
    ] = None,
    shards: Annotated[
        list[int] | None,
        typer.Option("--shards", min=1, max=4, help="Shards; repeat; default: 1 and 2."),
    ] = None,
    prefetch: Annotated[
        bool, typer.Option(help="Fetch the next batches' blocks while one is computed.")
    ] = True,
    seed: SeedOption = 0,
    folder: ScratchOption = None,
    json_file: ResultOption = None,
    baseline: BaselineOption = None,
    quick: QuickOption = False,
) -> None:
    """Train through a service and with all memory in one process, in turn: tokens per second.

    Examples: ``membank bench train --json train.json``,
    ``membank bench train --model demo --shards 2 --no-prefetch``.
    """
    with needs_extra("service"):
        from membank.cli.bench.embedded import EmbeddedService as EmbeddedService
    with needs_extra("trainer"):
        from membank.cli.bench.training import FULL, QUICK, measure_training, train_models
    known = tuple(train_models())
    for name in model or ():
        if name not in known:
            raise InvalidArgumentError(
                f"there is no model {name!r}; accepted: {', '.join(known)}",
                reason=Reason.BAD_CONFIG,
            )
    outputs = Outputs(json_file=json_file, baseline=baseline)
    scale = QUICK if quick else FULL
    names, counts = model or known, shards or (1, 2)
    with scratch_folder(folder) as scratch:
        with shown_progress() as notice:
            rows = [
                measure_training(
                    name, count, scale,
                    folder=scratch / f"{name}-{count}", prefetch=prefetch, seed=seed, notice=notice,
                )
                for name in names
                for count in counts
            ]  # fmt: skip
        console.print(pairs_table(rows))
        publish(
            "bench train",
            [row.to_json() for row in rows],
            {**asdict(scale), "prefetch": prefetch, "seed": seed, "quick": quick},
            folder=scratch,
            outputs=outputs,
            quick=quick,
        )
