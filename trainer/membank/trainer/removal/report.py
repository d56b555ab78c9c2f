"""What a study found, put side by side: every model of a topic, the goals, what was missed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np

from membank.trainer.removal import metrics
from membank.trainer.removal.config import RemovalConfig

Results = Mapping[int, Mapping[str, Any]]
"""What `RemovalStudy.run` returns: the stages of each seed."""

PASS_P = 0.05
"""Forget quality above which two models count as not to be told apart."""

BANK_REFERENCE = "bank, retrained without"
DENSE_REFERENCE = "dense, retrained without"

_SHOWN = (
    "recall", "probability", "answer_loss", "answer_em", "answer_es", "member_loss",
    "held_out_loss", "member_em", "member_es", "auc",
)  # fmt: skip


def summarise(results: Results, config: RemovalConfig) -> dict[str, Any]:
    """Return the content of ``report.json``, machine and time aside.

    Parameters
    ----------
    results
        What every stage found.
    config
        The study.

    Returns
    -------
    dict
        ``topics``: for each, its rows (one per model, a value per seed in every list), deletion,
        residue, leak and relearning; ``goals``; ``seeds``; ``config``.
    """
    topics = {label: _topic(label, results) for label in config.topics}
    return {
        "seeds": sorted(results),
        "config": config.to_json(),
        "topics": topics,
        "goals": _goals(topics),
    }


def mean_of(values: Sequence[float]) -> float:
    """Return the mean over seeds; of none, NaN."""
    return float(np.mean(values)) if len(values) else float("nan")


def _topic(label: str, results: Results) -> dict[str, Any]:
    seeds = [results[seed] for seed in sorted(results)]
    known = [seed["before"]["topics"][label] for seed in seeds]
    stages = [seed["topics"][label] for seed in seeds]
    retrained = [stage["retrained"] for stage in stages]
    bank_reference = [one["served"] for one in retrained]
    bank_ended = [one["ended"] for one in retrained]
    dense_reference = [one["dense"] for one in retrained]
    deletions = [stage["delete"]["report"] for stage in stages]
    rows = [
        _row(
            "bank, before",
            [one["bank"] for one in known],
            bank_reference,
            [one["bank_utility"] for one in known],
        ),
        _row(
            "bank, topic deleted",
            [stage["delete"]["served"] for stage in stages],
            bank_reference,
            [stage["delete"]["utility"] for stage in stages],
            [one["seconds"] for one in deletions],
        ),
        _row(
            "bank, topic deleted, no other blocks",
            [stage["delete"]["ended"] for stage in stages],
            bank_ended,
            [stage["delete"]["utility"] for stage in stages],
            [one["seconds"] for one in deletions],
        ),
        _row(
            BANK_REFERENCE,
            bank_reference,
            bank_reference,
            [one["utility"] for one in retrained],
            [one["seconds"]["anchor"] + one["seconds"]["bank"] for one in retrained],
        ),
        _row(
            "dense, before",
            [one["dense"] for one in known],
            dense_reference,
            [one["dense_utility"] for one in known],
        ),
        *_method_rows(stages, dense_reference),
        _row(
            DENSE_REFERENCE,
            dense_reference,
            dense_reference,
            [one["dense_utility"] for one in retrained],
            [one["seconds"]["anchor"] + one["seconds"]["dense"] for one in retrained],
        ),
    ]
    return {
        "num_facts": [one["num_facts"] for one in known],
        "num_members": [one["num_members"] for one in known],
        "num_held_out": [one["num_held_out"] for one in known],
        "clusters": known[0]["clusters"],
        "rows": rows,
        "deletion": deletions,
        "leak": _leak([stage["leak"] for stage in stages]),
        "residue": _residue([stage["leak"] for stage in stages]),
        "relearning": _curves(stages),
        "retrained_seeds": _between_seeds(bank_reference),
    }


def _row(
    model: str,
    knowledge: Sequence[Mapping[str, Any]],
    reference: Sequence[Mapping[str, Any]],
    utility: Sequence[Mapping[str, float]],
    seconds: Sequence[float] = (),
) -> dict[str, Any]:
    """Return everything about one model, a value per seed in each list."""
    pairs = list(zip(knowledge, reference, strict=True))
    p_values = [metrics.forget_quality(a["truth_ratios"], b["truth_ratios"]) for a, b in pairs]
    return {
        "model": model,
        "p": p_values,
        "log10_p": [metrics.log10_p(p) for p in p_values],
        "truth": [metrics.forgotten_truth(one["truth_ratios"]) for one in knowledge],
        "priv_leak": [metrics.priv_leak(a["auc"], b["auc"]) for a, b in pairs],
        **{name: [one[name] for one in knowledge] for name in _SHOWN},
        "utility": [one["utility"] for one in utility],
        "retained_recall": [one["recall"] for one in utility],
        "retained_loss": [one["held_out_loss"] for one in utility],
        "seconds": list(seconds),
    }


def _method_rows(
    stages: Sequence[Mapping[str, Any]], reference: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    rows = []
    for method in stages[0]["methods"]:
        by_epoch = list(zip(*(stage["methods"][method]["epochs"] for stage in stages), strict=True))
        epochs = [
            {
                **_row(
                    method,
                    [one["dense"] for one in at],
                    reference,
                    [one["utility"] for one in at],
                    [one["seconds"] for one in at],
                ),
                "epoch": at[0]["epoch"],
            }
            for at in by_epoch
        ]
        # TOFU reports the last epoch; the way there shows whether another would have been better.
        way = [{name: e[name] for name in ("epoch", "p", "log10_p", "utility")} for e in epochs]
        rows.append({**epochs[-1], "epochs": way})
    return rows


def _leak(leaks: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, list[float]]]:
    names = ("recall", "answer_loss", "member_loss", "held_out_loss")
    return {
        condition: {name: [leak[condition][name] for leak in leaks] for name in names}
        for condition in leaks[0]
    }


def _residue(leaks: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    """Return loss of the anchor with an empty block, minus that of the anchor trained without.

    Below 0, the shared weights still know something of the topic, in nats per token.
    """
    return {
        name: [
            leak["zeroed blocks"][name] - leak["retrained, anchor alone"][name] for leak in leaks
        ]
        for name in ("answer_loss", "member_loss", "held_out_loss")
    }


def _curves(stages: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return every relearning curve, a list per seed, and how far it runs below its reference's."""
    curves: dict[str, list[Mapping[str, Any]]] = {
        name: [stage["relearning"][name] for stage in stages] for name in stages[0]["relearning"]
    }
    for method in stages[0]["methods"]:
        curves[method] = [stage["methods"][method]["relearning"] for stage in stages]
    found = {}
    for name, by_seed in curves.items():
        reference = "bank, retrained" if name.startswith("bank") else "dense, retrained"
        found[name] = {
            "reference": reference,
            "steps": by_seed[0]["steps"],
            "recall": [one["recall"] for one in by_seed],
            "answer_loss": [one["answer_loss"] for one in by_seed],
            "loss_gap": [
                float(np.mean(np.subtract(one["answer_loss"], other["answer_loss"])))
                for one, other in zip(by_seed, curves[reference], strict=True)
            ],
        }
    return found


