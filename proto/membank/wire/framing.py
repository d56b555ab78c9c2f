"""Payload framing: blocks as one byte sequence, cut into messages of at most `CHUNK_BYTES`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from membank.wire.crc import Buffer, as_uint8, check_known_crc32c, crc32c
from membank.wire.errors import InvalidArgumentError, Reason

_Bytes = npt.NDArray[np.uint8]
_NOTHING: _Bytes = np.empty(0, np.uint8)

CHUNK_BYTES = 1 << 20
"""Payload bytes per message. In chunks of 1 MiB a fetch of 32 MB over loopback came at 1.04 times the
speed of a plain socket, in 512 KiB and 2 MiB at 1.06 and 1.16, in 256 KiB at 0.88, 64 KiB at 0.45,
4 MiB at 0.88; one of 8 MB at 0.78, 0.76, 0.79, 0.63, 0.40 and 0.74; through grpcio, at 0.6 to 0.8 at
best (2 busy cores, median of 11, benchmarks/chunks.py). Between 512 KiB and 2 MiB is noise; small
messages wait for each other, large ones leave the caches."""

MAX_MESSAGE_BYTES = 8 << 20
"""Largest message either end accepts; headers of 65,536 blocks take about 3 MiB."""

CHECK_BYTES = 1 << 20
"""Bytes that are checked at a time as they arrive: as many as stay in a processor's cache."""

_MAX_PIECES = 64
"""Most pieces of memory that are filled at a time; some systems take no more than 1,024."""

WATCH_ON_KEY = "membank-watch-on"
"""Key in the initial metadata of `WatchBlocks`: from now on no change is missed. An empty initial
metadata says nothing, since a call that failed has one too."""


def iter_chunks(buffers: Iterable[Buffer], *, chunk_bytes: int = CHUNK_BYTES) -> Iterator[bytes]:
    """Cut the concatenation of `buffers` into chunks of `chunk_bytes`, the last one shorter.

    Small buffers share a chunk, so that a thousand small blocks are not a thousand messages.
    """
    return map(b"".join, iter_parts(buffers, chunk_bytes=chunk_bytes))


def iter_parts(
    buffers: Iterable[Buffer], *, chunk_bytes: int = CHUNK_BYTES
) -> Iterator[list[memoryview]]:
    """Yield the chunks that `iter_chunks` does, each as the views that it consists of."""
    parts: list[memoryview] = []
    room = chunk_bytes
    for buffer in buffers:
        view = as_uint8(buffer).data
        while len(view):
            parts.append(view[:room])
            view = view[room:]
            room -= len(parts[-1])
            if room == 0:
                yield parts
                parts, room = [], chunk_bytes
    if parts:
        yield parts


@dataclass(frozen=True, slots=True)
class Payload:
    """What is announced about one payload of a stream."""

    num_bytes: int
    """Its size in bytes."""
    crc32c: int
    """Its CRC-32C."""
    what: str
    """Its name, for errors."""


