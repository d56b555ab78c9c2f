"""The zarr v3 arrays of one partition: one array per level and role, one chunk per slot.

zarr writes the metadata; chunks are read and written directly, because a chunk coded as
``bytes(little)``, ``crc32c`` is the block's bytes and a checksum, and zarr's own path costs a
copy and a third of a millisecond more. Whether the codecs are those is checked at open.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from threading import Lock
from typing import NamedTuple

import numpy as np
import zarr
from zarr.codecs import BytesCodec, Crc32cCodec
from zarr.storage import MemoryStore

from membank.bank_service.store.checked_read import pooled
from membank.bank_service.store.objects import Checking, ObjectStore, Viewable
from membank.wire.crc import zeros_crc32c
from membank.wire.errors import CorruptionError, NotFoundError, Reason
from membank.wire.format import NO_SLOT, decode_slot, encode_slot
from membank.wire.format.layout import array_prefix, slot_key
from membank.wire.format.slot import TRAILER_BYTES
from membank.wire.spec import Array, BankSpec, Role

_MIN_CAPACITY = 64
_CODECS = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]
_STORED_AS = {"float32": "float32", "float16": "float16", "bfloat16": "uint16"}


class Chunk(NamedTuple):
    """One role of a slot, as an object."""

    level: int
    """Level of the array."""
    slot: int
    """Row of the array."""
    key: str
    """Key in the bank's storage."""
    num_bytes: int
    """Size, as the spec has it."""


