"""The controller actor: gateway, supervision of the shards, transactions.

Its truth is in the bank's storage. It may be killed at any time: Ray starts it again, it finds the
shards by their names, settles what was under way, and listens at the same address.
"""

from __future__ import annotations

import fcntl
import logging
import os
import socket
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path

import ray

from membank.bank_service.cluster.addresses import gateway_listening
from membank.bank_service.cluster.claim import BankClaim, replaced
from membank.bank_service.cluster.config import UpConfig
from membank.bank_service.cluster.fleet import ShardFleet, ShardStatus
from membank.bank_service.cluster.gateway import Gateway
from membank.bank_service.cluster.identity import ADMIN_SERVICE, BLOCK_SERVICE
from membank.bank_service.cluster.placement import assign_partitions
from membank.bank_service.rpc.admin_servicer import AdminServicer
from membank.bank_service.rpc.block_servicer import BankInfoServicer
from membank.bank_service.rpc.budget import ByteBudget
from membank.bank_service.rpc.server import BankServer, Service, join_address
from membank.bank_service.store import open_objects
from membank.v1.admin_service_pb2_grpc import add_AdminServiceServicer_to_server
from membank.v1.block_service_pb2_grpc import add_BlockServiceServicer_to_server
from membank.wire.errors import (
    FailedPreconditionError,
    InternalError,
    MembankError,
    Reason,
)
from membank.wire.spec import BankSpec

_LOG = logging.getLogger(__name__)

_SUPERVISE_EVERY_S = 0.25
_RESTART_BACKOFF_S = 2.0


@dataclass(frozen=True, kw_only=True, slots=True)
class ControllerStatus:
    """A running service as its controller sees it."""

    address: str
    """gRPC address of the gateway, host:port."""
    pid: int
    """Process of the controller."""
    has_bank: bool
    """False while it waits for `CreateBank`."""
    revision: int
    """Newest committed revision; 0 without a bank."""
    shards: tuple[ShardStatus, ...]
    """The shards; empty without a bank."""
    problem: str = ""
    """What somebody must look at: another service has claimed the bank; "" = nothing."""


