"""Receipts: what a deletion destroyed, who confirmed it, and the signature under that.

A receipt tells of one commit that deleted blocks. What was destroyed stands in the commit's own
record first (`Deletion`, under `DELETION` in its detail), so the chain of records holds it, and a
receipt can be made again from there. The rest is what came after the commit: which processes
confirmed it, and which ones took their place.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import TypeVar

from membank.wire.errors import CorruptionError, InvalidArgumentError, Reason
from membank.wire.format.layout import FORMAT_VERSION
from membank.wire.signing import Context, PublicKey, Signature, Signer
from membank.wire.spec import BlockRef

T = TypeVar("T")

DELETION = "deletion"
"""Name under which the detail of a record says what it destroyed."""
SIGNING_KEY = "signing_key"
"""Name under which the detail of a `KEY_OPERATION` record has a public key."""
KEY_OPERATION = "signing-key"
"""Operation of a record that only makes a public key known."""


class Recycling(StrEnum):
    """What became of the processes that had held what was destroyed."""

    DONE = "done"
    """Each ended, the coordinator's among them, and another one has taken its place."""
    OFF = "off"
    """They run on: the service is set so."""
    NONE = "none"
    """They run on, or one does: nothing is there that could start it again."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ProcessLife:
    """One life of a process; no other process has all of these."""

    host: str
    """Name of its machine."""
    pid: int
    """Its id there."""
    start_time_s: float
    """When it began, seconds since 1970-01-01 UTC by that machine's clock."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DestroyedBlock:
    """What a deletion destroyed of one block."""

    ref: BlockRef
    """The block."""
    version: int
    """Version that it had; none of it is left."""
    num_slots: int
    """Stored versions of it, every retained one counted."""
    sha256: Mapping[str, str] = field(default_factory=dict)
    """SHA-256 of the bytes of its last version, in hexadecimal: weight and each moment of the
    optimizer by role, in C order, little-endian. Empty where nothing of it was ever stored, or where
    its storage was damaged."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DeletionOwner:
    """A shard that prepared a deletion."""

    shard_id: str
    """Its identity."""
    partitions: tuple[int, ...]
    """Its partitions that held blocks of the deletion."""
    num_slots: int
    """Slots to be destroyed there."""
    num_manifests: int
    """Manifests to be rewritten there, as they name the blocks."""
    journal_bytes: int
    """Bytes of the journals there, which are given up."""
    process: ProcessLife
    """Process that prepared it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Deletion:
    """What a commit destroys, as its record has it."""

    topics: tuple[BlockRef, ...]
    """Topmost of the blocks."""
    blocks: tuple[DestroyedBlock, ...]
    """Every block, by level, then by cluster."""
    owners: tuple[DeletionOwner, ...]
    """Shards that prepared it, by name."""
    coordinator: ProcessLife
    """Process that committed it."""
    trees: tuple[str, ...]
    """Keys of the tree documents to be destroyed."""
    packs: tuple[str, ...]
    """Names of the packs to be destroyed in the bank's own store."""
    public_key: str
    """Key that is to sign the receipt, in base64."""

    @property
    def partitions(self) -> frozenset[int]:
        """Partitions that held blocks of it."""
        return frozenset(number for owner in self.owners for number in owner.partitions)

    def to_json(self) -> dict[str, object]:
        """Return it as JSON-able values."""
        body = asdict(self)
        body["topics"] = [str(topic) for topic in self.topics]
        body["blocks"] = [
            [str(block.ref), block.version, block.num_slots, dict(block.sha256)]
            for block in self.blocks
        ]
        return _listed(body)

    @classmethod
    def from_json(cls, body: object, *, what: str) -> Deletion:
        """Read what `to_json` wrote.

        Raises
        ------
        CorruptionError
            If it is none (MANIFEST_CORRUPT).
        """

        def read() -> Deletion:
            fields = _object(body)
            return cls(
                topics=tuple(map(BlockRef.parse, fields.pop("topics"))),
                blocks=tuple(_block(*row) for row in fields.pop("blocks")),
                owners=tuple(map(_owner, fields.pop("owners"))),
                coordinator=ProcessLife(**fields.pop("coordinator")),
                trees=tuple(fields.pop("trees")),
                packs=tuple(fields.pop("packs")),
                **fields,
            )

        return _read(read, what=what, reason=Reason.MANIFEST_CORRUPT)


@dataclass(frozen=True, kw_only=True, slots=True)
class Acknowledgement:
    """An owner's word that nothing of the deleted blocks is left with it."""

    shard_id: str
    """Its identity."""
    partitions: tuple[int, ...]
    """Partitions of the deletion that it owns."""
    confirmed_by: ProcessLife
    """Process that destroyed what was there, and said so."""
    now: ProcessLife
    """Process that owns the partitions now, and confirmed it again; the same, where nothing was
    recycled."""
    time_s: float
    """When it confirmed it, seconds since 1970-01-01 UTC."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Receipt:
    """What is signed."""

    bank_id: str
    """The bank."""
    revision: int
    """Revision of the deletion."""
    record_sha256: str
    """SHA-256 of the bytes of its record."""
    operation: str
    """What was asked for, such as "delete"."""
    principal: str
    """Who asked."""
    request_id: str
    """Id of the request."""
    time_s: float
    """When it was committed, seconds since 1970-01-01 UTC."""
    deletion: Deletion
    """What was destroyed, as in the record."""
    recycling: Recycling
    """What became of the owners' processes."""
    acknowledgements: tuple[Acknowledgement, ...]
    """One for each owner, by name."""
    issuer: ProcessLife
    """Process that signed it; where it is not the one that committed the deletion, that has ended.
    It never is where recycling is done."""
    issue_time_s: float
    """When all of that was done, seconds since 1970-01-01 UTC."""

    def to_json(self) -> dict[str, object]:
        """Return it as JSON-able values."""
        body = {**asdict(self), "deletion": self.deletion.to_json()}
        return {"format": FORMAT_VERSION, **_listed(body)}


