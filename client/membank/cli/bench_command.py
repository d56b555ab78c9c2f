"""Commands that measure."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from membank.cli.bench import load_command
from membank.cli.bench.display import pairs_table, print_machine, shown_progress
from membank.cli.bench.load_command import scratch_folder
from membank.cli.bench.load_options import command
from membank.cli.bench.swap_command import SwapOptions, swap
from membank.cli.bench.train_command import train
from membank.cli.extras import needs_extra
from membank.cli.machine import environment
from membank.cli.output import console

if TYPE_CHECKING:
    # Only for the annotation: importing the service takes seconds.
    from membank.bank_service.bench import Row


def register(app: typer.Typer) -> None:
    """Add this module's commands to `app`."""
    group = typer.Typer(
        help="Measure a service, or the parts of one on this machine (docs/benchmarks.md).",
        no_args_is_help=True,
    )
    load_command.register(group)
    group.command("swap")(command(SwapOptions, swap))
    group.command("train")(train)
    group.command("store")(store)
    app.add_typer(group, name="bench")


def store(
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the results here.")
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(help="Run this benchmark alone, or all of a kind: read, journal ...; repeat."),
    ] = None,
    folder: Annotated[
        Path | None,
        typer.Option(
            "--dir", help="Directory on the disk to measure; without it, a temporary one."
        ),
    ] = None,
    s3: Annotated[
        str | None,
        typer.Option("--s3", metavar="URL", help="s3://BUCKET/PREFIX to measure as well."),
    ] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Exit with 1 where a target is missed.")
    ] = False,
    quick: Annotated[
        bool, typer.Option("--quick", help="Tiny sizes: shows that it works, claims nothing.")
    ] = False,
) -> None:
    """Measure the store beside the plain thing: files, appends, obstore.

    Each figure is a median over pairs of measurements, taken in turn in this run.

    Example: ``membank bench store --json store.json --dir /data/scratch``.
    """
    with needs_extra("service"):
        from membank.bank_service.bench import (
            FULL,
            QUICK,
            report,
            run_benches,
            select,
            store_benches,
        )
    scale = QUICK if quick else FULL
    with scratch_folder(folder) as scratch:
        benches = select(store_benches(scratch, scale, s3_url=s3), only or ())
        with shown_progress() as notice:
            rows = run_benches(benches, notice)
        document = report(rows, environment(scratch), scale)
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(json.dumps(document, indent=2) + "\n")
    console.print(pairs_table(rows))
    _print_remarks(rows, document, quick=quick)
    if strict and any(row.passed is False for row in rows):
        raise typer.Exit(1)


def _print_remarks(rows: list[Row], document: dict[str, object], *, quick: bool) -> None:
    print_machine(document)
    for row in rows:
        if row.reason:
            console.print(f"{row.name} was not run: {row.reason}")
    if quick:
        console.print("[yellow]a quick run: no claim follows from these figures[/]")
