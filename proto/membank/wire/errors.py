"""The error tree of membank and its one table to gRPC.

::

    MembankError
    |-- NotFoundError            (also KeyError)      NOT_FOUND
    |-- AlreadyExistsError                            ALREADY_EXISTS
    |-- InvalidArgumentError     (also ValueError)    INVALID_ARGUMENT
    |-- FailedPreconditionError                       FAILED_PRECONDITION
    |-- ConflictError                                 ABORTED
    |-- UnauthenticatedError                          UNAUTHENTICATED
    |-- AccessDeniedError                             PERMISSION_DENIED
    |-- UnavailableError                              UNAVAILABLE
    |-- DeadlineError            (also TimeoutError)  DEADLINE_EXCEEDED
    |-- ResourceExhaustedError                        RESOURCE_EXHAUSTED
    |-- CorruptionError                               DATA_LOSS
    `-- InternalError                                 INTERNAL

A leaf says what the handler can do about it; `Reason` says what happened. Every error pickles, so
that it crosses Ray unchanged, and travels over gRPC as a `google.rpc.Status` with one `ErrorInfo`.
"""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, ClassVar

import grpc
from google.protobuf import any_pb2
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

if TYPE_CHECKING:
    from collections.abc import Mapping

ERROR_DOMAIN = "membank"
"""`ErrorInfo.domain` of every error of this project."""


class Reason(StrEnum):
    """What happened, for machines. Append only: names are part of the wire format."""

    UNKNOWN_BANK = "UNKNOWN_BANK"
    UNKNOWN_LEVEL = "UNKNOWN_LEVEL"
    UNKNOWN_CLUSTER = "UNKNOWN_CLUSTER"
    UNKNOWN_TOPIC = "UNKNOWN_TOPIC"
    UNKNOWN_SNAPSHOT = "UNKNOWN_SNAPSHOT"
    UNKNOWN_PARTITION = "UNKNOWN_PARTITION"
    NO_TREE = "NO_TREE"
    NOT_A_BANK = "NOT_A_BANK"
    BANK_EXISTS = "BANK_EXISTS"
    SNAPSHOT_EXISTS = "SNAPSHOT_EXISTS"
    OBJECT_EXISTS = "OBJECT_EXISTS"
    OBJECT_MISSING = "OBJECT_MISSING"
    BAD_ARGUMENT = "BAD_ARGUMENT"
    BAD_CONFIG = "BAD_CONFIG"
    BAD_SHAPE = "BAD_SHAPE"
    BAD_DTYPE = "BAD_DTYPE"
    BAD_PACK = "BAD_PACK"
    NOT_FINITE = "NOT_FINITE"
    MESSAGE_TOO_LARGE = "MESSAGE_TOO_LARGE"
    STALE_VERSION = "STALE_VERSION"
    VERSION_MISMATCH = "VERSION_MISMATCH"
    BLOCK_WITHHELD = "BLOCK_WITHHELD"
    BLOCK_DELETED = "BLOCK_DELETED"
    FINGERPRINT_MISMATCH = "FINGERPRINT_MISMATCH"
    NOT_OWNER = "NOT_OWNER"
    BEHIND_REVISION = "BEHIND_REVISION"
    TRANSACTION_IN_PROGRESS = "TRANSACTION_IN_PROGRESS"
    TRANSACTION_CONFLICT = "TRANSACTION_CONFLICT"
    BANK_IN_USE = "BANK_IN_USE"
    FENCED = "FENCED"
    NO_CREDENTIALS = "NO_CREDENTIALS"
    BAD_CREDENTIALS = "BAD_CREDENTIALS"
    INSECURE_ENDPOINT = "INSECURE_ENDPOINT"
    ROLE_TOO_LOW = "ROLE_TOO_LOW"
    SHARD_UNAVAILABLE = "SHARD_UNAVAILABLE"
    CONNECT_FAILED = "CONNECT_FAILED"
    NOT_RUNNING = "NOT_RUNNING"
    PORT_IN_USE = "PORT_IN_USE"
    DEADLINE_PASSED = "DEADLINE_PASSED"
    CANCELLED = "CANCELLED"
    OVERLOADED = "OVERLOADED"
    NO_SPACE = "NO_SPACE"
    STORE_FAILED = "STORE_FAILED"
    STORE_UNSUPPORTED = "STORE_UNSUPPORTED"
    FORMAT_TOO_NEW = "FORMAT_TOO_NEW"
    CHECKSUM_MISMATCH = "CHECKSUM_MISMATCH"
    MANIFEST_CORRUPT = "MANIFEST_CORRUPT"
    JOURNAL_CORRUPT = "JOURNAL_CORRUPT"
    SLOT_CORRUPT = "SLOT_CORRUPT"
    SPEC_CORRUPT = "SPEC_CORRUPT"
    REPLAY_MISMATCH = "REPLAY_MISMATCH"
    MISSING_EXTRA = "MISSING_EXTRA"
    UNEXPECTED = "UNEXPECTED"
    UNKNOWN_REVISION = "UNKNOWN_REVISION"
    NO_BUCKET = "NO_BUCKET"
    STORE_DENIED = "STORE_DENIED"
    STORE_CREDENTIALS = "STORE_CREDENTIALS"
    STORE_CLOCK_SKEW = "STORE_CLOCK_SKEW"
    BAD_KEY = "BAD_KEY"
    BAD_SIGNATURE = "BAD_SIGNATURE"
    UNTRUSTED_KEY = "UNTRUSTED_KEY"
    UNSIGNED = "UNSIGNED"
    UNKNOWN_PACK = "UNKNOWN_PACK"
    PACK_EXISTS = "PACK_EXISTS"
    UNKNOWN_RECEIPT = "UNKNOWN_RECEIPT"
    TREE_FULL = "TREE_FULL"
    BASE_MISMATCH = "BASE_MISMATCH"
    EDIT_FELL_SHORT = "EDIT_FELL_SHORT"
    REQUEST_ID_REUSED = "REQUEST_ID_REUSED"
    KEYRING_NEEDED = "KEYRING_NEEDED"
    KEYRING_MISMATCH = "KEYRING_MISMATCH"
    BANK_NOT_SEALED = "BANK_NOT_SEALED"


