"""Headers as they travel (RFC 7541)."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import hpack

from membank.wire.http2.frames import ProtocolError

MAX_HEADER_BYTES = 64 << 10
"""Most bytes of headers that either end takes."""
NO_TABLE = b"\x20"
"""Precedes the first block of a sender that uses no table (RFC 7541, 6.3)."""
_MAX_KNOWN_BLOCKS = 64
_MAX_KNOWN_BYTES = 1_024

# At the level of debugging it writes all headers to the log, credentials included.
logging.getLogger("hpack").setLevel(logging.INFO)


def encode_headers(headers: Sequence[tuple[str, str]]) -> bytes:
    """Return a block of headers, or a part of one; it uses no table, so it is good for any stream."""
    return b"".join(
        (b"\x10" if name == "authorization" else b"\0") + _literal(name) + _literal(value)
        for name, value in headers
    )


class HeaderReader:
    """Decodes the headers that one connection receives.

    Those of one call are those of the next, but for a few: once the other end uses no table, a
    block of the same bytes means the same, and is not decoded again.
    """

    def __init__(self) -> None:
        self._decoder = hpack.Decoder(max_header_list_size=MAX_HEADER_BYTES)
        self._known: dict[bytes, dict[str, str]] = {}

    def forget_table(self) -> None:
        """Note that the other end uses no table from here on."""
        self._decoder.max_allowed_table_size = 0

    def read(self, block: bytes) -> dict[str, str]:
        """Return headers by name, the last one of each; not to be changed.

        Raises
        ------
        ProtocolError
            If they cannot be read, or are too many.
        """
        known = self._known.get(block)
        if known is not None:
            return known
        try:
            headers = {str(name): str(value) for name, value in self._decoder.decode(block)}
        except (hpack.HPACKError, UnicodeDecodeError) as err:
            raise ProtocolError(f"headers cannot be read: {err}") from err
        if not self._decoder.max_allowed_table_size and len(block) <= _MAX_KNOWN_BYTES:
            if len(self._known) >= _MAX_KNOWN_BLOCKS:
                self._known.clear()
            self._known[block] = headers
        return headers


def _literal(text: str) -> bytes:
    """Return a string as RFC 7541, 5.2 wants it, with its length in front."""
    raw = text.encode("latin-1")
    rest = len(raw) - 0x7F
    if rest < 0:
        return bytes([len(raw)]) + raw
    length = bytearray([0x7F])
    while rest >= 0x80:
        length.append(rest & 0x7F | 0x80)
        rest >>= 7
    length.append(rest)
    return bytes(length) + raw
