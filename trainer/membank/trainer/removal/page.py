"""The report for people: ``report.md`` and ``report.html``, with plots."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
from matplotlib.figure import Figure

from membank.trainer.removal.metrics import log10_p
from membank.trainer.removal.report import PASS_P, mean_of
from membank.trainer.training.files import write_atomically

_COLOURS = [matplotlib.colors.to_hex(matplotlib.colormaps["tab20"](n)) for n in range(20)]
_MARKERS = {"bank": "o", "blind bank": "s", "dense": "^"}


def write_report(folder: Path, document: Mapping[str, Any]) -> None:
    """Write ``report.json``, ``report.md``, ``report.html`` and the plots beside them.

    Parameters
    ----------
    folder
        Where to.
    document
        Content of ``report.json``: `membank.trainer.removal.report.summarise` and the environment.
    """
    plots = {
        "quality": _svg(quality_figure(document)),
        "relearning": _svg(relearning_figure(document)),
    }
    for name, svg in plots.items():
        write_atomically(folder / f"{name}.svg", svg.encode())
    content = {
        "document": document,
        "pass_p": PASS_P,
        "sources": json.dumps(
            {name: document.get(name) for name in ("environment", "seeds", "config")},
            indent=1,
            default=str,
        ),
    }
    for name, safe in (("md", False), ("html", True)):
        environment = jinja2.Environment(
            loader=jinja2.PackageLoader("membank.trainer.removal", package_path=""),
            autoescape=safe,
            undefined=jinja2.StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        environment.filters["mean"] = mean_text
        page = environment.get_template(f"report.{name}.j2").render(**content, plots=plots)
        write_atomically(folder / f"report.{name}", page.encode())
    write_atomically(folder / "report.json", json.dumps(document, indent=1, default=str).encode())


def mean_text(values: Sequence[float], digits: int = 2) -> str:
    """Write the mean over seeds, with the range where there are several; ``-`` where none."""
    if not len(values):
        return "-"
    text = f"{mean_of(values):.{digits}f}"
    if len(values) > 1:
        text += f" ({min(values):.{digits}f} to {max(values):.{digits}f})"
    return text


def quality_figure(document: Mapping[str, Any]) -> Figure:
    """Return forget quality (log10 p) over model utility, one panel per topic, a point per seed."""
    topics = document["topics"]
    figure = Figure(figsize=(4.2 * len(topics), 3.6), layout="constrained")
    for number, (label, topic) in enumerate(topics.items(), start=1):
        axes = figure.add_subplot(1, len(topics), number)
        for place, row in enumerate(topic["rows"]):
            axes.scatter(
                row["utility"],
                row["log10_p"],
                label=row["model"],
                color=_COLOURS[place % len(_COLOURS)],
                marker=_MARKERS[row["model"].partition(",")[0]],
                facecolors="none" if "before" in row["model"] else None,
            )
        axes.axhline(log10_p(PASS_P), color="#999999", linewidth=0.8, linestyle="--")
        axes.set(title=label, xlabel="utility of the other topics", ylabel="log10 p")
    axes.legend(fontsize=6)
    return figure


def relearning_figure(document: Mapping[str, Any]) -> Figure:
    """Return loss of the facts that the attacker does not train on over steps, per topic."""
    topics = document["topics"]
    figure = Figure(figsize=(4.2 * len(topics), 3.6), layout="constrained")
    for number, (label, topic) in enumerate(topics.items(), start=1):
        axes = figure.add_subplot(1, len(topics), number)
        for place, (name, curve) in enumerate(topic["relearning"].items()):
            losses = [mean_of(at) for at in zip(*curve["answer_loss"], strict=True)]
            axes.plot(
                curve["steps"],
                losses,
                label=name,
                color=_COLOURS[place % len(_COLOURS)],
                linestyle="--" if "retrained" in name else "-",
            )
        axes.set(
            title=label, xlabel="steps of the attack", ylabel="loss of hidden facts, nats/token"
        )
    axes.legend(fontsize=6)
    return figure


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    # A fixed salt: the same figures give the same file.
    with matplotlib.rc_context({"svg.hashsalt": "membank"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]
