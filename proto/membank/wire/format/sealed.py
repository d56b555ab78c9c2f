"""Sealed objects: encrypted each with a key of its own, which is destroyed with the object.

A *sealed bank* keeps what holds content, or tells of it, under AES-256-GCM. The keys are in a
*keyring*: another store, with one small object per sealed object at the same relative key. Once a
key is gone, no copy of the object that anybody kept can be read: not an old version of a bucket, not
a backup, not what a disk has not yet written over. Bytes and order of writes are in docs/format.md.
"""

from __future__ import annotations

import json
import os
import struct
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from membank.wire.crc import crc32c
from membank.wire.errors import CorruptionError, FailedPreconditionError, NotFoundError, Reason
from membank.wire.format.document import BankDocument
from membank.wire.format.layout import FORMAT_VERSION, PACKS, PARTITIONS, TREES

if TYPE_CHECKING:
    # It is read by way of this module.
    from membank.wire.format.stored import BankObjects

KEYRING_KEY = "keyring.json"
"""Key of the document in a keyring that says whose it is."""

SEAL_OVERHEAD_BYTES = 36
"""Bytes of a sealed object beyond its content: magic, nonce and tag."""

KEY_RECORD_BYTES = 44
"""Bytes of an object that holds a key."""

_MAGIC = b"MBSEAL1\0"
_KEY_MAGIC = b"MBSKEY1\0"
_NONCE_BYTES = 12
_TAG_BYTES = 16
_SECRET_BYTES = 32
_BODY_AT = len(_MAGIC) + _NONCE_BYTES
_CRC = struct.Struct("<I")
_LOG = "log"
_LEVEL = "level-"
_CHUNK = "c."
_WRONG = "its key does not open it: it was changed, or exchanged"


def is_sealed_key(key: str) -> bool:
    """Say whether a sealed bank seals the object of this key: slots, journals, trees and packs."""
    top, *below = key.split("/")
    if top in {TREES, PACKS}:
        return len(below) == 1
    if top != PARTITIONS or len(below) < 3:
        return False
    if below[1] == _LOG:
        return len(below) == 3
    return len(below) == 4 and below[1].startswith(_LEVEL) and below[3].startswith(_CHUNK)


def is_sealed_log_key(key: str) -> bool:
    """Say whether the object of this key is a part of a journal."""
    return is_sealed_key(key) and key.split("/")[2:3] == [_LOG]


def may_hold_sealed(prefix: str) -> bool:
    """Say whether there may be sealed objects under a prefix; "" is that of the whole bank."""
    top, *below = prefix.split("/")
    if top in {"", TREES, PACKS}:
        return True
    is_inside = len(below) < 2 or below[1] == _LOG or below[1].startswith(_LEVEL)
    return top == PARTITIONS and is_inside


class Seal:
    """Seals and opens the one object that a key is for.

    Parameters
    ----------
    secret
        The key, 32 bytes.
    bank_id
        Identity of the bank.
    key
        Key of the object. With `bank_id` it is authenticated, so that no object can be taken for
        another one, nor for one of another bank.
    where
        URL and key of the object, for errors.
    """

    def __init__(self, secret: bytes, *, bank_id: str, key: str, where: str) -> None:
        self._algorithm = algorithms.AES(secret)
        self._cipher = AESGCM(secret)
        self._name = f"{bank_id}/{key}".encode()
        self._key = key
        self._where = where

    def close(self, data: bytes) -> list[bytes]:
        """Return `data` as a sealed object, in pieces that follow one another."""
        # Random: an object that is put again has the same key, far less often than 2^32 times.
        nonce = os.urandom(_NONCE_BYTES)
        return [_MAGIC + nonce, self._cipher.encrypt(nonce, data, self._name)]

    def open(self, sealed: bytes | memoryview) -> bytes:
        """Return the content of a sealed object.

        Raises
        ------
        CorruptionError
            If it is not what was sealed with this key under this name.
        """
        nonce, body = self._parts(sealed)
        try:
            return self._cipher.decrypt(nonce, body, self._name)
        except InvalidTag as err:
            raise self._damaged(_WRONG) from err

    def open_into(self, sealed: bytes | memoryview, target: memoryview) -> None:
        """Write the content of a sealed object to `target`, which is exactly as long.

        Errors are those of `open`; `target` holds nothing of use then.
        """
        nonce, body = self._parts(sealed)
        # The one-shot interface writes into memory of the caller's from version 47 on only.
        mode = modes.GCM(bytes(nonce), bytes(body[-_TAG_BYTES:]))
        opening = Cipher(self._algorithm, mode).decryptor()
        opening.authenticate_additional_data(self._name)
        try:
            opening.update_into(body[:-_TAG_BYTES], target)
            opening.finalize()
        except InvalidTag as err:
            raise self._damaged(_WRONG) from err

    def _parts(self, sealed: bytes | memoryview) -> tuple[memoryview, memoryview]:
        view = memoryview(sealed)
        if len(view) < SEAL_OVERHEAD_BYTES or view[: len(_MAGIC)] != _MAGIC:
            raise self._damaged("it is no sealed object, in a bank that seals")
        return view[len(_MAGIC) : _BODY_AT], view[_BODY_AT:]

    def _damaged(self, problem: str) -> CorruptionError:
        return CorruptionError(
            f"{self._where}: {problem}; restore the object from a copy",
            reason=_reason_for(self._key),
            metadata={"key": self._key},
        )


