"""bank.json: the spec of a bank, written once at creation."""

from __future__ import annotations

import json
from dataclasses import asdict

from membank.wire.crc import crc32c
from membank.wire.errors import CorruptionError, FailedPreconditionError, MembankError, Reason
from membank.wire.format.layout import FORMAT_VERSION
from membank.wire.spec import BankSpec, LevelSpec, OptimizerSpec


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


def encode_spec(spec: BankSpec) -> bytes:
    """Encode `spec` as the content of bank.json."""
    body = spec_to_json(spec)
    text = json.dumps(body, sort_keys=True, separators=(",", ":"))
    document = {"format": FORMAT_VERSION, "spec": body, "crc32c": crc32c(text.encode())}
    return json.dumps(document, indent=1, sort_keys=True).encode()


def decode_spec(data: bytes, *, where: str) -> BankSpec:
    """Decode bank.json.

    Parameters
    ----------
    data
        Its bytes.
    where
        URL of the bank, for errors.

    Returns
    -------
    BankSpec
        The spec.

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
    if version > FORMAT_VERSION:
        raise FailedPreconditionError(
            f"{where} has format {version}; this membank reads up to {FORMAT_VERSION}: upgrade it",
            reason=Reason.FORMAT_TOO_NEW,
            metadata={"format": str(version)},
        )
    try:
        text = json.dumps(document["spec"], sort_keys=True, separators=(",", ":"))
        if crc32c(text.encode()) != document["crc32c"]:
            raise ValueError("CRC-32C does not match")
        return spec_from_json(document["spec"])
    except (ValueError, KeyError, TypeError, MembankError) as err:
        raise _damaged(where, err) from err


def _damaged(where: str, err: Exception) -> CorruptionError:
    return CorruptionError(
        f"bank.json of {where} is damaged ({err}); restore it from a copy",
        reason=Reason.SPEC_CORRUPT,
        metadata={"bank": where},
    )
