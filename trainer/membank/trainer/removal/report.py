"""What a study found, put side by side: every model of a topic, the goals, what was missed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np

from membank.trainer.removal import metrics
from membank.trainer.removal.config import RemovalConfig

Results = Mapping[int, Mapping[str, Any]]
"""What `RemovalStudy.run` returns: the stages of each seed."""

PASS_P = 0.05
"""Forget quality above which two models count as not to be told apart."""

_SECONDS = 30.0
"""What still counts as seconds."""

DELETED = "topic deleted"
RETRAINED = "retrained without it"

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
    found = [results[seed][label] for seed in sorted(results)]
    shared, blind = ([one[kind] for one in found] for kind in ("shared", "blind"))
    return {
        **{
            name: [one[name] for one in found]
            for name in ("num_facts", "num_members", "num_held_out")
        },
        "clusters": found[0]["clusters"],
        "rows": [
            *_bank_rows("bank", shared),
            *_dense_rows([one["dense"] for one in found]),
            *_bank_rows("blind bank", blind),
        ],
        "deletion": {
            name: [one["delete"]["report"] for one in stages]
            for name, stages in (("bank", shared), ("blind bank", blind))
        },
        "leak": {"bank": _leak(shared), "blind bank": _leak(blind)},
        "residue": {"bank": _residue(shared), "blind bank": _residue(blind)},
        "relearning": _curves(found),
        "between_seeds": _between_seeds(found),
    }


def _bank_rows(name: str, stages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows of one kind of bank: before, deleted as served and alone, retrained."""
    before, deleted, retrained = (
        [one[stage] for one in stages] for stage in ("before", "delete", "retrained")
    )
    served, neighbour = ([one[way] for one in retrained] for way in ("served", "neighbour"))
    took = [one["report"]["seconds"] for one in deleted]

    def utility(of: Sequence[Mapping[str, Any]]) -> list[Mapping[str, float]]:
        return [one["utility"] for one in of]

    return [
        _row(f"{name}, before", [one["served"] for one in before], served, utility(before)),
        _row(
            f"{name}, {DELETED}", [one["served"] for one in deleted], served, utility(deleted), took
        ),
        _row(
            f"{name}, {DELETED}, sent to a neighbour",
            [one["neighbour"] for one in deleted],
            neighbour,
            utility(deleted),
            took,
        ),
        _row(
            f"{name}, {RETRAINED}",
            served,
            served,
            utility(retrained),
            [sum(one["seconds"].values()) for one in retrained],
        ),
    ]


def _dense_rows(stages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows of the dense model: before, after each method, retrained."""
    before, retrained = ([one[stage] for one in stages] for stage in ("before", "retrained"))
    reference = [one["served"] for one in retrained]
    rows = [
        _row(
            "dense, before",
            [one["served"] for one in before],
            reference,
            [one["utility"] for one in before],
        )
    ]
    for method in stages[0]["methods"]:
        by_epoch = list(zip(*(one["methods"][method]["epochs"] for one in stages), strict=True))
        epochs = [
            {
                **_row(
                    f"dense, {method}",
                    [one["served"] for one in at],
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
    rows.append(
        _row(
            f"dense, {RETRAINED}",
            reference,
            reference,
            [one["utility"] for one in retrained],
            [one["seconds"] for one in retrained],
        )
    )
    return rows


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


_LEAK_WAYS = {
    "fetched, before": ("before", "served"),
    "parent's block alone": ("leak", "parent"),
    "neighbour's blocks": ("delete", "neighbour"),
    "zeroed blocks": ("leak", "zeroed"),
    "nothing: as served afterwards": ("delete", "served"),
    "retrained, neighbour's blocks": ("retrained", "neighbour"),
    "retrained, as served": ("retrained", "served"),
}
"""What is asked for a deleted topic's facts, and which stage measured it."""


def _leak(stages: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, list[float]]]:
    names = ("recall", "answer_loss", "member_loss", "held_out_loss")
    return {
        condition: {name: [one[stage][way][name] for one in stages] for name in names}
        for condition, (stage, way) in _LEAK_WAYS.items()
    }


