"""Pushing gradients in fewer bytes, without losing what they leave out.

An encoding rounds a gradient, or sends a part of it. With *error feedback* what was not sent stays
with the sender, block by block, and is added to the next gradient of the block; so over some steps
all of it arrives (docs/wire.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from membank.client.error_feedback import ErrorFeedback, Sending
from membank.client.session import new_request_id
from membank.client.transport.contract import PushAnswer
from membank.wire.codec import Encoded, Sparse, WireCodec, push_codec
from membank.wire.errors import (
    DeadlineError,
    InvalidArgumentError,
    MembankError,
    Reason,
    ResourceExhaustedError,
    UnavailableError,
)
from membank.wire.spec import Array, BankSpec, BlockRef

# After these the push may have been applied, or may be yet.
_FATE_UNKNOWN = (UnavailableError, DeadlineError, ResourceExhaustedError)


@dataclass(frozen=True, kw_only=True, slots=True)
class Compression:
    """What gradients travel as."""

    wire: str = "float32"
    """Encoding: float32, bfloat16, float16, int8, or sparse."""
    share: float = 1.0
    """Of ``sparse``, the part of the elements that is sent, those of the largest magnitude, in
    (0, 1]; each takes 8 bytes."""
    error_feedback: bool = True
    """Whether what was not sent of a gradient is added to the next one of its block."""
    max_residual_bytes: int = 1 << 30
    """Most bytes that are kept to be sent later, 4 for each parameter of a block, >= 0. Of those
    that exceed them, the ones that were used longest ago are dropped."""

    def __post_init__(self) -> None:
        self.codec()
        if self.share != 1.0 and self.wire != Sparse.name:
            raise InvalidArgumentError(
                f"share is {self.share} with wire {self.wire!r}; it is of 'sparse' alone",
                reason=Reason.BAD_CONFIG,
            )
        if self.max_residual_bytes < 0:
            raise InvalidArgumentError(
                f"max_residual_bytes is {self.max_residual_bytes}; accepted: >= 0",
                reason=Reason.BAD_CONFIG,
            )

    def codec(self) -> WireCodec:
        """Return the encoding.

        Raises
        ------
        InvalidArgumentError
            If there is none of that name (BAD_DTYPE), or the share is out of range (BAD_CONFIG).
        """
        return Sparse(self.share) if self.wire == Sparse.name else push_codec(self.wire)


class PushesGradients(Protocol):
    """What pushes, such as `BankClient`."""

    @property
    def spec(self) -> BankSpec:
        """Spec of the bank."""
        ...

    def push(
        self,
        gradients: Mapping[BlockRef, Array | Encoded],
        *,
        base: Mapping[BlockRef, int],
        step: int = 0,
        learning_rate_scale: float = 1.0,
        request_id: str | None = None,
        timeout_s: float | None = None,
    ) -> PushAnswer:
        """Apply gradients; see `AsyncBankClient.push`."""
        ...


class CompressedPushes:
    """Pushes as a client does, in an encoding; with error feedback, if that is configured.

    Safe to share between threads that push different blocks.

    Parameters
    ----------
    client
        What pushes, to a bank that there is; it stays the caller's to close.
    compression
        What gradients travel as.
    """

    def __init__(self, client: PushesGradients, compression: Compression) -> None:
        self._client = client
        self._codec = compression.codec()
        self._feedback = (
            ErrorFeedback(
                self._codec,
                max_staleness=client.spec.max_staleness,
                max_bytes=compression.max_residual_bytes,
            )
            if compression.error_feedback
            else None
        )

    @property
    def feedback(self) -> ErrorFeedback | None:
        """What keeps what was not sent; None without error feedback."""
        return self._feedback

    def push(
        self,
        gradients: Mapping[BlockRef, Array],
        *,
        base: Mapping[BlockRef, int],
        step: int = 0,
        learning_rate_scale: float = 1.0,
        request_id: str | None = None,
        timeout_s: float | None = None,
    ) -> PushAnswer:
        """Apply gradients as `BankClient.push` does, with what earlier ones have left.

        Where a push got no answer, the next one of any of its blocks sends it again first, to learn
        what became of it: until then nobody can say what of it has arrived.

        Parameters
        ----------
        gradients
            Gradient of each block, (L, P, R, D) float32, bfloat16 or float16, CPU.
        base
            Version that each was computed on.
        step
            Training step of the sender; recorded.
        learning_rate_scale
            Multiplies the bank's learning rates for this push; finite, >= 0.
        request_id
            Id of the request; None = a new one. Under the id of a push that got no answer, that one
            is sent again as it was, and its answer returned.
        timeout_s
            Deadline of each push that is sent.

        Returns
        -------
        PushAnswer
            As of `BankClient.push`.

        Raises
        ------
        MembankError
            As `BankClient.push`. After any but `UnavailableError`, `DeadlineError` and
            `ResourceExhaustedError`, the push counts as not applied.
        """
        gradients = {BlockRef(*ref): gradient for ref, gradient in gradients.items()}
        request_id = request_id or new_request_id()
        feedback = self._feedback
        if feedback is None:
            encoded = {
                ref: Encoded(self._codec.name, self._codec.encode(gradient), gradient.shape)
                for ref, gradient in gradients.items()
            }
            return self._client.push(
                encoded,
                base=base,
                step=step,
                learning_rate_scale=learning_rate_scale,
                request_id=request_id,
                timeout_s=timeout_s,
            )
        for earlier in feedback.unsettled(gradients):
            if earlier.request_id != request_id:
                self._send(feedback, earlier, timeout_s)
        sending = feedback.begin(
            request_id, gradients, base, step=step, learning_rate_scale=learning_rate_scale
        )
        return self._send(feedback, sending, timeout_s)

    def _send(
        self, feedback: ErrorFeedback, sending: Sending, timeout_s: float | None
    ) -> PushAnswer:
        try:
            answer = self._client.push(
                sending.encoded,
                base=sending.base,
                step=sending.step,
                learning_rate_scale=sending.learning_rate_scale,
                request_id=sending.request_id,
                timeout_s=timeout_s,
            )
        except _FATE_UNKNOWN:
            raise
        except MembankError:
            feedback.give_up(sending.request_id)
            raise
        feedback.settle(sending.request_id, answer.results)
        return answer
