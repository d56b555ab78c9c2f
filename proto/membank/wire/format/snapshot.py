"""Snapshots: a name for a revision, which is then kept for as long as the name exists."""

from __future__ import annotations

import json
from dataclasses import asdict

from membank.wire.crc import crc32c
from membank.wire.errors import CorruptionError, Reason
from membank.wire.format.layout import FORMAT_VERSION
from membank.wire.records import Snapshot


def encode_snapshot(snapshot: Snapshot) -> bytes:
    """Encode `snapshot` as JSON."""
    body = asdict(snapshot)
    text = json.dumps(body, sort_keys=True, separators=(",", ":"))
    document = {"format": FORMAT_VERSION, "snapshot": body, "crc32c": crc32c(text.encode())}
    return json.dumps(document, sort_keys=True, indent=1).encode()


def decode_snapshot(data: bytes, *, key: str) -> Snapshot:
    """Decode and check a snapshot.

    Raises
    ------
    CorruptionError
        If it is not as it was written.
    """
    try:
        document = json.loads(data)
        body = document["snapshot"]
        text = json.dumps(body, sort_keys=True, separators=(",", ":"))
        if crc32c(text.encode()) != document["crc32c"]:
            raise ValueError("CRC-32C does not match")
        return Snapshot(**body)
    except (ValueError, KeyError, TypeError) as err:
        raise CorruptionError(
            f"snapshot {key} is damaged ({err}); restore the file from a copy",
            reason=Reason.SPEC_CORRUPT,
            metadata={"key": key},
        ) from err
