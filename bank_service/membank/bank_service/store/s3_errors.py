"""What an S3 server, or the way to it, says when a request fails, in the words of the error tree.

Servers answer with a code; obstore carries it in the text of the answer, botocore (below s3fs) in a
field. What the two make of it differs, so the code decides, not their types.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from membank.wire.errors import (
    AlreadyExistsError,
    FailedPreconditionError,
    InvalidArgumentError,
    MembankError,
    NotFoundError,
    Reason,
    ResourceExhaustedError,
    UnavailableError,
)

INVALID_RANGE = "InvalidRange"
"""The code for a range that begins after the end of the object."""

# The answer's code, and the status of an answer without a body, as obstore prints them.
_CODE = re.compile(r"<Code>(\w+)</Code>")
_STATUS = re.compile(r"status code: (\d{3})\b")
_OBSTORE_REDIRECT = "redirect without LOCATION"
_OBSTORE_PROVIDER = "External AWS credential provider"
# How obstore's dump of an error names a failure to reach the server at all.
_OBSTORE_CONNECT = "kind: Connect,"
_UNREACHED = frozenset(
    {"EndpointConnectionError", "ConnectTimeoutError", "ProxyConnectionError", "SSLError"}
)


@dataclass(frozen=True, slots=True)
class _Meaning:
    """An error's leaf and reason, and the sentence after "the storage refuses WHAT"."""

    leaf: type[MembankError]
    reason: Reason
    text: str


_DENIED = _Meaning(
    FailedPreconditionError,
    Reason.STORE_DENIED,
    "the credentials in use may not do this; allow them to get, put, list and delete objects there",
)
_UNKNOWN_USER = _Meaning(
    FailedPreconditionError,
    Reason.STORE_CREDENTIALS,
    "the server does not accept the credentials; correct AWS_ACCESS_KEY_ID and "
    "AWS_SECRET_ACCESS_KEY, or what AWS_PROFILE names, and check AWS_ENDPOINT_URL",
)
_EXPIRED = _Meaning(
    FailedPreconditionError,
    Reason.STORE_CREDENTIALS,
    "the credentials have expired; renew them and start again with the new ones",
)
_SKEWED = _Meaning(
    FailedPreconditionError,
    Reason.STORE_CLOCK_SKEW,
    "the clock of this machine and that of the server differ by too much; set this machine's clock",
)
_NO_BUCKET = _Meaning(
    FailedPreconditionError,
    Reason.NO_BUCKET,
    "there is no such bucket; create it, or correct the URL or AWS_ENDPOINT_URL",
)
_ELSEWHERE = _Meaning(
    FailedPreconditionError,
    Reason.STORE_FAILED,
    "the bucket is in another region; set AWS_REGION to it",
)
_FULL = _Meaning(
    ResourceExhaustedError, Reason.NO_SPACE, "no space or quota is left; free some and try again"
)
_EXISTS = _Meaning(AlreadyExistsError, Reason.OBJECT_EXISTS, "it exists")
_MISSING = _Meaning(NotFoundError, Reason.OBJECT_MISSING, "it does not exist")
_UNSUPPORTED = _Meaning(
    FailedPreconditionError,
    Reason.STORE_UNSUPPORTED,
    "the server does not implement the request; use one that does (docs/s3.md)",
)
_BAD_NAME = _Meaning(
    InvalidArgumentError, Reason.BAD_ARGUMENT, "the server does not accept the name"
)
_PASSING = _Meaning(
    UnavailableError, Reason.STORE_FAILED, "the server is overloaded or failing; try again later"
)
_REFUSED = _Meaning(
    FailedPreconditionError, Reason.STORE_FAILED, "the server does not accept the request"
)

