"""What commands print: a table for people, or one JSON document for programs."""

from __future__ import annotations

import errno
import json
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Annotated, TextIO

import typer
from rich import box
from rich.console import Console
from rich.filesize import decimal
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from membank.wire.errors import InvalidArgumentError

_WIDTH_IN_FILES = 160
"""Columns where output goes to a file or a pipe, which have no width of their own."""


def _console(stream: TextIO, *, stderr: bool) -> Console:
    return Console(
        stderr=stderr, highlight=False, width=None if stream.isatty() else _WIDTH_IN_FILES
    )


console = _console(sys.stdout, stderr=False)
"""Standard output; rich leaves colours out where it is no terminal."""

err_console = _console(sys.stderr, stderr=True)
"""Standard error: progress, notices, errors."""

JsonOption = Annotated[
    bool, typer.Option("--json", help="Print one JSON document instead of text.")
]


def emit(payload: object, *, as_json: bool, render: Callable[[], None]) -> None:
    """Print `payload` as JSON, or call `render` to print it for people."""
    if as_json:
        json.dump(payload, sys.stdout, indent=2, default=str)
        sys.stdout.write("\n")
    else:
        render()


def table(columns: Sequence[str], rows: Iterable[Sequence[object]], *, title: str = "") -> Table:
    """Build a table; columns whose name ends in ``>`` are right-aligned.

    Cells are printed as they are, square brackets too: they hold texts of corpora and of people. One
    that is to be coloured is a `rich.text.Text`.
    """
    built = Table(
        title=title or None, title_justify="left", header_style="bold", box=box.SIMPLE_HEAD,
        pad_edge=False, padding=(0, 1),
    )  # fmt: skip
    for column in columns:
        built.add_column(column.rstrip(">"), justify="right" if column.endswith(">") else "left")
    for row in rows:
        built.add_row(*(cell if isinstance(cell, Text) else Text(str(cell)) for cell in row))
    return built


def format_bytes(count: int) -> str:
    """Write a number of bytes with a decimal prefix, such as ``36.1 MB``."""
    return decimal(count)


def format_count(count: int) -> str:
    """Write a large count with a suffix, such as ``4.62B``."""
    for limit, suffix in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if count >= limit:
            return f"{count / limit:.4g}{suffix}"
    return str(count)


def check_out(out: Path | None) -> None:
    """Make the directory of a file that a long command writes at its end.

    Raises
    ------
    InvalidArgumentError
        The file cannot be written; better told now than after an hour.
    """
    if out is None:
        return
    if out.is_dir():
        raise InvalidArgumentError(f"--out {out} is a directory; name a file")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(out if out.exists() else out.parent, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as err:
        raise InvalidArgumentError(
            f"--out {out} cannot be written: {err.strerror}; name a file in a directory of yours"
        ) from err


def format_share(share: float | None) -> str:
    """Write a share of 1 in percent, ``-`` where there is none."""
    return "-" if share is None else f"{100 * share:.1f} %"


def progress_bars() -> Progress:
    """Return progress bars with time left, on standard error."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=err_console,
        transient=False,
        refresh_per_second=4,
    )
