"""Errors of calls over gRPC, whoever speaks it: grpcio, or the calls that pass it by."""

from __future__ import annotations

import grpc

from membank.wire.errors import (
    FailedPreconditionError,
    MembankError,
    Reason,
    from_rpc_status,
)


def call_error(
    code: grpc.StatusCode, message: str, details: bytes | None, *, endpoint: str, method: str
) -> MembankError:
    """Return what to raise for a call that ended with a status.

    Parameters
    ----------
    code
        Code of the status, but OK.
    message
        What is said about it; may be empty.
    details
        The serialized ``google.rpc.Status``; None = there is none.
    endpoint
        Address that was called.
    method
        Method that was called, without its service.
    """
    if code is grpc.StatusCode.UNIMPLEMENTED:
        return FailedPreconditionError(
            f"{endpoint} does not offer {method}; connect to the gateway's address, "
            "and see that client and service are of versions that fit",
            reason=Reason.BAD_CONFIG,
            metadata={"endpoint": endpoint, "method": method},
        )
    return from_rpc_status(code, message, details, f"{endpoint} {method}")
