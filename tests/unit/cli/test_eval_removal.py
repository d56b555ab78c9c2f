"""What the removal study says to bad input: one line, and no training first."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from command_line import Ended, membank


def one_line(ended: Ended) -> str:
    assert "Traceback" not in ended.err
    # The console wraps a long line.
    text = " ".join(ended.err.split())
    assert text.count("error: ") == 1, ended.err
    assert text.startswith("error: ")
    return text


@pytest.mark.slow
def test_a_directory_for_a_file_is_refused(tmp_path: Path) -> None:
    ended = membank("eval", "removal", "--run", str(tmp_path / "run"), "--out", str(tmp_path))
    assert ended.code == 2
    assert "name a file" in one_line(ended)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("study", ["removal", "edit"])
def test_a_file_that_cannot_be_written_is_refused_before_any_work(
    tmp_path: Path, study: str
) -> None:
    (tmp_path / "file").write_text("")
    out = tmp_path / "file" / "kept.json"
    ended = membank("eval", study, "--run", str(tmp_path / "run"), "--out", str(out))
    assert ended.code == 2
    assert "--out" in one_line(ended)
    assert "cannot be written" in one_line(ended)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_study_of_another_configuration_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"topics": ["others"]}))
    ended = membank("eval", "removal", "--quick", "--run", str(tmp_path))
    assert ended.code == 4
    assert "another configuration" in one_line(ended)


@pytest.mark.slow
def test_a_damaged_configuration_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    ended = membank("eval", "removal", "--quick", "--run", str(tmp_path))
    assert ended.code == 9
    assert "config.json is damaged" in one_line(ended)


def test_no_seed_is_wrong_usage() -> None:
    ended = membank("eval", "removal", "--seeds", "0")
    assert ended.code == 2
    assert "--seeds" in ended.err


def test_eval_by_itself_still_measures_recall() -> None:
    ended = membank("eval", "--help")
    assert ended.code == 0
    assert "--perplexity" in ended.out
    assert "removal" in ended.out
