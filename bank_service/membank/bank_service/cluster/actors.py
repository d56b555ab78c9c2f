"""Where shards run: how their actors are made, found, asked, and ended in order."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol, TypeVar, cast

from membank.bank_service.cluster.identity import ShardSettings
from membank.wire.errors import MembankError

A = TypeVar("A")
T = TypeVar("T")

_LOG = logging.getLogger(__name__)

_STOP_MARGIN_S = 10.0
"""How much longer than it was given a controller may take to stop: it has little left of its time
where it was busy, and gives shards and claim a moment in any case."""


class ShardActors(Protocol):
    """The actors of one service's shards, by the shards' names. Safe to use from threads.

    An actor runs a `ShardActor`; it is started again when its process dies. The controller is an
    actor as well, and is called and killed like a shard's.
    """

    @property
    def node_ip(self) -> str:
        """Address of the machine that asks."""

    def nodes(self) -> list[tuple[str, str]]:
        """Return name and address of each node that is there, in a lasting order."""

    def make(self, settings: ShardSettings, node_id: str) -> object:
        """Make the actor of a shard on a node; where there is one, return that."""

    def find(self, shard_id: str) -> object | None:
        """Return the actor of a shard; None = there is none that will ever answer."""

    def kill(self, actor: object) -> None:
        """End an actor for good, whatever it does just now."""

    def restart(self, actor: object) -> None:
        """End the process of an actor, whatever it does just now; another one is started for it."""

    def tell(self, actor: object, method: str) -> None:
        """Call a method of an actor and wait for nothing."""

    def call(
        self,
        actor: object,
        method: str,
        *arguments: object,
        options: Mapping[str, object] | None = None,
        timeout_s: float,
        who: str,
    ) -> object:
        """Call a method of an actor, wait and return its result.

        Parameters
        ----------
        actor
            The actor.
        method
            Name of the method.
        *arguments, options
            Its arguments, by position and by name.
        timeout_s
            Longest wait.
        who
            Name of the actor, for errors.

        Returns
        -------
        object
            The result.

        Raises
        ------
        UnavailableError
            If the actor is dead, restarting or too slow (SHARD_UNAVAILABLE); whether the call took
            effect is unknown.
        MembankError
            If the method raised one.
        """


def shard_names(num_shards: int) -> list[str]:
    """Return the names of so many shards."""
    return [f"shard-{index}" for index in range(num_shards)]


def in_parallel(action: Callable[[A], T], items: Sequence[A]) -> list[T]:
    """Return what `action` returns for each item; they wait for actors side by side."""
    if not items:
        return []
    # One thread for each: of fewer, each would wait for several actors in turn.
    with ThreadPoolExecutor(len(items)) as pool:
        return list(pool.map(action, items))


def close_shards(actors: ShardActors, shards: Sequence[str], timeout_s: float) -> tuple[str, ...]:
    """Drain and close shards; their actors stay.

    Parameters
    ----------
    actors
        Where they run.
    shards
        Names of the shards.
    timeout_s
        Longest wait for them.

    Returns
    -------
    tuple[str, ...]
        Those that may have left acknowledged updates in their journals: all but those that said
        that they have not.
    """

    def close(shard_id: str) -> bool:
        actor = actors.find(shard_id)
        return actor is not None and _close(actors, actor, shard_id, timeout_s)

    closed = in_parallel(close, shards)
    return tuple(shard for shard, folded in zip(shards, closed, strict=True) if not folded)


def end_shards(actors: ShardActors, shards: Sequence[str], timeout_s: float) -> tuple[str, ...]:
    """Drain and close shards, then end their actors, by force where they do not end in time.

    Parameters
    ----------
    actors
        Where they run.
    shards
        Names of the shards.
    timeout_s
        Longest wait for them.

    Returns
    -------
    tuple[str, ...]
        Those that may have left acknowledged updates in their journals (see `close_shards`).
    """
    try:
        return close_shards(actors, shards, timeout_s)
    finally:
        kill_shards(actors, shards)


def end_service(
    actors: ShardActors, controller: object, shards: Sequence[str], timeout_s: float
) -> tuple[str, ...]:
    """Have a controller end its service; where it does not, end the shards without it.

    Parameters
    ----------
    actors
        Where all of them run.
    controller
        The controller; it is killed in any case.
    shards
        Names of the shards.
    timeout_s
        Longest wait for the controller, but for a margin, and again for shards that it left.

    Returns
    -------
    tuple[str, ...]
        Those that may have left acknowledged updates in their journals (see `close_shards`).
    """
    try:
        try:
            answer = actors.call(
                controller,
                "stop",
                timeout_s,
                timeout_s=timeout_s + _STOP_MARGIN_S,
                who="the controller",
            )
        finally:
            # Before the shards: it would make them anew.
            actors.kill(controller)
        return cast("tuple[str, ...]", answer)
    except MembankError as err:
        _LOG.warning("the controller did not stop in order: %s", err)
        return end_shards(actors, shards, timeout_s)
    finally:
        kill_shards(actors, shards)


def kill_shards(actors: ShardActors, shards: Sequence[str]) -> None:
    """End the actors of shards, whatever they do just now."""
    for shard_id in shards:
        actor = actors.find(shard_id)
        if actor is not None:
            actors.kill(actor)


def _close(actors: ShardActors, actor: object, shard_id: str, timeout_s: float) -> bool:
    try:
        return bool(actors.call(actor, "stop", timeout_s=timeout_s, who=shard_id))
    except MembankError as err:
        # What it acknowledged is in its journal; the next start there recovers it.
        _LOG.warning("%s did not stop in order: %s", shard_id, err)
        return False
