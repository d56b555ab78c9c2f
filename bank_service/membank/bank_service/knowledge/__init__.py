"""What operators do: transactions across shards, removal, packs, snapshots, the audit log."""

from membank.bank_service.knowledge.contract import (
    AdminRequest,
    BankAdmin,
    BankHost,
    ExportedPack,
)
from membank.bank_service.knowledge.operations import BankOperations
from membank.bank_service.knowledge.revisions import RevisionLog
from membank.bank_service.knowledge.shards import (
    ShardDirectory,
    ShardGroup,
    ShardHandle,
    ShardMember,
)
from membank.bank_service.knowledge.transactions import Coordinator, CoordinatorConfig
from membank.bank_service.knowledge.trees import TreeStore

__all__ = [
    "AdminRequest",
    "BankAdmin",
    "BankHost",
    "BankOperations",
    "Coordinator",
    "CoordinatorConfig",
    "ExportedPack",
    "RevisionLog",
    "ShardDirectory",
    "ShardGroup",
    "ShardHandle",
    "ShardMember",
    "TreeStore",
]
