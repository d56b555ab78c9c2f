"""A result as a picture: one panel per task, one dot per contestant."""

from __future__ import annotations

from pathlib import Path
from typing import Any

_COLUMNS = 3
_OURS, _PEER, _FLOOR = "#c0392b", "#5d7b9d", "#b8b8b8"
_UNITS = {
    "bytes": (1e-9, "GB/s"),
    "parameters": (1e-6, "M parameters/s"),
    "calls": (1.0, "calls/s"),
}


def draw(found: dict[str, Any], path: Path) -> None:
    """Draw the document of a run.

    Parameters
    ----------
    found
        The document.
    path
        File to write; its suffix decides the format.

    Raises
    ------
    SystemExit
        If matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise SystemExit("--plot needs matplotlib: pip install matplotlib") from None
    tasks = {name: task for name, task in found["tasks"].items() if task["results"]}
    num_rows = -(-len(tasks) // _COLUMNS)
    figure = Figure(figsize=(5 * _COLUMNS, 3.2 * num_rows), layout="constrained")
    panels = figure.subplots(num_rows, _COLUMNS, squeeze=False).ravel()
    for panel, (name, task) in zip(panels, tasks.items(), strict=False):
        _panel(panel, name, task, found["contestants"])
    for panel in panels[len(tasks) :]:
        panel.axis("off")
    figure.suptitle(f"commit {found['commit']}, {found['machine']['cores']} cores, loopback")
    figure.savefig(path)


def _panel(panel: Any, name: str, task: dict[str, Any], contestants: dict[str, Any]) -> None:  # noqa: ANN401  (matplotlib's axes)
    factor, unit = _UNITS[task["unit"]]
    rows = sorted(task["results"].items(), key=lambda item: float(item[1]["rate"]))
    colors = [_color(who, contestants[who]["reach"]) for who, _ in rows]
    values = [factor * row["rate"] for _, row in rows]
    # Dots, for views and copies differ by orders of magnitude: bars would need a zero.
    panel.scatter(values, range(len(rows)), c=colors, zorder=2)
    for height, value in enumerate(values):
        panel.annotate(
            f"{value:.3g}", (value, height), (7, -3), textcoords="offset points", fontsize=7
        )
    panel.set_yticks(range(len(rows)), [who for who, _ in rows])
    panel.set_xscale("log")
    panel.xaxis.set_minor_formatter("")
    panel.margins(x=0.15)
    panel.grid(axis="y", linewidth=0.3)
    panel.set_title(name, fontsize=10)
    panel.set_xlabel(unit, fontsize=8)
    panel.tick_params(labelsize=8)


def _color(who: str, reach: str) -> str:
    if who.startswith("membank"):
        return _OURS
    return _FLOOR if reach == "floor" else _PEER
