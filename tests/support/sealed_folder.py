"""A store in which everything is sealed, and a way past it that knows the bytes of seals alone."""

from __future__ import annotations

import os
from collections.abc import Sequence

from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from membank.bank_service.store import Data, ObjectStore, SealedObjects
from membank.bank_service.store.objects import check_key
from membank.wire.crc import crc32c

_BANK_ID = "b" * 32


class SealedFolder:
    """The folder ``trees`` of a store that seals, where everything is sealed, as a store."""

    def __init__(self, bank: ObjectStore, keyring: ObjectStore) -> None:
        self._bank = bank
        self._keyring = keyring
        self._store = SealedObjects(bank, keyring)
        self._store.begin_keyring(_BANK_ID)

    @property
    def url(self) -> str:
        return f"{self._store.url}/trees"

    def get(self, key: str) -> bytes:
        return self._store.get(self._key(key))

    def get_range(self, key: str, start: int, end: int) -> bytes:
        return self._store.get_range(self._key(key), start, end)

    def put(self, key: str, data: Data, *, durable: bool = False) -> None:
        self._store.put(self._key(key), data, durable=durable)

    def put_if_absent(self, key: str, data: Data, *, durable: bool = False) -> None:
        self._store.put_if_absent(self._key(key), data, durable=durable)

    def sync(self, keys: Sequence[str]) -> None:
        self._store.sync([self._key(key) for key in keys])

    def list(self, prefix: str) -> list[str]:
        # Nothing but what a bank seals is in there: one level of names.
        top = prefix and _flat(prefix + "/")
        if prefix:
            check_key(prefix)
        names = (key.removeprefix("trees/") for key in self._store.list("trees"))
        return sorted(_deep(name) for name in names if name.startswith(top))

    def delete(self, key: str) -> None:
        self._store.delete(self._key(key))

    def read_raw(self, key: str) -> bytes:
        """Return what is stored, opened by the bytes that docs/format.md tells."""
        place = self._key(key)
        record, sealed = self._keyring.get(place), self._bank.get(place)
        assert (len(record), record[:8], sealed[:8]) == (44, b"MBSKEY1\0", b"MBSEAL1\0")
        name = f"{_BANK_ID}/{place}".encode()
        return AESGCM(record[8:40]).decrypt(sealed[8:20], sealed[20:], name)

    def write_raw(self, key: str, data: bytes) -> None:
        """Store an object and its key, sealed by the bytes that docs/format.md tells."""
        place, nonce = self._key(key), os.urandom(12)
        head = b"MBSKEY1\0" + AESGCM.generate_key(256)
        self._keyring.put(place, head + crc32c(head).to_bytes(4, "little"))
        name = f"{_BANK_ID}/{place}".encode()
        self._bank.put(place, b"MBSEAL1\0" + nonce + AESGCM(head[8:]).encrypt(nonce, data, name))

    def _key(self, key: str) -> str:
        check_key(key)
        return f"trees/{_flat(key)}"


def _flat(key: str) -> str:
    return key.replace("/", "\N{FRACTION SLASH}")


def _deep(name: str) -> str:
    return name.replace("\N{FRACTION SLASH}", "/")
