"""Pictures of the report, each a PNG as a data URL. Colours are those of Okabe and Ito (2008)."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
import squarify
from matplotlib.axes import Axes
from matplotlib.figure import Figure

CONDITIONS = ("anchor", "generic", "random", "withheld", "fetched", "oracle")
"""Order of the bars: controls first, so that the eye ends at what is claimed."""

_COLOURS = {
    "anchor": "#999999",
    "generic": "#E69F00",
    "random": "#56B4E9",
    "withheld": "#CC79A7",
    "fetched": "#009E73",
    "oracle": "#0072B2",
}
_RC: Any = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}


def loss_curves(curves: Mapping[str, Sequence[tuple[int, float]]]) -> str:
    """Draw losses over tokens.

    Parameters
    ----------
    curves
        Per name, (tokens seen, loss in nats per token).

    Returns
    -------
    str
        Data URL of a PNG.
    """
    with mpl.rc_context(_RC):
        figure = Figure(figsize=(7, 3.2), layout="constrained")
        axes = figure.subplots()
        for name, points in curves.items():
            tokens, losses = np.array(points, dtype=float).reshape(-1, 2).T
            axes.plot(tokens / 1e6, _smooth(losses), label=name, linewidth=1.5)
        axes.set(xlabel="tokens, millions", ylabel="loss, nats per token")
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
        return _data_url(figure)


def recall_bars(recall: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """Draw recall by moment and condition, one panel per relation.

    Parameters
    ----------
    recall
        Moment ("trained", "after delete", ...) -> relation -> condition -> recall in [0, 1].

    Returns
    -------
    str
        Data URL of a PNG.
    """
    relations = list(next(iter(recall.values())))
    with mpl.rc_context(_RC):
        figure = Figure(figsize=(7, 2.7 * len(relations)), layout="constrained")
        panels: list[Axes] = list(np.atleast_1d(figure.subplots(len(relations), 1)))
        for axes, relation in zip(panels, relations, strict=True):
            _recall_panel(axes, relation, {m: by[relation] for m, by in recall.items()})
        panels[0].legend(frameon=False, ncols=len(CONDITIONS), loc="lower center",
                         bbox_to_anchor=(0.5, 1.12), columnspacing=1, handlelength=1)  # fmt: skip
        return _data_url(figure)


def tree_map(topics: Sequence[tuple[str, int, Sequence[tuple[str, int]]]]) -> str:
    """Draw the topic tree: areas are documents.

    Parameters
    ----------
    topics
        Per topic of level 1: label, documents, and (label, documents) of each topic under it.

    Returns
    -------
    str
        Data URL of a PNG.
    """
    filled = sorted((topic for topic in topics if topic[1] > 0), key=lambda t: -t[1])
    sizes = squarify.normalize_sizes([size for _, size, _ in filled], 100, 62)
    with mpl.rc_context(_RC):
        figure = Figure(figsize=(9, 5.6), layout="constrained")
        axes = figure.subplots()
        colours = mpl.colormaps["tab20"]
        for index, (box, (label, _, under)) in enumerate(
            zip(squarify.squarify(sizes, 0, 0, 100, 62), filled, strict=True)
        ):
            _topic_box(axes, box, label, [n for _, n in under if n], colours(index % 20))
        axes.set(xlim=(0, 100), ylim=(0, 62))
        axes.axis("off")
        return _data_url(figure)


def latency_curve(milliseconds: Sequence[float]) -> str:
    """Draw the distribution of fetch latencies, with p50, p95 and p99."""
    values = np.sort(np.asarray(milliseconds, dtype=float))
    with mpl.rc_context(_RC):
        figure = Figure(figsize=(7, 2.8), layout="constrained")
        axes = figure.subplots()
        axes.plot(values, np.arange(1, len(values) + 1) / len(values), color="#0072B2")
        for share in (0.5, 0.95, 0.99):
            value = float(np.quantile(values, share))
            axes.axvline(value, color="#999999", linewidth=0.8)
            axes.annotate(f"p{100 * share:.0f} {value:.1f}", (value, 0.03), rotation=90, fontsize=8)
        axes.set(xlabel="fetch of one path, milliseconds", ylabel="share of fetches", xscale="log")
        axes.grid(alpha=0.3)
        return _data_url(figure)


def _recall_panel(axes: Axes, relation: str, by_moment: Mapping[str, Mapping[str, float]]) -> None:
    width = 0.8 / len(CONDITIONS)
    for index, condition in enumerate(CONDITIONS):
        heights = [100 * by_moment[moment][condition] for moment in by_moment]
        places = np.arange(len(by_moment)) + (index - (len(CONDITIONS) - 1) / 2) * width
        bars = axes.bar(places, heights, width, color=_COLOURS[condition], label=condition)
        axes.bar_label(bars, fmt="%.0f", fontsize=7, padding=1)
    axes.set_xticks(range(len(by_moment)), list(by_moment))
    axes.set(ylabel=f"{relation}\nrecalled, %", ylim=(0, 109))


def _topic_box(
    axes: Axes,
    box: Mapping[str, float],
    label: str,
    sizes: Sequence[int],
    colour: tuple[float, float, float, float],
) -> None:
    x, y, dx, dy = box["x"], box["y"], box["dx"], box["dy"]
    ordered = sorted(sizes, reverse=True) or [1]
    inner = squarify.squarify(squarify.normalize_sizes(ordered, dx, dy), x, y, dx, dy)
    for place, leaf in enumerate(inner):
        shade = 0.3 + 0.3 * (place % 3) / 2
        axes.add_patch(
            mpl.patches.Rectangle(
                (leaf["x"], leaf["y"]),
                leaf["dx"],
                leaf["dy"],
                facecolor=(*colour[:3], shade),
                edgecolor="white",
                linewidth=0.5,
            )
        )
    axes.add_patch(
        mpl.patches.Rectangle((x, y), dx, dy, fill=False, edgecolor="white", linewidth=2.5)
    )
    # About 1.05 units of the 100-unit canvas per character at this size.
    lines = [word.strip() for word in label.split(",")]
    text = "\n".join(line[: max(3, int(dx / 1.05))] for line in lines[: max(1, int(dy / 2.6))])
    axes.text(x + dx / 2, y + dy / 2, text, ha="center", va="center", fontsize=7.5)


def _smooth(values: np.ndarray, window: int = 15) -> np.ndarray:
    if len(values) < 2 * window:
        return values
    kernel = np.ones(window) / window
    padded = np.concatenate([np.full(window - 1, values[:window].mean()), values])
    return np.convolve(padded, kernel, mode="valid")


def _data_url(figure: Figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
