"""bank.json: the spec of a bank, written once at creation."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from membank.wire.crc import crc32c
from membank.wire.errors import CorruptionError, FailedPreconditionError, MembankError, Reason
from membank.wire.format.layout import FORMAT_VERSION
from membank.wire.spec import BankSpec, LevelSpec, OptimizerSpec

SEALED_FORMAT = 2
"""Format of a bank whose content is sealed. Software that knows nothing of seals refuses it."""
_SEAL = "aes-256-gcm"


@dataclass(frozen=True, kw_only=True, slots=True)
class BankDocument:
    """What bank.json says."""

    spec: BankSpec
    """The spec."""
    is_sealed: bool = False
    """Whether content is sealed, each object with a key of its own (`membank.wire.format.sealed`)."""


def spec_to_json(spec: BankSpec) -> dict[str, object]:
    """Return `spec` as JSON-able values."""
    body = asdict(spec)
    body["levels"] = list(body["levels"])
    return body


def spec_from_json(body: dict[str, object]) -> BankSpec:
    """Return the spec that `spec_to_json` wrote.

    Raises
    ------
    InvalidArgumentError, TypeError, KeyError
        If a field is unknown, missing or out of range.
    """
    fields = dict(body)
    levels = fields.pop("levels")
    optimizer = fields.pop("optimizer")
    if not isinstance(levels, list) or not isinstance(optimizer, dict):
        raise TypeError("levels must be a list and optimizer an object")
    return BankSpec(
        levels=tuple(LevelSpec(**level) for level in levels),
        optimizer=OptimizerSpec(**optimizer),
        **fields,  # type: ignore[arg-type]  # checked by BankSpec itself
    )


def encode_bank(document: BankDocument) -> bytes:
    """Encode `document` as the content of bank.json."""
    body = spec_to_json(document.spec)
    text = json.dumps(body, sort_keys=True, separators=(",", ":"))
    fields: dict[str, object] = {"format": FORMAT_VERSION, "spec": body}
    if document.is_sealed:
        fields |= {"format": SEALED_FORMAT, "seal": _SEAL}
    fields["crc32c"] = crc32c(text.encode())
    return json.dumps(fields, indent=1, sort_keys=True).encode()


def encode_spec(spec: BankSpec) -> bytes:
    """Encode `spec` as the content of bank.json of a bank that is not sealed."""
    return encode_bank(BankDocument(spec=spec))


def decode_spec(data: bytes, *, where: str) -> BankSpec:
    """Return the spec in bank.json; see `decode_bank`."""
    return decode_bank(data, where=where).spec


def decode_bank(data: bytes, *, where: str) -> BankDocument:
    """Decode bank.json.

    Parameters
    ----------
    data
        Its bytes.
    where
        URL of the bank, for errors.

    Returns
    -------
    BankDocument
        What it says.

    Raises
    ------
    FailedPreconditionError
        If the bank was written by a newer membank.
    CorruptionError
        If the document is damaged.
    """
    try:
        document = json.loads(data)
        version = int(document["format"])
    except (ValueError, KeyError, TypeError) as err:
        raise _damaged(where, err) from err
    if version > SEALED_FORMAT:
        raise FailedPreconditionError(
            f"{where} has format {version}; this membank reads up to {SEALED_FORMAT}: upgrade it",
            reason=Reason.FORMAT_TOO_NEW,
            metadata={"format": str(version)},
        )
    try:
        text = json.dumps(document["spec"], sort_keys=True, separators=(",", ":"))
        if crc32c(text.encode()) != document["crc32c"]:
            raise ValueError("CRC-32C does not match")
        # Neither is covered by the CRC, and each says the same.
        is_sealed = version == SEALED_FORMAT
        if document.get("seal") != (_SEAL if is_sealed else None):
            raise ValueError(f"format {version} and seal {document.get('seal')!r} do not agree")
        return BankDocument(spec=spec_from_json(document["spec"]), is_sealed=is_sealed)
    except (ValueError, KeyError, TypeError, MembankError) as err:
        raise _damaged(where, err) from err


def _damaged(where: str, err: Exception) -> CorruptionError:
    return CorruptionError(
        f"bank.json of {where} is damaged ({err}); restore it from a copy",
        reason=Reason.SPEC_CORRUPT,
        metadata={"bank": where},
    )