@dataclass(frozen=True, kw_only=True, slots=True)
class SignedReceipt:
    """A receipt as it is stored and sent."""

    receipt: Receipt
    """What is signed."""
    signature: Signature
    """By whom; that it is right is checked, whether its key is to be trusted is not."""


def sign_receipt(receipt: Receipt, signer: Signer) -> bytes:
    """Encode `receipt` with a signature, as JSON in one fixed form."""
    body = receipt.to_json()
    signature = signer.sign(Context.RECEIPT, _compact(body))
    return _document(body, signature)


def decode_receipt(data: bytes, *, what: str) -> SignedReceipt:
    """Decode a receipt and check its signature.

    Parameters
    ----------
    data
        What `sign_receipt` returned. Any other bytes are refused, also where they say the same.
    what
        Name of the receipt, for errors.

    Returns
    -------
    SignedReceipt
        The receipt. Whether its key is to be trusted is for the caller to decide.

    Raises
    ------
    CorruptionError
        If it is not as it was signed (BAD_SIGNATURE).
    """

    def read() -> tuple[dict[str, object], object]:
        document = json.loads(data)
        return document["receipt"], document["signature"]

    body, seal = _read(read, what=what, reason=Reason.BAD_SIGNATURE)
    signature = Signature.from_json(seal, what=what)
    signature.check(Context.RECEIPT, _compact(body), what=what)
    if _document(body, signature) != data:
        # The same in another form: nobody signed these bytes.
        raise _damaged(what, "its bytes are not those that were signed", Reason.BAD_SIGNATURE)
    receipt = _read(lambda: _receipt(body, what), what=what, reason=Reason.BAD_SIGNATURE)
    return SignedReceipt(receipt=receipt, signature=signature)


def encode_public_key(key: PublicKey) -> bytes:
    """Encode a public key as it lies in a bank: the same bytes whoever writes them."""
    body = {"algorithm": "ed25519", "key_id": key.key_id, "public_key": key.text}
    return json.dumps({"format": FORMAT_VERSION, "key": body}, sort_keys=True, indent=1).encode()


def decode_public_key(data: bytes, *, what: str) -> PublicKey:
    """Decode a public key.

    Raises
    ------
    CorruptionError
        If it is not as it was written (BAD_KEY).
    """
    key = _read(
        lambda: PublicKey.parse(json.loads(data)["key"]["public_key"]),
        what=what,
        reason=Reason.BAD_KEY,
    )
    if encode_public_key(key) != data:
        raise _damaged(what, "its bytes are not those that were written", Reason.BAD_KEY)
    return key


def _receipt(body: Mapping[str, object], what: str) -> Receipt:
    fields = _object(body)
    if fields.pop("format") != FORMAT_VERSION:
        raise ValueError("it is of a newer format")
    return Receipt(
        deletion=Deletion.from_json(fields.pop("deletion"), what=what),
        recycling=Recycling(fields.pop("recycling")),
        acknowledgements=tuple(map(_acknowledgement, fields.pop("acknowledgements"))),
        issuer=ProcessLife(**fields.pop("issuer")),
        **fields,
    )


def _block(ref: str, version: int, num_slots: int, sha256: Mapping[str, str]) -> DestroyedBlock:
    return DestroyedBlock(
        ref=BlockRef.parse(ref), version=version, num_slots=num_slots, sha256=dict(sha256)
    )


def _owner(body: object) -> DeletionOwner:
    fields = _object(body)
    return DeletionOwner(
        partitions=tuple(fields.pop("partitions")),
        process=ProcessLife(**fields.pop("process")),
        **fields,
    )


def _acknowledgement(body: object) -> Acknowledgement:
    fields = _object(body)
    return Acknowledgement(
        partitions=tuple(fields.pop("partitions")),
        confirmed_by=ProcessLife(**fields.pop("confirmed_by")),
        now=ProcessLife(**fields.pop("now")),
        **fields,
    )


def _object(body: object) -> dict:  # type: ignore[type-arg]  # what JSON holds
    if not isinstance(body, Mapping):
        raise TypeError(f"{body!r} is no object")
    return dict(body)


def _listed(body: dict[str, object]) -> dict[str, object]:
    """Return `body` with lists for tuples, so that it equals what is read back from JSON."""
    listed: dict[str, object] = json.loads(json.dumps(body))
    return listed


def _compact(body: Mapping[str, object]) -> bytes:
    return json.dumps(body, sort_keys=True, separators=(",", ":")).encode()


def _document(body: Mapping[str, object], signature: Signature) -> bytes:
    document = {"receipt": body, "signature": signature.to_json()}
    return json.dumps(document, sort_keys=True, indent=1).encode()


def _read(read: Callable[[], T], *, what: str, reason: Reason) -> T:
    try:
        return read()
    except (ValueError, KeyError, TypeError, AttributeError, InvalidArgumentError) as err:
        raise _damaged(what, str(err), reason) from err


def _damaged(what: str, problem: str, reason: Reason) -> CorruptionError:
    return CorruptionError(f"{what} is damaged ({problem}); take another copy of it", reason=reason)
