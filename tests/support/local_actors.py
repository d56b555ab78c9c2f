"""Actors of shards in this process: real shards and servers, and calls that are plain calls."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from membank.bank_service.cluster.identity import ShardSettings
from membank.bank_service.cluster.shard_actor import ShardActor
from membank.bank_service.cluster.shard_server import ShardServer
from membank.wire.errors import Reason, UnavailableError
from membank.wire.format.receipt import ProcessLife


@dataclass(slots=True, eq=False)
class LocalActor:
    """One actor; `lives` stands for its process."""

    settings: ShardSettings
    actor: object
    lives: int = 0

    @property
    def shard_id(self) -> str:
        return self.settings.shard_id


class LocalActors:
    """`ShardActors` without Ray.

    Parameters
    ----------
    before_start
        Called with the settings before a shard is opened; what it raises keeps the shard closed.
    before_call
        Called with shard and method before a call is made; what it raises is the call's answer.
    """

    def __init__(
        self,
        *,
        before_start: Callable[[ShardSettings], None] = lambda settings: None,
        before_call: Callable[[str, str], None] = lambda shard_id, method: None,
    ) -> None:
        self.before_start = before_start
        self.before_call = before_call
        self.node_list = [("node-1", "127.0.0.1")]
        self.servers: dict[str, ShardServer] = {}
        self.waits: dict[str, float] = {}
        """How long the last call of each method would have been waited for."""
        self._lives = 0
        self._actors: dict[str, LocalActor] = {}

    @property
    def node_ip(self) -> str:
        return "127.0.0.1"

    def nodes(self) -> list[tuple[str, str]]:
        return self.node_list

    def make(self, settings: ShardSettings, node_id: str) -> object:
        shard_id = settings.shard_id
        if shard_id not in self._actors:
            self._actors[shard_id] = LocalActor(settings, ShardActor(settings, start=self._start))
        return self._actors[shard_id]

    def find(self, shard_id: str) -> object | None:
        return self._actors.get(shard_id)

    def kill(self, actor: object) -> None:
        assert isinstance(actor, LocalActor)
        self._actors.pop(actor.shard_id, None)
        server = self.servers.pop(actor.shard_id, None)
        if server is not None:
            server.shard.close(consolidate=False)
            server.stop()

    def restart(self, actor: object) -> None:
        assert isinstance(actor, LocalActor)
        server = self.servers.pop(actor.shard_id, None)
        if server is not None:
            server.shard.close(consolidate=False)
            server.stop()
        self._lives += 1
        actor.lives = self._lives
        actor.actor = ShardActor(actor.settings, start=self._start)

    def tell(self, actor: object, method: str) -> None:
        assert isinstance(actor, LocalActor)
        getattr(actor.actor, method)()

    def call(
        self,
        actor: object,
        method: str,
        *arguments: object,
        options: Mapping[str, object] | None = None,
        timeout_s: float,
        who: str,
    ) -> object:
        assert isinstance(actor, LocalActor)
        self.waits[method] = timeout_s
        self.before_call(actor.shard_id, method)
        if self._actors.get(actor.shard_id) is not actor:
            raise away(actor.shard_id)
        answer: object = getattr(actor.actor, method)(*arguments, **(options or {}))
        if isinstance(answer, ProcessLife):
            # All live in one process here.
            return replace(answer, pid=10_000 + actor.lives)
        return answer

    def end(self) -> None:
        """Kill all."""
        for actor in list(self._actors.values()):
            self.kill(actor)

    def _start(self, settings: ShardSettings) -> ShardServer:
        self.before_start(settings)
        server = self.servers[settings.shard_id] = ShardServer(settings)
        return server


def away(shard_id: str) -> UnavailableError:
    """Return the error for an actor that does not answer."""
    return UnavailableError(f"{shard_id} is down", reason=Reason.SHARD_UNAVAILABLE)
