"""A shard and its gRPC server in one process, without Ray."""

from __future__ import annotations

import dataclasses
import logging
import os
import threading
import uuid
from collections.abc import Callable
from functools import partial

from membank.bank_service.cluster.claim import require_claim
from membank.bank_service.cluster.config import default_journal_root, journal_name
from membank.bank_service.cluster.identity import (
    BLOCK_SERVICE,
    ShardIdentity,
    ShardSettings,
    server_version,
)
from membank.bank_service.knowledge.trees import TreeStore
from membank.bank_service.rpc.block_servicer import BlockServicer
from membank.bank_service.rpc.budget import ByteBudget
from membank.bank_service.rpc.direct import DataListener
from membank.bank_service.rpc.pushing import POOLED_BYTES
from membank.bank_service.rpc.same_host import SameHostDoor
from membank.bank_service.rpc.server import BankServer, Service, join_address
from membank.bank_service.shard.config import ShardConfig
from membank.bank_service.shard.lease import boot_clock
from membank.bank_service.shard.maintenance import ThreadMaintenance
from membank.bank_service.shard.shard import Shard
from membank.bank_service.store import Bank
from membank.v1.block_service_pb2_grpc import add_BlockServiceServicer_to_server
from membank.wire.buffers import BufferPool
from membank.wire.errors import CorruptionError, NotFoundError, Reason, UnavailableError
from membank.wire.format import Manifest, RevisionRecord
from membank.wire.records import BankInfo, Placement, ShardStats

_LOG = logging.getLogger(__name__)

_SETTLE_EVERY_S = 5.0


class ShardServer:
    """Opens a shard and serves it until `stop`.

    Parameters
    ----------
    settings
        What to serve.
    node, node_id
        Address and name of this machine, for `ShardIdentity`.
    open_bank
        Opens the bank at a URL; None = `Bank.open`, with the keyring that `settings` name.

    Raises
    ------
    MembankError
        What keeps the shard from being opened; also that another service has claimed the bank
        (BANK_IN_USE), or that nobody has, where `settings` names a service.
    """

    # `_placement` is replaced whole by one assignment; everything else is set once.

    def __init__(
        self,
        settings: ShardSettings,
        *,
        node: str = "127.0.0.1",
        node_id: str = "",
        open_bank: Callable[[str], Bank] | None = None,
    ) -> None:
        self._settings = settings
        open_bank = open_bank or partial(Bank.open, keyring=settings.keyring_url)
        self._bank = open_bank(settings.bank_url)
        if settings.service:
            self._bank = _ClaimedBank(self._bank, settings.service)
        self._trees = TreeStore(self._bank)
        self._placement: Placement | None = None
        self._stopping = threading.Lock()
        self._stopped = False
        maintenance = ThreadMaintenance()
        self.shard = _open_shard(self._bank, settings, maintenance)
        """The engine."""
        if isinstance(self._bank, _ClaimedBank):
            self._bank.is_taken_over = True
        self._door: SameHostDoor | None = None
        self._data: DataListener | None = None
        try:
            self._server = self._listen()
        except Exception:
            # Its locks would keep the next attempt out, and so would a port.
            self._close_ways_in()
            self.shard.close()
            raise
        # A coordinator that died must not keep trainers out of a partition for ever.
        maintenance.every(_SETTLE_EVERY_S, lambda: self.shard.settle(boot_clock()))
        self.identity = ShardIdentity(
            shard_id=settings.shard_id,
            incarnation=uuid.uuid4().hex,
            endpoint=join_address(
                settings.advertise_host or settings.server.host, self._server.port
            ),
            node=node,
            node_id=node_id,
            pid=os.getpid(),
        )
        """Where this shard is found."""

    def set_placement(self, placement: Placement) -> None:
        """Take over the placement that clients are told."""
        self._placement = placement

    def info(self) -> BankInfo:
        # docstring inherited
        placement = self._placement
        if placement is None:
            raise UnavailableError("the shard does not know the placement yet; retry")
        record = self._record()
        return BankInfo(
            spec=self._bank.spec,
            revision=record.revision,
            placement=placement,
            tree_revision=record.tree_revision,
            removal_revision=record.removal_revision,
            server_version=server_version(),
            durability=self._settings.shard.durability,
            ship_every_s=self._settings.shard.ship_every_s,
        )

    def tree(self) -> bytes:
        # docstring inherited
        revision = self._record().tree_revision
        try:
            return self._trees.read_bytes(revision)
        except NotFoundError:
            # A transaction may have replaced the document since the record was looked up.
            if self._record().tree_revision == revision:
                raise
            return self._trees.read_bytes(self._record().tree_revision)

    def stats(self) -> ShardStats:
        """Return the shard's statistics with its address."""
        return dataclasses.replace(
            self.shard.stats(), endpoint=self.identity.endpoint, pid=self.identity.pid
        )

    def stop(self) -> bool:
        """Drain the server, then close the shard; repeated calls have no effect.

        Returns
        -------
        bool
            Whether all that was acknowledged is in slots, so that any machine may go on.
        """
        with self._stopping:
            if not self._stopped:
                self._stopped = True
                self._server.stop()
                self._close_ways_in()
                self.shard.close()
            return self.shard.is_folded

    def _listen(self) -> BankServer:
        budget = ByteBudget(self._settings.max_in_flight_bytes)
        gradients = BufferPool(POOLED_BYTES)
        self._door = self._opened_door(budget, gradients)
        config = self._settings.server
        if config.data_port is not None:
            self._data = DataListener(config, self.shard, budget, gradients=gradients)
        servicer = BlockServicer(
            self.shard,
            self,
            budget,
            door=self._door,
            alternative=None if self._data is None else self._data.alternative_header,
            gradients=gradients,
        )
        service = Service(
            BLOCK_SERVICE, lambda server: add_BlockServiceServicer_to_server(servicer, server)
        )

        def drain() -> None:
            servicer.drain()
            if self._data is not None:
                self._data.drain()

        server = BankServer(config, [service], on_drain=drain)
        server.start()
        return server

    def _close_ways_in(self) -> None:
        if self._data is not None:
            self._data.stop()
        if self._door is not None:
            self._door.close()

    def _opened_door(self, budget: ByteBudget, gradients: BufferPool) -> SameHostDoor | None:
        if not self._settings.server.same_host:
            return None
        try:
            return SameHostDoor(self.shard, budget, gradients=gradients)
        except OSError as err:
            # Such as a kernel without abstract sockets: everybody goes over gRPC.
            _LOG.warning("callers on this machine cannot be let in to shared memory: %s", err)
            return None

    def _record(self) -> RevisionRecord:
        revision = self.shard.revision
        record = self._bank.record(revision)
        if record is None:
            raise CorruptionError(
                f"revision record {revision} of {self._bank.url} is missing; restore it from a copy",
                reason=Reason.MANIFEST_CORRUPT,
            )
        return record


