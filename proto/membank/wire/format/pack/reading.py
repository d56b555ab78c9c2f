"""Reading a pack: its arrays stay where they lie, in memory or in a mapped file."""

from __future__ import annotations

import json
from collections.abc import Mapping

from membank.wire.crc import Buffer, crc32c
from membank.wire.errors import (
    CorruptionError,
    FailedPreconditionError,
    InvalidArgumentError,
    MembankError,
    Reason,
)
from membank.wire.format.pack.contract import Pack
from membank.wire.format.pack.digest import canonical, sha256_of
from membank.wire.format.pack.document import METADATA_KEY, PACK_VERSION, object_of, pack_of
from membank.wire.format.pack.tensors import decode_file
from membank.wire.signing import Signature
from membank.wire.spec import Array

_REQUIRED = frozenset({"pack", "sha256"})
_OPTIONAL = frozenset({"signatures"})


def decode_pack(data: Buffer, *, what: str = "the pack") -> Pack:
    """Decode a pack and check that it is whole; who signed it is for `check_signatures` to say.

    Parameters
    ----------
    data
        The file's bytes, flat; also those of a mapped file. The pack's arrays are views of them.
    what
        Its name, for errors.

    Returns
    -------
    Pack
        The pack.

    Raises
    ------
    InvalidArgumentError
        If it is not a pack at all (BAD_PACK).
    CorruptionError
        If it is one and its bytes were changed (CHECKSUM_MISMATCH); the message names the damaged
        array. Or if a signature cannot be read (BAD_SIGNATURE).
    FailedPreconditionError
        If it was written by a newer membank (FORMAT_TOO_NEW).
    """
    document, arrays = _open(data, what)
    try:
        body, digest = object_of(document["pack"]), document["sha256"]
        version = int(str(body["format"]))
    except (ValueError, KeyError, TypeError) as err:
        raise _not_a_pack(what, f"its metadata is not a pack's ({err!r})") from err
    if version > PACK_VERSION:
        raise FailedPreconditionError(
            f"{what} has format {version}; this membank reads up to {PACK_VERSION}: upgrade it",
            reason=Reason.FORMAT_TOO_NEW,
            metadata={"format": str(version)},
        )
    if not _REQUIRED <= document.keys() <= _REQUIRED | _OPTIONAL:
        # A signature under a name that nobody looks for would be none.
        raise _not_a_pack(what, f"its metadata has other fields: {', '.join(document)}")
    if sha256_of(body, arrays) != digest:
        raise _damaged(what, body, arrays)
    signatures = _signatures(document.get("signatures"), what)
    try:
        return pack_of(body, arrays, sha256=str(digest), signatures=signatures)
    except (ValueError, KeyError, TypeError, AttributeError, MembankError) as err:
        # The digest is right, so this is what its writer wrote.
        raise _not_a_pack(what, f"its content does not fit together ({err!r})") from err


def document_of(data: Buffer, *, what: str) -> dict[str, object]:
    """Return the JSON document of a pack, not checked; errors as for `decode_pack`."""
    return _open(data, what)[0]


def _open(data: Buffer, what: str) -> tuple[dict[str, object], dict[str, Array]]:
    try:
        metadata, arrays = decode_file(data)
    except (ValueError, RecursionError) as err:
        problem = f"not a safetensors file of blocks, or cut short ({err})"
        raise _not_a_pack(what, problem) from err
    try:
        document = object_of(json.loads(metadata[METADATA_KEY]))
        if metadata != {METADATA_KEY: canonical(document)}:
            raise ValueError("not written as membank writes it")
    except (ValueError, KeyError, TypeError, RecursionError) as err:
        raise _not_a_pack(what, f"its metadata is not a pack's ({err!r})") from err
    return document, arrays


def _signatures(body: object, what: str) -> tuple[Signature, ...]:
    if body is None:
        return ()
    if not isinstance(body, list) or not body:
        raise _unreadable_signature(what)
    signatures = tuple(Signature.from_json(entry, what=what) for entry in body)
    if [signature.to_json() for signature in signatures] != body:
        # Base64 has several spellings of the same bytes, and takes some that are none.
        raise _unreadable_signature(what)
    return signatures


def _damaged(what: str, body: Mapping[str, object], arrays: Mapping[str, Array]) -> CorruptionError:
    crcs = body.get("crc32c")
    known = crcs if isinstance(crcs, dict) else {}
    wrong = [name for name in sorted(arrays) if crc32c(arrays[name]) != known.get(name)]
    where = f"array {wrong[0]}" if wrong else "its metadata"
    return CorruptionError(
        f"{what} was changed after it was written ({where}); take another copy of it",
        reason=Reason.CHECKSUM_MISMATCH,
        metadata={"damaged": wrong[0] if wrong else "metadata"},
    )


def _unreadable_signature(what: str) -> CorruptionError:
    return CorruptionError(
        f"the signatures of {what} cannot be read; take another copy of it",
        reason=Reason.BAD_SIGNATURE,
    )


def _not_a_pack(what: str, problem: str) -> InvalidArgumentError:
    return InvalidArgumentError(f"{what} is not a pack: {problem}", reason=Reason.BAD_PACK)
