"""gRPC: servicers, server, authentication. Thin skins; what they serve is passed in."""

from membank.bank_service.rpc.admin_servicer import AdminServicer
from membank.bank_service.rpc.block_servicer import BankInfoServicer, BankSource, BlockServicer
from membank.bank_service.rpc.budget import ByteBudget
from membank.bank_service.rpc.server import BankServer, ServerConfig, Service

__all__ = [
    "AdminServicer",
    "BankInfoServicer",
    "BankServer",
    "BankSource",
    "BlockServicer",
    "ByteBudget",
    "ServerConfig",
    "Service",
]