def new_secret() -> bytes:
    """Return a new key, from the system's random numbers."""
    return AESGCM.generate_key(8 * _SECRET_BYTES)


def encode_secret(secret: bytes) -> bytes:
    """Encode a key as the keyring holds it."""
    head = _KEY_MAGIC + secret
    return head + _CRC.pack(crc32c(head))


def decode_secret(data: bytes, *, key: str, where: str) -> bytes:
    """Return a key that `encode_secret` encoded.

    Parameters
    ----------
    data
        What the keyring holds.
    key
        Key of the object that it is for.
    where
        URL and key of `data`, for errors.

    Raises
    ------
    CorruptionError
        If it was changed.
    """
    head, crc = data[: -_CRC.size], data[-_CRC.size :]
    is_whole = len(data) == KEY_RECORD_BYTES and data.startswith(_KEY_MAGIC)
    if not is_whole or _CRC.pack(crc32c(head)) != crc:
        raise CorruptionError(
            f"{where} is damaged, so {key} cannot be opened; restore it from a copy of the keyring",
            reason=_reason_for(key),
            metadata={"key": key, "keyring": where},
        )
    return head[len(_KEY_MAGIC) :]


def is_torn_secret(data: bytes) -> bool:
    """Say whether this is what a loss of power leaves of a key that was not yet synced."""
    # Nothing that was to last can have been sealed with it. One that is merely damaged is kept.
    return len(data) < KEY_RECORD_BYTES or not any(data)


def encode_keyring(bank_id: str) -> bytes:
    """Encode the document that says which bank a keyring belongs to."""
    body = {"bank_id": bank_id}
    document = {"format": FORMAT_VERSION, "keyring": body, "crc32c": _json_crc(body)}
    return json.dumps(document, indent=1, sort_keys=True).encode()


def decode_keyring(data: bytes, *, where: str) -> str:
    """Return the bank's identity that `encode_keyring` wrote.

    Raises
    ------
    FailedPreconditionError
        If a newer membank wrote it (FORMAT_TOO_NEW).
    CorruptionError
        If it is damaged.
    """
    try:
        document = json.loads(data)
        version, body = int(document["format"]), document["keyring"]
        if version > FORMAT_VERSION:
            raise FailedPreconditionError(
                f"{where} has format {version}, and this membank reads up to {FORMAT_VERSION}; "
                "upgrade it",
                reason=Reason.FORMAT_TOO_NEW,
                metadata={"format": str(version)},
            )
        if _json_crc(body) != document["crc32c"]:
            raise ValueError("CRC-32C does not match")
        return str(body["bank_id"])
    except (ValueError, KeyError, TypeError) as err:
        raise CorruptionError(
            f"{where} is damaged ({err}); restore it from a copy of the keyring",
            reason=Reason.SPEC_CORRUPT,
            metadata={"key": KEYRING_KEY},
        ) from err


@runtime_checkable
class Keyed(Protocol):
    """What objects of a bank offer that are read, or written, with a keyring."""

    @property
    def keyring_url(self) -> str:
        """Where the keyring is; holds no credentials."""

    def require_bank(self, bank_id: str) -> None:
        """Raise `FailedPreconditionError` unless the keyring is that of the bank `bank_id`."""


