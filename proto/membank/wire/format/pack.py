"""Packs: a topic as one safetensors file that its owner can carry.

Arrays are named ``LEVEL/CLUSTER/ROLE`` (roles as in the bank, `Role`) and ``LEVEL/CLUSTER/centroid``;
elements are kept as in the bank, bfloat16 included, so that any safetensors reader opens them. The
metadata key ``membank.pack`` holds JSON: ``pack`` is all else, the CRC-32C of every array among it,
and ``sha256`` is the digest of ``pack`` and of every array. Equal packs are equal files.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy
from safetensors import SafetensorError

from membank.wire.crc import as_uint8, crc32c
from membank.wire.errors import (
    CorruptionError,
    FailedPreconditionError,
    InvalidArgumentError,
    MembankError,
    Reason,
)
from membank.wire.format.document import spec_from_json, spec_to_json
from membank.wire.format.tree import TreeDocument
from membank.wire.spec import Array, BankSpec, BlockRef, Role

PACK_VERSION = 1
"""Version of the layout; a reader refuses a pack with a greater one."""

_METADATA_KEY = "membank.pack"
_CENTROID = "centroid"
_HEADER_LENGTH = struct.Struct("<Q")
# safetensors' own loader for numpy does not know BF16.
_DTYPES: dict[str, np.dtype[np.generic]] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedBlock:
    """One block of a pack."""

    ref: BlockRef
    """The block."""
    version: int
    """Version it had when it was exported."""
    step: int
    """Gradient steps it had taken."""
    weight: Array
    """(L, P, R, D) in the bank's dtype."""
    optimizer_state: Mapping[Role, Array] = field(default_factory=dict)
    """(L, P, R, D) float32 per role; empty = exported without."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Pack:
    """A topic and what is needed to install it elsewhere."""

    spec: BankSpec
    """Spec of the bank it comes from; its fingerprint says which anchor the blocks belong to."""
    topic: BlockRef
    """The topic."""
    revision: int
    """Revision of the bank it was read at."""
    blocks: tuple[PackedBlock, ...]
    """The blocks of the topic that were not deleted, by level, then by cluster."""
    labels: Mapping[BlockRef, str] = field(default_factory=dict)
    """Labels of the topic and of those under it."""
    num_documents: Mapping[BlockRef, int] = field(default_factory=dict)
    """Documents of the training corpus in each of them."""
    centroids: Mapping[BlockRef, Array] = field(default_factory=dict)
    """(dims,) float32 of each of them; rows of NaN are left out."""
    retriever_sha256: str = ""
    """`retriever_sha256` of the bank's tree: centroids mean nothing to another; "" = no retriever."""


def retriever_sha256(tree: TreeDocument) -> str:
    """Return the digest of a tree's embedder, "" where it has none."""
    if not tree.embedder:
        return ""
    return _sha256(dict(tree.embedder), tree.arrays)


def encode_pack(pack: Pack) -> bytes:
    """Encode `pack` (module docstring).

    Parameters
    ----------
    pack
        The pack; arrays in any memory layout.

    Returns
    -------
    bytes
        A safetensors file.
    """
    arrays: dict[str, Array] = {}
    for block in pack.blocks:
        arrays[f"{block.ref}/{Role.WEIGHT.value}"] = block.weight
        for role, state in block.optimizer_state.items():
            arrays[f"{block.ref}/{role.value}"] = state
    for ref, row in pack.centroids.items():
        arrays[f"{ref}/{_CENTROID}"] = row
    arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    body = {
        "format": PACK_VERSION,
        "spec": spec_to_json(pack.spec),
        "topic": str(pack.topic),
        "revision": pack.revision,
        "retriever_sha256": pack.retriever_sha256,
        "labels": {str(ref): label for ref, label in pack.labels.items()},
        "num_documents": {str(ref): count for ref, count in pack.num_documents.items()},
        "blocks": {str(b.ref): {"version": b.version, "step": b.step} for b in pack.blocks},
        "crc32c": {name: crc32c(array) for name, array in arrays.items()},
    }
    # One key: the order of several is safetensors' to choose, and it chooses at random.
    document = {"pack": body, "sha256": _sha256(body, arrays)}
    return safetensors.numpy.save(arrays, metadata={_METADATA_KEY: _canonical(document)})


