"""The report of a demo: ``report.json`` for programs and ``report.html`` for people."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from membank.cli.demo import figures
from membank.cli.output import format_bytes, format_count
from membank.trainer.training import read_losses
from membank.trainer.training.files import write_atomically
from membank.wire.format import TreeDocument
from membank.wire.spec import BlockRef

_SIZE_ROWS = (
    ("anchor", "anchor_params", format_count),
    ("fetched for one context", "fetch_params", format_count),
    ("fetched for one context, bytes", "fetch_bytes", format_bytes),
    ("resident on a device", "resident_bytes", format_bytes),
    ("bank", "bank_params", format_count),
    ("bank, bytes", "bank_bytes", format_bytes),
    ("optimizer state, bytes", "optimizer_bytes", format_bytes),
    ("all parameters", "total_params", format_count),
)


def write_report(
    out: Path,
    document: Mapping[str, Any],
    *,
    title: str,
    lead: str,
    tree: TreeDocument,
    losses: Mapping[str, Sequence[Path]],
    latencies_ms: Sequence[float],
) -> None:
    """Write ``report.json`` and ``report.html``.

    Parameters
    ----------
    out
        Directory of the two files.
    document
        Content of ``report.json``.
    title, lead
        Heading of the page, and the sentence under it.
    tree
        Topics, for the map.
    losses
        Per curve, the files of losses of its workers.
    latencies_ms
        Times of fetches.
    """
    write_atomically(out / "report.json", json.dumps(document, indent=1, default=str).encode())
    recall = {
        "trained": document["recall"],
        "after delete": document["after_delete"]["recall"],
        "after import": document["after_import"]["recall"],
    }
    page = _template().render(
        title=title,
        lead=lead,
        recall=recall,
        conditions=figures.CONDITIONS,
        longer_anchor=document.get("recall_longer_anchor"),
        questions=document["questions"],
        checks=document["checks"],
        routing=document["routing"],
        levels=range(1, len(next(iter(document["routing"].values()))) + 1),
        operations=document["operations"],
        perplexity=document["perplexity"]["topics"],
        perplexity_conditions=document["perplexity"]["conditions"],
        latency=document["latency"],
        sizes=[(name, form(document["sizes"][key])) for name, key, form in _SIZE_ROWS],
        seconds=document["seconds"],
        config=json.dumps(
            {name: document[name] for name in ("environment", "config")}, indent=1, default=str
        ),
        pct=lambda share: "-" if share is None else f"{100 * share:.0f} %",
        figures={
            "recall": figures.recall_bars(recall),
            "loss": figures.loss_curves({n: _curve(files) for n, files in losses.items()}),
            "tree": figures.tree_map(topic_sizes(tree)),
            "latency": figures.latency_curve(latencies_ms),
        },
    )
    write_atomically(out / "report.html", page.encode())


def topic_sizes(tree: TreeDocument) -> list[tuple[str, int, list[tuple[str, int]]]]:
    """Return label and documents of each level-1 topic, and those of its leaves."""
    counts = tree.num_documents
    if not counts:
        return []
    depth = max(ref.level for ref in counts)
    clusters = [len(array) for array in tree.centroids]
    topics = []
    for ref in sorted(ref for ref in counts if ref.level == 1):
        under = [
            (tree.labels.get(leaf, ""), number)
            for leaf, number in counts.items()
            if leaf.level == depth > 1 and leaf.cluster * clusters[0] // clusters[-1] == ref.cluster
        ]
        topics.append((tree.labels.get(ref, str(BlockRef(*ref))), counts[ref], under))
    return topics


def _curve(files: Sequence[Path]) -> list[tuple[int, float]]:
    """Return (tokens scored by all workers so far, mean loss) of a stage, step by step."""
    logs = [read_losses(file) for file in files if file.exists()]
    points, seen = [], 0
    for records in zip(*logs, strict=False):
        seen += sum(record.num_tokens for record in records)
        points.append((seen, sum(record.loss for record in records) / len(records)))
    return points[:: max(1, len(points) // 600)]


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("membank.cli.demo", package_path=""),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template("report.html.j2")
