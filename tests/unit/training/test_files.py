"""Files that are written whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from membank.trainer.training.files import (
    read_json,
    read_tensors,
    write_atomically,
    write_json,
    write_tensors,
)
from membank.wire.errors import CorruptionError


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "run" / "state.json"
    write_json(path, {"step": 1})
    with pytest.raises(TypeError):
        write_atomically(path, "text where bytes belong")  # type: ignore[arg-type]
    assert read_json(path) == {"step": 1}
    assert [file.name for file in path.parent.iterdir()] == ["state.json"]


def test_files_have_the_mode_of_any_other_file(tmp_path: Path) -> None:
    write_atomically(tmp_path / "ours", b"")
    (tmp_path / "any").write_bytes(b"")
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "any").stat().st_mode


def test_tensors_come_back_and_another_kind_is_refused(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(6).reshape(2, 3).T, "b": torch.ones(2, dtype=torch.bfloat16)}
    write_tensors(tmp_path / "file", tensors, kind="one", meta='{"x": 1}')
    found, meta = read_tensors(tmp_path / "file", kind="one")
    assert meta == '{"x": 1}'
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    with pytest.raises(CorruptionError, match="not 'two'"):
        read_tensors(tmp_path / "file", kind="two")


@pytest.mark.parametrize("content", [b"{", b"[1]", b"\xff"])
def test_damaged_json_is_a_clear_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(CorruptionError, match="delete it"):
        read_json(tmp_path / "file")
    assert read_json(tmp_path / "missing") is None