def decode_pack(data: bytes, *, what: str = "the pack") -> Pack:
    """Decode and check a pack.

    Parameters
    ----------
    data
        The file's bytes.
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
        If it is one and its bytes were changed; the message names the damaged array.
    FailedPreconditionError
        If it was written by a newer membank.
    """
    metadata, arrays = _open(data, what)
    try:
        document = json.loads(metadata[_METADATA_KEY])
        body, digest = document["pack"], document["sha256"]
        version = int(body["format"])
    except (ValueError, KeyError, TypeError) as err:
        raise _not_a_pack(what, f"its metadata is not a pack's ({err!r})") from err
    if version > PACK_VERSION:
        raise FailedPreconditionError(
            f"{what} has format {version}; this membank reads up to {PACK_VERSION}: upgrade it",
            reason=Reason.FORMAT_TOO_NEW,
            metadata={"format": str(version)},
        )
    if _sha256(body, arrays) != digest:
        raise _damaged(what, body, arrays)
    try:
        return _pack(body, arrays)
    except (ValueError, KeyError, TypeError, AttributeError, MembankError) as err:
        # The digest is right, so this is what its writer wrote.
        raise _not_a_pack(what, f"its content does not fit together ({err!r})") from err


def _pack(body: dict[str, object], arrays: Mapping[str, Array]) -> Pack:
    spec_json, blocks, labels, counts = (
        _object(body[key]) for key in ("spec", "blocks", "labels", "num_documents")
    )
    states: dict[BlockRef, dict[Role, Array]] = {}
    centroids: dict[BlockRef, Array] = {}
    for name, array in arrays.items():
        ref_text, _, part = name.rpartition("/")
        ref = BlockRef.parse(ref_text)
        if part == _CENTROID:
            centroids[ref] = array
        else:
            states.setdefault(ref, {})[Role(part)] = array
    packed = []
    for text, entry in blocks.items():
        ref, fields = BlockRef.parse(text), _object(entry)
        roles = states.pop(ref)
        packed.append(
            PackedBlock(
                ref=ref,
                version=_integer(fields["version"]),
                step=_integer(fields["step"]),
                weight=roles.pop(Role.WEIGHT),
                optimizer_state=roles,
            )
        )
    if states:
        raise ValueError(f"arrays of blocks that it does not list: {sorted(states)[:3]}")
    return Pack(
        spec=spec_from_json(spec_json),
        topic=BlockRef.parse(str(body["topic"])),
        revision=_integer(body["revision"]),
        blocks=tuple(sorted(packed, key=lambda block: block.ref)),
        labels={BlockRef.parse(ref): str(label) for ref, label in labels.items()},
        num_documents={BlockRef.parse(ref): _integer(n) for ref, n in counts.items()},
        centroids=centroids,
        retriever_sha256=str(body["retriever_sha256"]),
    )


def _open(data: bytes, what: str) -> tuple[dict[str, str], dict[str, Array]]:
    try:
        # deserialize checks that header, offsets and sizes fit together; it does not return the metadata.
        tensors = safetensors.deserialize(data)  # type: ignore[no-untyped-call]  # its stub is bare
        (length,) = _HEADER_LENGTH.unpack_from(data)
        header = json.loads(data[_HEADER_LENGTH.size : _HEADER_LENGTH.size + length])
        arrays = {
            name: np.frombuffer(tensor["data"], _DTYPES[tensor["dtype"]]).reshape(tensor["shape"])
            for name, tensor in tensors
        }
        return dict(header.get("__metadata__") or {}), arrays
    except (SafetensorError, ValueError, KeyError, struct.error) as err:
        raise _not_a_pack(what, f"not a safetensors file of blocks, or cut short ({err})") from err


def _canonical(body: Mapping[str, object]) -> str:
    return json.dumps(body, sort_keys=True, separators=(",", ":"))


def _sha256(body: Mapping[str, object], arrays: Mapping[str, Array]) -> str:
    digest = hashlib.sha256(_canonical(body).encode())
    for name in sorted(arrays):
        array = arrays[name]
        head = f"\0{name}\0{array.dtype.name}\0{array.shape}\0"
        digest.update(head.encode())
        digest.update(as_uint8(np.ascontiguousarray(array)).data)
    return digest.hexdigest()


def _damaged(what: str, body: dict[str, object], arrays: Mapping[str, Array]) -> CorruptionError:
    crcs = body.get("crc32c")
    known = crcs if isinstance(crcs, dict) else {}
    wrong = [name for name in sorted(arrays) if crc32c(arrays[name]) != known.get(name)]
    where = f"array {wrong[0]}" if wrong else "its metadata"
    return CorruptionError(
        f"{what} was changed after it was written ({where}); take another copy of it",
        reason=Reason.CHECKSUM_MISMATCH,
        metadata={"damaged": wrong[0] if wrong else "metadata"},
    )


def _not_a_pack(what: str, problem: str) -> InvalidArgumentError:
    return InvalidArgumentError(f"{what} is not a pack: {problem}", reason=Reason.BAD_PACK)


def _object(value: object) -> dict[str, object]:
    if not isinstance(value, dict):
        raise TypeError(f"{value!r} is not an object")
    return value


def _integer(value: object) -> int:
    if not isinstance(value, int):
        raise TypeError(f"{value!r} is not a number")
    return value
