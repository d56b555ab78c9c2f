"""Ends that calls past grpcio meet: one that says what a test wants, and one that stands for grpcio."""

from __future__ import annotations

import socket
import threading
from collections.abc import Sequence
from contextlib import suppress

from membank.client.transport.contract import FetchAnswer, PushAnswer
from membank.client.transport.landing import Landing
from membank.v1 import block_service_pb2 as block_pb
from membank.wire.records import Update
from membank.wire.spec import BlockRef

MAX_TIMEOUT_S = 10.0
"""What tests give a call at most."""


class Grpcio:
    """Makes the calls that are left to it."""

    answer = FetchAnswer(revision=77, blocks=())
    push_answer = PushAnswer(results=(), duplicate=True)

    def __init__(self) -> None:
        self.pushes: list[str] = []
        """Request ids of the pushes."""

    async def fetch(
        self,
        request: block_pb.FetchBlocksRequest,
        refs: Sequence[BlockRef],
        landing: Landing,
        *,
        timeout_s: float,
    ) -> FetchAnswer:
        assert 0 < timeout_s <= MAX_TIMEOUT_S
        return self.answer

    async def push(self, update: Update, *, bank: str, timeout_s: float) -> PushAnswer:
        assert 0 < timeout_s <= MAX_TIMEOUT_S
        self.pushes.append(update.request_id)
        return self.push_answer

    async def close(self, *, grace_s: float = 0.0) -> None:
        raise AssertionError("not closed by whom it was lent to")


class Server:
    """Says one thing to each caller, whatever is asked, and counts them.

    Parameters
    ----------
    script
        What it says.
    hangs_up
        Whether it ends the connection once it was asked; otherwise the caller does.
    """

    def __init__(self, script: bytes, *, hangs_up: bool = False) -> None:
        self._script = script
        self._hangs_up = hangs_up
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self.callers: list[socket.socket] = []
        self.called = threading.Event()
        self.heard = threading.Event()
        self.left = threading.Event()
        self.hung_up = threading.Event()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        with suppress(OSError):
            while True:
                caller, _ = self._listener.accept()
                self.callers.append(caller)
                self.called.set()
                with caller, suppress(OSError):
                    caller.sendall(self._script)
                    self._listen(caller)
                self.left.set()

    def _listen(self, caller: socket.socket) -> None:
        heard = b""
        while part := caller.recv(1 << 16):
            heard += part
            if b"FetchBlocks" in heard or b"PushUpdates" in heard:
                self.heard.set()
                if self._hangs_up:
                    caller.shutdown(socket.SHUT_WR)
                    self.hung_up.set()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join()
