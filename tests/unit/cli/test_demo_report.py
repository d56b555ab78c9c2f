"""The demo's report: every figure under the name that says what it is."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from membank.cli.demo.document import report_document
from membank.cli.demo.report import write_report
from membank.cli.demo.state import DemoState
from membank.trainer.run import named_run
from membank.wire.format import TreeDocument
from membank.wire.spec import BlockRef

CONDITIONS = ("anchor", "generic", "fetched", "oracle", "random", "withheld")


def _evaluation(elements: dict[str, float], capitals: dict[str, float]) -> dict[str, object]:
    def relation(recall: dict[str, float], num_facts: int) -> dict[str, object]:
        return {
            "recall": recall,
            "num_facts": num_facts,
            "routed_share": [1.0, 0.9],
            "without_level": [0.5, 0.1],
        }

    return {
        "recall": {"atomic_number": relation(elements, 118), "capital": relation(capitals, 218)},
        "perplexity": {"topics": {"elements": {"perplexity": dict.fromkeys(CONDITIONS, 2.0)}}},
    }


ELEMENTS = {"anchor": 0.01, "generic": 0.05, "fetched": 0.9, "oracle": 0.95, "random": 0.02,
            "withheld": 0.03}  # fmt: skip
CAPITALS = {"anchor": 0.0, "generic": 0.04, "fetched": 0.8, "oracle": 0.85, "random": 0.06,
            "withheld": 0.07}  # fmt: skip
GONE = {**ELEMENTS, "fetched": 0.01, "oracle": 0.01}
BEFORE = {"1/0": ["ACTIVE", 7], "1/1": ["ACTIVE", 8]}
DELETED = {"1/0": ["DELETED", 0], "1/1": ["ACTIVE", 8]}


@pytest.fixture
def state(tmp_path: Path) -> DemoState:
    """A story that went as it should."""
    state = DemoState(tmp_path / "state.json", {})
    steps: list[dict[str, object]] = [{"operation": "swap", "on": "x", "ms": 1.0, "outcome": "y"}]
    stage = {"seconds": 1.0}
    results: dict[str, object] = {
        "prepare": {"num_documents": 3},
        "stage1": stage,
        "stage2": stage,
        "generic": stage,
        "eval": _evaluation(ELEMENTS, CAPITALS),
        "latency": {"ms": [float(ms) for ms in range(1, 102)], "bytes": 64},
        "before": BEFORE,
        "hot_operations": {"swap": True, "withhold": True, "steps": steps},
        "delete": {"answer": "171", "deleted": True, "fingerprints": DELETED, "steps": steps},
        "after_delete": _evaluation(GONE, CAPITALS),
        "import": {"packs_equal": True, "fingerprints": BEFORE, "steps": steps},
        "after_import": _evaluation(ELEMENTS, CAPITALS),
    }
    for name, result in results.items():
        state.finish(name, result)
    return state


def test_every_figure_is_where_its_name_says(state: DemoState) -> None:
    document = report_document(state, named_run("demo"), claims=True)
    assert document["recall"] == {"elements": ELEMENTS, "capitals": CAPITALS}
    for moment, elements in (("after_delete", GONE), ("after_import", ELEMENTS)):
        assert document[moment]["elements"] == elements
        assert document[moment]["capitals"] == CAPITALS
    assert document["import_bit_identical"] is True
    assert {"prepare", "stage1", "stage2", "eval", "operate", "total"} <= document["seconds"].keys()
    assert document["sizes"]["anchor_params"] == 591_456
    assert document["latency"]["p50_ms"] == pytest.approx(51.0)
    assert all(check["ok"] for check in document["checks"])
    assert len([check for check in document["checks"] if not check["must"]]) == 5


def test_a_small_run_claims_nothing(state: DemoState) -> None:
    document = report_document(state, named_run("fast"), claims=False)
    assert all(check["must"] for check in document["checks"])


@pytest.mark.parametrize(
    ("step", "result", "failing"),
    [
        ("after_delete", _evaluation(ELEMENTS, CAPITALS), {"elements_gone"}),
        ("after_delete", _evaluation(GONE, GONE), {"capitals_stay"}),
        ("after_import", _evaluation(GONE, CAPITALS), {"import_recall"}),
        ("before", {**BEFORE, "1/1": ["ACTIVE", 9]}, {"others_untouched", "import_bit_identical"}),
        ("hot_operations", {"swap": False, "withhold": False, "steps": []}, {"hot_swap", "withhold"}),
        ("eval", _evaluation({**ELEMENTS, "fetched": 0.3}, CAPITALS),
         {"recall_expected", "recall_goal", "above_generic", "above_anchor", "import_recall"}),
        ("eval", _evaluation({**ELEMENTS, "random": 0.2}, CAPITALS),
         {"random_near_anchor", "import_recall"}),
    ],
)  # fmt: skip
def test_each_check_can_fail(
    step: str, result: object, failing: set[str], state: DemoState
) -> None:
    state.finish(step, result)
    document = report_document(state, named_run("demo"), claims=True)
    assert {check["name"] for check in document["checks"] if not check["ok"]} == failing


@pytest.mark.slow
def test_the_page_holds_pictures_and_no_gap(state: DemoState, tmp_path: Path) -> None:
    config = replace(named_run("demo"), name="demo")
    document = report_document(state, config, claims=True)
    refs = [BlockRef(1, 0), BlockRef(1, 1), BlockRef(2, 0), BlockRef(2, 3)]
    tree = TreeDocument(
        labels={ref: f"topic {ref}" for ref in refs},
        num_documents=dict.fromkeys(refs, 4),
        centroids=(np.eye(2, dtype=np.float32), np.eye(4, dtype=np.float32)),
    )
    write_report(
        tmp_path, document, title="T", lead="L", tree=tree, losses={"stage 1": []},
        latencies_ms=[1.0, 2.0, 3.0],
    )  # fmt: skip
    page = (tmp_path / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 4
    assert json.loads((tmp_path / "report.json").read_text()) == json.loads(json.dumps(document))
