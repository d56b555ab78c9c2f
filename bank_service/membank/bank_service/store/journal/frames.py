"""Bytes of a journal: frames, segments of frames, and the chain that segments form.

A segment is a file, or an object, that is a sequence of frames::

    magic "MBJF" | u8 kind | u8 joined | 2 zero bytes | u32 length | u64 lsn | u32 payload CRC
    u32 header CRC | payload (`length` bytes)

with little-endian numbers and CRC-32C. The first frame of a segment is its head: whose it is, and
what it continues. LSNs count from 1 without gaps. Header and payload are checked apart, so that a
frame that was cut short (which a killed writer leaves) is told from one that was damaged.

**A segment that was written over an earlier one** (`Life`) has frames of that one behind its own. The
CRCs of its headers begin with a number of its own, so no frame of the earlier one is valid in it. Where
there is no whole frame, the segment ends, as a write may be unfinished there, unless a later write was
begun, which happens only once those before are complete: then a frame is damaged. A frame that is
`joined` proves no such thing: it was written along with the one before.

Nothing here reads or changes storage: a check of a bank at rest uses the same code as an owner.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from membank.bank_service.store.journal.contract import (
    CONTENT_KINDS,
    Checked,
    Frame,
    FrameKind,
    Ownership,
    Payload,
    TornTail,
)
from membank.wire.crc import crc32c, join_crc32c
from membank.wire.errors import (
    CorruptionError,
    FailedPreconditionError,
    InvalidArgumentError,
    Reason,
)

FORMAT_VERSION = 2
"""Version of segments; one with a greater version is refused. 1 is all that is needed without a `Life`."""
MAX_FRAME_BYTES = (1 << 32) - 1
"""Largest payload of one frame."""

_MAGIC = b"MBJF"
_HEADER = struct.Struct("<4sBB2xIQII")
_CHECKED = struct.Struct("<4sBB2xIQI")
_U32 = struct.Struct("<I")
_KINDS = frozenset(kind.value for kind in FrameKind)

HEADER_BYTES = _HEADER.size
"""Bytes of a frame before its payload."""


@dataclass(frozen=True, slots=True)
class Life:
    """What sets the frames of a segment apart from those that it was written over."""

    salt: int
    """The CRC of every header but that of the head begins with it; of 32 bits, random, never 0."""
    reused_bytes: int
    """Length that the file had: so far, bytes behind the last frame may be those of earlier lives.
    A file that is shorter was cut to its frames since."""


@dataclass(frozen=True, slots=True)
class SegmentHead:
    """First frame of a segment."""

    identity: str
    """Bank and partition, as ``BANK_ID/PARTITION``."""
    ownership: Ownership
    """Who wrote the segment."""
    base: int
    """LSN before its first frame."""
    follows: int
    """LSN of the last frame that was stored before it. Where this is not `base`, the log starts
    anew with this segment, and everything before is to be dropped."""
    number: int = 0
    """Number of the object that holds it; 0 for a file."""
    last: int | None = None
    """LSN of the last frame of an object, which is written at once; None for a file."""
    is_fence: bool = False
    """True for an object that must stay in the way of an older owner."""
    life: Life | None = None
    """Set where the segment was written over an earlier one."""


@dataclass(frozen=True, slots=True)
class SegmentScan:
    """What the bytes of a segment hold, every one of them checked."""

    name: str
    """The file or object."""
    head: SegmentHead | None
    """Its head; None = it was cut short before the head was whole."""
    last: int
    """LSN of its last frame; that of `head.base` where it has none, 0 without a head."""
    num_bytes: int
    """Bytes of whole frames, from its start."""
    is_continued: bool
    """True if it says that there is a next segment."""
    torn: TornTail | None
    """The unfinished write that follows the last whole frame; None = there is none."""
    num_stale: int = 0
    """Bytes after the last whole frame that are of earlier lives of the file, and mean nothing."""


def encode_frame(
    kind: FrameKind, lsn: int, payload: Payload, *, salt: int = 0, is_joined: bool = False
) -> list[bytes | memoryview]:
    """Return the buffers of one frame; those of `payload` are not copied.

    Parameters
    ----------
    kind, lsn
        As in `Frame`.
    payload
        Its content.
    salt
        That of the segment's `Life`; 0 = it has none.
    is_joined
        True if it is written along with the frame before.

    Raises
    ------
    InvalidArgumentError
        If the payload exceeds `MAX_FRAME_BYTES` (MESSAGE_TOO_LARGE).
    """
    crc = length = 0
    buffers: list[bytes | memoryview] = []
    for piece in payload:
        if isinstance(piece, Checked):
            data: bytes | memoryview = piece.data
            crc = join_crc32c(crc, data, piece.crc32c)
        else:
            data = piece
            crc = crc32c(data, start=crc)
        length += len(data)
        buffers.append(data)
    if length > MAX_FRAME_BYTES:
        raise InvalidArgumentError(
            f"an update of {length} bytes exceeds {MAX_FRAME_BYTES}; send its blocks apart",
            reason=Reason.MESSAGE_TOO_LARGE,
        )
    checked = _CHECKED.pack(_MAGIC, kind, is_joined, length, lsn, crc)
    return [checked + _U32.pack(crc32c(checked, start=salt)), *buffers]


def encode_batch(
    kind: FrameKind, after_lsn: int, payloads: Sequence[Payload], life: Life | None = None
) -> list[bytes | memoryview]:
    """Return the buffers of frames with consecutive LSNs that continue from `after_lsn`.

    Parameters
    ----------
    kind
        What they hold.
    after_lsn
        LSN before the first one.
    payloads
        One for each frame.
    life
        That of the segment.

    Raises
    ------
    InvalidArgumentError
        If a payload is too long, or `kind` is not for content.
    """
    if kind not in CONTENT_KINDS:
        raise InvalidArgumentError(f"frames of kind {kind.name} are the journal's own")
    return [
        buffer
        for lsn, payload in enumerate(payloads, after_lsn + 1)
        for buffer in encode_frame(
            kind,
            lsn,
            payload,
            salt=_salt_of(life),
            is_joined=life is not None and lsn > after_lsn + 1,
        )
    ]


def encode_head(head: SegmentHead) -> bytes:
    """Return the first frame of a segment."""
    fields: dict[str, object] = {
        "format": 1 if head.life is None else FORMAT_VERSION,
        "identity": head.identity,
        "epoch": head.ownership.epoch,
        "owner": head.ownership.owner,
        "onto": head.ownership.onto,
        "base": head.base,
    }
    if head.follows != head.base:
        fields["follows"] = head.follows
    if head.number:
        fields["number"] = head.number
    if head.last is not None:
        fields["last"] = head.last
    if head.is_fence:
        fields["fence"] = True
    if head.life is not None:
        fields["life"] = head.life.salt
        fields["reused"] = head.life.reused_bytes
    payload = json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()
    return b"".join(encode_frame(FrameKind.SEGMENT, head.base, [payload]))


def encode_continued(last_lsn: int, life: Life | None = None) -> bytes:
    """Return the frame that ends a segment of this `life` whose last frame is `last_lsn`."""
    return b"".join(encode_frame(FrameKind.CONTINUED, last_lsn, [], salt=_salt_of(life)))


def read_frames(
    name: str, data: bytes | memoryview, *, offset: int = 0, life: Life | None = None
) -> Iterator[Frame]:
    """Yield the frames of every kind in `data`, up to its end or to one that was cut short.

    Parameters
    ----------
    name
        The segment, for errors.
    data
        Its bytes, or those from `offset` on, which must be the start of a frame.
    offset
        Where `data` begins.
    life
        That of the segment. Not needed where `data` begins with the head, which tells.

    Raises
    ------
    CorruptionError
        If a frame is damaged (JOURNAL_CORRUPT; metadata `file` and `offset`).
    """
    view = memoryview(data)
    position = 0
    while position < len(view):
        start = offset + position
        is_head = start == 0
        may_end = life is not None and start < life.reused_bytes <= offset + len(view)
        try:
            frame = _decode_frame(name, start, view[position:], 0 if is_head else _salt_of(life))
        except CorruptionError:
            if not may_end:
                raise
            frame = None
        if frame is None:
            if may_end and life is not None and _has_later_write(view[position:], life):
                raise corrupt(name, start, "a frame is damaged, and later ones are not")
            return
        yield frame
        if is_head and life is None and frame.kind is FrameKind.SEGMENT:
            life = _decode_head(name, frame).life
        position += HEADER_BYTES + len(frame.payload)


def content_frames(
    name: str,
    data: bytes | memoryview,
    *,
    after_lsn: int = 0,
    offset: int = 0,
    life: Life | None = None,
) -> Iterator[Frame]:
    """Yield the frames of `read_frames` that a user appended, as far as they are later."""
    for frame in read_frames(name, data, offset=offset, life=life):
        if frame.kind in CONTENT_KINDS and frame.lsn > after_lsn:
            yield frame


def scan(name: str, data: bytes | memoryview) -> SegmentScan:
    """Check every byte of a segment.

    Parameters
    ----------
    name
        The file or object, for errors.
    data
        All its bytes.

    Raises
    ------
    CorruptionError
        If a complete frame was changed, or is out of order (JOURNAL_CORRUPT; metadata `file` and
        `offset`).
    FailedPreconditionError
        If a newer membank wrote it (FORMAT_TOO_NEW).
    """
    head: SegmentHead | None = None
    last = num_bytes = 0
    is_continued = False
    for frame in read_frames(name, data):
        if head is None:
            head = _decode_head(name, frame)
            last = head.base
        elif is_continued:
            raise corrupt(name, num_bytes, "a frame follows the end of the segment")
        elif frame.kind is FrameKind.CONTINUED and frame.lsn == last:
            is_continued = True
        elif frame.kind in CONTENT_KINDS and frame.lsn == last + 1:
            last = frame.lsn
        else:
            raise corrupt(name, num_bytes, f"LSN {frame.lsn} is out of order")
        num_bytes += HEADER_BYTES + len(frame.payload)
    rest = len(data) - num_bytes
    if rest and head is not None and _is_stale(memoryview(data), num_bytes, head.life):
        return SegmentScan(name, head, last, num_bytes, is_continued, None, num_stale=rest)
    torn = TornTail(name, num_bytes, rest) if rest else None
    return SegmentScan(name, head, last, num_bytes, is_continued, torn)


def check_chain(scans: Sequence[SegmentScan], identity: str) -> int:
    """Check that segments continue each other; return the index of the one where the log starts.

    Parameters
    ----------
    scans
        The segments in the order of their names. The last may be cut short; of the others the base
        of the next one tells whether a frame is missing.
    identity
        Whose journal it should be.

    Returns
    -------
    int
        Segments before it were given up by the owner that wrote it, which may have died before it
        could remove them.

    Raises
    ------
    CorruptionError
        If frames or segments are missing (JOURNAL_CORRUPT; metadata `file` and `offset`).
    FailedPreconditionError
        If a segment belongs to another bank or partition (BAD_CONFIG).
    """
    start = 0
    for index, (before, segment) in enumerate(zip([None, *scans], scans, strict=False)):
        is_last = index == len(scans) - 1
        if segment.head is None:
            # A next segment is announced only once its head is whole.
            if not is_last or (before is not None and before.is_continued):
                raise corrupt(segment.name, 0, "cut short, and frames after it existed")
            continue
        _require_identity(segment.name, segment.head, identity)
        if before is not None and segment.head.follows != before.last:
            raise corrupt(
                before.name,
                before.num_bytes,
                f"it ends with frame {before.last}, but {segment.name} follows frame "
                f"{segment.head.follows}: frames are missing",
            )
        if is_last and segment.is_continued:
            raise corrupt(segment.name, segment.num_bytes, "the next segment is missing")
        if segment.head.follows != segment.head.base:
            start = index
    return start


def corrupt(name: str, offset: int, problem: str) -> CorruptionError:
    """Return the error for damage at `offset` of a segment."""
    return CorruptionError(
        f"journal {name}, offset {offset}: {problem}; restore the file from a copy",
        reason=Reason.JOURNAL_CORRUPT,
        metadata={"file": name, "offset": str(offset)},
    )


def _require_identity(name: str, head: SegmentHead, identity: str) -> None:
    if head.identity != identity:
        raise FailedPreconditionError(
            f"{name} is the journal of {head.identity}, not of {identity}; give each bank a "
            "journal directory of its own",
            reason=Reason.BAD_CONFIG,
            metadata={"file": name},
        )


def _salt_of(life: Life | None) -> int:
    return 0 if life is None else life.salt


def _is_stale(data: memoryview, position: int, life: Life | None) -> bool:
    """Say whether what follows the last whole frame is no write that this life began."""
    if life is None or not position < life.reused_bytes <= len(data):
        return False
    return _checked_header(data[position : position + HEADER_BYTES], life) is None


def _has_later_write(rest: memoryview, life: Life) -> bool:
    """Say whether `rest` has the header of a frame of this life that begins a write of its own."""
    data = bytes(rest)
    at = data.find(_MAGIC, 1)
    while at >= 0:
        header = _checked_header(rest[at : at + HEADER_BYTES], life)
        if header is not None and not header[2]:
            return True
        at = data.find(_MAGIC, at + 1)
    return False


def _checked_header(header: memoryview, life: Life) -> tuple[Any, ...] | None:
    """Return the fields of a header of this life; None if it is none."""
    if len(header) < HEADER_BYTES:
        return None
    fields = _HEADER.unpack(header)
    is_whole = (
        fields[0] == _MAGIC and crc32c(header[: _CHECKED.size], start=life.salt) == fields[-1]
    )
    return fields if is_whole else None


def _decode_frame(name: str, offset: int, rest: memoryview, salt: int) -> Frame | None:
    """Return the frame that begins `rest`, or None if it was never finished."""
    if len(rest) < HEADER_BYTES or not any(rest):
        # Zeros are what a file system may leave of a write that lost its power.
        return None
    magic, kind, _, length, lsn, payload_crc, header_crc = _HEADER.unpack_from(rest)
    if magic != _MAGIC or crc32c(rest[: _CHECKED.size], start=salt) != header_crc:
        raise corrupt(name, offset, "the header of a frame is damaged")
    payload = rest[HEADER_BYTES : HEADER_BYTES + length]
    if len(payload) < length:
        return None
    if crc32c(payload) != payload_crc:
        raise corrupt(name, offset, "the payload of a frame is damaged")
    if kind not in _KINDS:
        raise corrupt(name, offset, f"frames of kind {kind} are not known here")
    return Frame(lsn, FrameKind(kind), payload)


def _decode_head(name: str, frame: Frame) -> SegmentHead:
    if frame.kind is not FrameKind.SEGMENT:
        raise corrupt(name, 0, "the first frame is not the head of a segment")
    try:
        fields = json.loads(bytes(frame.payload))
        found = int(fields["format"])
        if found <= FORMAT_VERSION:
            # Heads of old logs name no owner; "" is also what their manifests say.
            onto, owner = str(fields.get("onto", "")), str(fields.get("owner", ""))
            base = int(fields["base"])
            head = SegmentHead(
                identity=str(fields["identity"]),
                ownership=Ownership(int(fields["epoch"]), owner, onto),
                base=base,
                follows=int(fields.get("follows", base)),
                number=int(fields.get("number", 0)),
                last=int(fields["last"]) if "last" in fields else None,
                is_fence=bool(fields.get("fence", False)),
                life=Life(int(fields["life"]), int(fields["reused"])) if "life" in fields else None,
            )
    except (ValueError, KeyError, TypeError, AttributeError) as err:
        raise corrupt(name, 0, f"the head of the segment makes no sense ({err})") from err
    if found > FORMAT_VERSION:
        raise FailedPreconditionError(
            f"{name} has format {found}, and this membank reads up to {FORMAT_VERSION}; update it",
            reason=Reason.FORMAT_TOO_NEW,
            metadata={"file": name},
        )
    if head.base != frame.lsn:
        raise corrupt(name, 0, f"the head says {head.base} and its frame {frame.lsn}")
    return head
