"""A deletion on a Ray of its own: processes that held what was deleted end, and the receipt says so."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from command_line import membank
from membank.bank_service.cluster import Endpoint, UpConfig, down, status, up
from membank.bank_service.fsck import head_of, verify_audit
from membank.bank_service.store import open_objects
from membank.client import BankClient
from membank.wire.errors import MembankError
from membank.wire.format.receipt import Receipt, Recycling, decode_receipt
from membank.wire.signing import Signer
from membank.wire.spec import BankSpec, BlockRef, LevelSpec
from membank.wire.steps import Delete

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(240)]

SPEC = BankSpec(
    name="it",
    num_layers=2,
    width=16,
    levels=(LevelSpec(fan_out=4, block_width=4), LevelSpec(fan_out=4, block_width=4)),
)
TOPIC, OTHER = BlockRef(1, 1), BlockRef(1, 0)


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[UpConfig, Endpoint]]:
    folder = tmp_path_factory.mktemp("deletion")
    Signer.load_or_create(folder / "key.pem")
    config = UpConfig(
        bank_url=str(folder / "bank"),
        port=0,
        runtime_dir=folder / "run",
        signing_key=folder / "key.pem",
    )
    endpoint = up(config)
    try:
        with BankClient.connect(endpoint.address) as client:
            client.create_bank(SPEC)
        yield config, endpoint
    finally:
        down(runtime_dir=config.runtime_dir)


@pytest.fixture
def client(service: tuple[UpConfig, Endpoint]) -> Iterator[BankClient]:
    with BankClient.connect(service[1].address) as client:
        yield client


def push(client: BankClient, ref: BlockRef) -> None:
    gradient = np.ones(SPEC.block_shape(ref.level), np.float32)
    base = client.fetch_blocks([ref]).versions
    assert not client.push({ref: gradient}, base=base).refused


def pids(config: UpConfig) -> dict[str, int]:
    return {shard.shard_id: shard.pid for shard in status(runtime_dir=config.runtime_dir).shards}


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def read(data: bytes) -> Receipt:
    return decode_receipt(data, what="the receipt").receipt


def test_a_deletion_ends_the_process_that_held_it_and_the_receipt_names_both(
    service: tuple[UpConfig, Endpoint], client: BankClient
) -> None:
    config = service[0]
    push(client, TOPIC)
    push(client, OTHER)
    before = pids(config)
    controller = status(runtime_dir=config.runtime_dir).controller_pid
    applied = client.apply([Delete(topic=TOPIC)])
    after = pids(config)
    receipt = read(applied.receipt)
    assert receipt.recycling is Recycling.DONE
    (owner,) = receipt.acknowledgements
    assert owner.confirmed_by.pid == before[owner.shard_id]
    assert owner.now.pid == after[owner.shard_id] != before[owner.shard_id]
    assert not is_running(owner.confirmed_by.pid)
    untouched = set(before) - {owner.shard_id}
    assert {after[shard] for shard in untouched} == {before[shard] for shard in untouched}
    # As did the controller, through which content may have come.
    assert receipt.deletion.coordinator.pid == controller != receipt.issuer.pid
    assert receipt.issuer.pid == status(runtime_dir=config.runtime_dir).controller_pid
    assert not is_running(controller)
    # It serves on, both what it owned and what another one owns.
    push(client, OTHER)
    push(client, BlockRef(1, 3))
    assert client.receipt(applied.report.revision) == applied.receipt


def test_readers_and_trainers_wait_while_a_shard_is_recycled(client: BankClient) -> None:
    ref, ended = BlockRef(1, 3), threading.Event()
    failures: list[MembankError] = []

    def go_on() -> None:
        while not ended.is_set():
            try:
                push(client, ref)
            except MembankError as err:
                failures.append(err)
                return

    trainer = threading.Thread(target=go_on)
    trainer.start()
    # In the same shard as what is pushed to.
    client.delete(BlockRef(2, 4 * 3 + 1))
    ended.set()
    trainer.join()
    assert failures == []


def test_the_controller_dies_between_commit_and_receipt(
    service: tuple[UpConfig, Endpoint], client: BankClient
) -> None:
    config = service[0]
    topic = BlockRef(1, 2)
    push(client, topic)
    controller = status(runtime_dir=config.runtime_dir).controller_pid
    revisions = Path(config.bank_url) / "revisions"
    number = client.info().revision + 1
    killed = threading.Event()

    def kill_once_committed() -> None:
        while not (revisions / f"{number:010d}.json").exists():
            pass
        os.kill(controller, signal.SIGKILL)
        killed.set()

    killer = threading.Thread(target=kill_once_committed)
    killer.start()
    applied = client.apply([Delete(topic=topic)])
    killer.join()
    assert killed.is_set()
    assert applied.report.revision == number
    receipt = read(applied.receipt)
    assert receipt.deletion.coordinator.pid == controller
    assert receipt.recycling is Recycling.DONE


def test_what_the_command_line_says_of_it(
    service: tuple[UpConfig, Endpoint], client: BankClient, tmp_path: Path
) -> None:
    config, endpoint = service
    saved = tmp_path / "receipt.json"
    address = endpoint.address
    ended = membank("delete", "2/0", "--yes", "--bank", address, "--receipt", str(saved))
    assert ended.code == 0
    revision = client.info().revision
    assert f"receipts/{revision:010d}.json" in ended.out
    assert saved.read_bytes() == client.receipt(revision)
    shown = membank("audit", "receipt", str(revision), "--bank", address)
    assert shown.code == 0
    assert "took its place" in shown.out
    keys = tmp_path / "keys"
    keys.write_text(f"{Signer.load(config.signing_key).public_key.text} us\n")  # type: ignore[arg-type]
    objects = open_objects(config.bank_url)
    head = head_of(objects)
    verified = membank(
        "audit", "verify", config.bank_url, "--trusted", str(keys), "--head", str(head), "--json"
    )
    assert verified.code == 0, verified.out
    document = json.loads(verified.out)
    assert document["num_deletions"] == document["num_receipts"]
    assert verify_audit(objects).found.is_clean
