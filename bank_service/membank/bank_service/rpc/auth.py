"""Who calls, and what callers may do: a token file, four roles, one table of methods.

A token file has one caller per line, ``TOKEN PRINCIPAL ROLE``; ``#`` starts a comment. A line that
holds a token alone stands for the principal "operator" with the role admin, so that a file with
nothing but one generated secret works.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from types import MappingProxyType
from typing import Protocol

from membank.wire.errors import (
    AccessDeniedError,
    FailedPreconditionError,
    Reason,
    UnauthenticatedError,
)

Metadata = Iterable[tuple[str, str | bytes]]
"""Invocation metadata of a call."""


class Role(IntEnum):
    """What a caller may do; each role includes those before it."""

    READER = 1
    TRAINER = 2
    OPERATOR = 3
    ADMIN = 4


@dataclass(frozen=True, slots=True)
class Principal:
    """A known caller."""

    name: str
    """Its name, as written to the audit log."""
    role: Role
    """What it may do."""


LOCAL_PRINCIPAL = Principal("local", Role.ADMIN)
"""Everybody, where no tokens are configured; only loopback is served then."""

BLOCK_SERVICE = "/membank.v1.BlockService/"
"""Prefix of the methods of the data path."""

_BLOCK = BLOCK_SERVICE
_ADMIN = "/membank.v1.AdminService/"

METHOD_ROLES: Mapping[str, Role] = MappingProxyType(
    {
        _BLOCK + "GetBank": Role.READER,
        _BLOCK + "GetTree": Role.READER,
        _BLOCK + "FetchBlocks": Role.READER,
        _BLOCK + "WatchBlocks": Role.READER,
        _BLOCK + "GetSameHostDoor": Role.READER,
        _BLOCK + "PushUpdates": Role.TRAINER,
        _ADMIN + "ListTopics": Role.READER,
        _ADMIN + "DescribeBlocks": Role.READER,
        _ADMIN + "ListSnapshots": Role.READER,
        _ADMIN + "GetStats": Role.READER,
        _ADMIN + "ListPacks": Role.OPERATOR,
        _ADMIN + "GetReceipt": Role.OPERATOR,
        _ADMIN + "ApplyTransaction": Role.OPERATOR,
        _ADMIN + "ExportTopic": Role.OPERATOR,
        _ADMIN + "ImportTopic": Role.OPERATOR,
        _ADMIN + "DeletePack": Role.OPERATOR,
        _ADMIN + "CreateSnapshot": Role.OPERATOR,
        _ADMIN + "DeleteSnapshot": Role.OPERATOR,
        _ADMIN + "Rollback": Role.OPERATOR,
        _ADMIN + "ListAuditRecords": Role.OPERATOR,
        _ADMIN + "CollectGarbage": Role.ADMIN,
        _ADMIN + "CreateBank": Role.ADMIN,
    }
)
"""The least role that may call each method; a test walks over every method of the services."""

current_principal: ContextVar[Principal] = ContextVar("current_principal")
"""The caller of the RPC at hand; set by the interceptor for calls with a single answer."""


class Authenticator(Protocol):
    """Tells who calls."""

    def authenticate(self, metadata: Metadata) -> Principal:
        """Return the caller, or raise `UnauthenticatedError`."""


class OpenAuthenticator:
    """Takes everybody for `LOCAL_PRINCIPAL`; for servers on loopback without tokens."""

    def authenticate(self, metadata: Metadata) -> Principal:  # one answer for all
        # docstring inherited
        return LOCAL_PRINCIPAL


class TokenAuthenticator:
    """Knows callers by the bearer token in the metadata key ``authorization``.

    Parameters
    ----------
    principals
        The caller of each token. Only digests of the tokens are kept.
    """

    def __init__(self, principals: Mapping[str, Principal]) -> None:
        self._principals = [(_digest(token), who) for token, who in principals.items()]

    @classmethod
    def from_file(cls, path: Path) -> TokenAuthenticator:
        """Read a token file (module docstring).

        Raises
        ------
        FailedPreconditionError
            If it cannot be read, has a malformed line, or names no caller.
        """
        try:
            lines = path.read_text().splitlines()
        except (OSError, UnicodeDecodeError) as err:
            raise _bad_file(path, str(err)) from err
        principals: dict[str, Principal] = {}
        for number, line in enumerate(lines, start=1):
            fields = line.partition("#")[0].split()
            if not fields:
                continue
            if fields[0] in principals:
                raise _bad_file(path, f"line {number} repeats a token")
            principals[fields[0]] = _principal(fields, f"{path}:{number}")
        if not principals:
            raise _bad_file(path, "it names no caller")
        return cls(principals)

    def authenticate(self, metadata: Metadata) -> Principal:
        # docstring inherited
        token = _bearer_token(metadata)
        if token is None:
            raise UnauthenticatedError(
                "this server wants a token; give the client the token file of the service",
                reason=Reason.NO_CREDENTIALS,
            )
        digest = _digest(token)
        found: Principal | None = None
        # Every entry is compared, each in constant time: timing tells neither how much of a token
        # is right nor which line of the file it is near.
        for known, principal in self._principals:
            if hmac.compare_digest(known, digest):
                found = principal
        if found is None:
            raise UnauthenticatedError(
                "the token is not known to this server", reason=Reason.BAD_CREDENTIALS
            )
        return found


def require_role(principal: Principal, method: str) -> None:
    """Raise unless `principal` may call `method` (full name).

    Raises
    ------
    AccessDeniedError
        If its role is too low.
    """
    # A method that nobody gave a role is for admins alone.
    needed = METHOD_ROLES.get(method, Role.ADMIN)
    if principal.role < needed:
        raise AccessDeniedError(
            f"{principal.name} is {principal.role.name.lower()}; "
            f"{method.rsplit('/', 1)[-1]} needs {needed.name.lower()}",
            metadata={"role": principal.role.name.lower(), "needed": needed.name.lower()},
        )


def _bearer_token(metadata: Metadata) -> str | None:
    for key, value in metadata:
        if key == "authorization" and isinstance(value, str):
            scheme, _, token = value.partition(" ")
            if scheme.lower() == "bearer" and token:
                return token.strip()
    return None


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode()).digest()


def _principal(fields: list[str], where: str) -> Principal:
    match fields:
        case [_]:
            return Principal("operator", Role.ADMIN)
        case [_, name, role] if role.upper() in Role.__members__:
            return Principal(name, Role[role.upper()])
    roles = "|".join(role.name.lower() for role in Role)
    # The line itself is not quoted: it holds a secret.
    raise FailedPreconditionError(f"{where}: write TOKEN PRINCIPAL {roles}")


def _bad_file(path: Path, problem: str) -> FailedPreconditionError:
    return FailedPreconditionError(
        f"token file {path}: {problem}", metadata={"token_file": str(path)}
    )
