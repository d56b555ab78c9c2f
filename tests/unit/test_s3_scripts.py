"""The scripts of the tests' S3 server: what they say where they cannot do their work, and what they leave."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from s3_server import SCRIPTS, why_no_s3


def _path_with(folder: Path, *names: str) -> str:
    """Return a PATH on which there are only these programs."""
    folder.mkdir()
    for name in names:
        found = shutil.which(name)
        assert found is not None
        (folder / name).symlink_to(found)
    return str(folder)


def test_install_says_why_not_and_succeeds(tmp_path: Path) -> None:
    path = _path_with(tmp_path / "bin", "bash", "id")
    said = subprocess.run(
        [shutil.which("bash") or "bash", SCRIPTS / "install.sh"],
        env={"PATH": path},
        capture_output=True,
        text=True,
        check=True,
    )
    assert said.stdout.splitlines()[-1].startswith("s3-server: absent (")


def test_without_a_server_the_reason_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.delenv("MEMBANK_TEST_S3_URL", raising=False)
    assert "scripts/s3/install.sh" in (why_no_s3() or "")
    monkeypatch.setenv("MEMBANK_TEST_S3_URL", "s3://bucket")
    assert why_no_s3() is None


def _processes_of(folder: Path) -> list[str]:
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = entry.read_bytes().split(b"\0")
        except (FileNotFoundError, ProcessLookupError):
            continue
        if f"{folder}/ceph.conf".encode() in command:
            found.append(command[0].decode())
    return found


@pytest.mark.s3
@pytest.mark.slow
def test_a_start_that_fails_leaves_no_daemon(tmp_path: Path) -> None:
    broken = tmp_path / "bin"
    broken.mkdir()
    (broken / "radosgw").write_text("#!/bin/sh\nexit 1\n")
    (broken / "radosgw").chmod(0o755)
    said = subprocess.run(
        [SCRIPTS / "start.sh", tmp_path / "server"],
        env={**os.environ, "PATH": f"{broken}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert said.returncode != 0
    assert "no S3 server" in said.stderr
    assert _processes_of(tmp_path / "server") == []


@pytest.mark.s3
@pytest.mark.slow
def test_two_servers_live_side_by_side_and_stop_ends_its_own(tmp_path: Path) -> None:
    folders = [tmp_path / "one", tmp_path / "two"]
    try:
        for folder in folders:
            subprocess.run([SCRIPTS / "start.sh", folder], check=True, stdout=subprocess.DEVNULL)
        subprocess.run([SCRIPTS / "stop.sh", folders[0]], check=True)
        assert _processes_of(folders[0]) == []
        assert sorted(_processes_of(folders[1])) == ["ceph-mon", "ceph-osd", "radosgw"]
    finally:
        for folder in folders:
            subprocess.run([SCRIPTS / "stop.sh", folder], check=False)
