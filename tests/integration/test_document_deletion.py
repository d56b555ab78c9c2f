"""Documents deleted from a bank on disk: nothing of the old blocks is left, nothing else is touched."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from deletion_rig import ONE_THREAD
from membank.client import BankClient
from membank.trainer.deletion import (
    DeletionReport,
    DocumentDeletion,
    ServedExchange,
    forecast_deletion,
)
from membank.trainer.finding import NamedDocument
from membank.trainer.finding.finder import Finder
from membank.trainer.run import RunDirectory, RunMaterial, load_config
from membank.trainer.training import ServedMemory, load_sequences, train_memories
from membank.wire.errors import Reason
from membank.wire.spec import BlockRef, BlockState
from rpc_rig import RpcRig
from tiny_bank import State, file_bytes, full_state
from tiny_run import bank_spec, make_tiny_run, tiny_tree
from tiny_world import World, make_world

pytestmark = pytest.mark.slow  # a bank on disk, and training through its service

TOP, LEAF = BlockRef(1, 0), BlockRef(2, 0)
ROW = 0
"""A document of leaf 0, which it shares with three others."""


@pytest.fixture(scope="module")
def world() -> World:
    torch.set_num_threads(1)
    return make_world()


@pytest.fixture
def run(world: World, tmp_path: Path) -> RunDirectory:
    return make_tiny_run(tmp_path / "run", world)


@pytest.fixture
def rig(world: World, run: RunDirectory, tmp_path: Path) -> Iterator[RpcRig]:
    spec = replace(bank_spec(run, load_config(run)), bank_id="")
    with RpcRig(tmp_path / "bank", spec=spec, tree=tiny_tree(world)) as rig:
        yield rig


@pytest.fixture
def client(rig: RpcRig) -> Iterator[BankClient]:
    with BankClient.connect(rig.address) as client:
        yield client


def _train(client: BankClient, run: RunDirectory) -> None:
    sequences = load_sequences(run.memory_sequences_file)
    train_memories(run.anchor(), ServedMemory(client), sequences, load_config(run).stage2)


def _delete(client: BankClient, run: RunDirectory, world: World) -> DeletionReport:
    material = RunMaterial(run, client.spec.bank_id)
    named = [NamedDocument(line=0, text=world.documents[ROW].text)]
    forecast = forecast_deletion(client, material, named, ONE_THREAD)
    return DocumentDeletion(client, ServedExchange(client), material, ONE_THREAD).run(forecast)


def _state(rig: RpcRig) -> State:
    return full_state(rig.bank.shards["shard-0"])


def _marks(state: State) -> set[bytes]:
    """Return a piece of every array that the two blocks hold, long enough to be no accident."""
    arrays = [content for ref in (TOP, LEAF) for content in state[ref][3].values()]
    return {array[start : start + 48] for array in arrays for start in (0, len(array) // 2)}


def _found(marks: set[bytes], folder: Path) -> set[bytes]:
    files = file_bytes(folder).values()
    return {mark for mark in marks if any(mark in content for content in files)}


def test_no_version_of_the_old_blocks_is_left_and_all_else_keeps_its_bits(
    rig: RpcRig, client: BankClient, run: RunDirectory, world: World, tmp_path: Path
) -> None:
    _train(client, run)
    client.snapshot("before")
    earlier = _state(rig)
    _train(client, run)
    before = _state(rig)
    rig.bank.shards["shard-0"].consolidate()
    marks = _marks(earlier) | _marks(before)
    assert _found(marks, tmp_path / "bank") == marks

    told = _delete(client, run, world).to_json()

    assert _found(marks, tmp_path / "bank") == set()
    after = _state(rig)
    assert {ref for ref in before if before[ref] != after[ref]} == {TOP, LEAF}
    for ref in (TOP, LEAF):
        version, state, step, _ = after[ref]
        assert (state, step) == (BlockState.ACTIVE, 0)
        assert version == before[ref][0] + 2
    destroyed = told["destroyed"]
    assert isinstance(destroyed, dict)
    assert destroyed["slots_destroyed"] > 0


def test_no_rollback_brings_them_back(
    rig: RpcRig, client: BankClient, run: RunDirectory, world: World
) -> None:
    _train(client, run)
    client.snapshot("before")
    before = _state(rig)
    _delete(client, run, world)
    client.rollback("before")
    rolled_back = _state(rig)
    for ref in (TOP, LEAF):
        assert rolled_back[ref][3] != before[ref][3]
    with BankClient.connect(rig.address) as reader:
        pinned = reader.fetch_blocks([TOP, LEAF], snapshot="before")
    assert pinned.weights == {}


def test_a_gradient_that_was_computed_on_an_old_block_is_refused(
    rig: RpcRig, client: BankClient, run: RunDirectory, world: World
) -> None:
    _train(client, run)
    source = ServedMemory(client)
    late = source.fetch([TOP, LEAF])
    _delete(client, run, world)
    after = _state(rig)
    (pushed,) = source.push(dict(late.weights), late.versions, step=0)
    assert [result.reason for result in pushed.results] == [Reason.STALE_VERSION] * 2
    assert _state(rig) == after


def test_the_tree_tells_anew_what_the_topics_are(
    rig: RpcRig, client: BankClient, run: RunDirectory, world: World
) -> None:
    _train(client, run)
    before = client.tree()
    report = _delete(client, run, world)
    after = client.tree()
    for ref in (TOP, LEAF):
        assert after.num_documents[ref] == before.num_documents[ref] - 1
        assert after.labels[ref]
    assert {r: label for r, label in after.labels.items() if r not in (TOP, LEAF)} == {
        r: label for r, label in before.labels.items() if r not in (TOP, LEAF)
    }
    audited = [record.operation for record in client.audit(limit=2)]
    assert audited == ["transaction", "delete"]
    assert all(r.request_id.startswith(report.job_id) for r in client.audit(limit=2))


def test_found_afterwards_it_is_a_text_like_any_other(
    rig: RpcRig, client: BankClient, run: RunDirectory, world: World
) -> None:
    _train(client, run)
    named = [NamedDocument(line=0, doc_id=world.documents[ROW].doc_id)]
    found = Finder(run).find(client, named)
    assert dict(found.trained) == {TOP: 1, LEAF: 1}
    assert found.influence.blocks[0].nats_per_token is not None
    assert found.influence.blocks[0].nats_per_token > 0.1
    _delete(client, run, world)
    found = Finder(run).find(client, named)
    assert found.trained == ()
    assert found.revision == client.info().revision