def _residue(stages: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    """Return loss of the anchor with zeroed blocks, minus that of the bank trained without.

    Below 0, the shared weights still know something of the topic, in nats per token.
    """
    return {
        name: [one["leak"]["zeroed"][name] - one["retrained"]["served"][name] for one in stages]
        for name in ("answer_loss", "member_loss", "held_out_loss")
    }


def _curves(found: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return every relearning curve, a list per seed, and how far it runs below its reference's."""
    curves: dict[str, list[Mapping[str, Any]]] = {
        name: [one["relearning"][name] for one in found] for name in found[0]["relearning"]
    }
    dense = [one["dense"] for one in found]
    for method in dense[0]["methods"]:
        curves[f"dense, {method}"] = [one["methods"][method]["relearning"] for one in dense]
    curves["dense, retrained"] = [one["retrained"]["relearning"] for one in dense]
    shown = {}
    for name, by_seed in curves.items():
        reference = f"{name.partition(',')[0]}, retrained"
        shown[name] = {
            "reference": reference,
            "steps": by_seed[0]["steps"],
            "recall": [one["recall"] for one in by_seed],
            "answer_loss": [one["answer_loss"] for one in by_seed],
            "loss_gap": [
                float(np.mean(np.subtract(one["answer_loss"], other["answer_loss"])))
                for one, other in zip(by_seed, curves[reference], strict=True)
            ],
        }
    return shown


def _between_seeds(found: Sequence[Mapping[str, Any]]) -> list[float]:
    """Return the p-values between the retrained banks of two seeds: what chance alone looks like."""

    def ratios(one: Mapping[str, Any]) -> dict[str, float]:
        served = one["shared"]["retrained"]["served"]
        return dict(zip(one["facts"], served["truth_ratios"], strict=True))

    p_values = []
    for one, other in combinations(map(ratios, found), 2):
        # Each seed holds out other documents, so it is asked other facts: only the common ones are of
        # the same difficulty, as they are in every other p-value here.
        common = [fact for fact in one if fact in other]
        if common:
            p_values.append(
                metrics.forget_quality([one[f] for f in common], [other[f] for f in common])
            )
    return p_values


def _goals(topics: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [goal for label, topic in topics.items() for goal in _goals_of(label, topic)]


def _goals_of(label: str, topic: Mapping[str, Any]) -> list[dict[str, Any]]:
    rows = {row["model"]: row for row in topic["rows"]}
    goals = []
    for bank, deletions in topic["deletion"].items():
        deleted = rows[f"{bank}, {DELETED}"]
        took, would = mean_of(deleted["seconds"]), mean_of(rows[f"{bank}, {RETRAINED}"]["seconds"])
        total = {name: sum(int(one[name]) for one in deletions) for name in deletions[0]}
        changed = total["prompts_changed"] + total["blocks_changed"] + total["prompts_rerouted"]
        goals += [
            _goal(
                f"{bank}: forget quality above {PASS_P} in every seed",
                label,
                min(deleted["p"]) > PASS_P,
                "p " + ", ".join(f"{p:.2g}" for p in deleted["p"]),
            ),
            _goal(
                f"{bank}: other topics bit-identical",
                label,
                changed == 0,
                f"{total['prompts_elsewhere']} prompts and {total['blocks_elsewhere']} blocks "
                f"looked at, {changed} changed",
            ),
            _goal(
                f"{bank}: seconds instead of retraining",
                label,
                took < min(_SECONDS, would),
                f"{took:.2f} s, retraining {would:.0f} s",
            ),
        ]
    return goals


def _goal(what: str, label: str, ok: bool, seen: str) -> dict[str, Any]:
    return {"what": what, "topic": label, "ok": bool(ok), "seen": seen}
