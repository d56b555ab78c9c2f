"""Notes of services, and stopping those of which little is left. No Ray is started here."""

from __future__ import annotations

import dataclasses
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from membank.bank_service.cluster import Endpoint, down, list_running, state
from membank.bank_service.cluster.local_ray import marked_processes
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


@contextmanager
def process_of_ray(mark: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run a process that carries the mark of a Ray of our own."""
    process = subprocess.Popen(["sleep", "60"], env={**os.environ, "MEMBANK_RAY_MARK": mark})
    try:
        while not marked_processes(mark):  # the test's timeout bounds it
            pass
        yield process
    finally:
        process.kill()
        process.wait()


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


def test_a_service_that_could_not_be_asked_to_stop_runs_on_and_is_not_forgotten(
    tmp_path: Path,
) -> None:
    endpoint = dataclasses.replace(
        endpoint_of("s3://b/bank", ray_mark=tmp_path.name, folder=tmp_path),
        ray_address="no..name:1",  # refused before anything is dialled
    )
    state.save(endpoint, tmp_path)
    with process_of_ray(tmp_path.name) as process:
        with pytest.raises(UnicodeError):
            down(runtime_dir=tmp_path)
        assert process.poll() is None
        assert list_running(tmp_path) == (endpoint,)


def test_a_note_that_cannot_be_read_hides_no_other_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    endpoint = endpoint_of("s3://b/bank", ray_mark=None, folder=tmp_path)
    state.save(endpoint, tmp_path)
    unreadable = state.note_path("other", tmp_path)
    unreadable.mkdir()
    assert list_running(tmp_path) == (endpoint,)
    assert str(unreadable) in caplog.text


def test_a_note_that_cannot_be_removed_is_named(tmp_path: Path) -> None:
    endpoint = endpoint_of("s3://b/bank", ray_mark=None, folder=tmp_path)
    note = state.note_path(endpoint.key, tmp_path)
    note.mkdir()
    with pytest.raises(FailedPreconditionError, match="cannot remove") as caught:
        state.forget(endpoint, tmp_path)
    assert caught.value.reason is Reason.BAD_CONFIG
    assert str(note) in str(caught.value)
