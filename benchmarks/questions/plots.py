"""The answers as pictures."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from membank.cli.extras import needs_extra

Figures = Mapping[str, Any]
Axes = Any
"""Axes of matplotlib's, which is not always installed."""

_WIDTH, _HEIGHT = 5.5, 3.8


def draw(document: Mapping[str, Any], folder: Path) -> None:
    """Draw one SVG file for each question of a document.

    Parameters
    ----------
    document
        What was measured.
    folder
        Where the files go; it is made if missing.

    Raises
    ------
    FailedPreconditionError
        If matplotlib is not installed.
    """
    with needs_extra("trainer"):
        import matplotlib as mpl
        from matplotlib.figure import Figure
    folder.mkdir(parents=True, exist_ok=True)
    for name, answer in document["questions"].items():
        panels = _PANELS[name]
        figure = Figure(figsize=(_WIDTH * len(panels), _HEIGHT), layout="constrained")
        axes = figure.subplots(1, len(panels), squeeze=False)[0]
        for panel, paint in zip(axes, panels, strict=True):
            paint(panel, answer["figures"])
            panel.grid(visible=True, alpha=0.3)
            panel.legend(fontsize=6)
        # Text as text and fixed ids: small files, that change only where the figures do.
        with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "membank"}):
            figure.savefig(folder / f"questions-{name}.svg", metadata={"Date": None})


def _latency(panel: Axes, figures: Figures) -> None:
    for number, source in enumerate(figures["lines"]):
        rows = [row for row in figures["rows"] if row["source"] == source]
        rows.sort(key=lambda row: float(row["bytes"]))
        is_floor = source.startswith("floor")
        panel.plot(
            [row["bytes"] / 1e6 for row in rows], [row["p50_ms"] for row in rows],
            "--" if is_floor else "-", marker=".", label=source,
            color=f"{0.4 + 0.3 * number:.1f}" if is_floor else f"C{number % 10}",
        )  # fmt: skip
    _logarithmic(panel, "MB fetched", "p50, ms")


def _paper(panel: Axes, figures: Figures) -> None:
    paper = figures["paper"]
    cases = list(paper["model_ms"])
    bars = {"paper's model": paper["model_ms"]}
    for row in paper["rows"]:
        bars.setdefault(row["source"], {})[row["case"]] = row["p50_ms"]
    width = 0.8 / len(bars)
    for number, (name, values) in enumerate(bars.items()):
        places = [n + number * width for n, case in enumerate(cases) if case in values]
        panel.bar(places, [values[case] for case in cases if case in values], width, label=name)
    panel.set_xticks([n + 0.4 - width / 2 for n in range(len(cases))], cases)
    panel.set_ylabel("p50, ms")


def _blocks(panel: Axes, figures: Figures) -> None:
    for way in figures["costs"]:
        rows = [row for row in figures["rows"] if row["way"] == way]
        rows.sort(key=lambda row: float(row["block_bytes"]))
        rates = [figures["total_bytes"] / row["median_ms"] / 1e6 for row in rows]
        dashed = "--" if way.endswith("disk") else "-"
        panel.plot([row["block_bytes"] / 1e6 for row in rows], rates, dashed, marker=".", label=way)
    _logarithmic(panel, "MB of a block", "GB/s")


def _moved(order: str) -> Callable[[Axes, Figures], None]:
    def paint(panel: Axes, figures: Figures) -> None:
        lines: dict[tuple[str, str], list[tuple[int, float]]] = {}
        for row in figures["rows"]:
            if row["order"] == order:
                point = (row["cache_fetches"], 100 * row["fetched_share"])
                lines.setdefault((row["layout"], row["policy"]), []).append(point)
        for (layout, policy), points in lines.items():
            dashed = "-" if layout == "hierarchy" else "--"
            panel.plot(*zip(*points, strict=True), dashed, marker=".", label=f"{layout}, {policy}")
        panel.set_xscale("log", base=2)
        panel.set_ylim(0, 105)
        panel.set_xlabel("size of the cache, in fetches")
        panel.set_ylabel("bytes moved per request, % of a fetch")
        panel.set_title(order, fontsize=9)

    return paint


def _training(panel: Axes, figures: Figures) -> None:
    rows = figures["training"]
    names = [f"{row['model']}\ndepth {row['depth']}" for row in rows]
    base = [0.0] * len(rows)
    for part in ("compute", "fetch", "push"):
        values = [100 * row[f"{part}_ms"] / row["step_ms"] for row in rows]
        label = "computes" if part == "compute" else f"waits for {part}"
        panel.bar(names, values, bottom=base, label=label)
        base = [low + value for low, value in zip(base, values, strict=True)]
    panel.tick_params(axis="x", labelsize=6)
    panel.set_ylabel("% of a training step")


def _prompts(panel: Axes, figures: Figures) -> None:
    prompts = figures["prompts"]
    rows = prompts["rows"]
    names = [f"{row['placement']}, {row['place']},\n{row['way']}" for row in rows]
    panel.barh(names, [row["first_token_ms"] for row in rows], label="with memory")
    panel.axvline(prompts["forward_ms"], color="black", linestyle="--", label="no memory")
    panel.tick_params(axis="y", labelsize=6)
    panel.set_xlabel("first token, ms")


def _streams(number: int) -> Callable[[Axes, Figures], None]:
    def paint(panel: Axes, figures: Figures) -> None:
        model = figures["models"][number]
        rows = model["rows"]
        names = [f"{row['link']},\n{row['way']}" for row in rows]
        panel.barh(names, [row["first_token_ms"] for row in rows], label="first token")
        panel.barh(names, [row["waited_ms"] for row in rows], label="of that, waited", height=0.4)
        panel.axvline(model["forward_ms"], color="black", linestyle="--", label="no memory")
        panel.tick_params(axis="y", labelsize=6)
        panel.set_xlabel("ms")
        panel.set_title(f"{model['model']}, a path of {model['bytes'] / 1e6:.0f} MB", fontsize=9)

    return paint


def _batching(model: str, length: str) -> Callable[[Axes, Figures], None]:
    def paint(panel: Axes, figures: Figures) -> None:
        lines: dict[str, list[tuple[int, float]]] = {}
        for row in figures["rows"]:
            if (row["model"], row["length"]) == (model, length):
                lines.setdefault(row["way"], []).append((row["batch_size"], row["tokens_per_s"]))
        for way, points in lines.items():
            panel.plot(*zip(*points, strict=True), marker=".", label=way)
        _logarithmic(panel, "requests in a batch, each of another topic", "tokens/s")
        panel.set_title(f"{model}, {length}", fontsize=9)

    return paint


def _logarithmic(panel: Axes, x: str, y: str) -> None:
    panel.set_xscale("log")
    panel.set_yscale("log")
    panel.set_xlabel(x)
    panel.set_ylabel(y)


_PANELS: Mapping[str, tuple[Callable[[Axes, Figures], None], ...]] = {
    "latency": (_latency, _paper),
    "block_sizes": (_blocks,),
    "hierarchy": (_moved("sequential"), _moved("interleaved"), _moved("shuffled")),
    "overlap": (_training, _prompts),
    "layers": (_streams(0), _streams(1)),
    "batching": tuple(
        _batching(model, length)
        for model in ("demo", "demo-10x")
        for length in ("prompt of 64 tokens", "one token")
    ),
}
