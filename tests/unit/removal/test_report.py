"""What the report makes of results: goals, residue, curves, and pages that can be read."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from membank.trainer.removal.config import METHODS, RemovalConfig, full
from membank.trainer.removal.page import mean_text, write_report
from membank.trainer.removal.report import summarise

LABELS = full().topics


def knowledge(ratio: float, *, auc: float = 0.5, loss: float = 2.0) -> dict[str, Any]:
    """Return what a model knows whose truth ratios lie around `ratio`."""
    return {
        "truth_ratios": [ratio + 0.001 * n for n in range(40)],
        "probability": 0.2, "rouge": 0.1, "recall": 0.1, "answer_loss": loss,
        "answer_em": 0.3, "answer_es": 0.2, "member_loss": loss, "held_out_loss": loss + 0.5,
        "member_em": 0.3, "member_es": 0.2, "auc": auc,
    }  # fmt: skip


UTILITY = {"utility": 0.7, "recall": 0.8, "held_out_loss": 2.0}
CURVE = {"steps": [0, 5], "recall": [0.0, 0.5], "answer_loss": [3.0, 2.0]}
DELETION = {
    "seconds": 0.5, "num_blocks": 34, "num_slots_destroyed": 34, "bytes_destroyed": 1000,
    "bytes_written": 10, "forget_prompts": 40, "forget_routed_inside": 40,
    "prompts_elsewhere": 100, "prompts_rerouted": 0, "prompts_changed": 0,
    "blocks_elsewhere": 100, "blocks_changed": 0,
}  # fmt: skip


def bank(*, deleted: float = 1.0, retrained: float = 1.0) -> dict[str, Any]:
    return {
        "before": {"served": knowledge(0.1, auc=1.0), "utility": UTILITY},
        "delete": {
            "report": dict(DELETION),
            "served": knowledge(deleted),
            "neighbour": knowledge(deleted),
            "utility": UTILITY,
        },
        "retrained": {
            "served": knowledge(retrained, loss=2.25),
            "neighbour": knowledge(retrained),
            "utility": UTILITY,
            "seconds": {"anchor": 60.0, "bank": 90.0},
        },
        "leak": {"parent": knowledge(0.5), "zeroed": knowledge(1.0)},
    }


def dense() -> dict[str, Any]:
    epoch = {"epoch": 1, "seconds": 3.0, "served": knowledge(1.0), "utility": UTILITY}
    lower = {**CURVE, "answer_loss": [2.0, 1.0]}
    return {
        "before": {"served": knowledge(0.1), "utility": UTILITY},
        "retrained": {
            "served": knowledge(1.0), "utility": UTILITY, "seconds": 50.0, "relearning": CURVE
        },
        "methods": {
            method: {"epochs": [epoch, {**epoch, "epoch": 2}], "relearning": lower}
            for method in METHODS
        },
    }  # fmt: skip


def results(num_seeds: int = 1, **shared: float) -> dict[int, Any]:
    topic = {
        "facts": [f"number {n}" for n in range(40)],
        "num_facts": 40, "num_members": 50, "num_held_out": 9, "clusters": ["1/2"],
        "shared": bank(**shared), "blind": bank(), "dense": dense(),
        "relearning": {"bank, topic deleted": CURVE, "bank, retrained": CURVE},
    }  # fmt: skip
    return {seed: {label: copy.deepcopy(topic) for label in LABELS} for seed in range(num_seeds)}


@pytest.fixture
def config() -> RemovalConfig:
    return full()


def goals_of(document: dict[str, Any], what: str) -> list[bool]:
    return [goal["ok"] for goal in document["goals"] if what in goal["what"]]


def row_of(document: dict[str, Any], model: str) -> dict[str, Any]:
    rows: list[dict[str, Any]] = document["topics"][LABELS[0]]["rows"]
    return next(row for row in rows if row["model"] == model)


def test_every_goal_is_reached_where_deleted_and_retrained_are_alike(
    config: RemovalConfig,
) -> None:
    document = summarise(results(), config)
    # Two kinds of bank, three topics, three goals each.
    assert [goal["ok"] for goal in document["goals"]] == [True] * 18


def test_another_distribution_of_truth_ratios_misses_the_goal(config: RemovalConfig) -> None:
    document = summarise(results(deleted=0.5), config)
    assert goals_of(document, "bank: forget quality").count(False) == len(LABELS)
    assert row_of(document, "bank, topic deleted")["log10_p"][0] < -10
    assert row_of(document, "bank, retrained without it")["p"] == [1.0]


@pytest.mark.parametrize("count", ["prompts_changed", "prompts_rerouted", "blocks_changed"])
def test_one_changed_thing_in_one_seed_misses_the_goal(config: RemovalConfig, count: str) -> None:
    found = results(2)
    found[1][LABELS[0]]["shared"]["delete"]["report"][count] = 1
    document = summarise(found, config)
    assert goals_of(document, "bit-identical").count(False) == 1


def test_a_deletion_that_takes_longer_than_seconds_misses_the_goal(config: RemovalConfig) -> None:
    found = results()
    found[0][LABELS[0]]["shared"]["delete"]["report"]["seconds"] = 31.0
    assert goals_of(summarise(found, config), "seconds instead").count(False) == 1


def test_residue_is_the_emptied_bank_minus_the_retrained_anchor(config: RemovalConfig) -> None:
    residue = summarise(results(), config)["topics"][LABELS[0]]["residue"]["bank"]
    assert residue["answer_loss"] == pytest.approx([2.0 - 2.25])


def test_relearning_is_held_against_the_reference_of_its_kind(config: RemovalConfig) -> None:
    curves = summarise(results(), config)["topics"][LABELS[0]]["relearning"]
    assert curves["bank, topic deleted"]["loss_gap"] == [0.0]
    # (2 - 3 + 1 - 2) / 2 below the dense model that was trained without.
    assert curves["dense, NPO"]["loss_gap"] == [-1.0]


def test_the_last_epoch_counts_and_the_way_there_is_kept(config: RemovalConfig) -> None:
    row = row_of(summarise(results(), config), "dense, NPO")
    assert row["epoch"] == 2
    assert [epoch["epoch"] for epoch in row["epochs"]] == [1, 2]


def test_seeds_are_listed_and_tested_against_each_other(config: RemovalConfig) -> None:
    document = summarise(results(3), config)
    topic = document["topics"][LABELS[0]]
    assert topic["between_seeds"] == [1.0] * 3
    assert len(row_of(document, "bank, before")["p"]) == 3
    assert summarise(results(1), config)["topics"][LABELS[0]]["between_seeds"] == []


def test_seeds_are_tested_on_the_facts_that_both_were_asked(config: RemovalConfig) -> None:
    """Held-out documents differ by seed, and so do the facts: unlike facts are no evidence."""
    found = results(2)
    for seed, ratios in ((0, [1.0] * 20 + [5.0] * 20), (1, [1.0] * 20 + [0.1] * 20)):
        topic = found[seed][LABELS[0]]
        topic["facts"] = [f"number {n if n < 20 else 100 * (seed + 1) + n}" for n in range(40)]
        topic["shared"]["retrained"]["served"]["truth_ratios"] = ratios
    assert summarise(found, config)["topics"][LABELS[0]]["between_seeds"] == [1.0]


def test_the_pages_name_what_was_missed(tmp_path: Path, config: RemovalConfig) -> None:
    document = {**summarise(results(2, deleted=0.5), config), "quick": True, "environment": {}}
    write_report(tmp_path, document)
    text = (tmp_path / "report.md").read_text()
    assert "**missed**" in text
    assert "quick study" in text
    assert text.count("| dense, NPO | ") == 2 * len(LABELS)
    page = (tmp_path / "report.html").read_text()
    assert page.count("<svg") == 2
    assert '<td class="text missed">missed</td>' in page
    assert (tmp_path / "report.json").stat().st_size > 1000


def test_means_are_written_with_their_range() -> None:
    assert mean_text([0.5]) == "0.50"
    assert mean_text([1.0, 2.0], 1) == "1.5 (1.0 to 2.0)"
    assert mean_text([]) == "-"
