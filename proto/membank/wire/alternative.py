"""The port for data that a shard has beside that of all calls, and how callers learn of it.

The answers that come from the latter say so by the header ``alt-svc`` (RFC 7838). It names the port,
and the server by an id of its own, which callers of the port repeat: another server that got the
number of the port meanwhile answers them with 421 (Misdirected Request), never with its own blocks.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

ALTERNATIVE_KEY = "alt-svc"
"""Header that tells of it."""
SERVER_KEY = "membank-server"
"""Header of calls that come because of it."""
MISDIRECTED = "421"
"""Status of calls that are meant for another server."""

_ENTRY = re.compile(r'(h2c?)=":([0-9]{1,5})"; membank-server="([0-9a-f]{1,64})"')


@dataclass(frozen=True, slots=True)
class Alternative:
    """Where the data path of a server is, beside where it was told."""

    port: int
    """Port, on the same host."""
    server_id: str
    """Name of the server, in hexadecimal digits; another one at each start."""

    def header(self, *, is_secured: bool) -> str:
        """Return the header's value, for callers with or without TLS."""
        protocol = "h2" if is_secured else "h2c"
        return f'{protocol}=":{self.port}"; {SERVER_KEY}="{self.server_id}"'

    @classmethod
    def of_header(cls, value: str, *, is_secured: bool) -> Alternative | None:
        """Return what a header tells; None = nothing that a caller with or without TLS can use."""
        for protocol, port, server_id in _ENTRY.findall(value):
            if protocol == ("h2" if is_secured else "h2c") and 0 < int(port) < 1 << 16:
                return cls(int(port), server_id)
        return None
