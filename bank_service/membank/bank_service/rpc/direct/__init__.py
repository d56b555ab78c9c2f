"""The data path over gRPC without grpcio: payloads leave from where they lie, and arrive where they are for."""

from membank.bank_service.rpc.direct.listener import DataListener

__all__ = ["DataListener"]