def require_keyring(objects: object, document: BankDocument, *, where: str) -> None:
    """Raise unless a sealed bank comes with its keyring, and no other bank with any.

    Parameters
    ----------
    objects
        The bank's objects; `Keyed` if there is a keyring.
    document
        What bank.json says.
    where
        URL of the bank, for errors.

    Raises
    ------
    FailedPreconditionError
        If there is no keyring where one is needed (KEYRING_NEEDED), another one's or none at its
        URL (KEYRING_MISMATCH), or one for a bank that is not sealed (BANK_NOT_SEALED).
    CorruptionError
        If the keyring does not say whose it is.
    """
    bank_id = document.spec.bank_id
    if document.is_sealed and not isinstance(objects, Keyed):
        raise FailedPreconditionError(
            f"the bank at {where} is sealed: name its keyring (--keyring URL, MEMBANK_KEYRING, or "
            "`keyring` in Python)",
            reason=Reason.KEYRING_NEEDED,
            metadata={"bank": where, "bank_id": bank_id},
        )
    if not isinstance(objects, Keyed):
        return
    if not document.is_sealed:
        raise FailedPreconditionError(
            f"the bank at {where} is not sealed: what it holds lies there in the clear, whatever "
            f"the keyring {objects.keyring_url} has; name none (and unset MEMBANK_KEYRING), or "
            "import its topics into a sealed bank",
            reason=Reason.BANK_NOT_SEALED,
            metadata={"bank": where, "keyring": objects.keyring_url},
        )
    objects.require_bank(bank_id)


def read_keyring(keyring: BankObjects) -> str:
    """Return the identity of the bank that a keyring belongs to.

    Raises
    ------
    FailedPreconditionError
        If there is no keyring (KEYRING_MISMATCH).
    CorruptionError
        If it does not say whose it is.
    """
    try:
        data = keyring.get(KEYRING_KEY)
    except NotFoundError as err:
        raise FailedPreconditionError(
            f"{keyring.url} is no keyring: it has no {KEYRING_KEY}; check the URL",
            reason=Reason.KEYRING_MISMATCH,
            metadata={"keyring": keyring.url},
        ) from err
    return decode_keyring(data, where=f"{keyring.url}/{KEYRING_KEY}")


def require_keyring_of(keyring: BankObjects, bank_id: str) -> None:
    """Raise unless `keyring` is that of the bank `bank_id`; errors are those of `read_keyring`, too.

    Raises
    ------
    FailedPreconditionError
        If it belongs to another bank (KEYRING_MISMATCH).
    """
    found = read_keyring(keyring)
    if found != bank_id:
        raise FailedPreconditionError(
            f"{keyring.url} is the keyring of the bank with the id {found}, and not of {bank_id}; name "
            "the right one",
            reason=Reason.KEYRING_MISMATCH,
            metadata={"keyring": keyring.url, "found": found, "bank_id": bank_id},
        )


def read_secret(keyring: BankObjects, key: str, *, url: str) -> bytes:
    """Return the key of one object.

    Parameters
    ----------
    keyring
        The keyring.
    key
        Key of the object in the bank.
    url
        URL of the bank, for errors.

    Raises
    ------
    NotFoundError
        If the keyring has none (OBJECT_MISSING): the object counts as removed.
    CorruptionError
        If it was changed.
    """
    try:
        record = keyring.get(key)
    except NotFoundError as err:
        raise NotFoundError(
            f"{url}/{key} has no key in {keyring.url}: it was removed, or the keyring has lost it",
            reason=Reason.OBJECT_MISSING,
            metadata={"object": f"{url}/{key}", "keyring": keyring.url},
        ) from err
    return decode_secret(record, key=key, where=f"{keyring.url}/{key}")


class SealedReader:
    """Reads the objects of a sealed bank: a `BankObjects` over two others. Safe to use from threads.

    Parameters
    ----------
    objects
        The bank.
    keyring
        Its keyring.
    """

    # Threads: `_bank_id` is set to one and the same value, whoever does.

    def __init__(self, objects: BankObjects, keyring: BankObjects) -> None:
        self._objects = objects
        self._keyring = keyring
        self._bank_id = ""

    @property
    def url(self) -> str:
        # docstring inherited
        return self._objects.url

    @property
    def keyring_url(self) -> str:
        # docstring inherited
        return self._keyring.url

    def require_bank(self, bank_id: str) -> None:
        # docstring inherited
        require_keyring_of(self._keyring, bank_id)
        self._bank_id = bank_id

    def get(self, key: str) -> bytes:
        # docstring inherited
        data = self._objects.get(key)
        if not is_sealed_key(key):
            return data
        secret = read_secret(self._keyring, key, url=self.url)
        bank_id = self._bank_id or read_keyring(self._keyring)
        return Seal(secret, bank_id=bank_id, key=key, where=f"{self.url}/{key}").open(data)

    def list(self, prefix: str) -> list[str]:
        # docstring inherited
        return self._objects.list(prefix)


def _json_crc(body: object) -> int:
    return crc32c(json.dumps(body, sort_keys=True, separators=(",", ":")).encode())


def _reason_for(key: str) -> Reason:
    if not key.startswith(f"{PARTITIONS}/"):
        return Reason.SPEC_CORRUPT
    return Reason.JOURNAL_CORRUPT if is_sealed_log_key(key) else Reason.SLOT_CORRUPT
