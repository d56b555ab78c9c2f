"""Which process this is."""

from __future__ import annotations

from pathlib import Path

import pytest

from membank.bank_service.shard import process


def test_a_process_stays_the_same_where_the_clock_is_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = process.this_process()
    # The kernel's time of its start, by which those of processes are told, moves with the clock.
    (tmp_path / "self").mkdir()
    (tmp_path / "self/stat").write_bytes(Path("/proc/self/stat").read_bytes())
    (tmp_path / "stat").write_text("btime 12345\n")
    monkeypatch.setattr(process, "_PROC", tmp_path)
    assert process.this_process() == before
