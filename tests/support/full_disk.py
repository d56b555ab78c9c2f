"""Disks that are full, or may only be read, by the kernel's own refusal."""

from __future__ import annotations

import os
import resource
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def files_up_to(num_bytes: int) -> Iterator[None]:
    """Let the kernel refuse to let any file grow beyond `num_bytes`, after a partial write."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


class SmallDisk:
    """A file system of its own, for all processes of the machine.

    Parameters
    ----------
    root
        Where it is mounted.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._filling = root / "filling"

    def fill(self) -> None:
        """Use all of its space up."""
        with self._filling.open("ab", buffering=0) as file:
            for size in (1 << 16, 1 << 12, 1):
                try:
                    while True:
                        file.write(bytes(size))
                except OSError:
                    continue  # the next smaller piece may fit

    def free(self) -> None:
        """Take `fill` back."""
        self._filling.unlink()

    def set_read_only(self, read_only: bool) -> None:
        """Refuse writes of everybody, or allow them again."""
        options = f"remount,{'ro' if read_only else 'rw'}"
        subprocess.run(["mount", "-o", options, self.root], check=True, capture_output=True)


@contextmanager
def small_disk(root: Path, num_bytes: int) -> Iterator[SmallDisk]:
    """Mount a disk of `num_bytes` at `root`; skip the test where that is not allowed."""
    root.mkdir()
    options = f"size={num_bytes}"
    try:
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "membank-test", root],
            check=False,
            capture_output=True,
        )
    except FileNotFoundError:
        pytest.skip("there is no mount command")
    if done.returncode != 0 or not os.path.ismount(root):
        pytest.skip("may not mount a small disk here; root may")
    try:
        yield SmallDisk(root)
    finally:
        # Lazily: whatever a failed test left running may still hold a file.
        subprocess.run(["umount", "--lazy", root], check=True, capture_output=True)
