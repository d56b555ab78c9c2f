"""Bytes of a journal: frames, segments of frames, and the chain that segments form.

A segment is a file, or an object, that is a sequence of frames::

    magic "MBJF" | u8 kind | 3 zero bytes | u32 length | u64 lsn | u32 payload CRC | u32 header CRC
    payload (`length` bytes)

with little-endian numbers and CRC-32C. The first frame of a segment is its head: whose it is, and
what it continues. LSNs count from 1 without gaps. Header and payload are checked apart, so that a
frame that was cut short (which a killed writer leaves) is told from one that was damaged.

Nothing here reads or changes storage: a check of a bank at rest uses the same code as an owner.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

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

FORMAT_VERSION = 1
"""Version of segments; one with a greater version is refused."""
MAX_FRAME_BYTES = (1 << 32) - 1
"""Largest payload of one frame."""

_MAGIC = b"MBJF"
_HEADER = struct.Struct("<4sB3xIQII")
_CHECKED = struct.Struct("<4sB3xIQI")
_U32 = struct.Struct("<I")
_KINDS = frozenset(kind.value for kind in FrameKind)

HEADER_BYTES = _HEADER.size
"""Bytes of a frame before its payload."""


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
    """What follows the last whole frame; None = nothing."""


def encode_frame(kind: FrameKind, lsn: int, payload: Payload) -> list[bytes | memoryview]:
    """Return the buffers of one frame; those of `payload` are not copied.

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
    checked = _CHECKED.pack(_MAGIC, kind, length, lsn, crc)
    return [checked + _U32.pack(crc32c(checked)), *buffers]


def encode_batch(
    kind: FrameKind, after_lsn: int, payloads: Sequence[Payload]
) -> list[bytes | memoryview]:
    """Return the buffers of frames with consecutive LSNs that continue from `after_lsn`.

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
        for buffer in encode_frame(kind, lsn, payload)
    ]


def encode_head(head: SegmentHead) -> bytes:
    """Return the first frame of a segment."""
    fields: dict[str, object] = {
        "format": FORMAT_VERSION,
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
    payload = json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()
    return b"".join(encode_frame(FrameKind.SEGMENT, head.base, [payload]))


def encode_continued(last_lsn: int) -> bytes:
    """Return the frame that ends a segment whose last frame is `last_lsn`."""
    return b"".join(encode_frame(FrameKind.CONTINUED, last_lsn, []))


def read_frames(name: str, data: bytes | memoryview, *, offset: int = 0) -> Iterator[Frame]:
    """Yield the frames of every kind in `data`, up to its end or to one that was cut short.

    Parameters
    ----------
    name
        The segment, for errors.
    data
        Its bytes, or those from `offset` on, which must be the start of a frame.
    offset
        Where `data` begins.

    Raises
    ------
    CorruptionError
        If a frame is damaged (JOURNAL_CORRUPT; metadata `file` and `offset`).
    """
    view = memoryview(data)
    position = 0
    while position < len(view):
        frame = _decode_frame(name, offset + position, view[position:])
        if frame is None:
            return
        yield frame
        position += HEADER_BYTES + len(frame.payload)


def content_frames(
    name: str, data: bytes | memoryview, *, after_lsn: int = 0, offset: int = 0
) -> Iterator[Frame]:
    """Yield the frames of `read_frames` that a user appended, as far as they are later."""
    for frame in read_frames(name, data, offset=offset):
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


def _decode_frame(name: str, offset: int, rest: memoryview) -> Frame | None:
    """Return the frame that begins `rest`, or None if it was never finished."""
    if len(rest) < HEADER_BYTES or not any(rest):
        # Zeros are what a file system may leave of a write that lost its power.
        return None
    magic, kind, length, lsn, payload_crc, header_crc = _HEADER.unpack_from(rest)
    if magic != _MAGIC or crc32c(rest[: _CHECKED.size]) != header_crc:
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
