"""Bytes of segments: what older and newer versions wrote, and what makes no sense."""

from __future__ import annotations

import json
import struct

import pytest

from membank.bank_service.store.journal import (
    Checked,
    FrameKind,
    Ownership,
    SegmentHead,
    check_chain,
    content_frames,
    scan,
)
from membank.bank_service.store.journal.frames import (
    encode_batch,
    encode_continued,
    encode_frame,
    encode_head,
    read_frames,
)
from membank.wire.crc import crc32c
from membank.wire.errors import CorruptionError, FailedPreconditionError, Reason

OWNER = Ownership(3, "beef", "cafe")


def _head(base: int = 0, **fields: int | bool | str) -> SegmentHead:
    fields = {"follows": base, **fields}
    return SegmentHead("id", OWNER, base, **fields)  # type: ignore[arg-type]


def _segment(head: SegmentHead, num_frames: int) -> bytes:
    payloads = [[str(number).encode()] for number in range(num_frames)]
    frames = encode_batch(FrameKind.UPDATE, head.base, payloads)
    return b"".join([encode_head(head), *frames])


def _raw(kind: int, lsn: int, payload: bytes) -> bytes:
    header = struct.pack("<4sB3xIQI", b"MBJF", kind, len(payload), lsn, crc32c(payload))
    return header + struct.pack("<I", crc32c(header)) + payload


def test_a_frame_of_checked_pieces_is_the_same() -> None:
    pieces = [Checked(memoryview(data), crc32c(data)) for data in (b"lo", b"", b"ad")]
    frame = b"".join(encode_frame(FrameKind.UPDATE, 7, [b"pay", *pieces]))
    assert frame == _raw(2, 7, b"payload")


def test_bytes_that_changed_since_they_were_checked_are_found() -> None:
    changed = Checked(memoryview(b"lOad"), crc32c(b"load"))
    data = b"".join(encode_frame(FrameKind.UPDATE, 7, [b"pay", changed]))
    with pytest.raises(CorruptionError, match="payload of a frame is damaged"):
        list(read_frames("log", data))


def test_the_layout_is_that_of_the_document() -> None:
    assert b"".join(encode_frame(FrameKind.UPDATE, 7, [b"pay", b"load"])) == _raw(2, 7, b"payload")
    assert encode_continued(9) == _raw(3, 9, b"")
    fields = {
        "base": 5,
        "epoch": 3,
        "format": 1,
        "identity": "id",
        "onto": "cafe",
        "owner": "beef",
    }
    plain = json.dumps(fields, separators=(",", ":")).encode()
    assert encode_head(_head(5)) == _raw(1, 5, plain)
    fields |= {"fence": True, "follows": 4, "last": 7, "number": 6}
    full = json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()
    head = _head(5, follows=4, number=6, last=7, is_fence=True)
    assert encode_head(head) == _raw(1, 5, full)


@pytest.mark.parametrize(
    "head", [_head(), _head(5), _head(5, follows=2), _head(5, number=6, last=7, is_fence=True)]
)
def test_a_head_is_what_was_written(head: SegmentHead) -> None:
    found = scan("name", _segment(head, 2))
    assert (found.head, found.last, found.torn) == (head, head.base + 2, None)


def test_a_head_from_before_owners_had_names() -> None:
    old = json.dumps({"format": 1, "identity": "id", "epoch": 4, "base": 2}).encode()
    found = scan("name", _raw(1, 2, old) + _raw(2, 3, b"x"))
    assert found.head == SegmentHead("id", Ownership(4, "", ""), 2, 2)
    assert found.last == 3


def test_a_newer_format_is_refused() -> None:
    with pytest.raises(FailedPreconditionError, match="update it") as caught:
        scan("name", _raw(1, 0, b'{"format": 3}'))
    assert caught.value.reason is Reason.FORMAT_TOO_NEW


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"[]",
        b"3",
        b"\xff",
        b'{"format": 1}',
        b'{"format": "x"}',
        b'{"format": 1, "identity": "id", "epoch": null, "base": 0}',
        b'{"format": 1, "identity": "id", "epoch": 1, "base": 5}',
    ],
)
def test_a_head_that_makes_no_sense_is_damage(payload: bytes) -> None:
    with pytest.raises(CorruptionError) as caught:
        scan("name", _raw(1, 0, payload))
    assert caught.value.metadata == {"file": "name", "offset": "0"}


@pytest.mark.parametrize(
    ("frames", "problem"),
    [
        ([_raw(2, 1, b"")], "not the head"),
        ([encode_head(_head()), _raw(2, 2, b"")], "out of order"),
        ([encode_head(_head()), _raw(2, 1, b""), _raw(2, 1, b"")], "out of order"),
        ([encode_head(_head()), encode_head(_head())], "out of order"),
        ([encode_head(_head()), encode_continued(1)], "out of order"),
        ([encode_head(_head()), encode_continued(0), _raw(2, 1, b"")], "follows the end"),
        ([encode_head(_head()), _raw(9, 1, b"")], "kind 9 are not known"),
    ],
)
def test_frames_that_cannot_follow_each_other(frames: list[bytes], problem: str) -> None:
    with pytest.raises(CorruptionError, match=problem):
        scan("name", b"".join(frames))


def test_images_and_updates_are_content_and_nothing_else_is() -> None:
    data = b"".join([encode_head(_head()), _raw(2, 1, b"u"), _raw(4, 2, b"i"), encode_continued(2)])
    found = [(frame.lsn, frame.kind, bytes(frame.payload)) for frame in content_frames("n", data)]
    assert found == [(1, FrameKind.UPDATE, b"u"), (2, FrameKind.IMAGE, b"i")]
    assert [frame.lsn for frame in content_frames("n", data, after_lsn=1)] == [2]


def test_a_chain_starts_where_its_last_owner_started_anew() -> None:
    heads = [_head(0), _head(2), _head(9, follows=4), _head(11)]
    scans = [scan(str(number), _segment(head, 2)) for number, head in enumerate(heads)]
    assert check_chain(scans, "id") == 2
    assert check_chain(scans[:2], "id") == 0
    assert check_chain([], "id") == 0
    with pytest.raises(CorruptionError, match="frames are missing"):
        check_chain([scans[0], scans[2]], "id")
    with pytest.raises(FailedPreconditionError, match="journal of id, not of other"):
        check_chain(scans, "other")


def test_scanning_copies_no_payload() -> None:
    data = _segment(_head(), 1)
    (frame,) = content_frames("name", data)
    assert frame.payload.obj is data
