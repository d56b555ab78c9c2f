"""Which updates were applied, so that a retry is answered and not applied again."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence

from membank.bank_service.shard.update_frame import result_from_json, result_to_json
from membank.wire.errors import InvalidArgumentError
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
        self._results: OrderedDict[str, tuple[UpdateResult, ...]] = OrderedDict()
        for request in requests:
            self.add(request.request_id, tuple(result_from_json(item) for item in request.results))

    def add(self, request_id: str, results: tuple[UpdateResult, ...]) -> None:
        """Remember an update."""
        self._results[request_id] = results
        while len(self._results) > self._capacity:
            self._results.popitem(last=False)

    def answer(self, request_id: str, refs: Sequence[BlockRef]) -> tuple[UpdateResult, ...] | None:
        """Return what was answered to an update of `refs`; None = it is new.

        A retry may have fewer blocks than the first attempt: a trainer that goes on after a stop
        fetches again, and leaves out what has been withheld or deleted since.

        Raises
        ------
        InvalidArgumentError
            If the id was used for an update without one of `refs`.
        """
        known = self._results.get(request_id)
        if known is None:
            return None
        by_ref = {result.ref: result for result in known}
        if not by_ref.keys() >= set(refs):
            raise InvalidArgumentError(
                f"request id {request_id!r} was used for an update of other blocks; "
                "give each update an id of its own",
                metadata={"request_id": request_id},
            )
        return tuple(by_ref[ref] for ref in refs)

    def export(self) -> tuple[AppliedRequest, ...]:
        """Return what a manifest must remember, oldest first."""
        return tuple(
            AppliedRequest(request_id=request_id, results=tuple(result_to_json(r) for r in results))
            for request_id, results in self._results.items()
        )
