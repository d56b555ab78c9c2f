"""Objects that are sealed, each with a key of its own that is kept elsewhere (docs/format.md)."""

from __future__ import annotations

import builtins
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from membank.bank_service.store.block_memory import new_memory
from membank.bank_service.store.objects import (
    Data,
    ObjectStore,
    Viewable,
    directory_of,
    forget,
    publish,
    whole,
)
from membank.wire.copying import side_by_side
from membank.wire.crc import crc32c
from membank.wire.errors import (
    AlreadyExistsError,
    CorruptionError,
    FailedPreconditionError,
    NotFoundError,
    Reason,
    UnavailableError,
)
from membank.wire.format.sealed import (
    KEYRING_KEY,
    SEAL_OVERHEAD_BYTES,
    Seal,
    decode_secret,
    encode_keyring,
    encode_secret,
    is_sealed_key,
    is_sealed_log_key,
    is_torn_secret,
    may_hold_sealed,
    new_secret,
    read_keyring,
    read_secret,
    require_keyring_of,
)

_Bytes = bytes | memoryview
_KEY_ATTEMPTS = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class Halves:
    """What a crash leaves of sealed objects: an object without its key, or a key alone."""

    without_key: frozenset[str] = frozenset()
    """Keys of objects that nobody can open."""
    without_object: frozenset[str] = frozenset()
    """Keys of objects of which the keyring alone has something."""

    @property
    def all(self) -> frozenset[str]:
        """Both."""
        return self.without_key | self.without_object


