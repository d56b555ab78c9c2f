"""The JSON of a pack: all that it says beside its arrays."""

from __future__ import annotations

from collections.abc import Mapping

from membank.wire.format.document import spec_from_json, spec_to_json
from membank.wire.format.pack.contract import BlockBase, Pack, PackBase, PackedBlock
from membank.wire.signing import Signature
from membank.wire.spec import Array, BlockRef, Role

METADATA_KEY = "membank.pack"
"""Key of the document in the file's metadata. One key: safetensors writes several in any order."""
CENTROID = "centroid"
"""Last part of the name of an array that is no role."""

FULL_VERSION = 1
"""Version of a pack that is no diff."""
DIFF_VERSION = 2
"""Version of a diff: who knows only the first would take it for the whole topic."""
PACK_VERSION = DIFF_VERSION
"""Greatest version of the layout; a reader refuses a pack with a greater one."""


def body_of(head: Pack, blocks: Mapping[BlockRef, PackedBlock], crcs: Mapping[str, int]) -> object:
    """Return what is signed of a pack, its arrays aside.

    Parameters
    ----------
    head
        The pack; its blocks are not looked at.
    blocks
        The blocks; their arrays are not looked at.
    crcs
        CRC-32C of every array by its name.
    """
    body = {
        "format": FULL_VERSION if head.base is None else DIFF_VERSION,
        "spec": spec_to_json(head.spec),
        "topic": str(head.topic),
        "revision": head.revision,
        "retriever_sha256": head.retriever_sha256,
        "labels": {str(ref): label for ref, label in head.labels.items()},
        "num_documents": {str(ref): count for ref, count in head.num_documents.items()},
        "blocks": {
            str(ref): {"version": block.version, "step": block.step}
            for ref, block in blocks.items()
        },
        "crc32c": dict(crcs),
    }
    if head.base is not None:
        body["blocks"] = {
            str(ref): {
                "version": block.version,
                "step": block.step,
                "base": None if block.base is None else _base_to_json(block.base),
            }
            for ref, block in blocks.items()
        }
        body["base"] = {
            "revision": head.base.revision,
            "snapshot": head.base.snapshot,
            "unchanged": {
                str(ref): _base_to_json(held) for ref, held in head.base.unchanged.items()
            },
        }
    return body


def pack_of(
    body: Mapping[str, object],
    arrays: Mapping[str, Array],
    *,
    sha256: str,
    signatures: tuple[Signature, ...],
) -> Pack:
    """Return the pack that `body` and `arrays` make.

    Raises
    ------
    ValueError, KeyError, TypeError, AttributeError, MembankError
        If they do not fit together.
    """
    is_diff = body["format"] == DIFF_VERSION
    states: dict[BlockRef, dict[Role, Array]] = {}
    centroids: dict[BlockRef, Array] = {}
    for name, array in arrays.items():
        ref_text, _, part = name.rpartition("/")
        ref = BlockRef.parse(ref_text)
        if part == CENTROID:
            centroids[ref] = array
        else:
            states.setdefault(ref, {})[Role(part)] = array
    packed = []
    for text, entry in object_of(body["blocks"]).items():
        ref, fields = BlockRef.parse(text), object_of(entry)
        roles = states.pop(ref)
        packed.append(
            PackedBlock(
                ref=ref,
                version=_integer(fields["version"]),
                step=_integer(fields["step"]),
                weight=roles.pop(Role.WEIGHT),
                optimizer_state=roles,
                base=_base_of(fields["base"]) if is_diff and fields["base"] is not None else None,
            )
        )
    if states:
        raise ValueError(f"arrays of blocks that it does not list: {sorted(states)[:3]}")
    labels, counts = object_of(body["labels"]), object_of(body["num_documents"])
    return Pack(
        spec=spec_from_json(object_of(body["spec"])),
        topic=BlockRef.parse(str(body["topic"])),
        revision=_integer(body["revision"]),
        blocks=tuple(sorted(packed, key=lambda block: block.ref)),
        labels={BlockRef.parse(ref): str(label) for ref, label in labels.items()},
        num_documents={BlockRef.parse(ref): _integer(n) for ref, n in counts.items()},
        centroids=centroids,
        retriever_sha256=str(body["retriever_sha256"]),
        base=_pack_base_of(object_of(body["base"])) if is_diff else None,
        sha256=sha256,
        signatures=signatures,
    )


def object_of(value: object) -> dict[str, object]:
    """Return `value`, which must be a JSON object, or raise `TypeError`."""
    if not isinstance(value, dict):
        raise TypeError(f"{value!r} is not an object")
    return value


def _base_to_json(held: BlockBase) -> dict[str, object]:
    return {"version": held.version, "crc32c": held.crc32c}


def _base_of(value: object) -> BlockBase:
    fields = object_of(value)
    return BlockBase(version=_integer(fields["version"]), crc32c=_integer(fields["crc32c"]))


def _pack_base_of(body: Mapping[str, object]) -> PackBase:
    return PackBase(
        revision=_integer(body["revision"]),
        snapshot=str(body["snapshot"]),
        unchanged={
            BlockRef.parse(ref): _base_of(held)
            for ref, held in object_of(body["unchanged"]).items()
        },
    )


def _integer(value: object) -> int:
    if not isinstance(value, int):
        raise TypeError(f"{value!r} is not a number")
    return value
