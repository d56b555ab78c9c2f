"""What operators do: transactions across shards, removal, receipts, packs, snapshots, the audit log."""

from membank.bank_service.knowledge.contract import (
    AdminRequest,
    BankAdmin,
    BankHost,
    ExportedPack,
)
from membank.bank_service.knowledge.operations import BankOperations
from membank.bank_service.knowledge.receipts import NoRecycler, ReceiptDesk, Recycler
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
    "NoRecycler",
    "ReceiptDesk",
    "Recycler",
    "RevisionLog",
    "ShardDirectory",
    "ShardGroup",
    "ShardHandle",
    "ShardMember",
    "TreeStore",
]
