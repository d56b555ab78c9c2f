"""The document of a run: written, drawn, and set beside an earlier one."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from membank.cli.bench.comparison import compare, differences, read_results
from membank.cli.bench.display import comparison_table, print_machine
from membank.cli.bench.plot import check_plot, draw
from membank.cli.machine import environment
from membank.cli.output import console
from membank.wire.errors import InvalidArgumentError

FORMAT = 1
"""Version of the files of results."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Outputs:
    """Where results go beside the terminal.

    Raises
    ------
    MembankError
        If one of them cannot be read or written, before anything is measured.
    """

    json_file: Path | None
    """File for the document."""
    plot: Path | None = None
    """File for a plot of the latencies."""
    baseline: Path | None = None
    """Document of an earlier run to compare with."""

    def __post_init__(self) -> None:
        if self.plot is not None:
            check_plot(self.plot)
        if self.baseline is not None:
            read_results(self.baseline)
        if self.json_file is not None and self.json_file.is_dir():
            raise InvalidArgumentError(f"{self.json_file} is a folder; name a file")


def publish(
    command: str,
    rows: Sequence[Mapping[str, Any]],
    config: Mapping[str, object],
    *,
    folder: Path,
    outputs: Outputs,
    quick: bool,
) -> None:
    """Write what `outputs` asks for, and print comparison and machine.

    Parameters
    ----------
    command
        Name of the command.
    rows
        Rows as JSON documents.
    config
        What was asked for, JSON-able.
    folder
        Where the measured bank was: its file system is part of the result.
    outputs
        Where to.
    quick
        Whether the figures are for show alone.
    """
    before = None if outputs.baseline is None else read_results(outputs.baseline)
    document: dict[str, Any] = {
        "format": FORMAT,
        "command": command,
        **environment(folder),
        "config": dict(config),
        "rows": list(rows),
    }
    if before is not None:
        compared = compare(rows, before["rows"])
        document["baseline"] = {
            "file": outputs.baseline.name if outputs.baseline else None,
            "commit": before.get("commit"),
            "time_utc": before.get("time_utc"),
            "compared": [figure.to_json() for figure in compared],
        }
        if compared:
            console.print(comparison_table(compared))
        else:
            names = ", ".join(row["name"] for row in before["rows"])
            console.print(
                f"[yellow]no row of this run is in {outputs.baseline}[/], which has {names}"
            )
        for line in differences(document, before):
            console.print(f"differs: {line}", markup=False)
    if outputs.json_file is not None:
        outputs.json_file.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(document, indent=2, default=str)
        outputs.json_file.write_text(text + "\n", encoding="utf-8")
    if outputs.plot is not None:
        draw(rows, outputs.plot, () if before is None else before["rows"])
    print_machine(document)
    if quick:
        console.print("[yellow]a quick run: no claim follows from these figures[/]")
