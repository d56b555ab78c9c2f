"""Earlier states through a served bank: readers pinned while training goes on, and the ways back."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from command_line import membank
from membank.client import BankClient, ClientConfig
from membank.wire.errors import ConflictError, MembankError, NotFoundError, Reason
from membank.wire.spec import Array, BlockRef, BlockState
from rpc_rig import RpcRig
from shard_rig import RIG_SPEC

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]

REFS = tuple(RIG_SPEC.blocks())
TOPIC, OTHER = BlockRef(1, 1), BlockRef(1, 2)


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[RpcRig]:
    with RpcRig(tmp_path / "bank") as rig:
        yield rig


@pytest.fixture
def client(rig: RpcRig) -> Iterator[BankClient]:
    with BankClient.connect(rig.address) as client:
        yield client


def gradients(seed: int) -> dict[BlockRef, Array]:
    rng = np.random.default_rng(seed)
    return {
        ref: rng.standard_normal(RIG_SPEC.block_shape(ref.level)).astype(np.float32) for ref in REFS
    }


def train(client: BankClient, seed: int) -> None:
    base = client.fetch_blocks(REFS).versions
    # What a transaction changed or hides since is refused, and that is well.
    client.push(gradients(seed), base=base)


def content(client: BankClient, snapshot: str = "") -> dict[BlockRef, bytes]:
    return {
        ref: weight.tobytes()
        for ref, weight in client.fetch_blocks(REFS, snapshot=snapshot).weights.items()
    }


def test_a_pinned_reader_sees_the_same_bytes_whatever_goes_on(
    rig: RpcRig, client: BankClient
) -> None:
    train(client, 0)
    client.snapshot("then")
    then = content(client)
    stop = threading.Event()
    failures: list[BaseException] = []
    num_reads = num_collections = 0

    def repeated(action: Callable[[], None]) -> threading.Thread:
        def run() -> None:
            try:
                while not stop.is_set():
                    action()
            except BaseException as err:  # told to the test
                failures.append(err)
                stop.set()

        return threading.Thread(target=run)

    pinned = BankClient.connect(rig.address, config=ClientConfig(snapshot="then"))

    def read() -> None:
        nonlocal num_reads
        fetched = pinned.fetch_blocks(REFS)
        assert fetched.revision == 1
        found = {ref: weight.tobytes() for ref, weight in fetched.weights.items()}
        # Withheld or not, nothing but what was pinned is ever read.
        assert {ref: then[ref] for ref in found} == found
        assert found.keys() >= then.keys() - set(RIG_SPEC.subtree(TOPIC))
        num_reads += 1

    def fold_and_collect() -> None:
        nonlocal num_collections
        for shard in rig.bank.shards.values():
            shard.consolidate()
        client.collect_garbage()
        num_collections += 1

    threads = [repeated(read), repeated(fold_and_collect)]
    for thread in threads:
        thread.start()
    try:
        for number in range(12):
            train(client, number)
            weight = np.full(RIG_SPEC.block_shape(1), float(number), np.float32)
            client.swap({OTHER: weight})
            client.withhold(TOPIC)
            client.restore(TOPIC)
            if number == 6:
                client.collect_garbage(keep_revisions=1)
            if stop.is_set():
                break
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert failures == []
    assert num_reads > 0
    assert num_collections > 0
    assert content(client, "then") == then != content(client)
    pinned.close()


def test_held_blocks_of_both_worlds_do_not_mix(client: BankClient) -> None:
    train(client, 0)
    client.snapshot("then")
    then = client.fetch_blocks(REFS, snapshot="then")
    train(client, 1)
    now = client.fetch_blocks(REFS, held=then)
    for held in (then, now):
        again = client.fetch_blocks(REFS, held=held, snapshot="then")
        assert again.versions == then.versions
        for ref in REFS:
            np.testing.assert_array_equal(again.weights[ref], then.weights[ref])
        present = client.fetch_blocks(REFS, held=held)
        for ref in REFS:
            np.testing.assert_array_equal(present.weights[ref], now.weights[ref])


def test_the_life_of_a_mistake_on_the_command_line(rig: RpcRig, client: BankClient) -> None:
    at = ("--bank", rig.address, "--json")
    train(client, 0)
    good = content(client)
    client.snapshot("good")
    for number in range(10):
        train(client, number)
        client.swap({OTHER: np.full(RIG_SPEC.block_shape(1), float(number), np.float32)})
    ways = json.loads(membank("audit", "--retained", *at).out)
    assert [way["revision"] for way in ways] == [10, 9, 8, 7, 6, 5, 4, 1]
    ended = membank("rollback", "--to-revision", "2", *at)
    assert ended.code == 3
    assert json.loads(ended.err)["oldest"] == "4"
    dry = json.loads(membank("rollback", "--to", "good", "--dry-run", *at).out)
    done = json.loads(membank("rollback", "--to", "good", *at).out)
    assert done["changes"] == dry["changes"]
    assert content(client) == good
    # Back to what the mistake had been, for one block.
    membank("rollback", "--to-revision", "11", "--block", "1/2", *at)
    assert content(client)[OTHER] == np.full(RIG_SPEC.block_shape(1), 9.0, np.float32).tobytes()
    membank("snapshot", "good", "--delete", *at)
    found = json.loads(membank("gc", "--dry-run", "--keep-revisions", "1", *at).out)
    assert found["bytes"] > 0
    removed = json.loads(membank("gc", "--keep-revisions", "1", *at).out)
    assert {part["kind"] for part in removed["garbage"]} == {"retired_manifest", "retired_slot"}
    keys = {key for part in removed["garbage"] for key in part["keys"]}
    assert keys
    assert not keys & set(rig.bank.objects.list(""))
    ended = membank("rollback", "--to", "good", *at)
    assert (ended.code, json.loads(ended.err)["reason"]) == (3, "UNKNOWN_SNAPSHOT")
    assert [r["operation"] for r in json.loads(membank("audit", "--limit", "2", *at).out)] == [
        "gc",
        "delete-snapshot",
    ]


def test_a_snapshot_that_is_given_up_while_it_is_read(rig: RpcRig, client: BankClient) -> None:
    train(client, 0)
    client.snapshot("then")
    then = content(client)
    with BankClient.connect(rig.address, config=ClientConfig(snapshot="then")) as pinned:
        outcome: list[MembankError | None] = []

        def read() -> None:
            try:
                while True:
                    found = pinned.fetch_blocks(REFS).weights
                    assert {ref: weight.tobytes() for ref, weight in found.items()} == then
            except (NotFoundError, ConflictError) as err:
                outcome.append(err)

        reader = threading.Thread(target=read)
        reader.start()
        train(client, 1)
        client.delete_snapshot("then")
        client.collect_garbage(keep_revisions=1)
        reader.join(60)
    (error,) = outcome
    assert error is not None
    assert error.reason is Reason.UNKNOWN_SNAPSHOT


def test_what_was_deleted_comes_back_from_nowhere(rig: RpcRig, client: BankClient) -> None:
    train(client, 0)
    client.snapshot("then")
    client.delete(TOPIC)
    gone = set(RIG_SPEC.subtree(TOPIC))
    assert client.fetch_blocks(REFS, snapshot="then").weights.keys() == set(REFS) - gone
    client.swap({TOPIC: np.ones(RIG_SPEC.block_shape(1), np.float32)})
    fetched = client.fetch_blocks(REFS, snapshot="then")
    assert fetched[TOPIC].header.state is BlockState.DELETED
    for target in ("then", 1, 0):
        report = client.rollback(target, dry_run=True)
        assert not gone & {change.ref for change in report.changes}
