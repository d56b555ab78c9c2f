"""Manifests: which slot holds which version of which block of one partition.

A manifest is an immutable, numbered object. Its bytes are::

    magic "MBMANIF1" | u32 header length | header (JSON, UTF-8) | entries | u32 CRC-32C of all before

with little-endian numbers and one fixed-size record per block that was ever changed. A block
without a record is as initialised (version 0).
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from membank.wire.crc import crc32c
from membank.wire.errors import CorruptionError, Reason
from membank.wire.format.entries import ENTRY_DTYPE, Entry, EntryTable
from membank.wire.format.layout import FORMAT_VERSION
from membank.wire.spec import BlockRef

MAGIC = b"MBMANIF1"
_U32 = struct.Struct("<I")


@dataclass(frozen=True, kw_only=True, slots=True)
class AppliedRequest:
    """A push that was applied, kept so that a late retry is not applied again."""

    request_id: str
    """Id of the request."""
    results: tuple[tuple[int, int, bool, int, str], ...]
    """Per gradient: level, cluster, accepted, version, reason ("" = none)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """State of one partition at one moment."""

    partition: int
    """The partition."""
    number: int
    """Number of the manifest, from 1; +1 at each publication."""
    revision: int
    """Revision of the bank that this manifest belongs to. The newest manifest of a partition is
    the one with the greatest (revision, number) among those that count."""
    epoch: int
    """Counts the owners of the partition; grows at every takeover."""
    owner: str = ""
    """Random; names the opening of the partition that wrote it."""
    lock: str = ""
    """Identity of the lock that the owner holds while it answers; empty = it does no more."""
    lease_s: float = 0.0
    """Seconds that the owner may answer after it last made sure that it is the owner."""
    durability: str = ""
    """What the owner promised of its updates: with ``store``, those after this manifest are in the
    bank's own storage; otherwise they are where the owner keeps its journal."""
    nonce: str
    """Random; tells the writer that its own put succeeded although the answer was lost."""
    lsn: int
    """Journal position up to which (inclusive) updates are contained; 0 = none."""
    entries: Mapping[BlockRef, Entry]
    """Every block that was ever changed."""
    prepared: bool = False
    """True where it counts only if the record of its revision is a commit that names it."""
    requests: tuple[AppliedRequest, ...] = field(default=())
    """Latest applied requests, oldest first."""
    history_from: int = 0
    """Oldest revision whose end is kept: what the end of this one and of each later one needs has
    not been removed, and must not be while this manifest is in force."""


def encode_manifest(manifest: Manifest) -> bytes:
    """Encode `manifest` (module docstring)."""
    table = EntryTable.of(manifest.entries)
    header = {
        "format": FORMAT_VERSION,
        "partition": manifest.partition,
        "number": manifest.number,
        "revision": manifest.revision,
        "epoch": manifest.epoch,
        "owner": manifest.owner,
        "lock": manifest.lock,
        "lease_s": manifest.lease_s,
        "durability": manifest.durability,
        "nonce": manifest.nonce,
        "lsn": manifest.lsn,
        "prepared": manifest.prepared,
        "history_from": manifest.history_from,
        "num_entries": len(table),
        "requests": [[request.request_id, request.results] for request in manifest.requests],
    }
    head = json.dumps(header, separators=(",", ":")).encode()
    body = b"".join((MAGIC, _U32.pack(len(head)), head, table.tobytes()))
    return body + _U32.pack(crc32c(body))


def decode_manifest(data: bytes, *, num_roles: int, key: str) -> Manifest:
    """Decode and check a manifest.

    Parameters
    ----------
    data
        The object's bytes.
    num_roles
        Number of arrays per block of this bank.
    key
        Key of the object, for the error.

    Returns
    -------
    Manifest
        The manifest.

    Raises
    ------
    CorruptionError
        If any byte is not as it was written.
    """
    floor = len(MAGIC) + 2 * _U32.size
    if len(data) < floor or not data.startswith(MAGIC):
        raise _corrupt(key, "not a manifest, or cut short")
    (stored,) = _U32.unpack_from(data, len(data) - _U32.size)
    if crc32c(data[: -_U32.size]) != stored:
        raise _corrupt(key, "CRC-32C does not match")
    # From here on the bytes are what a writer wrote, so failures below are a writer's defect.
    (head_length,) = _U32.unpack_from(data, len(MAGIC))
    start = len(MAGIC) + _U32.size
    header = json.loads(data[start : start + head_length])
    table = np.frombuffer(
        data, ENTRY_DTYPE, count=header["num_entries"], offset=start + head_length
    )
    return Manifest(
        partition=header["partition"],
        number=header["number"],
        revision=header["revision"],
        epoch=header["epoch"],
        owner=header["owner"],
        lock=header["lock"],
        lease_s=header["lease_s"],
        durability=header["durability"],
        nonce=header["nonce"],
        lsn=header["lsn"],
        prepared=header["prepared"],
        # Writers before this field promised nothing of the revisions before their own.
        history_from=header.get("history_from", header["revision"]),
        entries=_entries(table, num_roles, key),
        requests=tuple(
            AppliedRequest(
                request_id=request_id,
                results=tuple((lv, cl, bool(ok), ver, why) for lv, cl, ok, ver, why in results),
            )
            for request_id, results in header["requests"]
        ),
    )


def _entries(table: np.ndarray, num_roles: int, key: str) -> EntryTable:
    try:
        return EntryTable(table, num_roles)
    except ValueError as err:
        raise _corrupt(key, str(err)) from err


def _corrupt(key: str, problem: str) -> CorruptionError:
    return CorruptionError(
        f"manifest {key}: {problem}; restore the file from a copy",
        reason=Reason.MANIFEST_CORRUPT,
        metadata={"key": key},
    )
