"""A proxy on loopback before an S3 server, which lets chosen requests fail in chosen ways.

It understands as much of HTTP/1.1 as S3 clients use, passes on what it reads unchanged, and so
leaves signatures valid. Without a server behind it, it answers by itself alone.
"""

from __future__ import annotations

import random
import re
import select
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple, Protocol
from urllib.parse import unquote, urlsplit

_READ_BYTES = 64 * 1024
_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


class Fault(StrEnum):
    """What happens to a request."""

    ANSWER = "answer"
    """It is answered with an error, and never reaches the server."""
    RESET_BEFORE = "reset before"
    """The connection breaks; the request never reaches the server."""
    RESET_AFTER = "reset after"
    """The server does the work; the connection breaks before its answer."""
    ERROR_AFTER = "error after"
    """The server does the work; the client is told of an error."""
    STALL_BEFORE = "stall before"
    """Nobody ever answers, and the request never reaches the server."""
    STALL_AFTER = "stall after"
    """The server does the work; its answer never arrives."""
    CUT_BODY = "cut body"
    """Half of the answer's body, or of its head where it has none, arrives; then the connection ends."""
    STALL_BODY = "stall body"
    """The same half arrives, then nothing more."""


class Request(NamedTuple):
    """What a plan sees of a request."""

    method: str
    """GET, HEAD, PUT, DELETE, POST."""
    path: str
    """Bucket and key, not quoted, with a leading slash."""
    query: str
    """What came after the question mark."""


@dataclass(frozen=True, kw_only=True)
class Rule:
    """A fault, and the requests that it happens to."""

    fault: Fault
    """What happens."""
    method: str = ""
    """Regular expression that the whole method must match; "" = any."""
    path: str = ""
    """Regular expression that must be found in bucket and key; "" = any."""
    query: str = ""
    """The same for the query."""
    skip: int = 0
    """How many such requests pass first."""
    times: int | None = 1
    """How many then fail; None = all."""
    status: int = 503
    """Status of the error's answer."""
    code: str = "SlowDown"
    """S3 code in its body; "" = an answer without a body."""

    def concerns(self, request: Request) -> bool:
        """Say whether the rule is about requests like this."""
        return (
            (not self.method or re.fullmatch(self.method, request.method) is not None)
            and re.search(self.path, request.path) is not None
            and re.search(self.query, request.query) is not None
        )


class Plan(Protocol):
    """Decides over every request, in the order in which they arrive."""

    def choose(self, request: Request) -> Rule | None:
        """Return the rule that this request falls under; None = it passes."""


class Script:
    """A plan that goes through rules in order; the first that concerns a request counts it.

    Parameters
    ----------
    *rules
        The rules.
    """

    def __init__(self, *rules: Rule) -> None:
        self._rules = rules
        self._seen = [0] * len(rules)

    def choose(self, request: Request) -> Rule | None:
        # docstring inherited
        for index, rule in enumerate(self._rules):
            if not rule.concerns(request):
                continue
            self._seen[index] += 1
            number = self._seen[index] - rule.skip
            if number >= 1 and (rule.times is None or number <= rule.times):
                return rule
        return None


class Dice:
    """A plan by which requests fail at random, each way equally often.

    Parameters
    ----------
    seed
        Decides, with the order of the requests.
    share
        How many requests fail, from 0 to 1.
    faults
        The ways.
    """

    def __init__(self, seed: int, share: float, faults: tuple[Fault, ...] = tuple(Fault)) -> None:
        self._random = random.Random(seed)
        self._share = share
        self._faults = faults

    def choose(self, request: Request) -> Rule | None:
        # docstring inherited
        if self._random.random() >= self._share:
            return None
        return Rule(fault=self._random.choice(self._faults))


PASS_ALL = Script()
"""The plan by which nothing fails."""