class _ClaimedBank(Bank):
    """A bank whose partitions are taken over only while a service has the claim on it.

    Ray starts a shard again whatever happened meanwhile; a service that has been replaced must not
    take the bank back from the one that its operator chose.
    """

    def __init__(self, bank: Bank, service: str) -> None:
        super().__init__(bank.objects, bank.spec)
        self._service = service
        self.is_taken_over = False
        """Whether that is done; what is published then, fencing alone may refuse."""
        # Before anything is touched.
        require_claim(self.objects, service)

    def publish_manifest(self, manifest: Manifest) -> None:
        # docstring inherited
        if not self.is_taken_over:
            # Many calls to the storage later, each of which may have been repeated for long.
            require_claim(self.objects, self._service)
        super().publish_manifest(manifest)


def _open_shard(bank: Bank, settings: ShardSettings, maintenance: ThreadMaintenance) -> Shard:
    try:
        return Shard.open(
            bank,
            shard_id=settings.shard_id,
            partitions=settings.partitions,
            config=_with_journal_dir(settings),
            maintenance=maintenance,
        )
    except BaseException:
        # The engine closes it once it has begun. Another attempt is made every half a minute, and
        # each would leave a thread behind.
        maintenance.close()
        raise


def _with_journal_dir(settings: ShardSettings) -> ShardConfig:
    """Return the engine's settings with a place for the journals on this machine's own disk."""
    config, url = settings.shard, settings.bank_url
    if config.journal_dir is not None or "://" not in url:
        return config
    return dataclasses.replace(config, journal_dir=str(default_journal_root() / journal_name(url)))