class MembankError(Exception):
    """Root of every error that membank raises on purpose.

    Parameters
    ----------
    message
        What is wrong, where (the resource's name), and what to do about it.
    reason
        What happened, for machines; None takes the class's own.
    metadata
        The dynamic parts of the message again, as strings.
    """

    code: ClassVar[grpc.StatusCode] = grpc.StatusCode.UNKNOWN
    default_reason: ClassVar[Reason] = Reason.UNEXPECTED
    retryable: ClassVar[bool] = False
    """True where the same call may succeed later without any change by the caller."""

    def __init__(
        self,
        message: str,
        *,
        reason: Reason | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.reason = self.default_reason if reason is None else reason
        self.metadata = dict(metadata or {})

    def __str__(self) -> str:
        # KeyError would quote the message.
        return self.message

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), self.message, self.reason, self.metadata)


def _rebuild(
    leaf: type[MembankError], message: str, reason: Reason, metadata: dict[str, str]
) -> MembankError:
    return leaf(message, reason=reason, metadata=metadata)


class NotFoundError(MembankError, KeyError):
    """The named bank, level, cluster, topic or object does not exist."""

    code = grpc.StatusCode.NOT_FOUND
    default_reason = Reason.UNKNOWN_TOPIC


class AlreadyExistsError(MembankError):
    """The thing to be created exists."""

    code = grpc.StatusCode.ALREADY_EXISTS
    default_reason = Reason.OBJECT_EXISTS


class InvalidArgumentError(MembankError, ValueError):
    """The request is wrong in itself; mend it and call again."""

    code = grpc.StatusCode.INVALID_ARGUMENT
    default_reason = Reason.BAD_ARGUMENT


class FailedPreconditionError(MembankError):
    """The request is right but the bank is not in the state it needs."""

    code = grpc.StatusCode.FAILED_PRECONDITION
    default_reason = Reason.BAD_CONFIG


class ConflictError(MembankError):
    """Somebody else changed it first; read again, decide again."""

    code = grpc.StatusCode.ABORTED
    default_reason = Reason.VERSION_MISMATCH


class UnauthenticatedError(MembankError):
    """The caller did not say who it is, or could not prove it."""

    code = grpc.StatusCode.UNAUTHENTICATED
    default_reason = Reason.NO_CREDENTIALS


class AccessDeniedError(MembankError):
    """The caller is known and may not do this."""

    code = grpc.StatusCode.PERMISSION_DENIED
    default_reason = Reason.ROLE_TOO_LOW


class UnavailableError(MembankError):
    """The service or a shard cannot answer now; retry with backoff."""

    code = grpc.StatusCode.UNAVAILABLE
    default_reason = Reason.SHARD_UNAVAILABLE
    retryable = True


class DeadlineError(MembankError, TimeoutError):
    """The caller's deadline passed; a mutation may or may not have happened."""

    code = grpc.StatusCode.DEADLINE_EXCEEDED
    default_reason = Reason.DEADLINE_PASSED


