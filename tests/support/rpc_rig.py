"""A real gRPC server on loopback around a shard and its operations, and stubs to call it."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Self

import grpc

from membank.bank_service.knowledge import AdminRequest, BankAdmin, TreeStore
from membank.bank_service.rpc import (
    AdminServicer,
    BankServer,
    BlockServicer,
    ByteBudget,
    ServerConfig,
    Service,
)
from membank.bank_service.rpc.direct import DataListener
from membank.bank_service.shard import ShardApi
from membank.v1.admin_service_pb2_grpc import AdminServiceStub, add_AdminServiceServicer_to_server
from membank.v1.block_service_pb2_grpc import BlockServiceStub, add_BlockServiceServicer_to_server
from membank.wire.errors import MembankError, NotFoundError, Reason, from_rpc_error
from membank.wire.format import TreeDocument
from membank.wire.records import BankInfo, PartitionOwner, Placement
from membank.wire.spec import BankSpec
from shard_rig import RIG_SPEC, ShardRig

BLOCK_SERVICE = "membank.v1.BlockService"
ADMIN_SERVICE = "membank.v1.AdminService"


class RpcRig:
    """One server that owns every partition of a new bank.

    Parameters
    ----------
    folder
        Where the bank is made.
    config
        How the server listens; None = any port of loopback, for everybody.
    budget_bytes
        Bound on payload bytes in flight.
    shard
        What is served instead of the bank's own shard; None = that.
    max_watchers
        Most concurrent watchers.
    stall_s
        Patience of the data port.
    spec
        What the bank is.
    tree
        Its tree document; None = labels and centroids for every block.
    """

    def __init__(
        self,
        folder: Path,
        *,
        config: ServerConfig | None = None,
        budget_bytes: int = 64 << 20,
        shard: ShardApi | None = None,
        max_watchers: int = 2,
        stall_s: float = 30.0,
        spec: BankSpec = RIG_SPEC,
        tree: TreeDocument | None = None,
    ) -> None:
        self.bank = ShardRig(folder, spec=spec, tree=tree, num_shards=1)
        self.shard: ShardApi = shard or self.bank.shards["shard-0"]
        self.budget = ByteBudget(budget_bytes)
        self.has_bank = True
        config = config or ServerConfig(drain_s=1.0)
        self.data = DataListener(config, self.shard, self.budget, stall_s=stall_s)
        blocks = BlockServicer(
            self.shard,
            self,
            self.budget,
            max_watchers=max_watchers,
            alternative=self.data.alternative_header,
        )
        admin = AdminServicer(self, self.budget)
        services = [
            Service(BLOCK_SERVICE, lambda s: add_BlockServiceServicer_to_server(blocks, s)),
            Service(ADMIN_SERVICE, lambda s: add_AdminServiceServicer_to_server(admin, s)),
        ]
        self.server = BankServer(config, services, on_drain=blocks.drain)
        self.address = self.server.start()
        if config.tls_cert is None:
            self.channel = grpc.insecure_channel(self.address)
        else:
            credentials = grpc.ssl_channel_credentials(config.tls_cert.read_bytes())
            self.channel = grpc.secure_channel(self.address, credentials)
        self.blocks = BlockServiceStub(self.channel)
        self.admin = AdminServiceStub(self.channel)

    def info(self) -> BankInfo:
        """Return the bank's description."""
        if not self.has_bank:
            raise NotFoundError("no bank yet", reason=Reason.UNKNOWN_BANK)
        owners = tuple(
            PartitionOwner(partition=n, shard_id="shard-0", endpoint=self.address)
            for n in range(self.bank.spec.num_partitions)
        )
        return BankInfo(
            spec=self.bank.spec,
            revision=self.shard.revision,
            placement=Placement(generation=1, owners=owners),
            tree_revision=self.bank.log.committed.tree_revision,
            removal_revision=self.bank.log.committed.removal_revision,
        )

    def tree(self) -> bytes:
        """Return the tree document."""
        return TreeStore(self.bank.bank).read_bytes(self.bank.log.committed.tree_revision)

    def create_bank(self, request: AdminRequest, spec: BankSpec, tree: bytes) -> BankSpec:
        """Pretend to create a bank; the name says who asked."""
        return BankSpec(name=request.principal, num_layers=1, width=1, levels=spec.levels)

    def operations(self) -> BankAdmin:
        """Return the operations of the bank."""
        self.info()
        return self.bank.operations

    def close(self) -> None:
        """Stop server and shard."""
        self.channel.close()
        self.server.stop()
        self.data.stop()
        self.bank.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def error_of(caught: grpc.RpcError) -> MembankError:
    """Return the error of the tree that an RPC ended with."""
    return from_rpc_error(caught, where="test")
