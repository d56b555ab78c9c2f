"""Revision records: each commits one transaction and says who did what.

A record is created once and never changed. Creating it is the commit of the transaction: whoever
creates the object of a revision first decides whether that revision is a commit or an abort. The
records form a chain (each holds the SHA-256 of the one before) and are the bank's audit log.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

from membank.wire.errors import CorruptionError, Reason
from membank.wire.format.layout import FORMAT_VERSION

REQUEST_SHA256 = "request_sha256"
"""Name under which the detail of a record has a digest of what was asked."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RevisionRecord:
    """One committed (or aborted) transaction."""

    revision: int
    """Number of the revision; 0 is the creation of the bank."""
    committed: bool
    """False for a transaction that was given up; the bank stays as at the revision before."""
    nonce: str
    """Random; tells the writer that its own put succeeded although the answer was lost."""
    previous_sha256: str
    """SHA-256 of the record of the revision before; empty for revision 0."""
    operation: str
    """What was done, such as "delete"."""
    principal: str
    """Who did it."""
    request_id: str
    """Id of the request; a retry finds its answer here."""
    time_s: float
    """When, seconds since 1970-01-01 UTC."""
    manifests: Mapping[int, int] = field(default_factory=dict)
    """Manifest number of each partition that the transaction changed."""
    tree_revision: int = 0
    """Revision whose tree document is in force."""
    removal_revision: int = 0
    """Newest revision that withheld or deleted something."""
    detail: Mapping[str, object] = field(default_factory=dict)
    """What it was applied to, and the answer to a retry; no content, no labels."""


def encode_revision(record: RevisionRecord) -> bytes:
    """Encode `record` as JSON with a fixed order of keys."""
    body = {"format": FORMAT_VERSION, **asdict(record)}
    body["manifests"] = {str(part): number for part, number in sorted(record.manifests.items())}
    text = json.dumps(body, sort_keys=True, separators=(",", ":"))
    digest = hashlib.sha256(text.encode()).hexdigest()
    return json.dumps({"record": body, "sha256": digest}, sort_keys=True, indent=1).encode()


def decode_revision(data: bytes, *, key: str) -> RevisionRecord:
    """Decode and check a record.

    Raises
    ------
    CorruptionError
        If it is not as it was written.
    """
    try:
        document = json.loads(data)
        body = document["record"]
        text = json.dumps(body, sort_keys=True, separators=(",", ":"))
        if hashlib.sha256(text.encode()).hexdigest() != document["sha256"]:
            raise ValueError("SHA-256 does not match")
        body.pop("format")
        body["manifests"] = {int(part): number for part, number in body["manifests"].items()}
        return RevisionRecord(**body)
    except (ValueError, KeyError, TypeError) as err:
        raise CorruptionError(
            f"revision record {key} is damaged ({err}); restore the file from a copy",
            reason=Reason.MANIFEST_CORRUPT,
            metadata={"key": key},
        ) from err


def record_sha256(data: bytes) -> str:
    """Return what the next record's `previous_sha256` must be, given this record's bytes."""
    return hashlib.sha256(data).hexdigest()
