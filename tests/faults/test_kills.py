"""kill -9 of a whole service at random moments: nothing acknowledged is lost, doubled or torn.

A short campaign of each kind; ``make faults COUNT=200`` runs long ones.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

import campaign_clients
import campaign_siege
from bad_settings import ForgetfulSetting, HoardingSetting, LateSetting
from campaign_bad_settings import MortalSetting
from campaign_model import Wrong
from campaign_service import preloaded_context
from campaign_setting import Promise, Setting
from campaign_siege import LOCAL_PACE, LOCAL_PROMISES, S3_PACE, S3_PROMISES, Pace, Siege, Trigger
from campaign_tally import Tally
from membank.bank_service.shard import Durability
from s3_server import S3Place

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


PROCESS = Promise(Durability.PROCESS)


def _besiege(
    setting: Setting,
    num_kills: int,
    pace: Pace = LOCAL_PACE,
    promises: Sequence[Promise] = (PROCESS,),
) -> Tally:
    tally = Tally()
    Siege(preloaded_context(), setting, tally, seed="test", pace=pace, promises=promises).run(
        num_kills
    )
    return tally


def _local(folder: Path) -> Setting:
    return Setting(
        name=uuid.uuid4().hex,
        url=str(folder / "bank"),
        journal_dir=folder / "journals",
        folder=folder,
    )


def test_local_bank_survives_kills(tmp_path: Path) -> None:
    tally = _besiege(_local(tmp_path / "siege"), 15, promises=LOCAL_PROMISES)

    assert tally.failures == []
    assert tally.kills >= 15
    assert not tally.is_vacuous
    assert tally.machines_lost == 1
    assert tally.gradients_gone < tally.shipped


@pytest.mark.s3
def test_bank_in_a_bucket_survives_kills(tmp_path: Path, s3_place: S3Place) -> None:
    local = _local(tmp_path / "siege")
    setting = replace(local, url=s3_place.url, environment=s3_place.server.owner.environment)

    tally = _besiege(setting, 8, S3_PACE, S3_PROMISES)

    assert tally.failures == []
    assert tally.kills >= 8
    assert not tally.is_vacuous
    assert tally.machines_lost == 1
    assert tally.gradients_gone < tally.shipped


def test_campaign_finds_updates_that_were_acknowledged_before_they_were_written(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "siege"

    tally = _besiege(LateSetting(**vars(_local(folder))), 20)

    # The check of the bank may be the first to see the hole, where a segment had ended.
    assert tally.wrong[Wrong.LOST] + tally.wrong[Wrong.FSCK]
    assert tally.kills < 20
    assert (folder / "before" / "journals").is_dir()


def test_campaign_finds_updates_that_are_applied_again(tmp_path: Path) -> None:
    tally = _besiege(ForgetfulSetting(**vars(_local(tmp_path / "siege"))), 20)

    assert tally.wrong[Wrong.DOUBLED]
    assert tally.kills < 20


def test_campaign_finds_deleted_content(tmp_path: Path) -> None:
    tally = _besiege(HoardingSetting(**vars(_local(tmp_path / "siege"))), 40)

    assert tally.wrong[Wrong.RESURRECTED]
    assert tally.kills < 40


def test_campaign_finds_deleted_content_that_comes_back_in_a_later_life(tmp_path: Path) -> None:
    tally = Tally()
    setting = _local(tmp_path / "siege")
    siege = Siege(
        preloaded_context(), setting, tally, seed="test", pace=LOCAL_PACE, promises=(PROCESS,)
    )
    assert siege.run(15)
    # As if a machine that was taken for dead had written what it still held.
    (setting.journal_dir / "late").write_bytes(siege.history.forbidden[0])

    assert not siege.run(0)
    assert tally.wrong[Wrong.RESURRECTED]


def test_campaign_finds_a_process_that_somebody_else_kills(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(campaign_clients, "PATIENCE_S", 10.0)

    tally = _besiege(MortalSetting(**vars(_local(tmp_path / "siege"))), 20)

    assert tally.wrong[Wrong.FAILED]
    assert "died by itself" in str(tally.failures)


def test_service_that_is_killed_at_its_start_is_not_blamed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = {Trigger.CALL_AT_START: 3, Trigger.CLOCK_AT_START: 1}
    monkeypatch.setattr(campaign_siege, "TRIGGERS", weights)

    tally = _besiege(_local(tmp_path / "siege"), 20, promises=LOCAL_PROMISES)

    assert tally.failures == []
    assert tally.kills > tally.restarts
    assert sum(tally.calls.values()) == sum(
        tally.triggers[trigger] for trigger in (Trigger.CALL, Trigger.CALL_AT_START)
    )


def test_campaign_finds_updates_that_a_clean_stop_left_in_a_journal(tmp_path: Path) -> None:
    tally = _besiege(replace(_local(tmp_path / "siege"), folds_at_stop=False), 3)

    assert tally.kills >= 3
    assert tally.wrong[Wrong.LOST]


def test_campaign_finds_updates_that_were_not_copied_before_the_machine_was_lost(
    tmp_path: Path,
) -> None:
    never = Promise(Durability.PROCESS, ship_every_s=1000.0)

    tally = _besiege(_local(tmp_path / "siege"), 1, promises=[never])

    assert tally.machines_lost == 1
    assert tally.wrong[Wrong.LOST]
