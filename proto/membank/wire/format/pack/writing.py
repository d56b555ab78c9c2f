"""Writing a pack: one block at a time, so that a topic need not fit into memory."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import BinaryIO, cast

import numpy as np

from membank.wire.crc import as_uint8, crc32c
from membank.wire.format.pack.contract import Pack, PackedBlock
from membank.wire.format.pack.digest import Digest, canonical
from membank.wire.format.pack.document import CENTROID, METADATA_KEY, body_of
from membank.wire.format.pack.tensors import TensorKind, encode_head, file_order
from membank.wire.framing import CHUNK_BYTES
from membank.wire.signing import Context, Signer
from membank.wire.spec import Array, BlockRef, Role

_NOTHING = np.empty(0, np.float32)


def encode_pack(pack: Pack, *, signers: Sequence[Signer] = ()) -> bytes:
    """Encode `pack`, signed by `signers`; signatures that it was read with are left out.

    Parameters
    ----------
    pack
        The pack; arrays in any memory layout.
    signers
        Who signs it.

    Returns
    -------
    bytes
        A safetensors file.
    """
    writer = PackWriter(io.BytesIO())
    for block in pack.blocks:
        writer.add(block)
    return b"".join(writer.finish(pack, signers=signers).chunks())


@dataclass(frozen=True, slots=True)
class _Spooled:
    """Where an array waits."""

    kind: TensorKind
    start: int
    crc: int


class PackWriter:
    """Collects the blocks of a pack.

    A pack begins with the digest of all that follows, so blocks wait in a file until all are there.

    Parameters
    ----------
    spool
        Where blocks wait: empty, readable, writable, seekable. Stays the caller's to close.
    """

    def __init__(self, spool: BinaryIO) -> None:
        self._spool = spool
        self._end = 0
        self._blocks: dict[BlockRef, PackedBlock] = {}
        self._arrays: dict[str, _Spooled] = {}

    def add(self, block: PackedBlock) -> None:
        """Take the next block, in any order; its arrays are not retained.

        Raises
        ------
        OSError
            If the spool cannot be written.
        """
        self._put(f"{block.ref}/{Role.WEIGHT.value}", block.weight)
        for role, state in block.optimizer_state.items():
            self._put(f"{block.ref}/{role.value}", state)
        self._blocks[block.ref] = replace(block, weight=_NOTHING, optimizer_state={})

    def finish(self, head: Pack, *, signers: Sequence[Signer] = ()) -> FinishedPack:
        """Return the pack of the blocks that were added.

        Parameters
        ----------
        head
            All that is said of it beside its blocks.
        signers
            Who signs it.

        Raises
        ------
        OSError
            If the spool cannot be written or read.
        """
        for ref, row in head.centroids.items():
            self._put(f"{ref}/{CENTROID}", row)
        self._spool.flush()
        crcs = {name: array.crc for name, array in self._arrays.items()}
        body = cast("dict[str, object]", body_of(head, self._blocks, crcs))
        digest = Digest(body)
        for name in sorted(self._arrays):
            kind = self._arrays[name].kind
            digest.add(name, kind.dtype, kind.shape, self._read(name))
        sha256 = digest.hexdigest()
        document: dict[str, object] = {"pack": body, "sha256": sha256}
        if signers:
            message = bytes.fromhex(sha256)
            document["signatures"] = [
                signer.sign(Context.PACK, message).to_json() for signer in signers
            ]
        return FinishedPack(self._spool, self._arrays, document, frozenset(self._blocks))

    def _put(self, name: str, array: Array) -> None:
        data = np.ascontiguousarray(array)
        self._spool.seek(self._end)
        self._spool.write(as_uint8(data).data)
        # The shape as it was: numpy makes (1,) of what is contiguous and has none.
        kind = TensorKind(array.dtype, array.shape)
        self._arrays[name] = _Spooled(kind, self._end, crc32c(data))
        self._end += data.nbytes

    def _read(self, name: str) -> Iterator[bytes]:
        return _read(self._spool, self._arrays[name])


class FinishedPack:
    """A pack, ready to be sent; made by `PackWriter.finish`.

    Parameters
    ----------
    spool
        Where its arrays are.
    arrays
        Where each of them is.
    document
        The JSON of the pack.
    refs
        The blocks that it carries.
    """

    def __init__(
        self,
        spool: BinaryIO,
        arrays: Mapping[str, _Spooled],
        document: Mapping[str, object],
        refs: frozenset[BlockRef],
    ) -> None:
        self._spool = spool
        self._arrays = arrays
        self.sha256 = str(document["sha256"])
        """Its digest, hexadecimal."""
        self.refs = refs
        """The blocks that it carries."""
        kinds = {name: array.kind for name, array in arrays.items()}
        self._names = file_order(kinds)
        self._head = encode_head({METADATA_KEY: canonical(document)}, kinds)
        self.num_bytes = len(self._head) + sum(kind.num_bytes for kind in kinds.values())
        """Size of the file."""

    def crc32c(self) -> int:
        """Return the CRC-32C of the file; reads all of it."""
        crc = 0
        for chunk in self.chunks():
            crc = crc32c(chunk, start=crc)
        return crc

    def pieces(self, spooled: memoryview) -> list[bytes | memoryview]:
        """Return the file as pieces of `spooled`, the bytes of the spool, and what precedes them."""
        pieces: list[bytes | memoryview] = [self._head]
        for name in self._names:
            array = self._arrays[name]
            pieces.append(spooled[array.start : array.start + array.kind.num_bytes])
        return pieces

    def chunks(self, chunk_bytes: int = CHUNK_BYTES) -> Iterator[bytes]:
        """Yield the file, at most `chunk_bytes` at a time."""
        for start in range(0, len(self._head), chunk_bytes):
            yield self._head[start : start + chunk_bytes]
        for name in self._names:
            yield from _read(self._spool, self._arrays[name], chunk_bytes)


def _read(spool: BinaryIO, array: _Spooled, chunk_bytes: int = CHUNK_BYTES) -> Iterator[bytes]:
    position, end = array.start, array.start + array.kind.num_bytes
    while position < end:
        # Sought anew: several may read in turn.
        spool.seek(position)
        chunk = spool.read(min(chunk_bytes, end - position))
        if not chunk:
            raise OSError("the file that holds the blocks of the pack was cut short")
        position += len(chunk)
        yield chunk
