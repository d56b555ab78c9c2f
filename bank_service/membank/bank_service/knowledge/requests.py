"""One request id, one request: what was asked under it, as a digest that its record keeps."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import fields

import numpy as np

from membank.bank_service.knowledge.contract import AdminRequest
from membank.wire.crc import crc32c
from membank.wire.errors import ConflictError, InvalidArgumentError, Reason
from membank.wire.format import RevisionRecord
from membank.wire.format.revision import REQUEST_SHA256
from membank.wire.steps import Step


def request_sha256(request_id: str, operation: str, asked: Mapping[str, object]) -> str:
    """Return the digest of a request, in hexadecimal.

    It is compared across versions of the service, so whatever is added to a request must leave the
    digest of those that do not use it as it is.

    Parameters
    ----------
    request_id
        Id of the request. With it in the digest, no two records show that the same was asked.
    operation
        Name in the audit log, such as "delete".
    asked
        What is asked, with every option; JSON-able.
    """
    body = {"request_id": request_id, "operation": operation, "asked": asked}
    text = json.dumps(body, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def asked_of(steps: Sequence[Step]) -> dict[str, object]:
    """Return what `steps` ask; arrays by element type, shape and CRC-32C.

    Their order says nothing, so it is not part of it.
    """
    return {"steps": sorted((_step(step) for step in steps), key=json.dumps)}


def check_same(record: RevisionRecord, request: AdminRequest, operation: str, digest: str) -> None:
    """Raise unless `record` is of the very request that is asked again.

    Parameters
    ----------
    record
        What was committed under the request's id.
    request
        Who asks, and under which id.
    operation
        What is asked for now.
    digest
        Its `request_sha256`. A record of an earlier version has none to compare it with.

    Raises
    ------
    ConflictError
        If it was somebody else's (REQUEST_ID_REUSED).
    InvalidArgumentError
        If something else was asked under the id (REQUEST_ID_REUSED).
    """
    if record.principal != request.principal:
        # Who that was, and what was asked, is not for this caller.
        raise ConflictError(
            f"request id {request.request_id} was used by somebody else; give every request an id "
            "of its own",
            reason=Reason.REQUEST_ID_REUSED,
            metadata={"request_id": request.request_id},
        )
    if record.operation != operation or record.detail.get(REQUEST_SHA256, digest) != digest:
        raise reused(request.request_id, record)


def reused(request_id: str, record: RevisionRecord) -> InvalidArgumentError:
    """Return the error for an id under which `record` came of something else."""
    return InvalidArgumentError(
        f"request id {request_id} was used for another request before, the {record.operation!r} of "
        f"revision {record.revision}; nothing was changed: give every request an id of its own",
        reason=Reason.REQUEST_ID_REUSED,
        metadata={"request_id": request_id, "revision": str(record.revision)},
    )


def _step(step: Step) -> dict[str, object]:
    values = {field.name: _value(getattr(step, field.name)) for field in fields(step)}
    # What is not given is left out, so that an option that is added later changes no old digest.
    given = {n: value for n, value in values.items() if value is not None and value is not False}
    return {"step": step.kind, **given}


def _value(value: object) -> object:
    if isinstance(value, np.ndarray):
        array = np.ascontiguousarray(value)
        return [array.dtype.name, list(array.shape), crc32c(array)]
    return str(value) if isinstance(value, tuple) else value
