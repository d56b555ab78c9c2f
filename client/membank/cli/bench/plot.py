"""Draws the latencies of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from membank.cli.extras import needs_extra
from membank.wire.errors import InvalidArgumentError

_NINES = (0.0, 0.9, 0.99, 0.999, 0.9999)


def check_plot(path: Path) -> None:
    """Raise unless a plot can be written to `path`, before anything is measured for it.

    Raises
    ------
    FailedPreconditionError
        If matplotlib is missing.
    InvalidArgumentError
        If matplotlib has no format of that suffix, or there is no such folder.
    """
    with needs_extra("trainer"):
        from matplotlib.backends.backend_agg import FigureCanvasAgg
    known = sorted(FigureCanvasAgg.get_supported_filetypes())
    if path.suffix.removeprefix(".").lower() not in known:
        raise InvalidArgumentError(f"{path} has no suffix of {', '.join(known)}; end it in .png")
    if not path.parent.is_dir():
        raise InvalidArgumentError(f"{path}: there is no folder {path.parent}; make it")


def draw(
    rows: Sequence[Mapping[str, Any]], path: Path, before: Sequence[Mapping[str, Any]] = ()
) -> None:
    """Draw the latencies of every row, those of an earlier run dashed.

    Parameters
    ----------
    rows
        Rows as JSON documents; those without a curve are left out.
    path
        File to write; its suffix says the format.
    before
        Rows of an earlier run; those of other names are left out.
    """
    with needs_extra("trainer"):
        from matplotlib.figure import Figure
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    earlier = {row["name"]: row for row in before}
    for number, row in enumerate(rows):
        if curve := _curve(row):
            axes.plot(*curve, color=f"C{number % 10}", label=row["name"])
        if old := _curve(earlier.get(row["name"], {})):
            axes.plot(*old, color=f"C{number % 10}", linestyle="--", label=f"{row['name']}, before")
    # A scale on which each further nine takes as much room: tails are what is looked for.
    axes.set_xscale("function", functions=(_to_nines, _from_nines))
    axes.set_xticks(_NINES, [f"{100 * share:g} %" for share in _NINES])
    axes.set_xlim(0, 0.99995)
    axes.set_yscale("log")
    axes.set_xlabel("share of calls")
    axes.set_ylabel("time of a call is at most (ms)")
    axes.grid(visible=True, alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(path)


def _curve(row: Mapping[str, Any]) -> tuple[list[float], list[float]] | None:
    points = [(x, y) for x, y in (row.get("latency_ms") or {}).get("curve", []) if x <= 0.9999]
    return ([x for x, _ in points], [y for _, y in points]) if points else None


def _to_nines(share: Any) -> Any:  # noqa: ANN401  # an array of matplotlib's
    return -np.log10(np.clip(1 - np.asarray(share), 1e-9, None))


def _from_nines(nines: Any) -> Any:  # noqa: ANN401  # an array of matplotlib's
    return 1 - 10.0 ** -np.asarray(nines)
