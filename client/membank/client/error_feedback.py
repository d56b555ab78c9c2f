"""What pushes in fewer bytes leave out: kept, and added to what is pushed next."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np

from membank.client.transport.requests import dtype_name
from membank.wire.buffers import BufferPool
from membank.wire.codec import Encoded, WireCodec
from membank.wire.errors import InvalidArgumentError, Reason
from membank.wire.records import UpdateResult
from membank.wire.spec import Array, BlockRef

_POOLED_BYTES = 256 << 20
"""Memory of what was kept that is used again for what is kept next."""
# The block is another one now, or will be when it may be trained again: each of these changes counts
# as an administrative one, and no gradient from before it is accepted afterwards.
_ANOTHER_BLOCK = frozenset({Reason.BLOCK_WITHHELD, Reason.BLOCK_DELETED, Reason.VERSION_MISMATCH})


@dataclass(frozen=True, slots=True, eq=False)
class Sending:
    """A push as it was first sent; whoever repeats it sends the same."""

    request_id: str
    """Its id."""
    encoded: Mapping[BlockRef, Encoded]
    """Gradient of each block, with what earlier ones had left."""
    base: Mapping[BlockRef, int]
    """Version that each was computed on, or the older one of what is added to it."""
    step: int
    """Training step."""
    learning_rate_scale: float
    """Multiplies the bank's learning rates."""
    left: Mapping[BlockRef, Array] = field(repr=False)
    """(L, P, R, D) float32 for each block: what it leaves out."""


@dataclass(slots=True, eq=False)
class _Residual:
    values: Array
    version: int
    """Version of the block after the push that left it."""


