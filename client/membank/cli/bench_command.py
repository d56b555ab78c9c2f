"""Commands that measure."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from membank.cli.extras import needs_extra
from membank.cli.machine import environment
from membank.cli.output import console, err_console, progress_bars, table

if TYPE_CHECKING:
    # Only for the annotation: importing the service takes seconds.
    from membank.bank_service.bench import Row


def register(app: typer.Typer) -> None:
    """Add this module's commands to `app`."""
    group = typer.Typer(help="Measure parts of a service on this machine.", no_args_is_help=True)
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
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="membank-bench-", dir=folder) as scratch:
        benches = select(store_benches(Path(scratch), scale, s3_url=s3), only or ())
        with _shown_progress() as notice:
            rows = run_benches(benches, notice)
        document = report(rows, environment(Path(scratch)), scale)
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(json.dumps(document, indent=2) + "\n")
    console.print(_rows_table(rows))
    _print_remarks(rows, document, quick=quick)
    if strict and any(row.passed is False for row in rows):
        raise typer.Exit(1)


@contextmanager
def _shown_progress() -> Iterator[Callable[[str, float, float], None]]:
    """Show a bar with time left on a terminal; elsewhere a line per benchmark."""
    if not err_console.is_terminal:
        shown = ""

        def print_line(name: str, done: float, total: float) -> None:
            nonlocal shown
            if name and name != shown:
                err_console.print(f"{name}, about {total - done:.0f} s left")
            shown = name

        yield print_line
        return
    with progress_bars() as bars:
        task = bars.add_task("benchmarks", total=None, note="")
        yield lambda name, done, total: bars.update(task, total=total, completed=done, note=name)


def _rows_table(rows: list[Row]) -> object:
    columns = ("benchmark", "ours>", "raw>", "unit", "ratio>", "min>", "max>", "target", "")
    return table(columns, (_cells(row) for row in rows))


def _cells(row: Row) -> tuple[str, ...]:
    target = "" if row.target is None else str(row.target)
    if row.ours is None or row.raw is None or row.ratio is None:
        return (row.name, "-", "-", row.unit, "-", "-", "-", target, "[yellow]not run[/]")
    verdict = {True: "[green]passed[/]", False: "[red]missed[/]", None: "-"}[row.passed]
    return (
        row.name,
        f"{row.ours:.4g}",
        f"{row.raw:.4g}",
        row.unit,
        f"{row.ratio:.2f}",
        f"{min(row.ratios):.2f}",
        f"{max(row.ratios):.2f}",
        target,
        verdict,
    )


def _print_remarks(rows: list[Row], document: dict[str, object], *, quick: bool) -> None:
    machine = document["machine"]
    assert isinstance(machine, dict)
    console.print(
        f"{machine['cores']} cores, {machine['file_system']}, load {machine['load_5_minutes']:.1f}, "
        f"commit {document['commit']}"
    )
    for row in rows:
        if row.reason:
            console.print(f"{row.name} was not run: {row.reason}")
    if quick:
        console.print("[yellow]a quick run: no claim follows from these figures[/]")
