"""What a journal promises, whatever it is written to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple, Protocol


class Checked(NamedTuple):
    """A piece of a payload whose CRC is known already."""

    data: memoryview
    """Its bytes, flat."""
    crc32c: int
    """Their CRC-32C."""


Payload = Sequence[bytes | memoryview | Checked]
"""Content of one frame, in pieces that are written one after the other: bytes, or flat views of them."""


class FrameKind(IntEnum):
    """What a frame holds; the numbers are part of the format."""

    SEGMENT = 1
    """Begins a segment: whose it is. Its LSN is that after which the segment begins."""
    UPDATE = 2
    """An update, to be computed again."""
    CONTINUED = 3
    """Ends a segment: there is a next one. Its LSN is that of the frame before."""
    IMAGE = 4
    """What an update made of its blocks, to be taken over."""


CONTENT_KINDS = frozenset({FrameKind.UPDATE, FrameKind.IMAGE})
"""Kinds that a user of a journal appends; the others are the journal's own."""


@dataclass(frozen=True, slots=True)
class Frame:
    """One record of the log."""

    lsn: int
    """Its number."""
    kind: FrameKind
    """What it holds."""
    payload: memoryview
    """Its bytes."""


@dataclass(frozen=True, slots=True)
class TornTail:
    """What a writer that was killed left unfinished; it was never acknowledged."""

    file: str
    """The segment."""
    offset: int
    """Where the last whole frame ends."""
    num_bytes: int
    """Bytes after it."""


@dataclass(frozen=True, slots=True)
class Ownership:
    """One opening of a partition by somebody who may change it."""

    epoch: int
    """Counts the owners of the partition."""
    owner: str
    """Random hex of this opening; "" where the writer knew of none."""
    onto: str
    """Nonce of the manifest that the opening started from; "" = there was none."""

    def is_current(self, epoch: int, owner: str, nonce: str) -> bool:
        """Say whether a journal of this owner belongs to the newest manifest.

        Parameters
        ----------
        epoch, owner, nonce
            Those of the newest manifest that counts; 0, "" and "" where there is none.

        Returns
        -------
        bool
            True if this opening wrote the manifest, or started from it and wrote none yet.
        """
        return (self.epoch, self.owner) == (epoch, owner) or self.onto == nonce


class Journal(Protocol):
    """The redo log of one partition: what has happened since its newest manifest.

    Read it with `replay`, then `begin` before the first `append`. One thread at a time may append;
    `trim`, `erase` and the properties may be used beside it, from any thread.
    """

    @property
    def last_lsn(self) -> int:
        """LSN of the last frame; 0 = none was ever written."""

    @property
    def base(self) -> int:
        """LSN after which the stored frames begin; 0 = none is stored, or they begin with 1."""

    @property
    def num_bytes(self) -> int:
        """Bytes stored."""

    @property
    def ownership(self) -> Ownership | None:
        """Who wrote the newest segment; None = there is none."""

    def replay(self, after_lsn: int) -> Iterator[Frame]:
        """Yield the frames after `after_lsn` that are stored now, oldest first.

        Raises
        ------
        CorruptionError
            If a frame was damaged since the journal was opened (JOURNAL_CORRUPT).
        NotFoundError
            If `trim` removed a segment before its turn came (OBJECT_MISSING).
        """

    def begin(self, ownership: Ownership, after_lsn: int) -> None:
        """Start a segment of this owner, to continue from the later of `after_lsn` and the log.

        Segments that hold nothing later than `after_lsn` are removed. Frames that an older owner
        slipped in before this call took effect are part of the log: replay after it.
        """

    def append(self, kind: FrameKind, payloads: Sequence[Payload]) -> int:
        """Add a batch of frames and return the LSN of the last one.

        They are as durable as the journal promises when this returns; after an error none is in
        the log, or the journal accepts nothing more. The death of the process may leave the first
        few of them, of which nobody was told.

        Parameters
        ----------
        kind
            What they hold: UPDATE or IMAGE.
        payloads
            One for each frame; not retained. None at all has no effect.

        Raises
        ------
        InvalidArgumentError
            If a payload exceeds `MAX_FRAME_BYTES`, or `kind` is one of the journal's own.
        ResourceExhaustedError
            If there is no space (NO_SPACE); the log is as before.
        UnavailableError
            If nothing was written, or if the journal cannot know (STORE_FAILED); or if another
            owner took the partition over (FENCED).
        """

    def trim(self, lsn: int) -> None:
        """Remove every frame up to `lsn`, as far as whole segments hold nothing later.

        May run beside `append`. Bytes of what was removed may be left in storage that is kept for
        later frames; see `erase`. After an error some frames may be left; trim again.
        """

    def erase(self) -> None:
        """Destroy every byte of frames that are no longer in the log.

        May run beside `append`. After a trim up to the last frame and this, no byte of any payload
        is left. After an error some may be; call it again.

        Raises
        ------
        UnavailableError
            If the storage failed (STORE_FAILED).
        """

    def discard(self) -> None:
        """Give up everything stored, before `begin`; that replaces it in one step."""

    def close(self) -> None:
        """Release what is held; what was appended stays. A second call has no effect."""

    def require_usable(self) -> None:
        """Raise `UnavailableError` if the journal accepts nothing any more."""
