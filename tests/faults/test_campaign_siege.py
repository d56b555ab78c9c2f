"""The clients of a campaign of kills come to an end, whatever becomes of the service."""

from __future__ import annotations

import time
from pathlib import Path
from threading import Event

import pytest

import campaign_clients
from campaign_calls import ServiceGone
from campaign_clients import Line
from campaign_setting import Seat, Setting


@pytest.mark.timeout(20)
def test_client_gives_up_on_a_process_that_died_and_is_taken_for_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(campaign_clients, "PATIENCE_S", 0.2)
    setting = Setting(
        name=f"nobody-{tmp_path}", url=str(tmp_path), journal_dir=tmp_path, folder=tmp_path
    )
    up = {seat: Event() for seat in Seat}
    line = Line(setting, up)
    up[Seat.SHARD_0].set()

    began = time.monotonic()
    for seat in (Seat.SHARD_0, Seat.SHARD_1):
        with pytest.raises(ServiceGone):
            line.insist(seat, "survey")
    assert time.monotonic() - began < 10