class SlotArrays:
    """Slots of one partition.

    Parameters
    ----------
    objects
        The bank's storage.
    spec
        The bank's spec.
    partition
        The partition.
    """

    # Threads: `_lock` guards capacities; slots need none, since each is written by one thread
    # before anybody else knows of it.

    def __init__(self, objects: ObjectStore, spec: BankSpec, partition: int) -> None:
        self._objects = objects
        self._get_checked = _checked_read(objects)
        self._spec = spec
        self._partition = partition
        self._lock = Lock()
        self._capacity: dict[int, int] = {}

    def read_capacity(self, level: int, role: Role) -> int:
        """Return the number of slots that one array declares, read anew; 0 = it is not there.

        Raises
        ------
        CorruptionError
            If its metadata is damaged or describes another array.
        """
        key = self._metadata_key(level, role)
        try:
            data = self._objects.get(key)
        except NotFoundError:
            return 0
        try:
            found = json.loads(data)
            capacity = int(found["shape"][0])
            expected = json.loads(self._metadata(level, role, capacity))
            differing = sorted(name for name in expected if found.get(name) != expected[name])
            if found["codecs"] != _CODECS and "codecs" not in differing:
                differing.append("codecs")
        except (ValueError, KeyError, TypeError, IndexError) as err:
            raise _bad_metadata(key, str(err)) from err
        if differing:
            raise _bad_metadata(key, f"unexpected {', '.join(differing)}")
        return capacity

    def reserve(self, level: int, slot: int) -> None:
        """Make the arrays of `level` large enough to hold `slot`."""
        with self._lock:
            capacity = self._load_capacity(level)
            if slot < capacity:
                return
            grown = max(_MIN_CAPACITY, capacity)
            while grown <= slot:
                grown *= 2
            for role in self._spec.roles:
                key = self._metadata_key(level, role)
                self._objects.put(key, self._metadata(level, role, grown), durable=True)
            self._capacity[level] = grown

    def write(self, level: int, slot: int, role: Role, array: Array, crc: int) -> None:
        """Write one role of a block to a reserved slot; it is not durable before `sync`.

        Raises
        ------
        AlreadyExistsError
            If the slot is taken. Slots are only ever created, so that an owner that was replaced
            without knowing it cannot overwrite a slot of its successor.
        """
        key = slot_key(self._partition, level, role, slot)
        self._objects.put_if_absent(key, encode_slot(array, crc))

    def sync(self, slots: Iterable[tuple[int, int, Iterable[Role]]]) -> None:
        """Make slots, given as (level, slot, roles that were written), survive the loss of power."""
        self._objects.sync(
            [
                slot_key(self._partition, level, role, slot)
                for level, slot, roles in slots
                for role in roles
            ]
        )

    def read(self, level: int, slot: int, role: Role, crc: int) -> Array:
        """Return one role of a block, checked.

        Returns
        -------
        Array
            (L, P, R, D), read-only. Optimizer state with the CRC of zeros is zeros, stored or not.

        Raises
        ------
        CorruptionError
            If the slot is missing or not what the manifest names.
        """
        try:
            return self._read(level, slot, role, crc)
        except CorruptionError:
            if not is_zero_state(self._spec, level, role, crc):
                raise
            return np.zeros(self._spec.block_shape(level), self._spec.role_dtype(role))

    def _read(self, level: int, slot: int, role: Role, crc: int) -> Array:
        key = slot_key(self._partition, level, role, slot)
        dtype, shape = self._spec.role_dtype(role), self._spec.block_shape(level)
        try:
            chunk, actual = self._get_checked(key, math.prod(shape) * dtype.itemsize)
        except NotFoundError as err:
            raise CorruptionError(
                f"{key} is missing; restore the file from a copy or roll the block back",
                reason=Reason.SLOT_CORRUPT,
                metadata={"key": key},
            ) from err
        return decode_slot(chunk, dtype=dtype, shape=shape, crc=crc, key=key, actual=actual)

    def delete(self, level: int, slot: int, roles: Sequence[Role] = tuple(Role)) -> None:
        """Remove `roles` of a slot; no effect where they are not stored."""
        # The weight last: what a crash leaves keeps the slot's number from being taken again, by a
        # block whose state is not stored and would be found here.
        for role in reversed(roles):
            if role not in self._spec.roles:
                continue
            self._objects.delete(slot_key(self._partition, level, role, slot))

    def stored_chunks(self, level: int) -> list[Chunk]:
        """Return the chunks that are stored, whether or not a manifest names their slots."""
        chunks = []
        # The weight last, for the reason that `delete` gives.
        for role in reversed(self._spec.roles):
            num_bytes = self._spec.block_params(level) * self._spec.role_dtype(role).itemsize
            for key in self._objects.list(array_prefix(self._partition, level, role)):
                slot = self._slot_in(key, level, role)
                if slot is not None:
                    chunks.append(Chunk(level, slot, key, num_bytes + TRAILER_BYTES))
        return chunks

    def _slot_in(self, key: str, level: int, role: Role) -> int | None:
        """Return the slot whose key this is; None = it is none's: metadata, or somebody's file."""
        digits = key.rsplit("/", 1)[-1].removeprefix("c.").partition(".")[0]
        # What slots may be, and nothing else that `int` takes.
        if not digits.isdecimal() or int(digits) >= NO_SLOT:
            return None
        slot = int(digits)
        return slot if slot_key(self._partition, level, role, slot) == key else None

    def _load_capacity(self, level: int) -> int:
        if level not in self._capacity:
            capacities = [self.read_capacity(level, role) for role in self._spec.roles]
            # A grown array keeps its slots, so a growth that was cut short is simply repeated.
            self._capacity[level] = min(capacities)
        return self._capacity[level]

    def _metadata_key(self, level: int, role: Role) -> str:
        return f"{array_prefix(self._partition, level, role)}/zarr.json"

    def _metadata(self, level: int, role: Role, capacity: int) -> bytes:
        dtype = self._spec.dtype if role is Role.WEIGHT else "float32"
        shape = self._spec.block_shape(level)
        documents: dict[str, zarr.core.buffer.Buffer] = {}
        zarr.create_array(
            store=MemoryStore(documents),
            shape=(capacity, *shape),
            chunks=(1, *shape),
            # zarr has no bfloat16; unsigned integers of the same bits are exact and portable.
            dtype=_STORED_AS[dtype],
            serializer=BytesCodec(endian="little"),
            compressors=[Crc32cCodec()],
            filters=None,
            fill_value=0,
            chunk_key_encoding={"name": "default", "separator": "."},
            attributes={"logical_dtype": dtype, "role": role.value},
            dimension_names=("slot", "layer", "part", "row", "column"),
        )
        return documents["zarr.json"].to_bytes()


def is_zero_state(spec: BankSpec, level: int, role: Role, crc: int) -> bool:
    """Say whether a role with this CRC is an optimizer state of zeros, which need not be stored."""
    if role is Role.WEIGHT:
        return False
    return crc == zeros_crc32c(spec.block_params(level) * spec.role_dtype(role).itemsize)


def _checked_read(objects: ObjectStore) -> Callable[[str, int], tuple[bytes | memoryview, int]]:
    if isinstance(objects, Checking):
        return objects.get_checked
    get = objects.get_view if isinstance(objects, Viewable) else objects.get

    def get_checked(key: str, num_bytes: int) -> tuple[bytes | memoryview, int]:
        return pooled(get(key), num_bytes)

    return get_checked


def _bad_metadata(key: str, problem: str) -> CorruptionError:
    return CorruptionError(
        f"{key}: {problem}; restore the file from a copy",
        reason=Reason.SPEC_CORRUPT,
        metadata={"key": key},
    )
