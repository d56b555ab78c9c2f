"""What a run leaves: a document, and what is printed of it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.markup import escape

from benchmarks.peers.conduct import TURNS, Outcome
from benchmarks.peers.contestant import Reach
from benchmarks.peers.ratios import Rule, changes, judge, tally
from benchmarks.peers.rounds import Samples
from benchmarks.peers.tasks import Scale
from membank.cli.machine import environment
from membank.cli.output import console, table

Document = dict[str, Any]

_SCALES = {"bytes": (1e-6, "MB/s"), "parameters": (1e-6, "M params/s"), "calls": (1.0, "calls/s")}


def document(
    outcome: Outcome, rules: Sequence[Rule], scale: Scale, folder: Path, merged: Sequence[Document]
) -> Document:
    """Return the document of a run: commit, versions, machine, configuration, figures, ratios.

    Parameters
    ----------
    outcome
        What was found.
    rules
        Ratios to compute.
    scale
        What was configured.
    folder
        Where servers wrote.
    merged
        Ratios of other benchmarks, such as that of a training step, taken over as they are.
    """
    ratios = [judge(rule, outcome.results).to_json() for rule in rules] + list(merged)
    return {
        "format": 1,
        **environment(folder),
        "config": {**scale.to_json(), "turns": TURNS},
        "verified": "every contestant's answers were compared with what was stored once, outside of "
        "the times; membank's are also checked against their CRC within them",
        "contestants": outcome.about,
        "not_run": outcome.not_run,
        "tasks": {
            name: {
                **task,
                "failed": outcome.failed.get(name, {}),
                "results": {
                    who: _figures(samples, task) for who, samples in outcome.results[name].items()
                },
            }
            for name, task in outcome.tasks.items()
        },
        "targets": tally(ratios),
        "ratios": ratios,
    }


def reaches(outcome: Outcome) -> dict[str, Reach]:
    """Return how far each contestant reaches."""
    return {name: Reach(str(about["reach"])) for name, about in outcome.about.items()}


def ratios_of(path: Path) -> list[Document]:
    """Return the ratios of a result file."""
    ratios: list[Document] = json.loads(path.read_text())["ratios"]
    return ratios


def print_document(found: Document) -> None:
    """Print figures and ratios."""
    for name, task in found["tasks"].items():
        factor, unit = _SCALES[task["unit"]]
        rows = sorted(task["results"].items(), key=lambda item: item[1]["cost_s"])
        columns = (name, f"{unit}>", "p50 ms>", "p95 ms>", "p99 ms>")
        console.print(table(columns, [_cells(who, row, factor) for who, row in rows]))
        for who, reason in task["failed"].items():
            console.print(f"{who} failed at {name}: {escape(reason)}")
    aimed = [ratio for ratio in found["ratios"] if ratio["target"]]
    for title, ratios in (
        ("ratio with a target", aimed),
        ("for information", [ratio for ratio in found["ratios"] if ratio not in aimed]),
    ):
        heads = (title, "compared with", "value>", "min>", "max>", "target", "")
        console.print(table(heads, map(_ratio_cells, ratios)))
    for note in dict.fromkeys(ratio["note"] for ratio in found["ratios"] if ratio.get("note")):
        console.print(escape(note))
    counts = found["targets"]
    console.print(f"{counts['reached']} of {len(aimed)} targets reached")
    for who, reason in found["not_run"].items():
        console.print(f"{who} was not run: {escape(reason)}")
    machine = found["machine"]
    console.print(
        f"{machine['cores']} cores, load {machine['load_5_minutes']:.1f}, commit {found['commit']}"
    )


def print_changes(found: Document, baseline: Path) -> None:
    """Print how the ratios differ from those of an earlier result."""
    rows = [
        (name, f"{before:.4g}", f"{now:.4g}", f"{now / before - 1:+.0%}")
        for name, before, now in changes(found["ratios"], ratios_of(baseline))
    ]
    console.print(table((f"ratio, beside {baseline.name}", "then>", "now>", "change>"), rows))


def _figures(samples: Samples, task: dict[str, Any]) -> Document:
    return {
        "rate": task["amount"] / samples.cost_s,
        "cost_s": samples.cost_s,
        "p50_s": samples.percentile_s(50),
        "p95_s": samples.percentile_s(95),
        "p99_s": samples.percentile_s(99),
        "num_calls": sum(len(taken.calls_s) for taken in samples.rounds),
        "rounds_cost_s": list(samples.costs_s),
    }


def _cells(who: str, row: Document, factor: float) -> tuple[str, ...]:
    times = (f"{1000 * row[key]:.3g}" for key in ("p50_s", "p95_s", "p99_s"))
    return (who, f"{factor * row['rate']:.4g}", *times)


def _ratio_cells(ratio: Document) -> tuple[str, ...]:
    target = ratio["target"] or ""
    if ratio["value"] is None:
        return (ratio["name"], "-", "-", "-", "-", target, "[yellow]not run[/]")
    verdict = {True: "[green]reached[/]", False: "[red]missed[/]", None: ""}[ratio["passed"]]
    figures = (f"{ratio[key]:.3g}" for key in ("value", "min", "max"))
    return (ratio["name"], ratio["other"] or "-", *figures, target, verdict)