class PayloadAssembler:
    """Puts the chunks of a stream back together, each payload in a buffer of its own.

    Bytes are checked soon after they have landed, while the processor's cache holds them: a pass
    over the whole payload at the end would read it from memory again.

    Parameters
    ----------
    max_bytes
        Most bytes that all payloads together may have.
    """

    def __init__(self, *, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._expected_bytes = 0
        self._received_bytes = 0
        self._payloads: list[Payload] = []
        self._buffers: list[_Bytes] = []
        self._crcs: list[int] = []
        self._hooks: dict[int, Callable[[], None]] = {}
        # Of the payload that is being received: which one, how much is here, how much is checked.
        self._current = 0
        self._filled = 0
        self._checked = 0

    def expect(
        self,
        payload: Payload,
        place: Callable[[], _Bytes] | None = None,
        *,
        when_whole: Callable[[], None] | None = None,
    ) -> None:
        """Announce the next payload.

        Parameters
        ----------
        payload
            What is announced.
        place
            Returns the memory that it is to land in, (num_bytes,) uint8, writable, C-contiguous;
            called once the bound is known to hold. None = fresh memory.
        when_whole
            Called, by `feed` or `landed`, as soon as the payload is whole and has been checked; what
            is damaged is refused then already. None = nobody needs it before `finish`.

        Raises
        ------
        InvalidArgumentError
            If all payloads together exceed the bound.
        """
        self._expected_bytes += payload.num_bytes
        if self._expected_bytes > self._max_bytes:
            raise InvalidArgumentError(
                f"{payload.what}: the request carries more than {self._max_bytes} bytes; "
                "send fewer blocks at a time",
                reason=Reason.MESSAGE_TOO_LARGE,
                metadata={"max_bytes": str(self._max_bytes)},
            )
        self._payloads.append(payload)
        self._buffers.append(np.empty(payload.num_bytes, np.uint8) if place is None else place())
        if when_whole is not None:
            self._hooks[len(self._crcs)] = when_whole
        self._crcs.append(0)

    def feed(self, data: bytes | memoryview) -> None:
        """Take the next chunk.

        Raises
        ------
        InvalidArgumentError
            If more bytes come than were announced.
        CorruptionError
            As of `landed`.
        """
        source = np.frombuffer(data, np.uint8) if len(data) else _NOTHING
        while source.size:
            (target,) = self.room(source.size, max_pieces=1)
            np.frombuffer(target, np.uint8)[...] = source[: len(target)]
            self.landed(len(target))
            source = source[len(target) :]

    def room(self, max_bytes: int, *, max_pieces: int = _MAX_PIECES) -> list[memoryview]:
        """Return where the next bytes are to land, for whoever writes them there; then `landed`.

        Parameters
        ----------
        max_bytes
            Most bytes of room, >= 1.
        max_pieces
            Most pieces, >= 1.

        Returns
        -------
        list of memoryview
            At least one piece of at least one byte, all at most `CHECK_BYTES` together.

        Raises
        ------
        InvalidArgumentError
            If all announced bytes are there.
        """
        left = min(max_bytes, CHECK_BYTES)
        pieces: list[memoryview] = []
        at, start = self._current, self._filled
        while left and len(pieces) < max_pieces and at < len(self._buffers):
            if piece := self._buffers[at].data[start : start + left]:
                pieces.append(piece)
                left -= len(piece)
            at, start = at + 1, 0
        if not pieces:
            raise InvalidArgumentError("the stream carries more bytes than its headers announce")
        return pieces

    def landed(self, num_bytes: int) -> None:
        """Say that the next `num_bytes` are where `room` put them.

        Raises
        ------
        CorruptionError
            If a payload that somebody waits for is not what its header announces.
        """
        self._received_bytes += num_bytes
        while num_bytes:
            buffer = self._buffers[self._current]
            count = min(num_bytes, buffer.size - self._filled)
            self._filled += count
            num_bytes -= count
            is_whole = self._filled == buffer.size
            if is_whole or self._filled - self._checked >= CHECK_BYTES:
                # Of what has landed, not of what was sent: damage on the way here is noticed too.
                piece = buffer[self._checked : self._filled]
                self._crcs[self._current] = crc32c(piece, start=self._crcs[self._current])
                self._checked = self._filled
            if is_whole:
                at = self._current
                self._current, self._filled, self._checked = at + 1, 0, 0
                if (when_whole := self._hooks.pop(at, None)) is not None:
                    payload = self._payloads[at]
                    check_known_crc32c(self._crcs[at], payload.crc32c, what=payload.what)
                    when_whole()

    def finish(self) -> list[_Bytes]:
        """Check everything and return the payloads in order.

        Raises
        ------
        InvalidArgumentError
            If bytes are missing.
        CorruptionError
            If a payload is not what its header announces.
        """
        if self._received_bytes != self._expected_bytes:
            raise InvalidArgumentError(
                f"the stream ended after {self._received_bytes} of {self._expected_bytes} "
                "announced bytes"
            )
        for payload, crc in zip(self._payloads, self._crcs, strict=True):
            check_known_crc32c(crc, payload.crc32c, what=payload.what)
        return self._buffers
