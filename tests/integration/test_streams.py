"""Streams of real shards over their ports for data, while a trainer pushes."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from membank.client import BankClient, ClientConfig
from membank.wire.spec import Array, BankSpec, BlockRef, LevelSpec, OptimizerKind, OptimizerSpec
from served_bank import ServedBank

SPEC = BankSpec(
    name="streams",
    num_layers=6,
    width=64,
    levels=(LevelSpec(fan_out=2, block_width=32), LevelSpec(fan_out=2, block_width=16)),
    optimizer=OptimizerSpec(kind=OptimizerKind.SGD),
    num_partitions=2,
    max_staleness=1 << 20,
)
# On both shards.
REFS = (BlockRef(1, 0), BlockRef(1, 1), BlockRef(2, 0), BlockRef(2, 3))
NUM_PUSHES = 30


@pytest.fixture
def client(tmp_path: Path) -> Iterator[BankClient]:
    config = replace(ClientConfig(), same_host=None)
    with (
        ServedBank(tmp_path / "bank", SPEC) as bank,
        BankClient.connect(bank.endpoint, config=config) as client,
    ):
        yield client


def test_all_layers_of_a_block_are_of_the_version_that_is_told(client: BankClient) -> None:
    contents: dict[tuple[BlockRef, int], Array] = {}
    failures: list[BaseException] = []

    def note() -> None:
        for ref, block in client.fetch_blocks(REFS).items():
            assert block.weight is not None
            contents[ref, block.version] = block.weight

    def push() -> None:
        try:
            for number in range(NUM_PUSHES):
                gradients = {
                    ref: np.full(SPEC.block_shape(ref.level), number, np.float32) for ref in REFS
                }
                client.push(gradients, base=dict.fromkeys(REFS, number))
                note()
        except BaseException as err:
            failures.append(err)

    note()
    pushing = threading.Thread(target=push)
    pushing.start()
    streamed: list[tuple[BlockRef, int, list[Array]]] = []
    while pushing.is_alive():
        with client.stream(REFS) as memory:
            layers = [memory.layer(number) for number in range(SPEC.num_layers)]
            streamed += [
                (ref, version, [layer[ref] for layer in layers])
                for ref, version in memory.head().versions.items()
            ]
    pushing.join()
    assert not failures
    assert len({version for _, version, _ in streamed}) > 1
    for ref, version, arrays in streamed:
        np.testing.assert_array_equal(np.stack(arrays), contents[ref, version])