class ResourceExhaustedError(MembankError):
    """A bound was reached: memory, message size, disk space."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED
    default_reason = Reason.OVERLOADED


class CorruptionError(MembankError):
    """Stored or received bytes are not what was written."""

    code = grpc.StatusCode.DATA_LOSS
    default_reason = Reason.CHECKSUM_MISMATCH


class InternalError(MembankError):
    """A defect of membank; please report it."""

    code = grpc.StatusCode.INTERNAL
    default_reason = Reason.UNEXPECTED


LEAVES: tuple[type[MembankError], ...] = (
    NotFoundError,
    AlreadyExistsError,
    InvalidArgumentError,
    FailedPreconditionError,
    ConflictError,
    UnauthenticatedError,
    AccessDeniedError,
    UnavailableError,
    DeadlineError,
    ResourceExhaustedError,
    CorruptionError,
    InternalError,
)
"""Every leaf; each has a gRPC code of its own."""

_LEAF_BY_CODE: dict[grpc.StatusCode, type[MembankError]] = {leaf.code: leaf for leaf in LEAVES}
# What gRPC itself raises without an ErrorInfo of ours.
_REASON_WITHOUT_DETAILS: dict[grpc.StatusCode, Reason] = {
    grpc.StatusCode.UNAVAILABLE: Reason.CONNECT_FAILED,
    grpc.StatusCode.DEADLINE_EXCEEDED: Reason.DEADLINE_PASSED,
    grpc.StatusCode.RESOURCE_EXHAUSTED: Reason.MESSAGE_TOO_LARGE,
    grpc.StatusCode.UNAUTHENTICATED: Reason.NO_CREDENTIALS,
}


def to_status(error: MembankError) -> grpc.Status:
    """Encode an error as the status that ends an RPC.

    Parameters
    ----------
    error
        The error to send.

    Returns
    -------
    grpc.Status
        To be given to ``context.abort_with_status``.
    """
    return rpc_status.to_status(to_status_proto(error))


def to_status_proto(error: MembankError) -> status_pb2.Status:
    """Encode an error as ``google.rpc.Status``."""
    info = error_details_pb2.ErrorInfo(
        reason=error.reason.value, domain=ERROR_DOMAIN, metadata=error.metadata
    )
    detail = any_pb2.Any()
    detail.Pack(info)
    code = code_pb2.Code.Value(error.code.name)
    return status_pb2.Status(code=code, message=error.message, details=[detail])


def from_status_proto(status: status_pb2.Status) -> MembankError:
    """Decode what `to_status_proto` encoded."""
    name = code_pb2.Code.Name(status.code)
    leaf = _LEAF_BY_CODE.get(grpc.StatusCode[name], InternalError)
    reason, metadata = _error_info(status)
    return leaf(status.message, reason=reason or leaf.default_reason, metadata=metadata)


def from_rpc_error(error: grpc.RpcError, *, where: str) -> MembankError:
    """Decode the error that ended an RPC.

    Parameters
    ----------
    error
        What grpcio raised; it must also be a `grpc.Call`.
    where
        The address or method that was called, for errors made by gRPC itself.

    Returns
    -------
    MembankError
        The leaf that the server raised, or the nearest leaf where gRPC itself failed.
    """
    call: grpc.Call = error  # type: ignore[assignment]  # grpcio raises calls as errors
    # Not of grpc.aio's mapping itself: before grpcio 1.80 its keys were its items.
    trailing = dict(iter(call.trailing_metadata() or ()))
    details = trailing.get("grpc-status-details-bin")
    return from_rpc_status(
        call.code(), call.details() or "", details if isinstance(details, bytes) else None, where
    )


def from_rpc_status(
    code: grpc.StatusCode, message: str, details: bytes | None, where: str
) -> MembankError:
    """Decode the status that ended an RPC.

    Parameters
    ----------
    code
        Its code, but OK.
    message
        What is said about it; may be empty.
    details
        The serialized ``google.rpc.Status``; None = there is none.
    where
        As for `from_rpc_error`.
    """
    leaf = _LEAF_BY_CODE.get(code, UnavailableError if _is_cancel(code) else InternalError)
    reason: Reason | None = None
    metadata: dict[str, str] = {}
    if details is not None:
        reason, metadata = _error_info(status_pb2.Status.FromString(details))
    message = message or code.name
    if reason is None:
        reason = _REASON_WITHOUT_DETAILS.get(code, leaf.default_reason)
        message = f"{where}: {message} ({code.name})"
    return leaf(message, reason=reason, metadata=metadata)


def _is_cancel(code: grpc.StatusCode) -> bool:
    return code is grpc.StatusCode.CANCELLED


def _error_info(status: status_pb2.Status) -> tuple[Reason | None, dict[str, str]]:
    for detail in status.details:
        info = error_details_pb2.ErrorInfo()
        if detail.Unpack(info) and info.domain == ERROR_DOMAIN:
            known = info.reason in Reason.__members__
            # A newer server may send a reason that this client does not know yet.
            reason = Reason(info.reason) if known else Reason.UNEXPECTED
            return reason, dict(info.metadata)
    return None, {}