_MEANINGS = {
    "AccessDenied": _DENIED,
    "AccountProblem": _DENIED,
    "AllAccessDisabled": _DENIED,
    "MethodNotAllowed": _DENIED,
    "NotSignedUp": _DENIED,
    "UserSuspended": _DENIED,
    "AuthFailure": _UNKNOWN_USER,
    "InvalidAccessKeyId": _UNKNOWN_USER,
    "InvalidSecurity": _UNKNOWN_USER,
    "InvalidToken": _UNKNOWN_USER,
    "SignatureDoesNotMatch": _UNKNOWN_USER,
    "ExpiredToken": _EXPIRED,
    "RequestExpired": _EXPIRED,
    "TokenRefreshRequired": _EXPIRED,
    "RequestTimeTooSkewed": _SKEWED,
    "NoSuchBucket": _NO_BUCKET,
    "AuthorizationHeaderMalformed": _ELSEWHERE,
    "IllegalLocationConstraintException": _ELSEWHERE,
    "PermanentRedirect": _ELSEWHERE,
    "TemporaryRedirect": _PASSING,
    "InsufficientStorage": _FULL,
    "QuotaExceeded": _FULL,
    "PreconditionFailed": _EXISTS,
    "NoSuchKey": _MISSING,
    "NotImplemented": _UNSUPPORTED,
    "InvalidBucketName": _BAD_NAME,
    "KeyTooLongError": _BAD_NAME,
    # Bodies that were damaged on the way, and conditions decided while another request ran.
    "BadDigest": _PASSING,
    "ConditionalRequestConflict": _PASSING,
    "IncompleteBody": _PASSING,
    "OperationAborted": _PASSING,
    "RequestTimeout": _PASSING,
    "XAmzContentSHA256Mismatch": _PASSING,
}
# For answers without a body: to HEAD requests, and from what stands before the server.
_BY_STATUS = {
    "301": _ELSEWHERE,
    "401": _UNKNOWN_USER,
    "403": _DENIED,
    "404": _MISSING,
    "408": _PASSING,
    "412": _EXISTS,
    "429": _PASSING,
    "501": _UNSUPPORTED,
    "507": _FULL,
}


def s3_code(err: BaseException) -> str | None:
    """Return the code, or else the status, with which a server answered; None if it did not.

    Parameters
    ----------
    err
        What obstore, s3fs or botocore raised.
    """
    for cause in _chain(err):
        response = getattr(cause, "response", None)
        if isinstance(response, dict):
            code = response.get("Error", {}).get("Code")
            return str(code or response.get("ResponseMetadata", {}).get("HTTPStatusCode"))
        if _is_obstore(cause):
            text = str(cause)
            found = _CODE.search(text) or _STATUS.search(text)
            return "PermanentRedirect" if _OBSTORE_REDIRECT in text else found and found.group(1)
    return None


def s3_error(err: BaseException, what: str) -> MembankError | None:
    """Return what `err` means for `what` (URL and key); None if no S3 client raised it."""
    code = s3_code(err)
    if code is not None:
        meaning = _MEANINGS.get(code) or _BY_STATUS.get(code) or _by_class(code)
        return _error(meaning, code, what)
    for cause in _chain(err):
        if _is_obstore(cause) or _is_botocore(cause):
            return _without_answer(cause, what)
    return None


def _by_class(code: str) -> _Meaning:
    """Return what a code means that nobody has listed: failures pass, refusals stay."""
    passes = code.startswith(("5", "Internal", "Service", "Slow", "Throttl", "TooManyRequests"))
    return _PASSING if passes else _REFUSED


def _error(meaning: _Meaning, code: str, what: str) -> MembankError:
    metadata = {"object": what, "code": code}
    if meaning is _MISSING:
        message = f"{what} does not exist"
    elif meaning is _EXISTS:
        message = f"{what} exists"
    else:
        message = f"{what}: {meaning.text} ({code})"
    return meaning.leaf(message, reason=meaning.reason, metadata=metadata)


def _without_answer(err: BaseException, what: str) -> MembankError:
    name, text = type(err).__name__, str(err)
    if name == "NoCredentialsError" or name == "PartialCredentialsError":
        return _error(_UNKNOWN_USER, name, what)
    if name == "InvalidPathError":
        # Not what was asked for, but what lies there.
        path = text.splitlines()[0]
        return FailedPreconditionError(
            f"{what}: an object there is not of a bank and has no usable name ({path}); remove it",
            reason=Reason.STORE_FAILED,
            metadata={"object": what},
        )
    if _OBSTORE_PROVIDER in text or name == "CredentialRetrievalError":
        problem = "the credentials cannot be renewed; check what AWS_PROFILE or the role gives"
    elif name in _UNREACHED or _OBSTORE_CONNECT in text:
        problem = "the server cannot be reached; check AWS_ENDPOINT_URL and the network"
    else:
        problem = "the request got no answer in time, or lost its connection; try again later"
    return UnavailableError(
        f"{what}: {problem} ({name})", reason=Reason.STORE_FAILED, metadata={"object": what}
    )


def _chain(err: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and what caused it."""
    for _ in range(8):
        if err is None:
            return
        yield err
        err = err.__cause__ or err.__context__


def _is_obstore(err: BaseException) -> bool:
    # obstore raises FileNotFoundError itself where an object is missing; its text is then its own.
    return type(err).__module__.startswith("obstore") or (
        isinstance(err, FileNotFoundError) and _STATUS.search(str(err)) is not None
    )


def _is_botocore(err: BaseException) -> bool:
    return type(err).__module__.startswith(("botocore", "aiobotocore", "aiohttp"))
