"""Notes of services, and stopping those of which little is left. No Ray is started here."""

from __future__ import annotations

from pathlib import Path

import pytest

from membank.bank_service.cluster import Endpoint, down, list_running, state
from membank.bank_service.rpc.server import free_port
from membank.wire.errors import FailedPreconditionError, Reason, UnavailableError


def endpoint_of(bank: str, *, ray_mark: str | None, folder: Path) -> Endpoint:
    """Return a service in a Ray that is not there."""
    return Endpoint(
        address="127.0.0.1:7600",
        bank_url=bank,
        ray_address=f"127.0.0.1:{free_port('127.0.0.1')}",
        ray_dir=None if ray_mark is None else str(folder),
        ray_mark=ray_mark,
        num_shards=2,
    )


def test_a_service_whose_own_ray_is_gone_may_have_left_something_in_every_journal(
    tmp_path: Path,
) -> None:
    notes = tmp_path / "notes"
    state.save(endpoint_of("s3://b/bank", ray_mark="nobody", folder=tmp_path / "ray"), notes)
    stopped = down(runtime_dir=notes)
    assert stopped.unfolded == ("shard-0", "shard-1")
    assert list_running(notes) == ()


def test_a_service_in_a_ray_that_does_not_answer_is_not_forgotten(tmp_path: Path) -> None:
    endpoint = endpoint_of("s3://b/bank", ray_mark=None, folder=tmp_path)
    state.save(endpoint, tmp_path)
    with pytest.raises(UnavailableError, match="may still run there") as caught:
        down(runtime_dir=tmp_path)
    assert list_running(tmp_path) == (endpoint,)
    (note,) = tmp_path.iterdir()
    assert str(note) in str(caught.value), "somebody who knows that it is gone can say so"


def test_a_place_where_nothing_can_be_noted_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    endpoint = endpoint_of("s3://b/bank", ray_mark=None, folder=tmp_path)
    with pytest.raises(FailedPreconditionError, match="MEMBANK_RUNTIME_DIR") as caught:
        state.save(endpoint, tmp_path / "file")
    assert caught.value.reason is Reason.BAD_CONFIG
