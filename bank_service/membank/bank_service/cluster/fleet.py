"""The shard actors of one bank: made, watched, and told the placement."""

from __future__ import annotations

import functools
import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from membank.bank_service.cluster.addresses import shard_listening
from membank.bank_service.cluster.config import NAMESPACE, UpConfig
from membank.bank_service.cluster.identity import ShardIdentity, ShardSettings
from membank.bank_service.cluster.placement import PlacementTable, assign_partitions, next_move
from membank.bank_service.cluster.shard_actor import RayShardHandle, ShardActor, call_actor
from membank.bank_service.knowledge.shards import ShardMember
from membank.bank_service.rpc.server import ServerConfig
from membank.wire.errors import (
    InternalError,
    MembankError,
    Reason,
    UnavailableError,
)
from membank.wire.records import Placement
from membank.wire.spec import BankSpec

if TYPE_CHECKING:
    Actor = ray.actor.ActorHandle[ShardActor]

_LOG = logging.getLogger(__name__)

_PROBE_TIMEOUT_S = 10.0
_MOVE_TIMEOUT_S = 60.0
_MOVE_BACKOFF_S = 60.0
_REBALANCE_EVERY_S = 3.0
_REOPEN_BACKOFF_S = (1.0, 2.0, 4.0, 8.0, 15.0, 30.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardStatus:
    """One shard of a running service."""

    shard_id: str
    """Its identity."""
    endpoint: str
    """gRPC address, host:port; the last one where it is down."""
    node: str
    """Address of its machine."""
    node_id: str
    """Ray's name for its node."""
    pid: int
    """Its process."""
    partitions: tuple[int, ...]
    """Partitions it owns."""
    num_restarts: int
    """Times it came back since the controller started."""
    alive: bool
    """Whether it answers."""
    problem: str = ""
    """Why it does not, as last heard."""


@dataclass(slots=True)
class _ShardState:
    """What the controller knows of one shard."""

    settings: ShardSettings
    node_id: str
    actor: Actor
    identity: ShardIdentity | None = None
    alive: bool = False
    problem: str = ""
    num_restarts: int = 0
    failures: int = 0
    retry_at_s: float = 0.0


class ShardFleet:
    """Shard actors and their supervision.

    Ray starts an actor again whose process died; `supervise` notices, tells everybody the new
    endpoint, reopens what failed to open, and replaces what Ray gave up on. A shard that another
    owner has replaced closes itself; it opens again only while this service has the claim on the
    bank (see `ShardServer`), so two services never fight for a partition. Actors are detached: they
    outlive a controller, which finds them by name when it starts again.

    Parameters
    ----------
    config
        Settings of the service.
    spec
        Spec of the bank.
    clock
        Monotonic seconds.
    """

    # `_lock` guards the states' fields and is never held during a call to an actor.

    def __init__(
        self, config: UpConfig, spec: BankSpec, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._config = config
        self._spec = spec
        self._clock = clock
        self._lock = threading.Lock()
        shard_ids = [f"shard-{index}" for index in range(config.num_shards)]
        self._partitions = assign_partitions(spec.num_partitions, shard_ids)
        self._table = PlacementTable(self._partitions)
        self._states: dict[str, _ShardState] = {}
        self._told: dict[str, tuple[str, int]] = {}
        self._started = threading.Event()
        self._rebalance_at_s = 0.0

    def start(self, timeout_s: float, *, is_restart: bool = False) -> None:
        """Make the actors, or find them, and wait until all serve.

        Parameters
        ----------
        timeout_s
            Longest wait.
        is_restart
            Whether there may be shards that failed to open and that nobody has looked after since.

        Raises
        ------
        MembankError
            What kept a shard from opening its partitions.
        UnavailableError
            If a shard or node did not come up in time.
        """
        deadline = self._clock() + timeout_s
        nodes = self._wait_for_nodes(deadline)
        for index, shard_id in enumerate(self._partitions):
            node_id, node_ip = nodes[index % len(nodes)]
            settings = self._settings(shard_id, node_ip)
            actor = self._make_actor(settings, node_id)
            with self._lock:
                self._states[shard_id] = _ShardState(settings, node_id, actor)
            if is_restart:
                actor.open.remote()
        for state in self._states.values():
            self._note(state, self._wait_for_identity(state, deadline))
        self._tell_placement()
        self._started.set()

    def members(self) -> tuple[ShardMember, ...]:
        """Return the shards, for transactions."""
        return tuple(
            ShardMember(
                shard_id=shard_id,
                partitions=state.settings.partitions,
                handle=RayShardHandle(
                    shard_id,
                    functools.partial(getattr, state, "actor"),
                    self._spec,
                    num_restarts=functools.partial(getattr, state, "num_restarts"),
                ),
            )
            for shard_id, state in self._states.items()
        )

    def placement(self) -> Placement:
        """Return the placement in force."""
        return self._table.current()

    def statuses(self) -> tuple[ShardStatus, ...]:
        """Return what is known of each shard now."""
        with self._lock:
            return tuple(_status(shard_id, state) for shard_id, state in self._states.items())

    def supervise(self) -> None:
        """Look after every shard once; never raises for what a shard does."""
        if not self._started.is_set():
            return
        for shard_id, state in self._states.items():
            try:
                self._note(state, self._ask_identity(state, _PROBE_TIMEOUT_S))
            except MembankError as err:
                if not _is_away(err):
                    self._reopen(state, err)
                    continue
                _LOG.debug("%s: %s", shard_id, err)
                self._mark_down(state, err)
                try:
                    self._replace_if_dead(state)
                except MembankError as reason:
                    _LOG.error("%s cannot be made anew: %s", shard_id, reason)
        self._tell_placement()
        if self._config.moves_shards and self._clock() >= self._rebalance_at_s:
            self._rebalance_at_s = self._clock() + _REBALANCE_EVERY_S
            self._rebalance()

    def _rebalance(self) -> None:
        """Move one shard from the fullest to the emptiest node, if that evens them out."""
        located = {
            shard_id: state.identity.node_id
            for shard_id, state in self._states.items()
            if state.identity is not None and state.alive
        }
        nodes = dict(_alive_nodes())
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
        call_actor(state.actor, "consolidate", timeout_s=_MOVE_TIMEOUT_S, who=shard_id)
        try:
            # Closing folds the rest. The journal may lie on the old node's own disk.
            is_folded = call_actor(state.actor, "stop", timeout_s=_MOVE_TIMEOUT_S, who=shard_id)
        except MembankError:
            state.actor.open.remote()
            raise
        if not is_folded:
            # Elsewhere, what was acknowledged and is in no slot would be missing.
            state.actor.open.remote()
            raise UnavailableError("its journal was not emptied; it stays where that is")
        self._mark_down(state, UnavailableError(f"{shard_id} moves to {node_ip}"))
        ray.kill(state.actor, no_restart=True)
        self._wait_for_name(shard_actor_name(self._config.key, shard_id))
        state.settings, state.node_id = settings, node_id
        state.actor = self._make_actor(settings, node_id)

    def _wait_for_name(self, name: str) -> None:
        """Wait until a killed actor has given its name up; making one would find it otherwise."""
        deadline = self._clock() + _MOVE_TIMEOUT_S
        while True:
            try:
                ray.get_actor(name, namespace=NAMESPACE)
            except ValueError:
                return
            if self._clock() > deadline:
                raise UnavailableError(f"{name} does not end")
            time.sleep(0.05)

    def stop(self, timeout_s: float) -> tuple[str, ...]:
        """Drain and end every shard, by force where it does not end by itself.

        Returns
        -------
        tuple[str, ...]
            Those that may have left acknowledged updates in their journals.
        """
        shards = [(shard_id, state.actor) for shard_id, state in self._states.items()]
        with ThreadPoolExecutor(max(1, len(shards))) as pool:
            folded = list(pool.map(lambda one: self._stop_one(one[0], one[1], timeout_s), shards))
        return tuple(
            shard_id
            for (shard_id, _), is_folded in zip(shards, folded, strict=True)
            if not is_folded
        )

    def _stop_one(self, shard_id: str, actor: Actor, timeout_s: float) -> bool:
        try:
            return bool(call_actor(actor, "stop", timeout_s=timeout_s, who=shard_id))
        except MembankError as err:
            # Its acknowledged updates are in its journal; the next start there recovers them.
            _LOG.warning("%s did not stop by itself: %s", shard_id, err)
            return False
        finally:
            ray.kill(actor, no_restart=True)

    def _settings(self, shard_id: str, node_ip: str) -> ShardSettings:
        config = self._config
        listening = shard_listening(
            config.host, gateway_ip=ray.util.get_node_ip_address(), node_ip=node_ip
        )
        return ShardSettings(
            shard_id=shard_id,
            bank_url=config.bank_url,
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

    def _make_actor(self, settings: ShardSettings, node_id: str) -> Actor:
        remote = ray.remote(ShardActor)
        actor = remote.options(
            name=shard_actor_name(self._config.key, settings.shard_id),
            namespace=NAMESPACE,
            get_if_exists=True,
            lifetime="detached",
            max_restarts=-1,
            max_concurrency=16,
            num_cpus=0,
            # Not soft: Ray would put the shard anywhere while it hardly knows the node yet. Where
            # the node is lost for good, Ray gives up and `_replace_if_dead` finds another.
            scheduling_strategy=NodeAffinitySchedulingStrategy(node_id=node_id, soft=False),
        ).remote(settings)
        return cast("Actor", actor)

    def _wait_for_nodes(self, deadline: float) -> list[tuple[str, str]]:
        while True:
            nodes = _alive_nodes()
            if len(nodes) >= self._config.min_nodes:
                return nodes
            if self._clock() > deadline:
                raise UnavailableError(
                    f"Ray has {len(nodes)} nodes, {self._config.min_nodes} are wanted; start more "
                    "or give a smaller --nodes"
                )
            time.sleep(0.2)

    def _wait_for_identity(self, state: _ShardState, deadline: float) -> ShardIdentity:
        while True:
            try:
                return self._ask_identity(state, max(deadline - self._clock(), 0.1))
            except UnavailableError as err:
                if self._clock() > deadline or not _is_away(err):
                    raise
                # Killed while it started, or its node was not ready for it.
                self._replace_if_dead(state)
                time.sleep(0.2)

    def _ask_identity(self, state: _ShardState, timeout_s: float) -> ShardIdentity:
        answer = call_actor(
            state.actor, "identity", timeout_s=timeout_s, who=state.settings.shard_id
        )
        if not isinstance(answer, ShardIdentity):
            raise InternalError(f"{state.settings.shard_id} answered {answer!r}")
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
        """Make a new actor where Ray has given up on the old one: its name is free then."""
        try:
            ray.get_actor(
                shard_actor_name(self._config.key, state.settings.shard_id), namespace=NAMESPACE
            )
        except ValueError:
            nodes = dict(_alive_nodes())
            if state.node_id not in nodes:
                state.node_id = self._emptiest(list(nodes))
                state.settings = self._settings(state.settings.shard_id, nodes[state.node_id])
            _LOG.warning("%s is gone; making it anew", state.settings.shard_id)
            state.actor = self._make_actor(state.settings, state.node_id)

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
        state.failures += 1
        state.retry_at_s = now + backoff_s
        state.actor.open.remote()

    def _tell_placement(self) -> None:
        """Give the placement to every shard that has not been told this one in this life."""
        placement = self._table.current()
        for shard_id, state in self._states.items():
            identity = state.identity
            if identity is None or not state.alive:
                continue
            news = (identity.incarnation, placement.generation)
            if self._told.get(shard_id) == news:
                continue
            try:
                call_actor(
                    state.actor,
                    "set_placement",
                    placement,
                    timeout_s=_PROBE_TIMEOUT_S,
                    who=shard_id,
                )
                self._told[shard_id] = news
            except MembankError as err:
                _LOG.debug("%s was not told the placement: %s", shard_id, err)


def _alive_nodes() -> list[tuple[str, str]]:
    """Return name and address of each node of Ray, in a lasting order."""
    nodes = [(n["NodeID"], n["NodeManagerAddress"]) for n in ray.nodes() if n["Alive"]]
    return sorted(nodes, key=lambda node: (node[1], node[0]))


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


def shard_actor_name(key: str, shard_id: str) -> str:
    """Return the name of a shard's actor in Ray."""
    return f"{key}-{shard_id}"
