"""The report of the study: ``editing.json`` for programs, ``editing.html`` for people."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from membank.trainer.training.files import write_atomically

_RC: Any = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}


@dataclass(frozen=True, kw_only=True, slots=True)
class Figured:
    """One figure of the study."""

    key: str
    """Name in the document."""
    name: str
    """Name for people."""
    goal: float | None = None
    """What it is to reach; None = no goal, it is shown beside the others."""


FIGURES = (
    Figured(key="reliability", name="reliability: the edited prompt", goal=0.99),
    Figured(key="generalisation", name="generalisation: unseen paraphrases", goal=0.9),
    Figured(key="seen", name="the paraphrases that were given"),
    Figured(key="elsewhere", name="locality: other blocks, bit by bit", goal=1.0),
    Figured(key="neighbours_given", name="locality: given neighbours of the block", goal=0.95),
    Figured(key="neighbours_held", name="locality: neighbours that were not given", goal=0.95),
    Figured(key="neighbours_leaked", name="neighbours in other words that state the new object"),
    Figured(key="neighbours_harmed", name="neighbours in other words, right before, wrong after"),
    Figured(key="efficacy", name="ES: new object likelier than old"),
    Figured(key="paraphrase", name="PS: the same, unseen paraphrases"),
    Figured(key="neighbourhood", name="NS: neighbours keep their own object"),
    Figured(key="score", name="S: harmonic mean of ES, PS, NS"),
    Figured(key="portability", name="portability: one step more"),
)
"""The figures, in the order in which they are shown."""


def goals(document: Mapping[str, Any]) -> list[dict[str, object]]:
    """Return for each figure with a goal what was measured, and whether both moments reach it."""
    found: list[dict[str, object]] = []
    for figure in FIGURES:
        values = [document[moment].get(figure.key) for moment in ("right_after", "after_all")]
        if figure.goal is not None:
            ok = all(value is not None and value >= figure.goal for value in values)
            found.append(
                {"figure": figure.key, "goal": figure.goal, "right_after": values[0],
                 "after_all": values[1], "reached": ok}
            )  # fmt: skip
    return found


def write_editing_report(
    folder: Path, document: Mapping[str, Any], *, environment: Mapping[str, object]
) -> dict[str, Any]:
    """Write ``editing.json`` and ``editing.html``.

    Parameters
    ----------
    folder
        Directory of the two files.
    document
        What `EditingStudy.run` returned.
    environment
        Where it was measured, and with what.

    Returns
    -------
    dict
        Content of ``editing.json``.
    """
    whole = {**document, "goals": goals(document), "environment": dict(environment)}
    write_atomically(folder / "editing.json", json.dumps(whole, indent=1, default=str).encode())
    page = _template().render(
        document=whole,
        figures=FIGURES,
        pct=lambda share: "-" if share is None else f"{100 * share:.1f} %",
        plots={"goals": _goal_bars(whole), "course": _course(whole), "time": _times(whole)},
        median=float(np.median(whole["seconds_per_edit"])) if whole["seconds_per_edit"] else None,
        config=json.dumps(
            {name: whole[name] for name in ("environment", "config")}, indent=1, default=str
        ),
    )
    write_atomically(folder / "editing.html", page.encode())
    return whole


def _goal_bars(document: Mapping[str, Any]) -> str:
    shown = [goal for goal in document["goals"] if goal["after_all"] is not None]
    with mpl.rc_context(_RC):
        figure = Figure(figsize=(7, 2.8), layout="constrained")
        axes = figure.subplots()
        places = np.arange(len(shown))
        for offset, moment, colour in (
            (-0.2, "right_after", "#56B4E9"),
            (0.2, "after_all", "#009E73"),
        ):
            heights = [100 * (goal[moment] or 0) for goal in shown]
            bars = axes.bar(
                places + offset, heights, 0.38, color=colour, label=moment.replace("_", " ")
            )
            axes.bar_label(bars, fmt="%.1f", fontsize=7, padding=1)
        for place, goal in zip(places, shown, strict=True):
            axes.hlines(
                100 * goal["goal"], place - 0.42, place + 0.42, color="#D55E00", linewidth=1
            )
        axes.set_xticks(places, [goal["figure"].replace("_", "\n") for goal in shown])
        axes.set(ylabel="%", ylim=(0, 112))
        axes.legend(frameon=False, ncols=2, loc="lower right")
        return _data_url(figure)


def _course(document: Mapping[str, Any]) -> str:
    with mpl.rc_context(_RC):
        figure = Figure(figsize=(7, 2.6), layout="constrained")
        axes = figure.subplots()
        edits = [point["edits"] for point in document["course"]]
        for name, colour in (("reliability", "#0072B2"), ("generalisation", "#E69F00")):
            values = [100 * point[name] for point in document["course"]]
            axes.plot(edits, values, marker="o", markersize=3, color=colour, label=name)
        axes.set(xlabel="edits made", ylabel="of all edits so far, %", ylim=(0, 104))
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, loc="lower right")
        return _data_url(figure)


def _times(document: Mapping[str, Any]) -> str:
    with mpl.rc_context(_RC):
        figure = Figure(figsize=(7, 2.4), layout="constrained")
        axes = figure.subplots()
        axes.hist(document["seconds_per_edit"], bins=24, color="#999999")
        axes.set(xlabel="seconds per edit, from routing to the swap", ylabel="edits")
        return _data_url(figure)


def _data_url(figure: Figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("membank.trainer.editing.study", package_path=""),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template("report.html.j2")
