"""The shard actors of one bank: made, watched, and told the placement."""

from __future__ import annotations

import functools
import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from membank.bank_service.cluster.actors import (
    ShardActors,
    close_shards,
    end_shards,
    in_parallel,
    shard_names,
)
from membank.bank_service.cluster.addresses import shard_listening
from membank.bank_service.cluster.config import UpConfig
from membank.bank_service.cluster.identity import ShardIdentity, ShardSettings, ShardStatus
from membank.bank_service.cluster.placement import PlacementTable, assign_partitions, next_move
from membank.bank_service.cluster.recycling import ShardRecycling
from membank.bank_service.cluster.shard_actor import ShardActorHandle
from membank.bank_service.knowledge.shards import ShardMember
from membank.bank_service.rpc.server import ServerConfig
from membank.wire.errors import InternalError, MembankError, Reason, UnavailableError
from membank.wire.records import Placement
from membank.wire.spec import BankSpec

_LOG = logging.getLogger(__name__)

_PROBE_TIMEOUT_S = 10.0
_MOVE_TIMEOUT_S = 60.0
_MOVE_BACKOFF_S = 60.0
_RECYCLE_TIMEOUT_S = 60.0
_REBALANCE_EVERY_S = 3.0
_REOPEN_BACKOFF_S = (1.0, 2.0, 4.0, 8.0, 15.0, 30.0)


@dataclass(slots=True)
class _ShardState:
    """What the controller knows of one shard."""

    settings: ShardSettings
    node_id: str
    actor: object
    identity: ShardIdentity | None = None
    alive: bool = False
    problem: str = ""
    num_restarts: int = 0
    is_recycled: bool = False
    failures: int = 0
    retry_at_s: float = 0.0


