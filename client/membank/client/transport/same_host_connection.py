"""One connection to a shard on this machine, through which payloads do not travel. Blocking."""

from __future__ import annotations

import os
import socket
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Self

import numpy as np
from google.rpc import status_pb2

from membank.client.transport.contract import FetchAnswer, PushAnswer, SameHostDoor
from membank.client.transport.landing import Landing
from membank.client.transport.payloads import check_header
from membank.client.transport.requests import push_answer, push_head
from membank.v1 import block_service_pb2 as block_pb
from membank.v1 import same_host_pb2 as host_pb
from membank.wire.codec import fetch_codec
from membank.wire.convert import header_from_pb
from membank.wire.copying import copy_checked
from membank.wire.crc import as_uint8, crc32c
from membank.wire.errors import MembankError, from_status_proto
from membank.wire.records import Block, BlockHeader, Update
from membank.wire.same_host import MessageSocket, abstract_address
from membank.wire.shared_memory import Bytes, MappedSegments, SharedMemory, pack
from membank.wire.spec import Array, BlockRef


class SameHostConnection:
    """A connection to a shard's door; one call at a time, from any thread.

    Parameters
    ----------
    messages
        The connected socket.
    where
        Endpoint of the shard, for errors.

    Notes
    -----
    Every call takes the seconds that it may last. It raises what the shard raised, after which the
    connection can be used again; and `OSError` or `LookupError`, but of no such leaf, where the way
    through shared memory failed, after which it is of no use.
    """

    def __init__(self, messages: MessageSocket, where: str) -> None:
        self._messages = messages
        self._where = where
        self._segments = MappedSegments()
        self._is_usable = True
        self._pid = os.getpid()

    @classmethod
    def open(cls, door: SameHostDoor, where: str, *, timeout_s: float) -> Self:
        """Knock at a door; raise `OSError` where nobody opens."""
        end = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        messages = MessageSocket(end)
        try:
            messages.set_timeout(timeout_s)
            end.connect(abstract_address(door.socket_name))
            if messages.peer_uid != os.geteuid():
                # Whoever listens under this name is not the shard; its memory is none to trust.
                raise PermissionError("the shard runs as another user")
            messages.send(host_pb.SameHostRequest(ticket=door.ticket))
            response, _ = messages.receive(host_pb.SameHostResponse)
            if not response.HasField("welcome"):
                raise ConnectionError("the shard did not welcome this client")
        except BaseException:
            messages.close()
            raise
        return cls(messages, where)

    def fetch(
        self,
        request: block_pb.FetchBlocksRequest,
        refs: Sequence[BlockRef],
        landing: Landing,
        *,
        timeout_s: float,
    ) -> FetchAnswer:
        """Copy blocks out of the shard's memory, each checked by its CRC once it has arrived.

        Parameters
        ----------
        request
            What to fetch.
        refs
            Its blocks.
        landing
            Where to.
        timeout_s
            Seconds that it may last.
        """
        with self._use():
            answer = self._found(request, refs, partial(self._copied, landing), timeout_s)
            if any(block.weight is not None for block in answer.blocks):
                # From now on the shard may use the memory for something else.
                self._messages.send(host_pb.SameHostRequest(release=host_pb.SameHostRelease()))
        return answer

    def view(
        self, request: block_pb.FetchBlocksRequest, refs: Sequence[BlockRef], *, timeout_s: float
    ) -> FetchAnswer:
        """Show blocks in the shard's memory, each checked by its CRC, until `let_go`.

        Parameters
        ----------
        request
            What to look at.
        refs
            Its blocks.
        timeout_s
            Seconds that it may last.
        """
        with self._use():
            return self._found(request, refs, self._checked, timeout_s)

    def let_go(self) -> None:
        """End a view.

        Raises
        ------
        OSError
            If the shard had ended it before: what was read since then may have been anything.
        """
        if self._pid != os.getpid():
            return  # a view of this process's parent, which may still read
        with self._use():
            self._messages.require_open()
            self._messages.send(host_pb.SameHostRequest(release=host_pb.SameHostRelease()))

    def _found(
        self,
        request: block_pb.FetchBlocksRequest,
        refs: Sequence[BlockRef],
        take: Callable[[BlockHeader, Bytes], Array],
        timeout_s: float,
    ) -> FetchAnswer:
        answer = self._ask(host_pb.SameHostRequest(fetch=request), timeout_s).blocks
        headers = [header_from_pb(header) for header in answer.headers]
        if [header.ref for header in headers] != list(refs):
            raise LookupError(f"{len(headers)} other blocks than the {len(refs)} asked for")
        places = deque(answer.places)
        blocks = []
        for header in headers:
            check_header(header, where=self._where)
            weight = None
            if header.num_bytes:
                place = places.popleft()
                source = self._segments.view(place.segment, place.offset, header.num_bytes)
                weight = take(header, source)
            blocks.append(Block(header=header, weight=weight))
        return FetchAnswer(revision=answer.revision, blocks=tuple(blocks))

    def push(
        self, update: Update, *, bank: str, staging: SharedMemory, timeout_s: float
    ) -> PushAnswer:
        """Have gradients applied, which are copied to `staging` for that."""
        ends = time.monotonic() + timeout_s
        arrays = [as_uint8(np.ascontiguousarray(gradient.values)) for gradient in update.gradients]
        # The parts keep the array: nothing else may take its place before the answer.
        parts, whole = pack([array.size for array in arrays], staging)
        crcs = [copy_checked(part, array) for part, array in zip(parts, arrays, strict=True)]
        place = staging.place_of(whole)
        offsets = [place.offset + part.ctypes.data - whole.ctypes.data for part in parts]
        push = host_pb.SameHostPush(
            head=push_head(update, crcs, bank=bank),
            places=[host_pb.SharedPlace(segment=place.segment, offset=at) for at in offsets],
        )
        request = host_pb.SameHostRequest(segments=[place.segment], push=push)
        with self._use():
            pushed = self._ask(request, ends - time.monotonic(), [place.descriptor]).pushed
        return push_answer(pushed)

    def is_usable(self) -> bool:
        """Say whether another call may be made."""
        return self._is_usable

    def abandon(self) -> None:
        """Make a call in another thread fail; that thread, or whoever waits for it, closes."""
        self._is_usable = False
        # Not closed: another file could get the socket's number while that thread still uses it.
        self._messages.shut_down()

    def close(self) -> None:
        """End the connection; nobody may be using it."""
        self._messages.close()

    @contextmanager
    def _use(self) -> Iterator[None]:
        try:
            yield
        except MembankError:
            # The shard's answer; several leaves are errors of the system's kinds as well.
            raise
        except BaseException:
            self._is_usable = False
            raise

    def _ask(
        self, request: host_pb.SameHostRequest, timeout_s: float, descriptors: Sequence[int] = ()
    ) -> host_pb.SameHostResponse:
        if timeout_s <= 0:
            raise TimeoutError
        self._messages.set_timeout(timeout_s)
        self._messages.send(request, descriptors)
        response, received = self._messages.receive(host_pb.SameHostResponse)
        try:
            for number in response.segments:
                self._segments.adopt(number, received.pop(0))
        finally:
            for descriptor in received:
                os.close(descriptor)
        if response.HasField("status"):
            raise from_status_proto(status_pb2.Status.FromString(response.status))
        return response

    def _copied(self, landing: Landing, header: BlockHeader, source: Bytes) -> Array:
        target = landing.place(header)
        self._require(header, copy_checked(target, source))
        return landing.weight(header, target)

    def _checked(self, header: BlockHeader, source: Bytes) -> Array:
        self._require(header, crc32c(source))
        return fetch_codec(header.dtype).decode(source, header.shape)

    def _require(self, header: BlockHeader, actual: int) -> None:
        if actual != header.crc32c:
            # The shard took the memory back, such as after a lease that was overstayed.
            raise ConnectionError(f"{self._where}: block {header.ref} changed while it was read")
