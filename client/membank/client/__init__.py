"""The client of a bank: connect, route, fetch, push, operate. No torch, Ray or zarr.

`BankClient` is the synchronous client, `AsyncBankClient` the same on an event loop.
"""

from membank.client.blocks import BlockSource
from membank.client.cache.blocks import CacheStats
from membank.client.cache.disk_tier import DiskStats
from membank.client.compression import CompressedPushes, Compression
from membank.client.config import (
    CacheConfig,
    ClientConfig,
    DiskTierConfig,
    Eviction,
    RetryConfig,
    SameHostConfig,
    Secret,
    TlsConfig,
)
from membank.client.core import AsyncBankClient
from membank.client.error_feedback import ErrorFeedback, Sending
from membank.client.memory import FetchedBlocks, Memory
from membank.client.opened import AsyncOpenedBank, OpenedBank, StateRead
from membank.client.retriever import (
    Embedder,
    LsaEmbedder,
    Retriever,
    ScoredPath,
)
from membank.client.streaming.layers import AsyncLayeredMemory, LayeredMemory, MemoryHead
from membank.client.sync import BankClient
from membank.client.transaction import Transaction
from membank.client.transport.contract import (
    Connector,
    FetchAnswer,
    ImportAnswer,
    LayerListener,
    PackInfo,
    PushAnswer,
    Transport,
    WatchAnswer,
)
from membank.client.transport.direct_calls import DirectStats
from membank.client.transport.grpc_transport import GrpcTransport, grpc_connector
from membank.client.transport.same_host import SameHostStats
from membank.client.watching import Changes

__all__ = [
    "AsyncBankClient",
    "AsyncLayeredMemory",
    "AsyncOpenedBank",
    "BankClient",
    "BlockSource",
    "CacheConfig",
    "CacheStats",
    "Changes",
    "ClientConfig",
    "CompressedPushes",
    "Compression",
    "Connector",
    "DirectStats",
    "DiskStats",
    "DiskTierConfig",
    "Embedder",
    "ErrorFeedback",
    "Eviction",
    "FetchAnswer",
    "FetchedBlocks",
    "GrpcTransport",
    "ImportAnswer",
    "LayerListener",
    "LayeredMemory",
    "LsaEmbedder",
    "Memory",
    "MemoryHead",
    "OpenedBank",
    "PackInfo",
    "PushAnswer",
    "Retriever",
    "RetryConfig",
    "SameHostConfig",
    "SameHostStats",
    "ScoredPath",
    "Secret",
    "Sending",
    "StateRead",
    "TlsConfig",
    "Transaction",
    "Transport",
    "WatchAnswer",
    "grpc_connector",
]
