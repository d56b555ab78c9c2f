"""The study of removal, small, through the command and a real service."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from command_line import membank

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1500)]


def test_the_quick_study_deletes_and_leaves_a_report_and_nothing_to_do(tmp_path: Path) -> None:
    run, out = tmp_path / "run", tmp_path / "kept" / "removal.json"
    ended = membank("eval", "removal", "--quick", "--run", str(run), "--out", str(out), "--json")
    assert ended.code == 0, ended.err
    document = json.loads(ended.out)
    assert document == json.loads(out.read_text()) == json.loads((run / "report.json").read_text())
    assert document["quick"]
    for topic in document["topics"].values():
        for reports in topic["deletion"].values():
            (report,) = reports
            assert report["num_slots_destroyed"] >= report["num_blocks"] > 0
            assert report["bytes_destroyed"] > 0
            assert report["prompts_elsewhere"] > 50
            changed = ("prompts_changed", "prompts_rerouted", "blocks_changed")
            assert [report[name] for name in changed] == [0, 0, 0]
    assert "quick study" in (run / "report.md").read_text()
    # Everything is done: a second time it reads what is there, even with no Ray to be had.
    written = {file: file.stat().st_mtime_ns for file in run.rglob("*.safetensors")}
    again = membank("eval", "removal", "--quick", "--run", str(run), "--json")
    assert again.code == 0, again.err
    topics = json.loads(again.out)["topics"]
    assert topics == document["topics"]
    assert written == {file: file.stat().st_mtime_ns for file in run.rglob("*.safetensors")}
