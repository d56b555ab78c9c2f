"""Clients of a bank, by membank's public API alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from typing import Any

from benchmarks.peers.blocks import NUM_LAYERS, WIDTH, Array, Blocks
from benchmarks.peers.contestant import Access, NotRunError
from benchmarks.peers.rules import ADAMW_BETAS, ADAMW_EPS, LEARNING_RATE
from membank.client import BankClient, ClientConfig, FetchedBlocks
from membank.wire.errors import UnavailableError
from membank.wire.spec import BankSpec, BlockRef, LevelSpec, OptimizerKind, OptimizerSpec


def client_config(*, same_host: bool) -> ClientConfig:
    """Return the configuration of a client: the one place that chooses how it calls the shard."""
    offers = any(field.name == "same_host" for field in dataclasses.fields(ClientConfig))
    if same_host and not offers:
        raise NotRunError("this membank does not call shards through shared memory")
    # Where it can, it does so by itself.
    settings: dict[str, Any] = {} if same_host or not offers else {"same_host": None}
    return ClientConfig(**settings)


def create_bank(endpoint: str, blocks: Blocks) -> None:
    """Have a service create the bank whose levels have the sizes of `blocks`."""
    spec = BankSpec(
        name="peers",
        num_layers=NUM_LAYERS,
        width=WIDTH,
        levels=tuple(
            LevelSpec(fan_out=s.fan_out, block_width=s.block_width, learning_rate=LEARNING_RATE)
            for s in blocks.sizes
        ),
        optimizer=OptimizerSpec(
            kind=OptimizerKind.ADAMW, beta1=ADAMW_BETAS[0], beta2=ADAMW_BETAS[1], eps=ADAMW_EPS
        ),
    )
    with BankClient.connect(endpoint) as client:
        client.create_bank(spec)


class BlocksClient:
    """A client of the bank that holds `Blocks`.

    Parameters
    ----------
    access
        Endpoint of the service, and the blocks.
    same_host
        Whether it calls the shard through shared memory.

    Raises
    ------
    NotRunError
        If it cannot.
    """

    def __init__(self, access: Access, *, same_host: bool) -> None:
        self._blocks = access.blocks
        self._client = BankClient.connect(access.address, config=client_config(same_host=same_host))
        self._versions: dict[BlockRef, int] = {}
        if same_host:
            self._check_same_host()

    def load(self, blocks: Mapping[str, Array]) -> None:
        # docstring inherited
        weights = {self._ref(key): array for key, array in blocks.items()}
        self._client.swap(weights)
        # A gradient that was computed before a swap is refused.
        for ref in weights:
            self._versions.pop(ref, None)

    def fetch(self, keys: Sequence[str]) -> Sequence[Array]:
        # docstring inherited
        return self._weights(self._client.fetch_blocks([self._ref(key) for key in keys]))

    def push(self, key: str, gradient: Array) -> None:
        # docstring inherited
        ref = self._ref(key)
        if ref not in self._versions:
            self._versions.update(self._client.fetch_blocks([ref]).versions)
        answer = self._client.push({ref: gradient}, base=self._versions)
        (result,) = answer.results
        if not result.accepted:
            raise RuntimeError(f"the bank refused a gradient of {ref}: {result}")
        self._versions[ref] = result.version

    def fetch_unchanged(self, keys: Sequence[str]) -> None:
        # docstring inherited
        raise NotImplementedError

    def close(self) -> None:
        # docstring inherited
        self._client.close()

    def _check_same_host(self) -> None:
        """Raise unless a fetch goes through shared memory: it falls back to gRPC in silence."""
        self._client.fetch_blocks([BlockRef(self._client.spec.num_levels, 0)])
        stats = self._client.same_host_stats
        if not stats.num_fetches:
            raise NotRunError(f"the shard is called over gRPC instead: {dict(stats.fallbacks)}")

    def _ref(self, key: str) -> BlockRef:
        label, _, number = key.partition("/")
        return BlockRef(self._blocks.level(label), int(number))

    @staticmethod
    def _weights(fetched: FetchedBlocks) -> list[Array]:
        return list(fetched.weights.values())  # type: ignore[arg-type]  # the bank is float32


class ViewClient(BlocksClient):
    """A client that looks at blocks where the shard keeps them, each until its next fetch.

    Parameters
    ----------
    access
        Endpoint of the service, and the blocks.
    """

    def __init__(self, access: Access) -> None:
        super().__init__(access, same_host=True)
        self._lease = ExitStack()

    def fetch(self, keys: Sequence[str]) -> Sequence[Array]:
        # docstring inherited
        # Nothing of it is read any more, so it does not matter whether it outlived its lease.
        with suppress(UnavailableError):
            self._lease.close()
        refs = [self._ref(key) for key in keys]
        return self._weights(self._lease.enter_context(self._client.borrow(refs)))

    def close(self) -> None:
        # docstring inherited
        with suppress(UnavailableError):
            self._lease.close()
        super().close()


class PathsClient(BlocksClient):
    """A client that fetches paths; a key is ``path/LEAF``.

    Parameters
    ----------
    access
        Endpoint of the service.
    """

    def __init__(self, access: Access) -> None:
        super().__init__(access, same_host=False)
        self._held: FetchedBlocks | None = None

    def load(self, blocks: Mapping[str, Array]) -> None:
        # docstring inherited
        return

    def fetch(self, keys: Sequence[str]) -> Sequence[Array]:
        # docstring inherited
        (key,) = keys
        return self._weights(self._client.fetch(self._path(key)))

    def fetch_unchanged(self, keys: Sequence[str]) -> None:
        # docstring inherited
        (key,) = keys
        path = self._path(key)
        if self._held is None or set(self._held) != set(path):
            self._held = self._client.fetch(path)
        self._client.fetch(path, held=self._held)

    def _path(self, key: str) -> tuple[BlockRef, ...]:
        spec = self._client.spec
        return spec.path_to(BlockRef(spec.num_levels, int(key.partition("/")[2])))
