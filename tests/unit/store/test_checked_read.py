"""A checked read returns the file and its checksum, whatever its size."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from membank.bank_service.store import checked_read
from membank.bank_service.store.checked_read import read_checked
from membank.wire.crc import crc32c

TRAILER = 4


@pytest.fixture
def _small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make small files take the way of large ones."""
    monkeypatch.setattr(checked_read, "_SPLIT_BYTES", 8)
    monkeypatch.setattr(checked_read, "_PART_BYTES", 3)


@pytest.mark.usefixtures("_small_parts")
@pytest.mark.parametrize("length", [*range(24), 101])
@pytest.mark.parametrize("missing", [0, 1, 5, 60])
def test_content_and_checksum(tmp_path: Path, length: int, missing: int) -> None:
    content = random.Random(length).randbytes(length + TRAILER)
    stored = content[: max(0, len(content) - missing)]
    path = tmp_path / "object"
    path.write_bytes(stored)
    data, crc = read_checked(str(path), length)
    assert data.readonly
    assert bytes(data) == stored
    assert crc == crc32c(stored[:length])


@pytest.mark.parametrize("num_bytes", [(2 << 20) - 1, 2 << 20, (9 << 20) + 3])
def test_files_of_real_sizes(tmp_path: Path, num_bytes: int) -> None:
    content = random.Random(0).randbytes(num_bytes + TRAILER)
    path = tmp_path / "object"
    path.write_bytes(content)
    data, crc = read_checked(str(path), num_bytes)
    assert bytes(data) == content
    assert crc == crc32c(content[:num_bytes])


def test_an_error_of_the_system_is_told(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_checked(str(tmp_path / "none"), 4)
    with pytest.raises(IsADirectoryError):
        read_checked(str(tmp_path), 4)
