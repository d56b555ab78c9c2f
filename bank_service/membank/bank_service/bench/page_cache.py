"""Files in and out of the page cache."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path


def drop(files: Iterable[Path]) -> None:
    """Take files out of the page cache."""
    for file in files:
        handle = os.open(file, os.O_RDONLY)
        try:
            # Pages that wait to be written cannot be dropped.
            os.fdatasync(handle)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(handle)


def is_cached(file: Path) -> bool:
    """Say whether the beginning of a file can be read without a device."""
    handle = os.open(file, os.O_RDONLY)
    try:
        os.preadv(handle, [bytearray(1)], 0, os.RWF_NOWAIT)
    except BlockingIOError:
        return False
    except OSError:
        return True  # the file system cannot tell
    else:
        return True
    finally:
        os.close(handle)
