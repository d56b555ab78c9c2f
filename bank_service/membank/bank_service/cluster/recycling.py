"""One shard's process ends, and another one takes its place on the same node."""

from __future__ import annotations

import time
from collections.abc import Callable

from membank.bank_service.cluster.actors import ShardActors, close_shards
from membank.bank_service.cluster.identity import ShardIdentity
from membank.wire.errors import Reason, UnavailableError

_PAUSE_S = 0.05
_LEAST_WAIT_S = 1.0


class ShardRecycling:
    """Recycles the shards of one service.

    Parameters
    ----------
    actors
        Where they run.
    ask_identity
        Returns where the shard of an actor is found, or raises why it is not.
    clock
        Monotonic seconds.
    sleep
        Waits for some seconds.
    """

    def __init__(
        self,
        actors: ShardActors,
        ask_identity: Callable[[object, str], ShardIdentity],
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._actors = actors
        self._ask_identity = ask_identity
        self._clock = clock
        self._sleep = sleep

    def run(self, actor: object, shard_id: str, deadline: float) -> ShardIdentity:
        """Fold, drain and end the process of a shard; return where the next one is found.

        Raises
        ------
        UnavailableError
            If it does not end, or the next one does not serve by the deadline.
        """
        before = self._ask_identity(actor, shard_id)
        # Most of the journal while it still serves, so that it is away for a moment only.
        self._actors.call(actor, "consolidate", timeout_s=self._left(deadline), who=shard_id)
        # What is left in its journal, the next process finds there: it is on the same node.
        close_shards(self._actors, [shard_id], self._left(deadline))
        self._actors.restart(actor)
        return self._next_life(actor, before, deadline)

    def _next_life(self, actor: object, before: ShardIdentity, deadline: float) -> ShardIdentity:
        while True:
            try:
                identity = self._ask_identity(actor, before.shard_id)
                if identity.incarnation != before.incarnation:
                    return identity
                problem = UnavailableError(f"{before.shard_id} does not end; retry")
            except UnavailableError as err:
                # The old process answers that it is stopped, until it has ended.
                if err.reason not in {Reason.SHARD_UNAVAILABLE, Reason.NOT_RUNNING}:
                    raise
                problem = err
            if self._clock() > deadline:
                raise problem
            self._sleep(_PAUSE_S)

    def _left(self, deadline: float) -> float:
        return max(deadline - self._clock(), _LEAST_WAIT_S)