class ControllerActor:
    """Lifecycle of the controller; made remote by `up`.

    Ray runs methods on several threads; one more thread starts everything and then supervises.
    The constructor never fails (see `ShardActor`).
    """

    # Set by the starting thread before `_ready`, read by others after it.

    def __init__(self, config: UpConfig) -> None:
        logging.basicConfig(level=logging.INFO)
        self._is_restart = ray.get_runtime_context().was_current_actor_reconstructed
        # A controller that comes back may have been on the node that was lost: waiting for as many
        # nodes as at first would keep the shards that are left from being served.
        self._config = config = replace(config, min_nodes=1) if self._is_restart else config
        self._ready = threading.Event()
        self._stopping = threading.Event()
        self._error: MembankError | None = None
        self._fleet: ShardFleet | None = None
        self._server: BankServer | None = None
        self._bank_lock: int | None = None
        self._claim: BankClaim | None = None
        self._gateway = Gateway(
            config.bank_url,
            self._start_fleet,
            check_spec=lambda spec: check_spec(config, spec),
            shard=config.shard_config(),
            check_ours=self._check_ours,
        )
        self._thread = threading.Thread(target=self._run, name="membank-controller", daemon=True)
        self._thread.start()

    def wait_ready(self) -> ControllerStatus:
        """Return once the service answers, or raise what keeps it from that."""
        self._ready.wait()
        if self._error is not None:
            raise self._error
        return self.status()

    def status(self) -> ControllerStatus:
        """Return what is known of the service now."""
        lost_to = None if self._claim is None else self._claim.lost_to
        return ControllerStatus(
            address=self._address(),
            pid=os.getpid(),
            has_bank=self._gateway.has_bank,
            revision=self._gateway.revision,
            shards=() if self._fleet is None else self._fleet.statuses(),
            problem="" if lost_to is None else str(replaced(self._config.bank_url, lost_to)),
        )

    def stop(self, timeout_s: float) -> tuple[str, ...]:
        """End gateway and shards; the caller ends this actor after.

        Parameters
        ----------
        timeout_s
            Longest wait for a start under way, and for each shard.

        Returns
        -------
        tuple[str, ...]
            Shards that may have left acknowledged updates in their journals.
        """
        self._stopping.set()
        # A start that hangs must not keep the claim from being given back.
        self._thread.join(timeout_s)
        if self._server is not None:
            self._server.stop()
        unfolded = () if self._fleet is None else self._fleet.stop(timeout_s)
        if self._claim is not None:
            self._claim.release()
        return unfolded

    def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                self._start()
                break
            except MembankError as err:
                error = err
            except Exception as err:
                _LOG.exception("the controller did not start")
                error = InternalError(f"{type(err).__name__}: {err}")
            if not self._is_restart:
                self._error = error
                self._ready.set()
                return
            # Clients wait for the service to come back; nobody waits for an error.
            _LOG.error("the controller does not start again: %s; trying again", error)
            self._stopping.wait(_RESTART_BACKOFF_S)
        self._ready.set()
        while not self._stopping.wait(_SUPERVISE_EVERY_S):
            if self._fleet is not None:
                try:
                    self._fleet.supervise()
                except Exception:
                    # Supervision must outlive any single failure of it.
                    _LOG.exception("supervision failed once")

    def _start(self) -> None:
        self._lock_bank()
        if self._server is None:
            budget = ByteBudget(self._config.max_in_flight_bytes)
            admin = AdminServicer(self._gateway, budget)
            blocks = BankInfoServicer(self._gateway)
            server = BankServer(
                self._config.gateway_config(),
                [
                    Service(ADMIN_SERVICE, lambda s: add_AdminServiceServicer_to_server(admin, s)),
                    Service(BLOCK_SERVICE, lambda s: add_BlockServiceServicer_to_server(blocks, s)),
                ],
            )
            # First of all: a taken port is found before shards are started for nothing.
            server.start()
            self._server = server
        self._claim_bank()
        if self._claim is None or self._claim.lost_to is None:
            self._gateway.open()

    def _start_fleet(self, spec: BankSpec) -> ShardFleet:
        fleet = ShardFleet(self._config, spec)
        # Known before it is started: whatever of it exists is stopped with the service.
        self._fleet = fleet
        fleet.start(self._config.start_timeout_s, is_restart=self._is_restart)
        return fleet

    def _lock_bank(self) -> None:
        """Keep other services on this machine off a bank in a directory."""
        if self._bank_lock is not None or not self._config.is_directory:
            return
        folder = Path(self._config.bank_url)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        except OSError as err:
            raise FailedPreconditionError(
                f"cannot use {folder} for a bank: {err.strerror or err}",
                reason=Reason.STORE_FAILED,
            ) from err
        deadline = time.monotonic() + (10.0 if self._is_restart else 0.0)
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as err:
                if time.monotonic() > deadline:
                    os.close(handle)
                    raise bank_in_use(self._config.bank_url) from err
                time.sleep(0.1)
        # Held until the process ends, however it ends.
        self._bank_lock = handle

    def _claim_bank(self) -> None:
        """Keep other services off a bank behind a URL, where no file lock reaches."""
        if self._claim is None and not self._config.is_directory:
            begin = BankClaim.resume if self._is_restart else BankClaim.take
            self._claim = begin(
                open_objects(self._config.bank_url),
                service=self._config.service_id,
                host=socket.gethostname(),
                endpoint=self._address(),
            )

    def _check_ours(self) -> None:
        """Raise where another service has the bank and a shard of this one has found that out."""
        if self._claim is None or self._claim.lost_to is None:
            return
        if self._fleet is None or not all(shard.alive for shard in self._fleet.statuses()):
            raise replaced(self._config.bank_url, self._claim.lost_to)

    def _address(self) -> str:
        listening = gateway_listening(self._config.host, ray.util.get_node_ip_address())
        port = self._server.port if self._server is not None else self._config.port
        return join_address(listening.advertise, port)


def check_spec(config: UpConfig, spec: BankSpec) -> None:
    """Raise `InvalidArgumentError` for a bank with fewer partitions than there are shards."""
    assign_partitions(spec.num_partitions, [str(index) for index in range(config.num_shards)])


def bank_in_use(bank_url: str) -> FailedPreconditionError:
    """Return the error for a bank that another service serves."""
    return FailedPreconditionError(
        f"{bank_url} is served already; see `membank status`, or stop it with `membank down`",
        reason=Reason.BANK_IN_USE,
        metadata={"bank": bank_url},
    )
