"""Signatures: what says that a receipt or a pack is as its signer wrote it (Ed25519, RFC 8032).

A signed text is ``CONTEXT NUL MESSAGE``, so that a signature made for one kind of document is never
one for another. Whoever verifies must know the signer's key from elsewhere: a document carries the
key that signed it, so that the signature can be checked at all, but only a key that is trusted says
who signed.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)

from membank.wire.errors import (
    CorruptionError,
    FailedPreconditionError,
    InvalidArgumentError,
    Reason,
)


class Context(StrEnum):
    """What is signed."""

    RECEIPT = "membank receipt v1"
    PACK = "membank pack v1"


@dataclass(frozen=True, slots=True)
class PublicKey:
    """Whose signatures can be checked."""

    raw: bytes
    """32 bytes."""

    @property
    def text(self) -> str:
        """Base64, as documents and files of trusted keys hold it."""
        return base64.b64encode(self.raw).decode()

    @property
    def key_id(self) -> str:
        """First 16 hexadecimal digits of its SHA-256: for people, and names of files."""
        return hashlib.sha256(self.raw).hexdigest()[:16]

    @classmethod
    def parse(cls, text: str) -> PublicKey:
        """Read what `text` writes.

        Raises
        ------
        InvalidArgumentError
            If it is no key (BAD_KEY).
        """
        try:
            raw = base64.b64decode(text, validate=True)
            Ed25519PublicKey.from_public_bytes(raw)
        except (binascii.Error, ValueError) as err:
            raise InvalidArgumentError(
                f"{text[:60]!r} is not an Ed25519 public key in base64", reason=Reason.BAD_KEY
            ) from err
        return cls(raw)


@dataclass(frozen=True, slots=True)
class Signature:
    """A signature and the key that it is checked with."""

    public_key: PublicKey
    """Key of the signer."""
    value: bytes
    """64 bytes."""

    def to_json(self) -> dict[str, object]:
        """Return it as JSON-able values."""
        return {
            "algorithm": "ed25519",
            "public_key": self.public_key.text,
            "value": base64.b64encode(self.value).decode(),
        }

    @classmethod
    def from_json(cls, body: object, *, what: str) -> Signature:
        """Read what `to_json` wrote.

        Raises
        ------
        CorruptionError
            If it is none (BAD_SIGNATURE).
        """
        try:
            if not isinstance(body, Mapping) or body["algorithm"] != "ed25519":
                raise ValueError("not an Ed25519 signature")
            key = PublicKey.parse(str(body["public_key"]))
            return cls(key, base64.b64decode(str(body["value"]), validate=True))
        except (InvalidArgumentError, binascii.Error, ValueError, KeyError) as err:
            raise CorruptionError(
                f"the signature of {what} cannot be read ({err}); take another copy of it",
                reason=Reason.BAD_SIGNATURE,
            ) from err

    def check(self, context: Context, message: bytes, *, what: str) -> None:
        """Raise `CorruptionError` (BAD_SIGNATURE) unless it was made of this message."""
        key = Ed25519PublicKey.from_public_bytes(self.public_key.raw)
        try:
            key.verify(self.value, _signed(context, message))
        except InvalidSignature as err:
            raise CorruptionError(
                f"{what} was changed after it was signed, or another key signed it; "
                "take another copy of it",
                reason=Reason.BAD_SIGNATURE,
                metadata={"key_id": self.public_key.key_id},
            ) from err


class Signer:
    """Signs with one private key.

    Parameters
    ----------
    key
        The key.
    """

    def __init__(self, key: Ed25519PrivateKey) -> None:
        self._key = key

    @property
    def public_key(self) -> PublicKey:
        """What its signatures are checked with."""
        raw = self._key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
        return PublicKey(raw)

    def sign(self, context: Context, message: bytes) -> Signature:
        """Sign a message of any length."""
        return Signature(self.public_key, self._key.sign(_signed(context, message)))

    def __reduce__(self) -> tuple[object, ...]:
        # A key that travels is a key that is logged, spilled or kept by whoever carries it.
        raise TypeError("a signing key stays in its process; send the name of its file")

    @classmethod
    def generate(cls) -> Signer:
        """Return one with a fresh key."""
        return cls(Ed25519PrivateKey.generate())

    @classmethod
    def load(cls, file: Path) -> Signer:
        """Read a key from a PEM file (PKCS 8, not encrypted).

        Raises
        ------
        FailedPreconditionError
            If there is no such file, or it holds no Ed25519 key (BAD_KEY).
        """
        try:
            key = load_pem_private_key(file.read_bytes(), password=None)
        except (OSError, ValueError, TypeError, UnsupportedAlgorithm) as err:
            raise _unusable(file, str(err)) from err
        if not isinstance(key, Ed25519PrivateKey):
            raise _unusable(file, "it is no Ed25519 key")
        return cls(key)

    @classmethod
    def load_or_create(cls, file: Path) -> Signer:
        """Read a key, or make one where there is no file yet; only its owner may read it."""
        file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        signer = cls.generate()
        pem = signer._key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        unfinished = file.with_name(f".{file.name}.{os.getpid()}")
        try:
            if file.exists():
                return cls.load(file)
            descriptor = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "wb") as target:
                target.write(pem)
                target.flush()
                os.fsync(target.fileno())
            # Two that start at once end up with one key: the first link stays.
            os.link(unfinished, file)
        except FileExistsError:
            return cls.load(file)
        except OSError as err:
            raise _unusable(file, str(err)) from err
        finally:
            unfinished.unlink(missing_ok=True)
        return signer


class TrustedKeys(Mapping[PublicKey, str]):
    """Keys whose signatures count, and the name of each.

    Parameters
    ----------
    names
        Name by key.
    """

    def __init__(self, names: Mapping[PublicKey, str]) -> None:
        self._names = dict(names)

    def __getitem__(self, key: PublicKey) -> str:
        return self._names[key]

    def __iter__(self) -> Iterator[PublicKey]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    @classmethod
    def load(cls, file: Path) -> TrustedKeys:
        """Read a file with one ``KEY NAME`` per line; ``#`` starts a comment.

        Raises
        ------
        InvalidArgumentError
            If it cannot be read, or a line is no key (BAD_KEY).
        """
        try:
            lines = file.read_text().splitlines()
        except (OSError, UnicodeDecodeError) as err:
            raise InvalidArgumentError(
                f"the file of trusted keys {file} cannot be read: {err}", reason=Reason.BAD_KEY
            ) from err
        names = {}
        for line in lines:
            text, _, name = line.partition("#")[0].strip().partition(" ")
            if text:
                key = PublicKey.parse(text)
                names[key] = name.strip() or key.key_id
        return cls(names)

    def require(self, signature: Signature, *, what: str) -> str:
        """Return the name of the signer.

        Raises
        ------
        FailedPreconditionError
            If its key is not among these (UNTRUSTED_KEY).
        """
        name = self._names.get(signature.public_key)
        if name is None:
            raise FailedPreconditionError(
                f"{what} is signed with the key {signature.public_key.text}, which is not trusted "
                "here; add it to the trusted keys if you know whose it is",
                reason=Reason.UNTRUSTED_KEY,
                metadata={"key_id": signature.public_key.key_id},
            )
        return name


def _signed(context: Context, message: bytes) -> bytes:
    return context.value.encode() + b"\0" + message


def _unusable(file: Path, problem: str) -> FailedPreconditionError:
    return FailedPreconditionError(
        f"the signing key {file} cannot be used: {problem}; give a PEM file with an Ed25519 key "
        "that this user can read, or move it away to have a new one made",
        reason=Reason.BAD_KEY,
        metadata={"file": str(file)},
    )
