"""One worker through real shards and real gRPC equals the same model with memory in process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from membank.client import BankClient
from membank.trainer.training import (
    InProcessMemory,
    MemoryStageConfig,
    PositionCheckpoint,
    PrefetchConfig,
    Progress,
    ServedMemory,
    read_losses,
    train_memories,
)
from membank.wire.records import ShardStats
from membank.wire.spec import BankSpec, BlockRef, OptimizerKind, OptimizerSpec
from served_bank import ServedBank
from tiny_training import tiny_anchor, tiny_sequences, tiny_spec

CONFIG = MemoryStageConfig(num_tokens=50 * 6 * 12, batch_size=6, run_length=2)
pytestmark = pytest.mark.slow  # two servers and a bank on disk for each test


class Killed(Exception):
    """Ends a run in its middle, as a signal would."""


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def spec(request: pytest.FixtureRequest) -> BankSpec:
    return replace(tiny_spec(), optimizer=getattr(request, "param", OptimizerSpec()))


@pytest.fixture
def bank(spec: BankSpec, tmp_path: Path) -> Iterator[ServedBank]:
    with ServedBank(tmp_path / "bank", spec) as bank:
        yield bank


@pytest.fixture
def client(bank: ServedBank) -> Iterator[BankClient]:
    with BankClient.connect(bank.endpoint) as client:
        yield client


def _losses(path: Path) -> list[float]:
    return [record.loss for record in read_losses(path)]


def _train(
    memory: InProcessMemory | ServedMemory,
    losses: Path,
    *,
    depth: int = 2,
    checkpoint: PositionCheckpoint | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> None:
    now = iter(range(10**6))
    result = train_memories(
        tiny_anchor(memory.spec),
        memory,
        tiny_sequences(memory.spec),
        replace(CONFIG, prefetch=PrefetchConfig(depth=depth)),
        checkpoint=checkpoint,
        losses=losses,
        on_progress=on_progress,
        clock=lambda: float(next(now)),
    )
    assert result.num_refused == 0


def _assert_equal_blocks(reference: InProcessMemory, client: BankClient, spec: BankSpec) -> None:
    expected = reference.fetch(list(spec.blocks()))
    found = ServedMemory(client).fetch(list(spec.blocks()))
    assert found.versions == expected.versions
    for ref, weight in expected.weights.items():
        torch.testing.assert_close(found.weights[ref], weight, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    "spec", [OptimizerSpec(kind=kind) for kind in OptimizerKind], indirect=True, ids=str
)
@pytest.mark.parametrize("depth", [0, 2])
def test_losses_and_blocks_equal_those_of_memory_in_process(
    spec: BankSpec, client: BankClient, tmp_path: Path, depth: int
) -> None:
    reference = InProcessMemory(spec)
    _train(reference, tmp_path / "process", depth=0)
    _train(ServedMemory(client), tmp_path / "served", depth=depth)
    expected = _losses(tmp_path / "process")
    assert len(expected) == 50
    np.testing.assert_allclose(_losses(tmp_path / "served"), expected, rtol=1e-5)
    assert expected[-1] < expected[0]
    _assert_equal_blocks(reference, client, spec)


def test_prefetch_changes_no_bit(spec: BankSpec, tmp_path: Path) -> None:
    losses: list[list[float]] = []
    contents: list[tuple[dict[BlockRef, int], dict[BlockRef, bytes]]] = []
    for depth in (0, 1, 3):
        folder = tmp_path / str(depth)
        with (
            ServedBank(folder / "bank", spec) as bank,
            BankClient.connect(bank.endpoint) as client,
        ):
            _train(ServedMemory(client), folder / "losses", depth=depth)
            blocks = client.fetch_blocks(spec.blocks())
            weights = {ref: weight.tobytes() for ref, weight in blocks.weights.items()}
            contents.append((blocks.versions, weights))
        losses.append(_losses(folder / "losses"))
    assert losses[0] == losses[1] == losses[2]
    assert contents[0] == contents[1] == contents[2]


def test_a_shard_that_restarts_in_the_middle_changes_no_loss(
    spec: BankSpec, bank: ServedBank, client: BankClient, tmp_path: Path
) -> None:
    reference = InProcessMemory(spec)
    _train(reference, tmp_path / "process")

    def restart(progress: Progress) -> None:
        if progress.step in (11, 23):
            bank.restart(progress.step % 2)

    _train(ServedMemory(client), tmp_path / "served", on_progress=restart)
    np.testing.assert_allclose(
        _losses(tmp_path / "served"), _losses(tmp_path / "process"), rtol=1e-5
    )
    _assert_equal_blocks(reference, client, spec)


def test_a_worker_that_dies_goes_on_as_if_nothing_had_happened(
    spec: BankSpec, client: BankClient, tmp_path: Path
) -> None:
    reference = InProcessMemory(spec)
    _train(reference, tmp_path / "process")

    def die(progress: Progress) -> None:
        if progress.step == 20:
            raise Killed

    for on_progress in (die, None):
        position = PositionCheckpoint(tmp_path / "position.json")
        source = ServedMemory(client, run_id=position.run_id)
        try:
            _train(source, tmp_path / "served", checkpoint=position, on_progress=on_progress)
        except Killed:
            continue
    losses = _losses(tmp_path / "served")
    np.testing.assert_allclose(losses, _losses(tmp_path / "process"), rtol=1e-5)
    _assert_equal_blocks(reference, client, spec)


def _pushed_bytes(bank: ServedBank) -> int:
    stats: list[ShardStats] = [shard.stats() for shard in bank.shards]
    return sum(shard.num_bytes_pushed for shard in stats)


def test_a_push_touches_its_blocks_alone_and_sends_their_bytes_alone(
    spec: BankSpec, bank: ServedBank, client: BankClient
) -> None:
    source = ServedMemory(client)
    every = list(spec.blocks())

    def contents() -> dict[BlockRef, tuple[int, int, bytes, dict[object, bytes]]]:
        return {
            block.ref: (
                block.version,
                block.step,
                block.weight.tobytes(),
                {role: state.tobytes() for role, state in block.optimizer_state.items()},
            )
            for server in bank.shards
            for block in server.shard.read(
                [r for r in every if spec.partition_of(r) in server.shard.partitions]
            )
        }

    for touched in (every[:1], every[2:5], every[1:7]):
        fetched = source.fetch(touched)
        before, sent = contents(), _pushed_bytes(bank)
        source.push(dict(fetched.weights), fetched.versions, step=0)
        after = contents()
        assert {ref for ref in every if before[ref] != after[ref]} == set(touched)
        expected = sum(spec.block_params(ref.level) for ref in touched) * 4
        assert _pushed_bytes(bank) - sent == expected
