"""What both S3 clients are told: where the server is, who asks, and how long to go on trying."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from membank.bank_service.store.objects import check_key
from membank.wire.errors import FailedPreconditionError, InvalidArgumentError, Reason

if TYPE_CHECKING:
    from botocore.credentials import Credentials
    from obstore.store import S3Credential

LARGE_UPLOAD_BYTES = 256 * 1024
"""Above this size the upload itself may take longer than a silence of the server means anything."""

_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,61}[A-Za-z0-9]")
_DEFAULT_REGION = "us-east-1"
# botocore renews credentials long before they expire; this is how often it is asked whether it has.
_CREDENTIAL_TTL = timedelta(minutes=1)


@dataclass(frozen=True, kw_only=True, slots=True)
class S3Config:
    """Bounds on the time of every request.

    A call ends at the latest after `retry_s`, the wait before a last attempt (`max_backoff_s`) and
    that attempt itself: after 32 s where a server does nothing but fail, 37 s where it is silent, and
    152 s where it is silent while a large object is sent to it.
    """

    connect_timeout_s: float = 3.0
    """Longest wait for a connection, in seconds."""
    stall_timeout_s: float = 5.0
    """Longest silence of the server within a request, in seconds: less than a shard's lease, which one
    lost packet must not cost. Not for uploads above 256 KiB, during which a server has nothing to say."""
    transfer_timeout_s: float = 120.0
    """Longest whole attempt, the body included, in seconds; 64 MB then need 0.5 MB/s."""
    retry_s: float = 30.0
    """How long after its begin a request is still tried again, in seconds; 0 = tried once."""
    max_backoff_s: float = 2.0
    """Longest wait between two attempts, in seconds; the first are shorter."""
    max_idle_connections: int = 32
    """Connections kept open between requests; more are opened when more threads ask."""

    def __post_init__(self) -> None:
        for name in ("connect_timeout_s", "stall_timeout_s", "transfer_timeout_s", "max_backoff_s"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be positive")
        if self.retry_s < 0:
            raise ValueError(f"retry_s is {self.retry_s}; it must be 0 or positive")
        if self.max_idle_connections < 1:
            raise ValueError(
                f"max_idle_connections is {self.max_idle_connections}; it must be positive"
            )


@dataclass(frozen=True, slots=True)
class S3Place:
    """A bucket, and what comes before every key."""

    bucket: str
    prefix: str

    @classmethod
    def parse(cls, url: str) -> S3Place:
        """Take an ``s3://bucket/prefix`` URL apart.

        Raises
        ------
        InvalidArgumentError
            If it names no bucket, or more than a bucket and a prefix.
        """
        bucket, _, prefix = url.removeprefix("s3://").partition("/")
        if not _BUCKET.fullmatch(bucket):
            # The URL is not repeated: people put credentials in this place.
            raise InvalidArgumentError(
                "an S3 URL is s3://BUCKET or s3://BUCKET/PREFIX, the bucket's name being 3 to 63 "
                "letters, digits, dots and hyphens; credentials and endpoint come from the "
                "environment (docs/s3.md)"
            )
        prefix = prefix.rstrip("/")
        if prefix:
            check_key(prefix)
        return cls(bucket, prefix)

    def path(self, key: str) -> str:
        """Return where in the bucket the object of `key` is."""
        return f"{self.prefix}/{key}" if self.prefix else key


class S3Account:
    """The server and its region, from the environment and the AWS configuration files.

    Both clients get what is found here, so that the two always speak to the same server.
    """

    def __init__(self) -> None:
        # Imported here: a quarter of a second that banks in directories need not wait.
        import botocore.exceptions
        import botocore.session

        self._session: Any = botocore.session.Session()
        try:
            profile = self._session.get_scoped_config()
            configured = self._session.get_config_variable("region")
        except botocore.exceptions.BotoCoreError as err:
            raise FailedPreconditionError(
                f"the AWS configuration cannot be used: {err}; correct AWS_PROFILE or the files "
                "it refers to",
                reason=Reason.STORE_CREDENTIALS,
            ) from err
        self.endpoint: str | None = _endpoint(profile, self._session.full_config)
        """URL of the server; None = AWS itself."""
        self.region: str = os.environ.get("AWS_REGION") or configured or _DEFAULT_REGION
        """Region that requests are signed for."""

    def credentials(self) -> CredentialProvider:
        """Return the source of credentials that AWS tools would use.

        Raises
        ------
        FailedPreconditionError
            If there is none (STORE_CREDENTIALS).
        """
        found = self._session.get_credentials()
        if found is None:
            raise FailedPreconditionError(
                "there are no S3 credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or "
                "AWS_PROFILE, or run where a role gives them",
                reason=Reason.STORE_CREDENTIALS,
            )
        return CredentialProvider(found)


class CredentialProvider:
    """Gives obstore the credentials that botocore found, renewed as botocore renews them.

    Parameters
    ----------
    credentials
        botocore's credentials, of whatever source.
    """

    # Threads: botocore's credentials lock themselves while they are renewed.

    def __init__(self, credentials: Credentials) -> None:
        import botocore.credentials

        self._credentials = credentials
        self._expire = isinstance(credentials, botocore.credentials.RefreshableCredentials)

    def __call__(self) -> S3Credential:
        """Return the credentials of this moment."""
        now = self._credentials.get_frozen_credentials()
        return {
            "access_key_id": now.access_key,
            "secret_access_key": now.secret_key,
            "token": now.token,
            "expires_at": datetime.now(UTC) + _CREDENTIAL_TTL if self._expire else None,
        }

    def __reduce__(self) -> tuple[object, ...]:
        raise TypeError("credentials are not pickled; open the store again from its URL")


def _endpoint(profile: dict[str, Any], files: dict[str, Any]) -> str | None:
    """Look an endpoint up in the places, and the order, that AWS documents."""
    for name in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"):
        if found := os.environ.get(name):
            return found
    services = files.get("services", {}).get(profile.get("services"), {})
    found = services.get("s3", {}).get("endpoint_url") or profile.get("endpoint_url")
    return None if found is None else str(found)
