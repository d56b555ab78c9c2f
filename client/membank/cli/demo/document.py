"""What ``report.json`` holds, made from the results of the story's steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from statistics import quantiles
from typing import Any

from membank.cli.demo.checks import recall_goals, service_checks
from membank.cli.demo.environment import environment
from membank.cli.demo.state import DemoState
from membank.trainer.model import MemoryConfig, Recipe, plan
from membank.trainer.run import RunConfig

RELATIONS = {"atomic_number": "elements", "capital": "capitals"}
"""Relation of the corpus -> its name in the report."""

SECONDS = ("prepare", "stage1", "stage2", "generic", "eval", "operate", "up", "study", "total")
"""Steps whose time is reported."""


def report_document(state: DemoState, config: RunConfig, *, claims: bool) -> dict[str, Any]:
    """Return the content of ``report.json``.

    Parameters
    ----------
    state
        Results of all steps.
    config
        What was run.
    claims
        True checks recall against the goals of learning.

    Returns
    -------
    dict
        JSON-able. Recall is in [0, 1], times in seconds unless the name says ms.
    """
    result: Any = state.result
    evaluation, prepared = result("eval"), result("prepare")
    document: dict[str, Any] = {
        "recall": _recall(evaluation),
        "after_delete": {
            **_recall(result("after_delete")),
            "recall": _recall(result("after_delete")),
            "answer": result("delete")["answer"],
        },
        "after_import": {
            **_recall(result("after_import")),
            "recall": _recall(result("after_import")),
        },
        "import_bit_identical": result("import")["packs_equal"]
        and result("before") == result("import")["fingerprints"],
        "routing": {
            RELATIONS[name]: relation["routed_share"]
            for name, relation in evaluation["recall"].items()
        },
        "without_level": {
            RELATIONS[name]: relation["without_level"]
            for name, relation in evaluation["recall"].items()
        },
        "questions": {
            RELATIONS[name]: relation["num_facts"]
            for name, relation in evaluation["recall"].items()
        },
        "perplexity": _perplexity(evaluation["perplexity"]),
        "operations": [
            step
            for name in ("hot_operations", "delete", "import")
            for step in result(name)["steps"]
        ],
        "latency": _latency(result("latency")),
        "seconds": {name: round(state.seconds.get(name, 0.0), 2) for name in SECONDS},
        "stages": {name: result(name) for name in ("stage1", "stage2", "generic")},
        "sizes": asdict(plan(_recipe(config), optimizer=config.optimizer.kind.value)),
        "prepared": prepared,
        "config": config.to_json(),
        "environment": environment(),
    }
    if state.has("study"):
        document["recall_longer_anchor"] = {
            RELATIONS[name]: relation["recall"]["anchor"]
            for name, relation in result("study").items()
        }
    steps = {name: result(name) for name in ("before", "hot_operations", "delete", "import")}
    checks = service_checks(document, steps)
    if claims:
        checks += recall_goals(document["recall"])
    document["checks"] = [asdict(check) for check in checks]
    return document


def _recall(evaluation: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    return {RELATIONS[name]: dict(r["recall"]) for name, r in evaluation["recall"].items()}


def _perplexity(report: Mapping[str, Any]) -> dict[str, Any]:
    topics = report["topics"]
    conditions = list(next(iter(topics.values()))["perplexity"]) if topics else []
    rows = [{"topic": name, **body["perplexity"]} for name, body in sorted(topics.items())]
    return {"conditions": conditions, "topics": rows}


def _latency(measured: Mapping[str, Any]) -> dict[str, float]:
    cuts = quantiles(measured["ms"], n=100)
    return {
        "count": len(measured["ms"]),
        "bytes": measured["bytes"],
        "p50_ms": cuts[49],
        "p95_ms": cuts[94],
        "p99_ms": cuts[98],
    }


def _recipe(config: RunConfig) -> Recipe:
    memory = MemoryConfig(
        block_widths=config.block_widths, fan_outs=config.tree.all_fan_outs, dtype="float32"
    )
    return Recipe(name=config.name, anchor=config.anchor, memory=memory)
