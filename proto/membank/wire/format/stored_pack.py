"""What is said of a pack in the bank's own store, so that nobody has to read the pack to know it."""

from __future__ import annotations

import json
from dataclasses import dataclass

from membank.wire.crc import crc32c
from membank.wire.errors import CorruptionError, MembankError, Reason
from membank.wire.format.layout import FORMAT_VERSION
from membank.wire.records import StoredPack
from membank.wire.spec import BlockRef


@dataclass(frozen=True, kw_only=True, slots=True)
class PackRecord:
    """A pack in the bank's own store, and what a deletion must know of it."""

    pack: StoredPack
    """What callers are told."""
    sha256: str
    """Digest of the pack, hexadecimal: which of two packs of one name it is."""
    refs: frozenset[BlockRef]
    """Every block of which it has content, label or count."""


def encode_pack_record(record: PackRecord) -> bytes:
    """Encode `record` as JSON."""
    body = {
        "name": record.pack.name,
        "topic": str(record.pack.topic),
        "revision": record.pack.revision,
        "num_bytes": record.pack.num_bytes,
        "create_time_s": record.pack.create_time_s,
        "sha256": record.sha256,
        "blocks": [str(ref) for ref in sorted(record.refs)],
    }
    document = {"format": FORMAT_VERSION, "pack": body, "crc32c": _crc(body)}
    return json.dumps(document, sort_keys=True, indent=1).encode()


def decode_pack_record(data: bytes, *, key: str) -> PackRecord:
    """Decode and check what `encode_pack_record` wrote.

    Raises
    ------
    CorruptionError
        If it is not as it was written (SPEC_CORRUPT).
    """
    try:
        document = json.loads(data)
        body = document["pack"]
        if _crc(body) != document["crc32c"]:
            raise ValueError("CRC-32C does not match")
        if document["format"] != FORMAT_VERSION:
            raise ValueError("it does not say its format")
        return PackRecord(
            pack=StoredPack(
                name=str(body["name"]),
                topic=BlockRef.parse(body["topic"]),
                revision=int(body["revision"]),
                num_bytes=int(body["num_bytes"]),
                create_time_s=float(body["create_time_s"]),
            ),
            sha256=str(body["sha256"]),
            refs=frozenset(map(BlockRef.parse, body["blocks"])),
        )
    except (ValueError, KeyError, TypeError, AttributeError, MembankError) as err:
        raise CorruptionError(
            f"{key} is damaged ({err}); `membank pack delete` removes it together with its pack",
            reason=Reason.SPEC_CORRUPT,
            metadata={"key": key},
        ) from err


def _crc(body: object) -> int:
    return crc32c(json.dumps(body, sort_keys=True, separators=(",", ":")).encode())