class SealedObjects:
    """An `ObjectStore` that seals what holds content, or tells of it, before it keeps it in another.

    **Order.** A key is stored before its object, and synced with it; an object that is put again
    keeps its key. Of a removal, the key goes first, and durably: from then on the object is removed,
    whatever copies of it there are. So a crash leaves a key alone, or an object without key.

    **Half of an object** is no object to `get`, and another one can be created in its place. It is
    listed, so that whoever removes what nothing names removes it too. Only in a journal it is not,
    since its reader takes whatever is listed for a part of the chain.

    Parameters
    ----------
    objects
        Where objects are kept.
    keyring
        Where keys are kept: another place, that is to forget what is removed there.
    """

    # Threads: `_bank_id` is set to one and the same value, whoever does; the stores see to the rest.

    def __init__(self, objects: ObjectStore, keyring: ObjectStore) -> None:
        self._objects = objects
        self._keyring = keyring
        self._bank_id = ""
        # On a disk, handing one of two reads to another thread costs more than the read.
        self._is_near = directory_of(objects) is not None and directory_of(keyring) is not None

    @property
    def url(self) -> str:
        # docstring inherited
        return self._objects.url

    @property
    def keyring_url(self) -> str:
        # docstring inherited
        return self._keyring.url

    @property
    def directory(self) -> Path | None:
        # docstring inherited
        return directory_of(self._objects)

    @property
    def stores(self) -> tuple[ObjectStore, ObjectStore]:
        # docstring inherited
        return self._objects, self._keyring

    def require_bank(self, bank_id: str) -> None:
        # docstring inherited
        require_keyring_of(self._keyring, bank_id)
        self._bank_id = bank_id

    def begin_keyring(self, bank_id: str) -> None:
        """Make the keyring that of a new bank.

        Raises
        ------
        FailedPreconditionError
            If it belongs to another one (KEYRING_MISMATCH).
        """
        try:
            publish(self._keyring, KEYRING_KEY, encode_keyring(bank_id))
        except AlreadyExistsError as err:
            found = read_keyring(self._keyring)
            if found != bank_id:
                raise FailedPreconditionError(
                    f"{self.keyring_url} is the keyring of another bank (id {found}); name another "
                    f"place. If that bank never came to be, remove {KEYRING_KEY} there",
                    reason=Reason.KEYRING_MISMATCH,
                    metadata={"keyring": self.keyring_url, "found": found, "bank_id": bank_id},
                ) from err
        self._bank_id = bank_id

    def get(self, key: str) -> bytes:
        # docstring inherited
        if not is_sealed_key(key):
            return self._objects.get(key)
        sealed, secret = self._read(self._objects.get, key)
        return self._seal(key, secret).open(sealed)

    def get_checked(self, key: str, num_bytes: int) -> tuple[memoryview, int]:
        # docstring inherited
        get: Callable[[str], _Bytes] = self._objects.get
        if isinstance(self._objects, Viewable):
            get = self._objects.get_view
        if not is_sealed_key(key):
            return memoryview(data := get(key)).toreadonly(), crc32c(data[:num_bytes])
        sealed, secret = self._read(get, key)
        # Into pooled memory, which a removal wipes.
        memory = new_memory(max(len(sealed) - SEAL_OVERHEAD_BYTES, 0)).data
        self._seal(key, secret).open_into(sealed, memory)
        return memory.toreadonly(), crc32c(memory[:num_bytes])

    def get_range(self, key: str, start: int, end: int) -> bytes:
        # docstring inherited
        if not is_sealed_key(key):
            return self._objects.get_range(key, start, end)
        # No part of it can be told to be genuine without the whole.
        return self.get(key)[start : max(start, end)]

    def put(self, key: str, data: Data, *, durable: bool = False) -> None:
        # docstring inherited
        if is_sealed_key(key):
            secret, _ = self._secret_for(key, durable=durable)
            data = self._seal(key, secret).close(whole(data))
        self._objects.put(key, data, durable=durable)

    def put_if_absent(self, key: str, data: Data, *, durable: bool = False) -> None:
        # docstring inherited
        if not is_sealed_key(key):
            self._objects.put_if_absent(key, data, durable=durable)
            return
        secret, is_new = self._secret_for(key, durable=durable)
        sealed = self._seal(key, secret).close(whole(data))
        try:
            self._objects.put_if_absent(key, sealed, durable=durable)
        except AlreadyExistsError:
            # Where there was no key there was no object either, but what a removal left that was
            # cut off; unless somebody else took this very key, and was faster.
            if not is_new or self._opens(key, secret):
                raise
            self._objects.delete(key)
            self._objects.put_if_absent(key, sealed, durable=durable)

    def sync(self, keys: Sequence[str]) -> None:
        # docstring inherited
        sealed = [key for key in keys if is_sealed_key(key)]
        # Nothing names any of them before this returns, so either may survive without the other.
        side_by_side(lambda: self._keyring.sync(sealed), lambda: self._objects.sync(keys))

    def list(self, prefix: str) -> builtins.list[str]:
        # docstring inherited
        found = self._objects.list(prefix)
        if not may_hold_sealed(prefix):
            return found
        # After the objects: whatever was seen there had its key before.
        keyed = {key for key in self._keyring.list(prefix) if is_sealed_key(key)}
        listed = {key for key in found if key in keyed or not is_sealed_log_key(key)}
        return sorted(listed | {key for key in keyed if not is_sealed_log_key(key)})

    def halves(self, prefix: str) -> Halves:
        """Return what is stored under `prefix` of which half is missing."""
        stored = {key for key in self._objects.list(prefix) if is_sealed_key(key)}
        keyed = {key for key in self._keyring.list(prefix) if is_sealed_key(key)}
        return Halves(
            without_key=frozenset(stored - keyed), without_object=frozenset(keyed - stored)
        )

    def delete(self, key: str) -> None:
        # docstring inherited
        if is_sealed_key(key):
            forget(self._keyring, key)
        self._objects.delete(key)

    def __repr__(self) -> str:
        return f"SealedObjects({self._objects!r}, {self._keyring!r})"

    def _read(self, get: Callable[[str], _Bytes], key: str) -> tuple[_Bytes, bytes]:
        """Return what `get` returns of an object, and its key."""
        if self._is_near:
            return get(key), read_secret(self._keyring, key, url=self.url)
        sealed, secret = side_by_side(
            lambda: get(key), lambda: read_secret(self._keyring, key, url=self.url)
        )
        return sealed, bytes(secret)

    def _secret_for(self, key: str, *, durable: bool) -> tuple[bytes, bool]:
        """Return the key to seal an object with, and whether it is a new one."""
        fresh = new_secret()
        for _ in range(_KEY_ATTEMPTS):
            try:
                self._keyring.put_if_absent(key, encode_secret(fresh), durable=durable)
            except AlreadyExistsError:
                pass
            else:
                return fresh, True
            try:
                record = self._keyring.get(key)
            except NotFoundError:
                continue  # removed at this moment
            if is_torn_secret(record):
                self._keyring.put(key, encode_secret(fresh), durable=durable)
                return fresh, True
            if durable:
                # It may come from a put that was not.
                self._keyring.sync([key])
            secret = decode_secret(record, key=key, where=f"{self.keyring_url}/{key}")
            # The answer to the first attempt may have been lost.
            return secret, secret == fresh
        raise UnavailableError(
            f"the key of {key} in {self.keyring_url} comes and goes; try again",
            reason=Reason.STORE_FAILED,
            metadata={"object": f"{self.keyring_url}/{key}"},
        )

    def _opens(self, key: str, secret: bytes) -> bool:
        try:
            self._seal(key, secret).open(self._objects.get(key))
        except (CorruptionError, NotFoundError):
            return False
        return True

    def _seal(self, key: str, secret: bytes) -> Seal:
        if not self._bank_id:
            self._bank_id = read_keyring(self._keyring)
        return Seal(secret, bank_id=self._bank_id, key=key, where=f"{self.url}/{key}")


def halves_of(objects: ObjectStore, prefix: str) -> Halves:
    """Return what is stored under `prefix` of which half is missing; nothing if it is not sealed."""
    return objects.halves(prefix) if isinstance(objects, SealedObjects) else Halves()
