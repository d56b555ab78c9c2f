"""The scanner itself: it finds what is there, wherever that is, and nothing else."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

import raw_scan
from raw_scan import marked, needles, pattern, scan_files, scan_process, stopped

CONTENT = marked((1000,), 1)
WANTED = needles("content", CONTENT)

# Each keeps the content in another kind of memory. It comes in a file, so that no copy is in a buffer.
_KEEPERS = {
    "allocator": "kept = np.array(content)",
    "large": "kept = np.concatenate([content] * 1000)",
    "freed": "kept = np.array(content); extra = np.array(content); del extra, kept",
    "memfd": "kept = os.memfd_create('kept'); os.write(kept, content)",
    "unlinked": (
        "kept = open(sys.argv[1] + '.gone', 'wb'); kept.write(content);"
        "kept.flush(); os.unlink(kept.name)"
    ),
    "mapped": "kept = np.memmap(sys.argv[1], np.float32, 'r+'); kept[:] = kept + 0",
    "private": "kept = np.memmap(sys.argv[1], np.float32, 'c'); kept[:] = kept + 0",
    "stack": "import ctypes; kept = (ctypes.c_char * content.nbytes).from_buffer_copy(content)",
}
_SCRIPT = """
import mmap, os, sys
import numpy as np
content = np.memmap(sys.argv[1], np.float32, "r")
{keep}
del content
print("ready", flush=True)
sys.stdin.read()
"""


@contextmanager
def keeper(script: str, path: Path) -> Iterator[int]:
    """Run a process that keeps content; yield its id."""
    process = subprocess.Popen(
        [sys.executable, "-c", _SCRIPT.format(keep=script), str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == b"ready\n"
        yield process.pid
    finally:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()


@pytest.mark.parametrize("kind", _KEEPERS)
def test_content_is_found_in_any_kind_of_memory(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "content"
    path.write_bytes(CONTENT.tobytes())
    with keeper(_KEEPERS[kind], path) as pid, stopped(pid):
        found = scan_process(pid, WANTED)
    assert {finding.name for finding in found} == set(WANTED)


def test_a_process_that_has_nothing_is_clean(tmp_path: Path) -> None:
    path = tmp_path / "content"
    path.write_bytes(CONTENT.tobytes())
    overwritten = "kept = np.array(content); kept[:] = 0"
    with keeper(overwritten, path) as pid, stopped(pid):
        assert scan_process(pid, WANTED) == []
        assert scan_process(pid, needles("other", marked((1000,), 2))) == []


def test_files_are_looked_through_across_reads_and_holes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(raw_scan, "_READ_BYTES", 4096)
    folder = tmp_path / "a" / ".hidden"
    folder.mkdir(parents=True)
    for offset in range(4096 - 64, 4096 + 64, 7):
        with (folder / f"{offset}.tmp").open("wb") as file:
            file.seek(1 << 30)  # a hole, which takes neither space nor time
            file.write(b"\0" * offset + CONTENT[:16].tobytes())
    found = scan_files(tmp_path, WANTED)
    assert len(found) == 2 * len(list(folder.iterdir()))
    assert scan_files(tmp_path, needles("other", marked((1000,), 2))) == []


def test_every_fragment_longer_than_one_and_a_half_periods_is_found(tmp_path: Path) -> None:
    data = CONTENT.tobytes()
    period = pattern(1).nbytes
    for start in range(period):
        path = tmp_path / "fragment"
        path.write_bytes(data[start : start + period * 3 // 2])
        assert scan_files(tmp_path, WANTED), start


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_needles_of_other_element_types_are_their_own(tmp_path: Path, dtype: str) -> None:
    import ml_dtypes  # noqa: F401  # makes bfloat16 known to numpy

    content = CONTENT.astype(np.dtype(dtype))
    (tmp_path / "file").write_bytes(b"x" + content.tobytes())
    assert {finding.name for finding in scan_files(tmp_path, needles("it", content))} == set(
        needles("it", content)
    )


def test_whoever_may_not_be_looked_at_is_no_clean_process() -> None:
    with pytest.raises(ProcessLookupError):
        os.kill(2**22 - 3, 0)
    with pytest.raises((FileNotFoundError, ProcessLookupError)):
        scan_process(2**22 - 3, WANTED)