class ShardFleet:
    """Shard actors and their supervision.

    An actor whose process died is started again; `supervise` notices, tells everybody the new
    endpoint, reopens what failed to open, and replaces what will not come back. A shard that another
    owner has replaced closes itself; it opens again only while this service has the claim on the
    bank (see `ShardServer`), so two services never fight for a partition.

    Parameters
    ----------
    config
        Settings of the service.
    spec
        Spec of the bank.
    actors
        Where the shards run.
    clock
        Monotonic seconds.
    sleep
        Waits for some seconds.
    """

    # `_lock` guards the states' fields, and that nothing is made or opened once `_is_ended`; it is
    # never held while an actor is waited for. `_stopping` is, and taken first: no shard is moved
    # while it is recycled.

    def __init__(
        self,
        config: UpConfig,
        spec: BankSpec,
        actors: ShardActors,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._config = config
        self._spec = spec
        self._actors = actors
        self._clock = clock
        self._sleep = sleep
        self._lock = threading.Lock()
        self._stopping = threading.Lock()
        self._recycling = ShardRecycling(
            actors,
            lambda actor, shard_id: self._ask(actor, shard_id, _PROBE_TIMEOUT_S),
            clock=clock,
            sleep=sleep,
        )
        self._partitions = assign_partitions(spec.num_partitions, shard_names(config.num_shards))
        self._table = PlacementTable(self._partitions)
        self._states: dict[str, _ShardState] = {}
        self._told: dict[str, tuple[str, int]] = {}
        self._started = threading.Event()
        self._rebalance_at_s = 0.0
        self._is_ended = False

    def start(self, timeout_s: float, *, insist: bool = True, adopt: bool = True) -> None:
        """Make the actors, or find them, and have them open their shards.

        Parameters
        ----------
        timeout_s
            Longest wait.
        insist
            Whether all must serve when this returns. Otherwise a shard that does not is looked
            after by `supervise`, like one that fails later.
        adopt
            Whether actors that are there are of this service. Otherwise they are ended first: their
            settings are others, and the claim on the bank that they may open with is gone.

        Raises
        ------
        MembankError
            What kept a shard from opening its partitions.
        UnavailableError
            If a node, or a shard that was insisted on, did not come up in time.
        """
        deadline = self._clock() + timeout_s
        nodes = self._wait_for_nodes(deadline)
        if not adopt:
            self._end_found()
        found = []
        for index, shard_id in enumerate(self._partitions):
            node_id, node_ip = nodes[index % len(nodes)]
            settings = self._settings(shard_id, node_ip)
            actor = self._actors.find(shard_id)
            with self._lock:
                self._check_not_ended()
                made = actor or self._actors.make(settings, node_id)
                state = self._states[shard_id] = _ShardState(settings, node_id, made)
            if actor is not None:
                found.append(state)
        if insist:
            # A new one opens by itself; one that is found may have failed to, before.
            in_parallel(lambda state: self._open(state, deadline), found)
            for state in self._states.values():
                self._note(state, self._wait_for_identity(state, deadline))
            self._tell_placement()
        else:
            self._look_after()
        self._started.set()

    def members(self) -> tuple[ShardMember, ...]:
        """Return the shards, for transactions."""
        return tuple(
            ShardMember(
                shard_id=shard_id,
                partitions=state.settings.partitions,
                handle=ShardActorHandle(
                    shard_id,
                    functools.partial(getattr, state, "actor"),
                    self._spec,
                    actors=self._actors,
                    num_restarts=functools.partial(getattr, state, "num_restarts"),
                ),
            )
            for shard_id, state in self._states.items()
        )

    def placement(self) -> Placement:
        """Return the placement in force."""
        return self._table.current()

    def all_serve(self) -> bool:
        """Say whether every shard answered when it was asked last."""
        return all(status.alive for status in self.statuses())

    def statuses(self) -> tuple[ShardStatus, ...]:
        """Return what is known of each shard now."""
        with self._lock:
            return tuple(_status(shard_id, state) for shard_id, state in self._states.items())

    def recycle(self, shard_ids: Sequence[str], timeout_s: float = _RECYCLE_TIMEOUT_S) -> None:
        """Let other processes take the place of those of shards; they serve when it returns.

        `UnavailableError` if one does not end, or is not back in time: `supervise` looks after it.
        """
        deadline = self._clock() + timeout_s
        if not self._stopping.acquire(timeout=timeout_s):
            raise UnavailableError("a shard is being moved to another node; retry")
        try:
            states = [self._states[shard_id] for shard_id in shard_ids]
            in_parallel(lambda state: self._recycle(state, deadline), states)
        finally:
            self._stopping.release()
        self._tell_placement()

    def supervise(self) -> None:
        """Look after every shard once; never raises for what a shard does."""
        if not self._started.is_set():
            return
        self._look_after()
        if self._config.moves_shards and self._clock() >= self._rebalance_at_s:
            self._rebalance_at_s = self._clock() + _REBALANCE_EVERY_S
            self._rebalance()

    def end(self) -> None:
        """Make and open nothing any more, also where a start or a look at the shards is under way."""
        with self._lock:
            self._is_ended = True

    def let_go(self, why: MembankError, timeout_s: float) -> None:
        """Close every shard, folding what it may; nothing is opened again.

        Parameters
        ----------
        why
            What is said of the shards then.
        timeout_s
            Longest wait for them.
        """
        close_shards(self._actors, list(self._partitions), timeout_s)
        for state in self._states.values():
            self._mark_down(state, why)

    def _end_found(self) -> None:
        """End actors that are there, in order: their journals may lie on disks of their nodes."""
        found = [shard_id for shard_id in self._partitions if self._actors.find(shard_id)]
        if found:
            _LOG.warning("%s are there already, of an earlier service: making them anew", found)
            end_shards(self._actors, found, _MOVE_TIMEOUT_S)
        for shard_id in found:
            self._wait_for_name(shard_id)

    def _look_after(self) -> None:
        states = [state for state in self._states.values() if not state.is_recycled]
        # Side by side: one that does not answer must not keep the others from being looked after.
        for state, found in zip(states, in_parallel(self._probe, states), strict=True):
            if state.is_recycled:
                continue  # since it was asked: what it said is of the process that ends
            if isinstance(found, ShardIdentity):
                self._note(state, found)
            elif _is_away(found):
                self._bring_back(state, found)
            else:
                self._reopen(state, found)
        self._tell_placement()

    def _probe(self, state: _ShardState) -> ShardIdentity | MembankError:
        try:
            return self._ask_identity(state, _PROBE_TIMEOUT_S)
        except MembankError as err:
            return err

    def _bring_back(self, state: _ShardState, err: MembankError) -> None:
        _LOG.debug("%s: %s", state.settings.shard_id, err)
        self._mark_down(state, err)
        try:
            self._replace_if_dead(state)
        except MembankError as reason:
            _LOG.error("%s cannot be made anew: %s", state.settings.shard_id, reason)

    def _recycle(self, state: _ShardState, deadline: float) -> None:
        shard_id = state.settings.shard_id
        with self._lock:
            self._check_not_ended()
            state.is_recycled = True
        self._mark_down(state, UnavailableError(f"{shard_id} is started anew; retry"))
        try:
            self._note(state, self._recycling.run(state.actor, shard_id, deadline))
        finally:
            state.is_recycled = False

    def _rebalance(self) -> None:
        """Move one shard from the fullest to the emptiest node, if that evens them out."""
        if not self._stopping.acquire(blocking=False):
            return
        try:
            self._even_out()
        finally:
            self._stopping.release()

    def _even_out(self) -> None:
        located = {
            shard_id: state.identity.node_id
            for shard_id, state in self._states.items()
            if state.identity is not None and state.alive
        }
        nodes = dict(self._actors.nodes())
        move = next_move(sorted(nodes), located)
        # A shard that is down is on its way back; wait and see where.
        if move is not None and len(located) == len(self._states):
            shard_id, node_id = move
            try:
                self._move(self._states[shard_id], node_id, nodes[node_id])
            except MembankError as err:
                _LOG.warning("%s did not move to %s: %s", shard_id, nodes[node_id], err)
                self._rebalance_at_s = self._clock() + _MOVE_BACKOFF_S

    def _move(self, state: _ShardState, node_id: str, node_ip: str) -> None:
        shard_id = state.settings.shard_id
        settings = self._settings(shard_id, node_ip)
        _LOG.info("moving %s to %s", shard_id, node_ip)
        # Most of the journal while it still serves, so that it is away for a moment only; and a
        # storage that fails is found before anything is stopped.
        self._actors.call(state.actor, "consolidate", timeout_s=_MOVE_TIMEOUT_S, who=shard_id)
        # Closing folds the rest. The journal may lie on the old node's own disk.
        if close_shards(self._actors, [shard_id], _MOVE_TIMEOUT_S):
            # Elsewhere, what was acknowledged and is in no slot would be missing.
            self._tell_to_open(state)
            raise UnavailableError("its journal was not emptied; it stays where that is")
        self._mark_down(state, UnavailableError(f"{shard_id} moves to {node_ip}"))
        self._actors.kill(state.actor)
        self._wait_for_name(shard_id)
        self._make(state, settings, node_id)

    def _make(self, state: _ShardState, settings: ShardSettings, node_id: str) -> None:
        with self._lock:
            self._check_not_ended()
            state.actor = self._actors.make(settings, node_id)
            state.settings, state.node_id = settings, node_id

    def _tell_to_open(self, state: _ShardState) -> None:
        with self._lock:
            if not self._is_ended:
                self._actors.tell(state.actor, "open")

    def _check_not_ended(self) -> None:
        if self._is_ended:
            raise UnavailableError("the service is being stopped")

    def _wait_for_name(self, shard_id: str) -> None:
        """Wait until a killed actor has given its name up; making one would find it otherwise."""
        deadline = self._clock() + _MOVE_TIMEOUT_S
        while self._actors.find(shard_id) is not None:
            if self._clock() > deadline:
                raise UnavailableError(f"{shard_id} does not end")
            self._sleep(0.05)

    def _settings(self, shard_id: str, node_ip: str) -> ShardSettings:
        config = self._config
        listening = shard_listening(config.host, gateway_ip=self._actors.node_ip, node_ip=node_ip)
        return ShardSettings(
            shard_id=shard_id,
            bank_url=config.bank_url,
            keyring_url=config.keyring_url,
            partitions=self._partitions[shard_id],
            # Directories have no claim; a lock keeps a second service away.
            service="" if config.is_directory else config.service_id,
            server=ServerConfig(
                host=listening.bind,
                tls_cert=config.tls_cert,
                tls_key=config.tls_key,
                token_file=config.token_file,
            ),
            advertise_host=listening.advertise,
            shard=config.shard_config(),
            max_in_flight_bytes=config.max_in_flight_bytes,
        )

    def _wait_for_nodes(self, deadline: float) -> list[tuple[str, str]]:
        while True:
            nodes = self._actors.nodes()
            if len(nodes) >= self._config.min_nodes:
                return nodes
            if self._clock() > deadline:
                raise UnavailableError(
                    f"Ray has {len(nodes)} nodes, {self._config.min_nodes} are wanted; start more "
                    "or give a smaller --nodes"
                )
            self._sleep(0.2)

    def _wait_for_identity(self, state: _ShardState, deadline: float) -> ShardIdentity:
        while True:
            try:
                return self._ask_identity(state, max(deadline - self._clock(), 0.1))
            except UnavailableError as err:
                if self._clock() > deadline or not _is_away(err):
                    raise
                # Killed while it started, or its node was not ready for it.
                self._replace_if_dead(state)
                self._sleep(0.2)

    def _open(self, state: _ShardState, deadline: float) -> None:
        remaining = max(deadline - self._clock(), 0.1)
        with self._lock:
            self._check_not_ended()
        try:
            self._actors.call(state.actor, "open", timeout_s=remaining, who=state.settings.shard_id)
        except UnavailableError as err:
            # Killed meanwhile, or too slow; the wait for its identity finds out.
            _LOG.debug("%s", err)

    def _ask_identity(self, state: _ShardState, timeout_s: float) -> ShardIdentity:
        return self._ask(state.actor, state.settings.shard_id, timeout_s)

    def _ask(self, actor: object, shard_id: str, timeout_s: float) -> ShardIdentity:
        answer = self._actors.call(actor, "identity", timeout_s=timeout_s, who=shard_id)
        if not isinstance(answer, ShardIdentity):
            raise InternalError(f"{shard_id} answered {answer!r}")
        return answer

    def _note(self, state: _ShardState, identity: ShardIdentity) -> None:
        with self._lock:
            before = state.identity
            state.identity, state.alive = identity, True
            state.problem, state.failures = "", 0
            if before is not None and before.incarnation != identity.incarnation:
                state.num_restarts += 1
                _LOG.info("%s is back at %s", identity.shard_id, identity.endpoint)
        self._table.set_endpoint(identity.shard_id, identity.endpoint)

    def _mark_down(self, state: _ShardState, why: MembankError) -> None:
        with self._lock:
            state.alive, state.problem = False, str(why)

    def _replace_if_dead(self, state: _ShardState) -> None:
        """Make a new actor where the old one will not come back: its name is free then."""
        shard_id = state.settings.shard_id
        if self._actors.find(shard_id) is not None:
            return
        nodes = dict(self._actors.nodes())
        if not nodes:
            raise UnavailableError("Ray has no node that is alive")
        settings, node_id = state.settings, state.node_id
        if node_id not in nodes:
            node_id = self._emptiest(list(nodes))
            settings = self._settings(shard_id, nodes[node_id])
        _LOG.warning("%s is gone; making it anew", shard_id)
        self._make(state, settings, node_id)

    def _emptiest(self, nodes: Sequence[str]) -> str:
        carried = [state.node_id for state in self._states.values()]
        return min(nodes, key=carried.count)

    def _reopen(self, state: _ShardState, err: MembankError) -> None:
        if state.problem != str(err):
            _LOG.error("%s is not open: %s", state.settings.shard_id, err)
        self._mark_down(state, err)
        now = self._clock()
        if now < state.retry_at_s:
            return
        backoff_s = _REOPEN_BACKOFF_S[min(state.failures, len(_REOPEN_BACKOFF_S) - 1)]
        with self._lock:
            state.failures += 1
            state.retry_at_s = now + backoff_s
        self._tell_to_open(state)

    def _tell_placement(self) -> None:
        """Give the placement to every shard that has not been told this one in this life."""
        placement = self._table.current()
        news = [
            (shard_id, state.actor, (state.identity.incarnation, placement.generation))
            for shard_id, state in self._states.items()
            if state.identity is not None and state.alive
        ]
        in_parallel(
            lambda item: self._tell(*item, placement),
            [item for item in news if self._told.get(item[0]) != item[2]],
        )

    def _tell(
        self, shard_id: str, actor: object, news: tuple[str, int], placement: Placement
    ) -> None:
        try:
            self._actors.call(
                actor, "set_placement", placement, timeout_s=_PROBE_TIMEOUT_S, who=shard_id
            )
            self._told[shard_id] = news
        except MembankError as err:
            _LOG.debug("%s was not told the placement: %s", shard_id, err)


def _is_away(err: MembankError) -> bool:
    """Say whether no process answers, or not yet; it answers with anything else."""
    return isinstance(err, UnavailableError) and err.reason is Reason.SHARD_UNAVAILABLE


def _status(shard_id: str, state: _ShardState) -> ShardStatus:
    identity = state.identity
    return ShardStatus(
        shard_id=shard_id,
        endpoint=identity.endpoint if identity else "",
        node=identity.node if identity else "",
        node_id=identity.node_id if identity else "",
        pid=identity.pid if identity else 0,
        partitions=state.settings.partitions,
        num_restarts=state.num_restarts,
        alive=state.alive,
        problem=state.problem,
    )
