"""How client and shard talk on one machine: messages on a Unix socket, with descriptors of memory.

What is said is in ``same_host.proto``. The socket proves what shared memory needs: that both ends
run on one kernel, and as one user.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from google.protobuf.message import DecodeError, Message

from membank.wire.framing import MAX_MESSAGE_BYTES

M = TypeVar("M", bound=Message)

MAX_DESCRIPTORS = 253
"""Most descriptors that the kernel takes along with one message (SCM_MAX_FD)."""

_HEAD = struct.Struct("<II")
_CREDENTIALS = struct.Struct("iII")


class MessageSocket:
    """One end of a connection. Not safe for threads; one request and its answer at a time.

    Parameters
    ----------
    connection
        A connected Unix stream socket; closed with this.

    Notes
    -----
    Every method raises `OSError` where the other end is gone, does not answer within the socket's
    timeout (`TimeoutError`), or says what cannot be understood. The connection is of no use then.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection

    @property
    def peer_uid(self) -> int:
        """User that the process at the other end runs as."""
        size = _CREDENTIALS.size
        raw = self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size)
        return int(_CREDENTIALS.unpack(raw)[1])

    def set_timeout(self, seconds: float | None) -> None:
        """Bound each wait for the other end; None = for ever."""
        self._socket.settimeout(seconds)

    def send(self, message: Message, descriptors: Sequence[int] = ()) -> None:
        """Send a message, and copies of open file descriptors with it."""
        body = message.SerializeToString()
        head = _HEAD.pack(len(body), len(descriptors))
        if descriptors:
            sent = socket.send_fds(self._socket, [head, body], descriptors)
            rest = memoryview(head + body)[sent:]
        else:
            rest = memoryview(head + body)
        if rest:
            self._socket.sendall(rest)

    def receive(self, kind: type[M]) -> tuple[M, list[int]]:
        """Return the next message and its descriptors, which are the caller's to close."""
        descriptors: list[int] = []
        try:
            head = self._head(descriptors)
            length, num_descriptors = _HEAD.unpack(head)
            if length > MAX_MESSAGE_BYTES or num_descriptors != len(descriptors):
                raise ConnectionError(
                    f"a message of {length} bytes with {len(descriptors)} descriptors for "
                    f"{num_descriptors}"
                )
            body = bytearray(length)
            self._fill(memoryview(body))
            try:
                return kind.FromString(bytes(body)), descriptors
            except DecodeError as err:
                raise ConnectionError(f"no {kind.__name__}: {err}") from err
        except BaseException:
            for descriptor in descriptors:
                os.close(descriptor)
            raise

    def require_open(self) -> None:
        """Raise `ConnectionError` if the other end has closed the connection, or sent something."""
        timeout_s = self._socket.gettimeout()
        self._socket.settimeout(0)
        try:
            data = self._socket.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return
        finally:
            self._socket.settimeout(timeout_s)
        raise ConnectionError("the other end spoke out of turn" if data else "it was closed")

    def shut_down(self) -> None:
        """End the connection; a thread that waits on it is told, and may still close it."""
        with suppress(OSError):  # the other end was quicker
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """End the connection, if that was not done, and give the socket up."""
        self.shut_down()
        self._socket.close()

    def _head(self, descriptors: list[int]) -> bytes:
        head = b""
        while len(head) < _HEAD.size:
            data, received, _, _ = socket.recv_fds(
                self._socket, _HEAD.size - len(head), MAX_DESCRIPTORS, socket.MSG_CMSG_CLOEXEC
            )
            descriptors += received
            if not data:
                raise ConnectionError("the other end closed the connection")
            head += data
        return head

    def _fill(self, target: memoryview) -> None:
        while len(target):
            count = self._socket.recv_into(target)
            if count == 0:
                raise ConnectionError("the other end closed the connection")
            target = target[count:]


def boot_id() -> str:
    """Return the identity of the running kernel, another one at every start; "" = not known."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def abstract_address(name: str) -> bytes:
    """Return the address of `name` in the abstract namespace, which no file system shows."""
    return b"\0" + name.encode()
