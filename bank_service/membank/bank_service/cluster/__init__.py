"""The service on Ray: launch, controller, shard actors, placement."""

from membank.bank_service.cluster.config import UpConfig, default_runtime_dir
from membank.bank_service.cluster.identity import ShardStatus
from membank.bank_service.cluster.launch import ServiceStatus, down, status, up
from membank.bank_service.cluster.state import Endpoint, list_running

__all__ = [
    "Endpoint",
    "ServiceStatus",
    "ShardStatus",
    "UpConfig",
    "default_runtime_dir",
    "down",
    "list_running",
    "status",
    "up",
]