@dataclass
class _Message:
    head: bytes
    body: bytes = b""
    fields: dict[str, str] = field(default_factory=dict)

    @property
    def half(self) -> bytes:
        """What arrives of it where it is cut."""
        if self.body:
            return self.head + self.body[: len(self.body) // 2]
        return self.head[: len(self.head) // 2]

    @property
    def first_line(self) -> list[str]:
        return self.head.split(b"\r\n", 1)[0].decode("latin-1").split(" ", 2)


class _ClosedError(Exception):
    """The other side closed the connection."""


class FaultProxy:
    """The proxy; use it as a context manager.

    Parameters
    ----------
    upstream
        URL of the server; None = answer everything with the plan's errors, else with 200.
    """

    # Threads: one accepts, one serves each connection. `_lock` guards the plan and the record.

    def __init__(self, upstream: str | None) -> None:
        parts = urlsplit(upstream or "")
        self._upstream = (parts.hostname or "", parts.port or 80) if upstream else None
        self._lock = threading.Lock()
        self._plan: Plan = PASS_ALL
        self._record: list[tuple[Request, Fault | None]] = []
        self._stopped = threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._open: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []

    @property
    def url(self) -> str:
        """Where it listens; a client's endpoint."""
        return f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    @property
    def record(self) -> list[tuple[Request, Fault | None]]:
        """Every request so far, and what happened to it."""
        with self._lock:
            return list(self._record)

    @property
    def num_faults(self) -> int:
        """How many requests failed so far."""
        return sum(fault is not None for _, fault in self.record)

    @contextmanager
    def following(self, plan: Plan) -> Iterator[None]:
        """Follow `plan` until the block ends, then let everything pass."""
        self._set_plan(plan)
        try:
            yield
        finally:
            self._set_plan(PASS_ALL)

    def __enter__(self) -> FaultProxy:
        self._start(self._accept)
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        # An accept that waits is woken by a connection.
        with suppress(OSError):
            socket.create_connection(self._listener.getsockname(), timeout=1).close()
        self._listener.close()
        with self._lock:
            connections = list(self._open)
        for connection in connections:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(timeout=10)

    def _set_plan(self, plan: Plan) -> None:
        with self._lock:
            self._plan = plan

    def _start(self, target: Callable[..., None], *arguments: object) -> None:
        thread = threading.Thread(target=target, args=arguments, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            if self._stopped.is_set():
                connection.close()
                return
            self._start(self._serve, connection)

    def _serve(self, connection: socket.socket) -> None:
        server: socket.socket | None = None
        with self._lock:
            self._open.add(connection)
        try:
            if self._upstream is not None:
                server = socket.create_connection(self._upstream, timeout=60)
            while self._serve_one(connection, server):
                pass
        except (OSError, _ClosedError):
            pass  # a client that gave up, or a server that ended
        finally:
            with self._lock:
                self._open.discard(connection)
            for end in (connection, server):
                if end is not None:
                    end.close()

    def _serve_one(self, connection: socket.socket, server: socket.socket | None) -> bool:
        """Serve one request; return whether the connection goes on."""
        message = _read_message(connection, answer_expect=True)
        method, target, _ = message.first_line
        parts = urlsplit(target)
        request = Request(method, unquote(parts.path), parts.query)
        with self._lock:
            rule = self._plan.choose(request)
            self._record.append((request, None if rule is None else rule.fault))
        fault = None if rule is None else rule.fault
        if rule is not None and fault is Fault.ANSWER:
            connection.sendall(_error_answer(rule, method))
            return True
        if fault is Fault.RESET_BEFORE:
            return _reset(connection)
        if fault is Fault.STALL_BEFORE:
            return self._stall(connection)
        if server is None:
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
            return True
        server.sendall(message.head + message.body)
        answer = _read_message(server, to=method)
        return self._pass_on(connection, answer, rule, method)

    def _pass_on(
        self, connection: socket.socket, answer: _Message, rule: Rule | None, method: str
    ) -> bool:
        match None if rule is None else rule.fault:
            case Fault.RESET_AFTER:
                return _reset(connection)
            case Fault.STALL_AFTER:
                return self._stall(connection)
            case Fault.ERROR_AFTER if rule is not None:
                connection.sendall(_error_answer(rule, method))
            case Fault.CUT_BODY | Fault.STALL_BODY as fault:
                connection.sendall(answer.half)
                if fault is Fault.STALL_BODY:
                    return self._stall(connection)
                # An orderly end: a reset could overtake the half that was sent.
                connection.shutdown(socket.SHUT_WR)
                return False
            case _:
                connection.sendall(answer.head + answer.body)
        return answer.fields.get("connection", "").lower() != "close"

    def _stall(self, connection: socket.socket) -> bool:
        """Say nothing until the client gives up or the proxy ends."""
        while not self._stopped.is_set():
            readable, _, _ = select.select([connection], [], [], 0.2)
            if readable and not connection.recv(_READ_BYTES):
                break
        return False


def _reset(connection: socket.socket) -> bool:
    # Lingering for no time makes the kernel send a reset, not an end.
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()
    return False


def _error_answer(rule: Rule, method: str) -> bytes:
    body = b""
    if rule.code and method != "HEAD":
        body = (
            '<?xml version="1.0" encoding="UTF-8"?>'
            f"<Error><Code>{rule.code}</Code><Message>planned</Message>"
            "<StringToSign>AWS4-HMAC-SHA256 secret-looking</StringToSign></Error>"
        ).encode()
    head = (
        f"HTTP/1.1 {rule.status} Planned\r\nContent-Type: application/xml\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


def _read_message(source: socket.socket, *, answer_expect: bool = False, to: str = "") -> _Message:
    """Read a request, or the answer to a request of method `to`, whole."""
    data = b""
    while b"\r\n\r\n" not in data:
        data += _receive(source)
    head, _, rest = data.partition(b"\r\n\r\n")
    fields = {}
    lines = head.split(b"\r\n")
    for line in lines[1:]:
        name, _, value = line.decode("latin-1").partition(":")
        fields[name.strip().lower()] = value.strip()
    if answer_expect and fields.get("expect", "").lower() == "100-continue":
        # The client holds the body back until it is told to go on; the server need not know.
        source.sendall(_CONTINUE)
        lines = [line for line in lines if not line.lower().startswith(b"expect:")]
    message = _Message(b"\r\n".join(lines) + b"\r\n\r\n", fields=fields)
    if to == "HEAD" or (to and lines[0].split()[1] in {b"204", b"304"}):
        return message
    if fields.get("transfer-encoding", "").lower() == "chunked":
        while not _chunks_end(rest):
            rest += _receive(source)
        message.body = rest
        return message
    length = int(fields.get("content-length", "0"))
    pieces, have = [rest], len(rest)
    while have < length:
        pieces.append(_receive(source))
        have += len(pieces[-1])
    message.body = b"".join(pieces)
    return message


def _chunks_end(body: bytes) -> bool:
    """Say whether a chunked body is complete."""
    at = 0
    while True:
        end = body.find(b"\r\n", at)
        if end < 0:
            return False
        size = int(body[at:end].split(b";")[0], 16)
        if size == 0:
            return body.endswith(b"\r\n\r\n")
        at = end + 2 + size + 2


def _receive(source: socket.socket) -> bytes:
    data = source.recv(_READ_BYTES)
    if not data:
        raise _ClosedError
    return data