def _between_seeds(reference: Sequence[Mapping[str, Any]]) -> list[float]:
    """Return the p-values between the reference's own seeds: what chance alone looks like."""
    return [
        metrics.forget_quality(one["truth_ratios"], other["truth_ratios"])
        for one, other in combinations(reference, 2)
    ]


def _goals(topics: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    goals: list[dict[str, Any]] = []

    def add(what: str, label: str, ok: bool, seen: str) -> None:
        goals.append({"what": what, "topic": label, "ok": bool(ok), "seen": seen})

    for label, topic in topics.items():
        row = {row["model"]: row for row in topic["rows"]}
        deleted, reference = row["bank, topic deleted"], row[BANK_REFERENCE]
        p_values = deleted["p"]
        add(
            f"forget quality above {PASS_P} in every seed",
            label,
            min(p_values) > PASS_P,
            "p " + ", ".join(f"{p:.2g}" for p in p_values),
        )
        changed = _total(topic["deletion"], lambda d: d["prompts_changed"] + d["blocks_changed"])
        rerouted = _total(topic["deletion"], lambda d: d["prompts_rerouted"])
        prompts = _total(topic["deletion"], lambda d: d["prompts_elsewhere"])
        blocks = _total(topic["deletion"], lambda d: d["blocks_elsewhere"])
        add(
            "other topics bit-identical",
            label,
            changed == rerouted == 0,
            f"{prompts} prompts and {blocks} blocks looked at, {changed} changed, {rerouted} rerouted",
        )
        took, would = mean_of(deleted["seconds"]), mean_of(reference["seconds"])
        add(
            "seconds instead of retraining",
            label,
            took < min(30.0, would),
            f"{took:.2f} s; retraining took {would:.0f} s",
        )
    return goals


def _total(reports: Sequence[Mapping[str, Any]], count: Callable[[Mapping[str, Any]], int]) -> int:
    return sum(count(report) for report in reports)
