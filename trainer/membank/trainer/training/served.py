"""A bank behind the service, seen through the client."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

from torch import Tensor
from torch.utils.dlpack import from_dlpack

from membank.client import BankClient, CompressedPushes, Compression, FetchedBlocks
from membank.trainer.training.source import Acknowledged, Fetched
from membank.wire.records import UpdateResult
from membank.wire.spec import BankSpec, BlockRef, BlockState


def as_fetched(blocks: FetchedBlocks) -> Fetched:
    """Return blocks that a client fetched as float32, as a training loop sees them."""
    return Fetched(
        # Through DLPack, which lets a read-only array be seen without a copy.
        weights={ref: from_dlpack(weight) for ref, weight in blocks.weights.items()},
        versions=blocks.versions,
        absent={r: s for r, s in blocks.states.items() if s is not BlockState.ACTIVE},
    )


class ServedMemory:
    """Fetches blocks from shards and pushes gradients to them; the optimizer runs there.

    Parameters
    ----------
    client
        A connected client; it stays the caller's to close.
    run_id
        Identity of this worker's run. With it every push has a request id that is the same after a
        restart, so that a step done again is not applied again. Empty gives each push a new one.
    patience_s
        Deadline of a fetch or push, retries included, in seconds, > 0: how long a shard may be away.
    compression
        What gradients travel as; None = as they are, float32.

    Notes
    -----
    Weights travel as float32, whatever the bank keeps. What a compressed push leaves out is kept
    here and ends with this object: a restart begins without it.
    """

    def __init__(
        self,
        client: BankClient,
        *,
        run_id: str = "",
        patience_s: float = 120.0,
        compression: Compression | None = None,
    ) -> None:
        self._client = client
        self._push = (client if compression is None else CompressedPushes(client, compression)).push
        self._run_id = run_id
        self._patience_s = patience_s
        self._spec = client.info().spec

    @property
    def spec(self) -> BankSpec:
        # docstring inherited
        return self._spec

    def fetch(self, refs: Sequence[BlockRef]) -> Fetched:
        # docstring inherited
        if not refs:
            return Fetched(weights={}, versions={}, absent={})
        return as_fetched(
            self._client.fetch_blocks(refs, dtype="float32", timeout_s=self._patience_s)
        )

    def push(
        self,
        gradients: Mapping[BlockRef, Tensor],
        versions: Mapping[BlockRef, int],
        *,
        step: int,
        learning_rate_scale: float = 1.0,
        first: Sequence[BlockRef] = (),
        then: Callable[[], None] | None = None,
    ) -> tuple[Acknowledged, ...]:
        # docstring inherited
        send = partial(self._send, base=versions, step=step, scale=learning_rate_scale)
        awaited = {ref: gradients[ref] for ref in first if ref in gradients}
        others = {ref: values for ref, values in gradients.items() if ref not in awaited}
        # Two ids, or the second part would count as a repetition of the first. With nothing left to
        # send after it, the first part is the whole push and has the name of one.
        results = send(awaited, part="first" if others else "")
        if then is not None:
            then()
        results |= send(others, part="")
        return (Acknowledged(step=step, results=tuple(results[ref] for ref in gradients)),)

    def flush(self) -> tuple[Acknowledged, ...]:
        # docstring inherited
        return ()

    def _send(
        self,
        gradients: Mapping[BlockRef, Tensor],
        *,
        base: Mapping[BlockRef, int],
        step: int,
        scale: float,
        part: str,
    ) -> dict[BlockRef, UpdateResult]:
        if not gradients:
            return {}
        request_id = "-".join(filter(None, (self._run_id, str(step), part)))
        answer = self._push(
            {ref: gradient.detach().contiguous().numpy() for ref, gradient in gradients.items()},
            base=base,
            step=step,
            learning_rate_scale=scale,
            request_id=request_id if self._run_id else None,
            timeout_s=self._patience_s,
        )
        return {result.ref: result for result in answer.results}
