"""How benchmarks show themselves: progress, tables, remarks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from membank.cli.bench.comparison import Compared
from membank.cli.bench.process_watch import ProcessFigures
from membank.cli.bench.results import LoadRow
from membank.cli.output import console, err_console, format_bytes, progress_bars, table

if TYPE_CHECKING:
    # Only for the annotation: importing the service takes seconds.
    from membank.bank_service.bench import Row
    from membank.cli.bench.swap_results import SwapRow

_PASSED, _MISSED = Text("passed", "green"), Text("missed", "red")

Notice = Callable[[str, float, float], None]
"""Takes what is being done, how much of it is done, and all of it, in any unit."""


@contextmanager
def shown_progress() -> Iterator[Notice]:
    """Show a bar with time left on a terminal; elsewhere a line for each new thing."""
    if not err_console.is_terminal:
        shown = ""

        def print_line(name: str, done: float, total: float) -> None:
            nonlocal shown
            if name and name != shown:
                err_console.print(name)
            shown = name

        yield print_line
        return
    with progress_bars() as bars:
        task = bars.add_task("benchmarks", total=None, note="")
        yield lambda name, done, total: bars.update(
            task, total=round(total), completed=round(done), note=name
        )


def pairs_table(rows: Sequence[Row]) -> Table:
    """Return the table of rows that set two things side by side."""
    columns = ("benchmark", "ours>", "raw>", "unit", "ratio>", "min>", "max>", "target", "")
    return table(columns, (_pair_cells(row) for row in rows))


def load_table(rows: Sequence[LoadRow]) -> Table:
    """Return the table of the rows of load runs."""
    columns = (
        "benchmark", "calls>", "p50 ms>", "p95 ms>", "p99 ms>", "MB/s>", "calls/s>",
        "client\nCPU s/GB>", "shards\nCPU s/GB>", "client\nRSS MB>", "shards\nRSS MB>", "memory",
        "errors>",
    )  # fmt: skip
    return table(columns, (_load_cells(row) for row in rows))


def swap_table(rows: Sequence[SwapRow]) -> Table:
    """Return the table of runs of swaps under load."""
    columns = (
        "benchmark", "fetches>", "p50 ms\nwithout>", "with>", "p99 ms\nwithout>", "with>",
        "ratio>", "by pairs>", "swaps>", "swap ms>", "failed>", "mixed>", "",
    )  # fmt: skip
    return table(columns, (_swap_cells(row) for row in rows))


def comparison_table(compared: Sequence[Compared]) -> Table:
    """Return the table of figures now and in an earlier run."""
    columns = ("benchmark", "figure", "before>", "now>", "ratio>")
    cells = (
        (c.row, c.figure, f"{c.before:.4g}", f"{c.now:.4g}", f"{c.ratio:.2f}") for c in compared
    )
    return table(columns, cells, title="beside the earlier run")


def print_machine(document: Mapping[str, Any]) -> None:
    """Print where and with what a run was made."""
    machine = document["machine"]
    console.print(
        f"{machine['cores']} cores, {machine['file_system']}, load {machine['load_5_minutes']:.1f}, "
        f"commit {document['commit']}"
    )


def print_load_remarks(rows: Sequence[LoadRow]) -> None:
    """Print what must be known of load runs beside their figures."""
    for row in rows:
        if row.gave_up:
            console.print(f"[red]{row.name}: a client gave up after failing again and again[/]")
        if row.errors:
            reasons = ", ".join(f"{reason} {count}" for reason, count in row.errors.items())
            console.print(f"{row.name}: errors: {reasons}; the last one: ", end="")
            console.print(row.last_error, markup=False)
        if row.num_refused:
            console.print(
                f"{row.name}: {row.num_refused} of {row.num_gradients} gradients were refused: "
                "clients are further apart than max_staleness of the bank, or blocks are withheld"
            )
        for name, group in (("clients", row.client), ("shards", row.server)):
            if group is not None and group.is_flat is False:
                grown = format_bytes(group.rss_growth_bytes or 0)
                console.print(
                    f"[yellow]{row.name}: memory of the {name} grew by {grown} over the last two "
                    "thirds of the run[/]"
                )


def _pair_cells(row: Row) -> tuple[object, ...]:
    target = "" if row.target is None else str(row.target)
    if row.ours is None or row.raw is None or row.ratio is None:
        return (row.name, "-", "-", row.unit, "-", "-", "-", target, Text("not run", "yellow"))
    verdict = {True: _PASSED, False: _MISSED, None: "-"}[row.passed]
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


def _load_cells(row: LoadRow) -> tuple[object, ...]:
    figures = row.figures

    def cell(name: str) -> str:
        return f"{figures[name]:.3g}" if name in figures else "-"

    return (
        row.name,
        str(row.num_requests),
        *(cell(name) for name in ("p50_ms", "p95_ms", "p99_ms")),
        f"{row.bytes_per_s / 1e6:.0f}",
        cell("requests_per_s"),
        cell("client_cpu_s_per_gb"),
        cell("server_cpu_s_per_gb"),
        _memory(row.client),
        _memory(row.server),
        _verdict(row),
        str(row.errors.total()),
    )


def _swap_cells(row: SwapRow) -> tuple[object, ...]:
    figures = row.figures

    def cell(name: str) -> str:
        return f"{figures[name]:.3g}" if name in figures else "-"

    return (
        row.name,
        str(len(row.quiet.seconds) + len(row.swapping.seconds)),
        *(cell(f"{phase}_{q}_ms") for q in ("p50", "p99") for phase in ("quiet", "swapping")),
        cell("p99_ratio"),
        cell("p99_ratio_median_of_pairs"),
        str(len(row.run.swaps)),
        cell("swap_p50_ms"),
        str(row.errors.total()),
        str(row.num_mixed),
        _PASSED if row.passed else _MISSED,
    )


def _memory(group: ProcessFigures | None) -> str:
    if group is None:
        return "-"
    return f"{group.rss_begin_bytes / 1e6:.0f} > {group.rss_end_bytes / 1e6:.0f}"


def _verdict(row: LoadRow) -> str | Text:
    flat = [group.is_flat for group in (row.client, row.server) if group is not None]
    if False in flat:
        return Text("grows", "red")
    return "flat" if flat and None not in flat else "-"
