"""Who may call, and how errors leave the server; the same for every way in."""

from __future__ import annotations

import logging
import uuid

from membank.bank_service.rpc.auth import (
    METHOD_ROLES,
    Authenticator,
    Metadata,
    Principal,
    require_role,
)
from membank.wire.errors import InternalError, MembankError

_LOG = logging.getLogger(__name__)


def admit(authenticator: Authenticator, metadata: Metadata, method: str) -> Principal:
    """Return who calls `method` (full name).

    Raises
    ------
    UnauthenticatedError
        If that is not known.
    AccessDeniedError
        If its role is too low.
    """
    principal = authenticator.authenticate(metadata)
    if method in METHOD_ROLES:
        require_role(principal, method)
    return principal


def leaving(error: Exception, method: str) -> MembankError:
    """Return what the caller of `method` is told of an error.

    A `MembankError` leaves as it is. Anything else is a defect: the caller learns a request id, the
    log holds the traceback under it, and nothing of the inside leaks.
    """
    if isinstance(error, MembankError) and not isinstance(error, InternalError):
        return error
    # Also an InternalError of another process of the service, which quotes its cause.
    request_id = uuid.uuid4().hex
    _LOG.error("%s failed, request %s", method, request_id, exc_info=error)
    return InternalError(
        f"{method.rsplit('/', 1)[-1]} failed inside the server; "
        f"its log has the cause under request {request_id}",
        metadata={"request_id": request_id},
    )