class ErrorFeedback:
    """Keeps what pushes leave out, and adds it to the next ones. Safe to share between threads.

    A push is begun, sent, and settled by its answer. Until then both what it carries and what was
    left before it are kept, so that nothing is lost and nothing is counted twice, whatever becomes
    of it:

    - accepted: what it leaves out takes the place of what was left before;
    - refused: the gradient is gone, as without feedback, and what was left before stays, unless
      the refusal says that it is too old itself, or that its block is another one by now;
    - not answered: it stays begun, and is sent again, the same bytes under the same id.

    What was left is as old as the push that left it. A gradient that it is added to is sent with
    that version as its base, if it is the older one. So the service's own rule holds for it too:
    nothing from before an administrative change of a block, such as its deletion, reaches it.

    Parameters
    ----------
    codec
        How gradients travel.
    max_staleness
        That of the bank. What would be refused for it is dropped, and the gradient sent alone.
    max_bytes
        Most bytes of what is kept, pushes under way not counted.
    """

    # `_lock` guards everything.

    def __init__(self, codec: WireCodec, *, max_staleness: int, max_bytes: int = 1 << 30) -> None:
        self._codec = codec
        self._max_staleness = max_staleness
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._pool = BufferPool(_POOLED_BYTES)
        # What was used longest ago comes first.
        self._residuals: OrderedDict[BlockRef, _Residual] = OrderedDict()
        self._begun: dict[str, Sending] = {}
        self._num_bytes = 0
        self._num_dropped = 0

    @property
    def num_bytes(self) -> int:
        """Bytes that are kept, those of pushes under way not counted."""
        return self._num_bytes

    @property
    def num_dropped(self) -> int:
        """Blocks of which something was dropped because there was no room for it."""
        return self._num_dropped

    def begun(self, request_id: str) -> Sending | None:
        """Return a push that was begun and is not settled; None = there is none."""
        with self._lock:
            return self._begun.get(request_id)

    def unsettled(self, refs: Iterable[BlockRef]) -> list[Sending]:
        """Return the pushes of any of `refs` that are not settled, in the order of their beginning."""
        wanted = set(refs)
        with self._lock:
            return [sending for sending in self._begun.values() if wanted & sending.encoded.keys()]

    def begin(
        self,
        request_id: str,
        gradients: Mapping[BlockRef, Array],
        base: Mapping[BlockRef, int],
        *,
        step: int = 0,
        learning_rate_scale: float = 1.0,
    ) -> Sending:
        """Return what to send of gradients.

        Parameters
        ----------
        request_id
            Id of the push; of one that is begun and not settled, that is returned as it was.
        gradients
            (L, P, R, D) float32, bfloat16 or float16 for each block; of no block whose push is not
            settled.
        base
            Version that each was computed on.
        step
            Training step.
        learning_rate_scale
            Multiplies the bank's learning rates.

        Raises
        ------
        InvalidArgumentError
            If a gradient is of another type or shape than can be added, or its block is in a push
            that is not settled.
        """
        with self._lock:
            if request_id in self._begun:
                return self._begun[request_id]
            for sending in self._begun.values():
                if gradients.keys() & sending.encoded.keys():
                    raise InvalidArgumentError(
                        f"push {sending.request_id} of the same block is not settled; send it again"
                    )
            encoded: dict[BlockRef, Encoded] = {}
            left: dict[BlockRef, Array] = {}
            bases: dict[BlockRef, int] = {}
            for ref, gradient in gradients.items():
                residual = self._usable(ref, base[ref])
                encoded[ref], left[ref] = self._encode(ref, gradient, residual)
                bases[ref] = base[ref] if residual is None else min(base[ref], residual.version)
            sending = Sending(
                request_id=request_id,
                encoded=encoded,
                base=bases,
                step=step,
                learning_rate_scale=learning_rate_scale,
                left=left,
            )
            self._begun[request_id] = sending
            return sending

    def settle(self, request_id: str, results: Iterable[UpdateResult]) -> None:
        """Take note of what became of a push; without effect where that is known.

        Parameters
        ----------
        request_id
            Its id.
        results
            One for each of its gradients.
        """
        with self._lock:
            sending = self._begun.pop(request_id, None)
            for result in results if sending is not None else ():
                assert sending is not None
                ref = result.ref
                if result.accepted:
                    self._drop(ref)
                    self._keep(ref, _Residual(sending.left[ref], result.version))
                elif result.reason in _ANOTHER_BLOCK or self._is_stale(result, sending):
                    self._drop(ref)

    def give_up(self, request_id: str) -> None:
        """Forget a push that was not applied; what was left before it stays."""
        with self._lock:
            self._begun.pop(request_id, None)

    def _usable(self, ref: BlockRef, base_version: int) -> _Residual | None:
        residual = self._residuals.get(ref)
        if residual is not None and base_version - residual.version > self._max_staleness:
            self._drop(ref)
            return None
        return residual

    def _is_stale(self, result: UpdateResult, sending: Sending) -> bool:
        """Say whether a gradient was refused for the age of what was added to it."""
        residual = self._residuals.get(result.ref)
        return (
            result.reason is Reason.STALE_VERSION
            and residual is not None
            and residual.version <= sending.base[result.ref]
        )

    def _encode(
        self, ref: BlockRef, gradient: Array, residual: _Residual | None
    ) -> tuple[Encoded, Array]:
        dtype_name(gradient)
        whole = self._pool.take(gradient.size * 4).view(np.float32).reshape(gradient.shape)
        if residual is None:
            np.copyto(whole, gradient)
        elif residual.values.shape == gradient.shape:
            # A sum that overflows is refused by the service, as any gradient that is not finite.
            with np.errstate(over="ignore", invalid="ignore"):
                np.add(gradient, residual.values, out=whole)
        else:
            raise InvalidArgumentError(
                f"gradient of block {ref} has shape {gradient.shape}; the one before had "
                f"{residual.values.shape}",
                reason=Reason.BAD_SHAPE,
                metadata={"block": str(ref)},
            )
        payload = self._codec.encode(whole)
        if np.shares_memory(payload, whole):
            payload = payload.copy()  # what travels is what is subtracted now
        sent = self._codec.decode(payload, whole.shape, self._pool.take)
        with np.errstate(over="ignore", invalid="ignore"):
            np.subtract(whole, sent, out=whole)
        return Encoded(self._codec.name, payload, whole.shape), whole

    def _keep(self, ref: BlockRef, residual: _Residual) -> None:
        self._residuals[ref] = residual
        self._num_bytes += residual.values.nbytes
        while self._num_bytes > self._max_bytes:
            self._num_dropped += 1
            self._drop(next(iter(self._residuals)))

    def _drop(self, ref: BlockRef) -> None:
        residual = self._residuals.pop(ref, None)
        if residual is not None:
            self._num_bytes -= residual.values.nbytes
