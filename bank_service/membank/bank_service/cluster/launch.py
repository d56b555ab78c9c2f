"""Start a service, look at it, stop it."""

from __future__ import annotations

import dataclasses
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import ray
from ray.exceptions import ActorAlreadyExistsError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from membank.bank_service.cluster import state
from membank.bank_service.cluster.actors import end_service, end_shards, shard_names
from membank.bank_service.cluster.bank_lock import bank_in_use
from membank.bank_service.cluster.config import NAMESPACE, UpConfig, default_runtime_dir
from membank.bank_service.cluster.controller import ControllerActor
from membank.bank_service.cluster.identity import ShardStatus
from membank.bank_service.cluster.local_ray import (
    LocalRay,
    connected,
    marked_processes,
    start_ray,
    stop_ray,
)
from membank.bank_service.cluster.ray_actors import RayShardActors
from membank.bank_service.cluster.service import ControllerStatus, check_spec
from membank.bank_service.cluster.state import Endpoint
from membank.bank_service.rpc.server import check_port_free, free_port
from membank.bank_service.store import Bank
from membank.wire.errors import MembankError, NotFoundError, Reason, UnavailableError

_STATUS_TIMEOUT_S = 15.0
_RAY_STOP_S = 5.0
_GIVE_UP_S = 10.0
"""How long a start that failed may take to give back what it has: shards, and the claim."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ServiceStatus:
    """A running service."""

    endpoint: Endpoint
    """Where it is."""
    has_bank: bool
    """False while it waits for `CreateBank`."""
    revision: int
    """Newest committed revision; 0 without a bank."""
    controller_pid: int
    """Process of the controller; 0 where it does not answer."""
    shards: tuple[ShardStatus, ...]
    """Its shards; empty without a bank."""
    problem: str = ""
    """What somebody must look at: another service has claimed the bank; "" = nothing."""
    unfolded: tuple[str, ...] = ()
    """After `down`, shards that may have left acknowledged updates in their journals: where these
    lie on a disk, the service must be started there again before the bank is served elsewhere."""


def up(config: UpConfig) -> Endpoint:
    """Start a service and return once it answers.

    Parameters
    ----------
    config
        What to start.

    Returns
    -------
    Endpoint
        Where it is. It runs on when this process ends, until `down`.

    Raises
    ------
    FailedPreconditionError
        INSECURE_ENDPOINT, PORT_IN_USE, BANK_IN_USE, BAD_KEY, KEYRING_NEEDED, KEYRING_MISMATCH,
        BANK_NOT_SEALED, or what somebody must mend in the storage.
    InvalidArgumentError
        If the file of trusted keys cannot be read (BAD_KEY).
    CorruptionError
        If the bank is damaged.
    UnavailableError
        If Ray, a node or a shard does not come up in time; nothing is left running then.
    """
    _check_not_running(config)
    # Found out before a Ray is started for nothing.
    config.load_trusted_keys()
    check_port_free(config.host, config.port)
    # Made here, if it is to be: the controller starts on this machine.
    config.load_signer()
    if config.ray_address is None:
        # Actors of a Ray that is started here have this environment, and find what it finds.
        _check_bank(config)
    deadline = time.monotonic() + config.start_timeout_s
    local: LocalRay | None = None
    if config.ray_address is None:
        local = start_ray(
            num_cpus=config.num_cpus,
            object_store_bytes=config.object_store_bytes,
            timeout_s=config.start_timeout_s,
        )
    try:
        with connected(local.address if local else config.ray_address or "auto"):
            endpoint = _start_controller(config, local, deadline)
    except BaseException:
        # Also on Ctrl-C: a Ray that nobody knows of would run for ever.
        if local is not None:
            stop_ray(local, timeout_s=_RAY_STOP_S)
        raise
    return endpoint


def status(*, bank_url: str | None = None, runtime_dir: Path | None = None) -> ServiceStatus:
    """Return the state of a running service.

    Parameters
    ----------
    bank_url
        Its bank; None = the only service there is.
    runtime_dir
        Where services are noted; None = `default_runtime_dir`.

    Returns
    -------
    ServiceStatus
        Controller, shards and revision.

    Raises
    ------
    UnavailableError
        If none is running (NOT_RUNNING), or its controller does not answer.
    """
    folder = runtime_dir or default_runtime_dir()
    endpoint = state.find(bank_url, folder)
    _check_ray_lives(endpoint, folder)
    with connected(endpoint.ray_address):
        controller = _find_controller(endpoint.key)
        if controller is None:
            raise _not_running(endpoint)
        return _status(endpoint, controller)


def down(
    *, bank_url: str | None = None, runtime_dir: Path | None = None, timeout_s: float = 30.0
) -> ServiceStatus:
    """Stop a service: calls under way are given a moment, shards closed, its own Ray ended.

    Parameters
    ----------
    bank_url
        Its bank; None = the only service there is.
    runtime_dir
        Where services are noted; None = `default_runtime_dir`.
    timeout_s
        How long gateway and shards are given before they are killed; the shards as long again where
        the controller does not answer. What was acknowledged is recovered at the next start in
        either case.

    Returns
    -------
    ServiceStatus
        What was stopped, as far as it still answered.

    Raises
    ------
    UnavailableError
        If none is running (NOT_RUNNING), or the Ray of others in which it runs does not answer.
    """
    folder = runtime_dir or default_runtime_dir()
    endpoint = state.find(bank_url, folder)
    stopped = _stop_joined if endpoint.ray_mark is None else _stop_own
    return stopped(endpoint, folder, timeout_s)


def _stop_joined(endpoint: Endpoint, folder: Path, timeout_s: float) -> ServiceStatus:
    """Stop a service in a Ray of others."""
    try:
        with connected(endpoint.ray_address):
            stopped = _stop_actors(endpoint, timeout_s)
    except UnavailableError as err:
        # It may live on there, and would never be found again without its note.
        raise UnavailableError(
            f"{err}; the service of {endpoint.bank_url} may still run there: try again, or, if that "
            f"Ray is gone for good, remove {state.note_path(endpoint.key, folder)}",
            reason=err.reason,
            metadata=err.metadata,
        ) from err
    state.forget(endpoint, folder)
    return stopped


def _stop_own(endpoint: Endpoint, folder: Path, timeout_s: float) -> ServiceStatus:
    """Stop a service and the Ray that was started for it."""
    stopped = _nothing_left(endpoint)
    try:
        _check_ray_lives(endpoint, folder)
        with connected(endpoint.ray_address):
            stopped = _stop_actors(endpoint, timeout_s)
    except UnavailableError:
        # Its Ray is gone or does not answer; what is left of it is ended below. After any other
        # error it runs on, and is found by the next attempt.
        pass
    if endpoint.ray_mark is not None and endpoint.ray_dir is not None:
        local = LocalRay(endpoint.ray_address, endpoint.ray_dir, endpoint.ray_mark)
        stop_ray(local, timeout_s=_RAY_STOP_S)
    state.forget(endpoint, folder)
    return stopped


def _check_not_running(config: UpConfig) -> None:
    for endpoint in state.list_running(config.runtime_dir):
        if endpoint.key != config.key:
            continue
        if endpoint.ray_mark is not None and not marked_processes(endpoint.ray_mark):
            # The machine was restarted, or somebody killed it all.
            state.forget(endpoint, config.runtime_dir)
        elif endpoint.ray_mark is not None:
            raise bank_in_use(config.bank_url)
        # A service in a Ray of others is found there, by its name.


def _check_bank(config: UpConfig) -> None:
    try:
        bank = Bank.open(config.bank_url, keyring=config.keyring_url)
    except NotFoundError as err:
        if err.reason is not Reason.NOT_A_BANK:
            raise
    else:
        check_spec(config, bank.spec)


def _start_controller(config: UpConfig, local: LocalRay | None, deadline: float) -> Endpoint:
    config = dataclasses.replace(
        config,
        # Chosen here, so that a controller that is started again listens where the first one did.
        port=config.port or free_port(config.host),
        # Also here: the settings may be used again, for another service.
        service_id=uuid.uuid4().hex,
    )
    controller = _make_controller(config)
    actors = RayShardActors(config.key)
    try:
        remaining = max(deadline - time.monotonic(), 1.0)
        answer = cast(
            "ControllerStatus",
            actors.call(controller, "wait_ready", timeout_s=remaining, who="the controller"),
        )
        endpoint = _endpoint(config, local, answer)
        # A service that nobody can find would run for ever.
        state.save(endpoint, config.runtime_dir)
    except BaseException:
        end_service(actors, controller, shard_names(config.num_shards), _GIVE_UP_S)
        raise
    return endpoint


def _make_controller(config: UpConfig) -> object:
    node_id = ray.get_runtime_context().get_node_id()
    try:
        return cast(
            "object",
            ray.remote(ControllerActor)
            .options(
                name=_controller_name(config.key),
                namespace=NAMESPACE,
                lifetime="detached",
                max_restarts=-1,
                max_concurrency=8,
                num_cpus=0,
                scheduling_strategy=NodeAffinitySchedulingStrategy(node_id=node_id, soft=True),
            )
            .remote(config),
        )
    except ActorAlreadyExistsError as err:
        # Ray says so alone: whoever looked before could be overtaken by another `up`.
        raise bank_in_use(config.bank_url) from err


def _endpoint(config: UpConfig, local: LocalRay | None, started: ControllerStatus) -> Endpoint:
    return Endpoint(
        address=started.address,
        bank_url=config.bank_url,
        keyring_url=config.keyring_url,
        ray_address=ray.get_runtime_context().gcs_address,
        ray_dir=None if local is None else local.folder,
        ray_mark=None if local is None else local.mark,
        num_shards=config.num_shards,
        had_bank=started.has_bank,
    )


def _stop_actors(endpoint: Endpoint, timeout_s: float) -> ServiceStatus:
    deadline = time.monotonic() + timeout_s
    controller = _find_controller(endpoint.key)
    actors, shards = RayShardActors(endpoint.key), shard_names(endpoint.num_shards)
    if controller is None:
        unfolded = end_shards(actors, shards, timeout_s)
        return dataclasses.replace(_nothing_left(endpoint), unfolded=unfolded)
    try:
        stopped = _status(endpoint, controller)
    except MembankError:
        stopped = _nothing_left(endpoint)
    remaining = max(deadline - time.monotonic(), 1.0)
    unfolded = end_service(actors, controller, shards, remaining)
    return dataclasses.replace(stopped, unfolded=unfolded)


def _status(endpoint: Endpoint, controller: object) -> ServiceStatus:
    actors = RayShardActors(endpoint.key)
    answer = cast(
        "ControllerStatus",
        actors.call(controller, "status", timeout_s=_STATUS_TIMEOUT_S, who="the controller"),
    )
    return ServiceStatus(
        endpoint=endpoint,
        has_bank=answer.has_bank,
        revision=answer.revision,
        controller_pid=answer.pid,
        shards=answer.shards,
        problem=answer.problem,
    )


def _find_controller(key: str) -> object | None:
    try:
        return cast("object", ray.get_actor(_controller_name(key), namespace=NAMESPACE))
    except ValueError:
        return None


def _controller_name(key: str) -> str:
    return f"{key}-controller"


def _check_ray_lives(endpoint: Endpoint, runtime_dir: Path) -> None:
    # Asking a Ray that is gone takes half a minute; looking for its processes does not.
    if endpoint.ray_mark is not None and not marked_processes(endpoint.ray_mark):
        state.forget(endpoint, runtime_dir)
        raise _not_running(endpoint)


def _not_running(endpoint: Endpoint) -> UnavailableError:
    return UnavailableError(
        f"the service of {endpoint.bank_url} is not running any more; start it with `membank up`",
        reason=Reason.NOT_RUNNING,
        metadata={"bank": endpoint.bank_url},
    )


def _nothing_left(endpoint: Endpoint) -> ServiceStatus:
    """Return what is known of a service of which nothing answers: no shard stopped in order."""
    return ServiceStatus(
        endpoint=endpoint,
        has_bank=False,
        revision=0,
        controller_pid=0,
        shards=(),
        unfolded=tuple(shard_names(endpoint.num_shards)),
    )
