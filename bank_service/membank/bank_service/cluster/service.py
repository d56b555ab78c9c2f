"""What a controller does, whatever process it lives in: lock, claim, gateway, shards."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from membank.bank_service.cluster.actors import (
    ShardActors,
    close_shards,
    end_shards,
    shard_names,
)
from membank.bank_service.cluster.addresses import gateway_listening
from membank.bank_service.cluster.bank_lock import lock_bank
from membank.bank_service.cluster.claim import BEAT_EVERY_S, BankClaim, replaced
from membank.bank_service.cluster.config import UpConfig
from membank.bank_service.cluster.fleet import ShardFleet
from membank.bank_service.cluster.gateway import Gateway
from membank.bank_service.cluster.identity import ADMIN_SERVICE, BLOCK_SERVICE, ShardStatus
from membank.bank_service.cluster.placement import assign_partitions
from membank.bank_service.rpc.admin_servicer import AdminServicer
from membank.bank_service.rpc.block_servicer import BankInfoServicer
from membank.bank_service.rpc.budget import ByteBudget
from membank.bank_service.rpc.server import BankServer, join_address
from membank.bank_service.rpc.server import Service as RpcService
from membank.bank_service.store import ObjectStore, open_objects
from membank.v1.admin_service_pb2_grpc import add_AdminServiceServicer_to_server
from membank.v1.block_service_pb2_grpc import add_BlockServiceServicer_to_server
from membank.wire.errors import FailedPreconditionError, UnavailableError
from membank.wire.spec import BankSpec

_LOCK_PATIENCE_S = 10.0
_LET_GO_EVERY_S = 3.0
_LET_GO_TIMEOUT_S = 60.0
# Of the time that a stop may take, what calls at the gateway are given to finish, and what is kept
# for giving the claim back.
_GATEWAY_SHARE = 1 / 6
_CLAIM_SHARE = 1 / 6
_LEAST_WAIT_S = 1.0


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
    """What somebody must look at: another service has claimed the bank, or something unfinished
    holds up every transaction; "" = nothing."""


class Service:
    """The service of one bank: started, looked after, and stopped by its controller.

    Parameters
    ----------
    config
        Settings of the service.
    actors
        Where its shards run.
    is_restart
        Whether an earlier controller of this service died.
    open_storage
        Opens the storage that the claim is written to.
    beat_every_s
        Seconds between two changes of the claim.
    end_process
        Ends this process, for which another one is started then; None = nobody would start it.
    clock
        Monotonic seconds.
    """

    # `start` and `supervise` are called by one thread; the others by any. What `start` sets is
    # replaced whole, and `_ended` is looked at after that.

    def __init__(
        self,
        config: UpConfig,
        actors: ShardActors,
        *,
        is_restart: bool,
        open_storage: Callable[[str], ObjectStore] = open_objects,
        beat_every_s: float = BEAT_EVERY_S,
        end_process: Callable[[], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._config = config
        self._actors = actors
        self._is_restart = is_restart
        self._open_storage = open_storage
        self._beat_every_s = beat_every_s
        self._clock = clock
        self._shards = shard_names(config.num_shards)
        self._fleet: ShardFleet | None = None
        self._server: BankServer | None = None
        self._bank_lock: int | None = None
        self._claim: BankClaim | None = None
        self._let_go_at_s = clock()
        self._ended = threading.Event()
        self._gateway = Gateway(
            config.bank_url,
            self._start_fleet,
            keyring_url=config.keyring_url,
            load_signer=config.load_signer,
            check_spec=lambda spec: check_spec(config, spec),
            shard=config.shard_config(),
            recycles=config.recycle,
            end_process=end_process,
            check_ours=self._check_ours,
            load_trusted_keys=config.load_trusted_keys,
        )

    def start(self) -> None:
        """Listen, claim the bank and serve it; after a failure, go on from there.

        Raises
        ------
        MembankError
            What keeps the service from serving.
        """
        self._lock_bank()
        if self._is_restart:
            # The claim first: it is found dead if it does not change. And clients should hear that
            # the service is starting, also where its storage does not answer.
            try:
                self._claim_bank()
            finally:
                self._listen()
        else:
            # A taken port is found before anything is claimed or started for nothing.
            self._listen()
            self._claim_bank()
        if self._replaced() is None:
            self._gateway.open(insist=not self._is_restart)

    def supervise(self) -> None:
        """Look after the shards once; where another service has the bank, close them."""
        why = self._replaced()
        if why is not None:
            self._let_go(why)
        elif self._fleet is not None:
            self._fleet.supervise()

    def status(self) -> ControllerStatus:
        """Return what is known of the service now."""
        why = self._replaced()
        return ControllerStatus(
            address=self._address(),
            pid=os.getpid(),
            has_bank=self._gateway.has_bank,
            revision=self._gateway.revision,
            shards=() if self._fleet is None else self._fleet.statuses(),
            problem=self._gateway.held_up if why is None else str(why),
        )

    def stop(self, timeout_s: float) -> tuple[str, ...]:
        """End gateway, shards and claim.

        Parameters
        ----------
        timeout_s
            Longest wait for all of it.

        Returns
        -------
        tuple[str, ...]
            Shards that may have left acknowledged updates in their journals.
        """
        deadline = self._clock() + timeout_s
        # A start, or a look at the shards, may be under way. Whatever it makes known from now on, it
        # gives back itself; what is known already is given back here.
        self._ended.set()
        if self._fleet is not None:
            self._fleet.end()
        if self._server is not None:
            # A call may wait for a shard for minutes, which the shards need to fold their journals.
            self._server.stop(within_s=timeout_s * _GATEWAY_SHARE)
        # By name: a controller that came back may not have got so far as to look for them.
        is_none_made = self._fleet is None and self._gateway.waits_for_bank
        remaining = deadline - self._clock() - timeout_s * _CLAIM_SHARE
        unfolded = (
            ()
            if is_none_made
            else end_shards(self._actors, self._shards, max(remaining, _LEAST_WAIT_S))
        )
        if self._claim is not None:
            self._claim.release(max(deadline - self._clock(), _LEAST_WAIT_S))
        return unfolded

    def _let_go(self, why: FailedPreconditionError) -> None:
        """Close the shards: what they acknowledged from now on, nobody would ever hear of.

        Again and again, for those that could not be reached.
        """
        if self._clock() < self._let_go_at_s:
            return
        self._let_go_at_s = self._clock() + _LET_GO_EVERY_S
        if self._fleet is not None:
            self._fleet.let_go(why, _LET_GO_TIMEOUT_S)
        else:
            close_shards(self._actors, self._shards, _LET_GO_TIMEOUT_S)

    def _replaced(self) -> FailedPreconditionError | None:
        claim = self._claim
        if claim is None or claim.lost_to is None:
            return None
        return replaced(self._config.bank_url, claim.lost_to)

    def _check_ours(self) -> None:
        if (why := self._replaced()) is not None:
            raise why

    def _listen(self) -> None:
        if self._server is not None:
            return
        budget = ByteBudget(self._config.max_in_flight_bytes)
        admin = AdminServicer(self._gateway, budget)
        blocks = BankInfoServicer(self._gateway)
        server = BankServer(
            self._config.gateway_config(),
            [
                RpcService(ADMIN_SERVICE, lambda s: add_AdminServiceServicer_to_server(admin, s)),
                RpcService(BLOCK_SERVICE, lambda s: add_BlockServiceServicer_to_server(blocks, s)),
            ],
        )
        server.start()
        self._server = server
        if self._ended.is_set():
            server.stop(within_s=0.0)

    def _start_fleet(self, spec: BankSpec, *, insist: bool) -> ShardFleet:
        # No other service of the bank is in this Ray, so shards that are there when a new service
        # starts were left by one that is gone.
        adopt = self._is_restart or self._fleet is not None
        fleet = ShardFleet(self._config, spec, self._actors)
        # Known before it is started: whatever of it exists is looked after.
        self._fleet = fleet
        if self._ended.is_set():
            fleet.end()
        fleet.start(self._config.start_timeout_s, insist=insist, adopt=adopt)
        return fleet

    def _lock_bank(self) -> None:
        """Keep other services on this machine off a bank in a directory."""
        if self._bank_lock is None and self._config.is_directory:
            # Held until the process ends, however it ends.
            self._bank_lock = lock_bank(
                Path(self._config.bank_url),
                patience_s=_LOCK_PATIENCE_S if self._is_restart else 0.0,
            )

    def _claim_bank(self) -> None:
        """Keep other services off a bank behind a URL, where no file lock reaches."""
        if self._claim is None and not self._config.is_directory:
            begin = BankClaim.resume if self._is_restart else BankClaim.take
            self._claim = begin(
                self._open_storage(self._config.bank_url),
                service=self._config.service_id,
                host=socket.gethostname(),
                endpoint=self._address(),
                beat_every_s=self._beat_every_s,
            )
            if self._ended.is_set():
                self._claim.release()
                raise UnavailableError("the service is being stopped")

    def _address(self) -> str:
        listening = gateway_listening(self._config.host, self._actors.node_ip)
        port = self._server.port if self._server is not None else self._config.port
        return join_address(listening.advertise, port)


def check_spec(config: UpConfig, spec: BankSpec) -> None:
    """Raise `InvalidArgumentError` for a bank with fewer partitions than there are shards."""
    assign_partitions(spec.num_partitions, shard_names(config.num_shards))
