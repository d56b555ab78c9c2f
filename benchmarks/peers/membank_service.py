"""membank itself: a service as ``membank up`` starts it, with one shard, through the public client.

Journals are on, at the default durability (``process``), and every fetched block is checked against
its CRC, so both are part of the times.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.peers.blocks import NUM_LAYERS, WIDTH, Array, Blocks
from benchmarks.peers.contestant import About, Access, Contestant, NotRunError, Reach, Work
from benchmarks.peers.rules import ADAMW_BETAS, ADAMW_EPS, LEARNING_RATE
from membank.cli.machine import version_of
from membank.client import BankClient, ClientConfig, FetchedBlocks
from membank.wire.spec import BankSpec, BlockRef, LevelSpec, OptimizerKind, OptimizerSpec

GRPC = "grpc"
SAME_HOST = "same-host"

_START_S = 120.0
_RESIDENT_GIB = 4
_NUM_FETCHED_LEAVES = 256


def client_config(transport: str) -> ClientConfig:
    """Return the configuration of a client that uses `transport`: the one place that chooses it."""
    if any(field.name == "transport" for field in dataclasses.fields(ClientConfig)):
        settings: dict[str, Any] = {"transport": transport}
        return ClientConfig(**settings)
    if transport == GRPC:
        return ClientConfig()
    raise NotRunError(f"this membank has no transport {transport!r}")


class BankServer:
    """A service of one bank, in the processes that a user gets.

    Parameters
    ----------
    name
        Name.
    make
        Makes the bank in a directory, before the service starts; None = the service makes it.
    spec
        The bank, where the service makes it.
    """

    def __init__(
        self,
        name: str,
        *,
        make: Callable[[Path], None] | None = None,
        spec: BankSpec | None = None,
    ) -> None:
        self.name = name
        self._make = make
        self._spec = spec
        self._folder: Path | None = None

    def about(self) -> About:
        # docstring inherited
        return About(
            version=f"membank {version_of('membank')}",
            setup=f"membank up --shards 1 --resident {_RESIDENT_GIB}: gateway and shard as Ray "
            "actors, the bank in a directory; fetched bytes are checked (CRC-32C) within the times",
            docs="README.md",
            optimizer="AdamW on the shard, torch's fused kernel",
            keeps="in the journal: survives kill -9 (durability process)",
        )

    def start(self, folder: Path, num_clients: int) -> str:
        # docstring inherited
        self._folder = folder
        if self._make is not None:
            self._make(folder / "bank")
        arguments = ("--shards", "1", "--port", "0", "--resident", str(_RESIDENT_GIB))
        endpoint = str(json.loads(self._command("up", *arguments, "--json"))["endpoint"])
        if self._spec is not None:
            with BankClient.connect(endpoint) as client:
                client.create_bank(self._spec)
        return endpoint

    def stop(self) -> None:
        # docstring inherited
        if self._folder is not None:
            self._command("down")
            self._folder = None

    def _command(self, verb: str, *arguments: str) -> str:
        assert self._folder is not None
        program = Path(sys.executable).with_name("membank")
        answer = subprocess.run(
            [program, verb, "--bank", self._folder / "bank", *arguments],
            # Noted here alone, a service of the user's is not touched.
            env={**os.environ, "MEMBANK_RUNTIME_DIR": str(self._folder / "run")},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_START_S,
            check=False,
        )
        if answer.returncode:
            raise NotRunError(f"membank {verb} failed: {answer.stderr.strip()[-300:]}")
        return answer.stdout


class BankClientAdapter:
    """A client of the bank that holds `Blocks`.

    Parameters
    ----------
    access
        Endpoint of the service, and the blocks.
    transport
        How the client reaches the shard.
    """

    def __init__(self, access: Access, *, transport: str) -> None:
        self._blocks = access.blocks
        self._client = BankClient.connect(access.address, config=client_config(transport))
        self._versions: dict[BlockRef, int] = {}

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

    def _ref(self, key: str) -> BlockRef:
        label, _, number = key.partition("/")
        return BlockRef(self._blocks.level(label), int(number))

    @staticmethod
    def _weights(fetched: FetchedBlocks) -> list[Array]:
        return list(fetched.weights.values())  # type: ignore[arg-type]  # the bank is float32


class PathClient(BankClientAdapter):
    """A client that fetches paths; a key is ``path/LEAF``.

    Parameters
    ----------
    access
        Endpoint of the service.
    """

    def __init__(self, access: Access) -> None:
        super().__init__(access, transport=GRPC)
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


def path_keys(num_leaves: int) -> list[str]:
    """Return the paths that are fetched: as many in every bank, spread over its leaves."""
    return [f"path/{leaf}" for leaf in range(0, num_leaves, num_leaves // _NUM_FETCHED_LEAVES)]


def blocks_spec(blocks: Blocks) -> BankSpec:
    """Return the bank whose levels have the sizes of `blocks`."""
    return BankSpec(
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


def _make_tree(num_leaves: int, folder: Path) -> None:
    """Make a bank of four levels whose blocks, of 3 KB, are all written."""
    from membank.bank_service.bench.banks import PLAIN_SGD, written_bank

    fan_out = round(num_leaves**0.25)
    spec = BankSpec(
        name="paths",
        num_layers=NUM_LAYERS,
        width=32,
        levels=(LevelSpec(fan_out=fan_out, block_width=1),) * 4,
        optimizer=PLAIN_SGD,
    )
    written_bank(folder, spec)


def _view_client(access: Access) -> BankClientAdapter:
    raise NotRunError("this membank has no read without a copy")


def contestants(blocks: Blocks) -> list[Contestant]:
    """Return the ways to one bank."""
    server = BankServer("membank", spec=blocks_spec(blocks))
    return [
        Contestant(
            name="membank grpc",
            server=server,
            connect=partial(BankClientAdapter, transport=GRPC),
            reach=Reach.NETWORK,
            note="BankClient.fetch_blocks and push, as they come",
            many_clients=True,
            push_rule="adamw",
        ),
        Contestant(
            name="membank same-host",
            server=server,
            connect=partial(BankClientAdapter, transport=SAME_HOST),
            reach=Reach.SAME_HOST,
            note="as membank grpc, through memory that client and shard share",
            many_clients=True,
            push_rule="adamw",
        ),
        Contestant(
            name="membank view",
            server=server,
            connect=_view_client,
            reach=Reach.VIEW,
            note="the client maps what the shard holds",
            works=frozenset({Work.FETCH}),
        ),
    ]


def path_contestant(num_leaves: int) -> Contestant:
    """Return a bank with a tree of four levels, each of its blocks written."""
    name = f"membank {num_leaves} leaves"
    return Contestant(
        name=name,
        server=BankServer(name, make=partial(_make_tree, num_leaves)),
        connect=PathClient,
        reach=Reach.NETWORK,
        note="over gRPC; 4 blocks of 3 KB, 256 paths that have been fetched before",
        works=frozenset({Work.FETCH, Work.CONDITIONAL}),
    )
