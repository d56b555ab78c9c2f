"""membank itself: a service as ``membank up`` starts it, with one shard, through the public client.

Journals are on, at the default durability (``process``), and every fetched block is checked against
its CRC, so both are part of the times.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from benchmarks.peers.blocks import NUM_LAYERS, Blocks
from benchmarks.peers.contestant import (
    About,
    Access,
    Client,
    Contestant,
    NotRunError,
    Reach,
    Work,
    version_of,
)

_START_S = 150.0
_RESIDENT_GIB = 4
_NUM_FETCHED_LEAVES = 256


class BankServer:
    """A service of one bank, in the processes that a user gets.

    Parameters
    ----------
    name
        Name.
    make
        Makes the bank in a directory, before the service starts; None = the service makes it.
    blocks
        What the bank is to hold, where the service makes it.
    """

    def __init__(
        self,
        name: str,
        *,
        make: Callable[[Path], None] | None = None,
        blocks: Blocks | None = None,
    ) -> None:
        self.name = name
        self._make = make
        self._blocks = blocks
        self._folder: Path | None = None
        self._environment: dict[str, str] = {}
        self._is_up = False

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

    def start(self, folder: Path, num_clients: int, environment: Mapping[str, str]) -> str:
        # docstring inherited
        self._folder, self._environment = folder, dict(environment)
        if self._make is not None:
            self._make(folder / "bank")
        arguments = ("--shards", "1", "--port", "0", "--resident", str(_RESIDENT_GIB),
                     "--start-timeout", str(_START_S))  # fmt: skip
        endpoint = str(json.loads(self._command("up", *arguments, "--json"))["endpoint"])
        self._is_up = True
        if self._blocks is not None:
            from benchmarks.peers.membank_client import create_bank

            create_bank(endpoint, self._blocks)
        return endpoint

    def stop(self) -> None:
        # docstring inherited
        if self._is_up:
            self._is_up = False
            self._command("down")

    def _command(self, verb: str, *arguments: str) -> str:
        assert self._folder is not None
        program = Path(sys.executable).with_name("membank")
        answer = subprocess.run(
            [program, verb, "--bank", self._folder / "bank", *arguments],
            # Noted here alone, a service of the user's is not touched.
            env={
                **os.environ,
                **self._environment,
                "MEMBANK_RUNTIME_DIR": str(self._folder / "run"),
            },
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=2 * _START_S,
            check=False,
        )
        if answer.returncode:
            raise NotRunError(f"membank {verb} failed: {answer.stderr.strip()[-300:]}")
        return answer.stdout


def path_keys(num_leaves: int) -> list[str]:
    """Return the paths that are fetched: as many in every bank, spread over its leaves."""
    return [f"path/{leaf}" for leaf in range(0, num_leaves, num_leaves // _NUM_FETCHED_LEAVES)]


def _make_tree(num_leaves: int, folder: Path) -> None:
    """Make a bank of four levels whose blocks, of 3 KB, are all written."""
    from membank.bank_service.bench.banks import PLAIN_SGD, written_bank
    from membank.wire.spec import BankSpec, LevelSpec

    fan_out = round(num_leaves**0.25)
    spec = BankSpec(
        name="paths",
        num_layers=NUM_LAYERS,
        width=32,
        levels=(LevelSpec(fan_out=fan_out, block_width=1),) * 4,
        optimizer=PLAIN_SGD,
    )
    written_bank(folder, spec)


def _over_grpc(access: Access) -> Client:
    from benchmarks.peers.membank_client import BlocksClient

    return BlocksClient(access, same_host=False)


def _same_host(access: Access) -> Client:
    from benchmarks.peers.membank_client import BlocksClient

    return BlocksClient(access, same_host=True)


def _view(access: Access) -> Client:
    from benchmarks.peers.membank_client import ViewClient

    return ViewClient(access)


def _paths(access: Access) -> Client:
    from benchmarks.peers.membank_client import PathsClient

    return PathsClient(access)


def contestants(blocks: Blocks) -> list[Contestant]:
    """Return the ways to one bank."""
    server = BankServer("membank", blocks=blocks)
    return [
        Contestant(
            name="membank grpc",
            server=server,
            connect=_over_grpc,
            reach=Reach.NETWORK,
            note="BankClient.fetch_blocks and push, as they come",
            many_clients=True,
            push_rule="adamw",
        ),
        Contestant(
            name="membank same-host",
            server=server,
            connect=_same_host,
            reach=Reach.SAME_HOST,
            note="as membank grpc, through memory that client and shard share",
            many_clients=True,
            push_rule="adamw",
        ),
        Contestant(
            name="membank view",
            server=server,
            connect=_view,
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
        connect=_paths,
        reach=Reach.NETWORK,
        note="over gRPC; 4 blocks of 3 KB, 256 paths that have been fetched before",
        works=frozenset({Work.FETCH, Work.CONDITIONAL}),
    )
