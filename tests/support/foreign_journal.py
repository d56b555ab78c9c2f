"""The updates that a bank's journals hold, read as docs/format.md says: no code of membank."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import google_crc32c

SEGMENT, UPDATE, CONTINUED, IMAGE = 1, 2, 3, 4
HEADER_BYTES = 28
UNFINISHED = (0, 0, b"")


@dataclass(frozen=True)
class ForeignUpdate:
    """One update: its head, and the bytes of the arrays that belong to it."""

    lsn: int
    is_image: bool
    head: dict[str, Any]
    arrays: bytes


@dataclass
class _Log:
    """What one place holds of a partition's journal."""

    head: dict[str, Any] = field(default_factory=dict)
    """Of the newest segment."""
    updates: dict[int, ForeignUpdate] = field(default_factory=dict)
    """By LSN."""


def read_updates(partition: Path, manifest: dict[str, Any]) -> list[ForeignUpdate]:
    """Return the updates of a partition that came after a manifest, in order.

    Parameters
    ----------
    partition
        Folder of the partition.
    manifest
        Head of the manifest in force.
    """
    local = sorted((partition / "journal").glob("*.log"), key=_rank)
    stored = sorted((partition / "log").glob("*"), key=lambda path: int(path.name))
    found: dict[int, ForeignUpdate] = {}
    for paths in (stored, local):
        log = _read_log(paths)
        if _continues(log.head, manifest):
            found |= log.updates
    last = max(found, default=0)
    return [found[lsn] for lsn in range(manifest["lsn"] + 1, last + 1)]


def _continues(head: dict[str, Any], manifest: dict[str, Any]) -> bool:
    if not head:
        return False
    is_same = (head["epoch"], head["owner"]) == (manifest["epoch"], manifest["owner"])
    return is_same or head["onto"] == manifest["nonce"]


def _rank(path: Path) -> tuple[int, int]:
    base, epoch = path.stem.split("-")
    return int(epoch), int(base)


def _read_log(paths: list[Path]) -> _Log:
    log = _Log()
    for path in paths:
        for kind, lsn, payload in _frames(path.read_bytes()):
            if kind == SEGMENT:
                log.head = json.loads(payload)
                assert log.head["format"] == (2 if "life" in log.head else 1)
                if log.head.get("follows", log.head["base"]) != log.head["base"]:
                    log.updates.clear()
            elif kind in (UPDATE, IMAGE):
                (length,) = struct.unpack_from("<I", payload)
                head = json.loads(payload[4 : 4 + length])
                log.updates[lsn] = ForeignUpdate(lsn, kind == IMAGE, head, payload[4 + length :])
            else:
                assert kind == CONTINUED
    return log


def _frames(data: bytes) -> Iterator[tuple[int, int, bytes]]:
    offset, life, reused = 0, 0, 0
    while offset + HEADER_BYTES <= len(data) and any(data[offset:]):
        found = _frame_at(data, offset, life if offset else 0)
        if found is None or found == UNFINISHED:
            is_written_over = offset < reused <= len(data)
            assert found == UNFINISHED or is_written_over
            assert not (is_written_over and _has_later_write(data, offset, life))
            return
        kind, lsn, payload = found
        yield kind, lsn, payload
        if kind == SEGMENT:
            head = json.loads(payload)
            life, reused = head.get("life", 0), head.get("reused", 0)
        offset += HEADER_BYTES + len(payload)


def _frame_at(data: bytes, offset: int, life: int) -> tuple[int, int, bytes] | None:
    """Return a frame, None where it does not check, `UNFINISHED` where its end is missing."""
    header = data[offset : offset + HEADER_BYTES]
    magic, kind, _, zeros, length, lsn, payload_crc, crc = struct.unpack("<4sBB2sIQII", header)
    if (magic, zeros) != (b"MBJF", bytes(2)) or google_crc32c.extend(life, header[:24]) != crc:
        return None
    payload = data[offset + HEADER_BYTES : offset + HEADER_BYTES + length]
    if len(payload) < length:
        return UNFINISHED
    return (kind, lsn, payload) if google_crc32c.value(payload) == payload_crc else None


def _has_later_write(data: bytes, offset: int, life: int) -> bool:
    for at in range(offset + 1, len(data) - HEADER_BYTES + 1):
        header = data[at : at + HEADER_BYTES]
        (crc,) = struct.unpack("<I", header[24:])
        is_whole = header[:4] == b"MBJF" and google_crc32c.extend(life, header[:24]) == crc
        if is_whole and header[5] == 0:
            return True
    return False
