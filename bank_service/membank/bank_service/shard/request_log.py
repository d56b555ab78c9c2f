"""Which updates were applied, so that a retry is answered and not applied again."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence

from membank.bank_service.shard.update_frame import result_from_json, result_to_json
from membank.wire.errors import InvalidArgumentError, Reason
from membank.wire.format.manifest import AppliedRequest
from membank.wire.records import UpdateResult
from membank.wire.spec import BlockRef


class RequestLog:
    """The latest updates of one partition, with their answers.

    Parameters
    ----------
    capacity
        Updates to remember; the oldest are forgotten.
    requests
        What a manifest remembers, oldest first.
    """

    def __init__(self, capacity: int, requests: Iterable[AppliedRequest]) -> None:
        self._capacity = capacity
        # Kept as a manifest has them: every manifest takes all, while a retry is rare.
        self._requests: OrderedDict[str, AppliedRequest] = OrderedDict()
        for request in requests:
            self._keep(request)

    def add(self, request_id: str, results: tuple[UpdateResult, ...]) -> None:
        """Remember an update."""
        written = tuple(result_to_json(result) for result in results)
        self._keep(AppliedRequest(request_id=request_id, results=written))

    def answer(self, request_id: str, refs: Sequence[BlockRef]) -> tuple[UpdateResult, ...] | None:
        """Return what was answered to an update of `refs`; None = it is new.

        Raises as `answer_of` does.
        """
        known = self._requests.get(request_id)
        if known is None:
            return None
        return answer_of(request_id, map(result_from_json, known.results), refs)

    def export(self) -> tuple[AppliedRequest, ...]:
        """Return what a manifest must remember, oldest first."""
        return tuple(self._requests.values())

    def _keep(self, request: AppliedRequest) -> None:
        self._requests[request.request_id] = request
        while len(self._requests) > self._capacity:
            self._requests.popitem(last=False)


def answer_of(
    request_id: str, results: Iterable[UpdateResult], refs: Sequence[BlockRef]
) -> tuple[UpdateResult, ...]:
    """Return what is answered to a retry with `refs` of an update that had `results`.

    A retry may have fewer blocks than the first attempt: a trainer that goes on after a stop
    fetches again, and leaves out what has been withheld or deleted since.

    Raises
    ------
    InvalidArgumentError
        If the id was used for an update without one of `refs` (REQUEST_ID_REUSED).
    """
    by_ref = {result.ref: result for result in results}
    if not by_ref.keys() >= set(refs):
        raise InvalidArgumentError(
            f"request id {request_id!r} was used for an update of other blocks; "
            "give each update an id of its own",
            reason=Reason.REQUEST_ID_REUSED,
            metadata={"request_id": request_id},
        )
    return tuple(by_ref[ref] for ref in refs)
