"""A service on a Ray of its own: real processes, real gRPC, real kill -9."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from membank.bank_service.cluster import Endpoint, UpConfig, down, list_running, status, up
from membank.bank_service.cluster.addresses import gateway_listening
from membank.bank_service.cluster.local_ray import marked_processes
from membank.bank_service.store import Bank
from membank.client import BankClient, ClientConfig, TlsConfig
from membank.wire.errors import (
    AccessDeniedError,
    AlreadyExistsError,
    CorruptionError,
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
    Reason,
)
from membank.wire.spec import Array, BankSpec, BlockRef, BlockState, LevelSpec

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(180)]

SPEC = BankSpec(
    name="it",
    num_layers=2,
    width=16,
    levels=(LevelSpec(fan_out=4, block_width=4), LevelSpec(fan_out=4, block_width=4)),
)
TOPIC = BlockRef(1, 1)


def config_in(folder: Path, **fields: object) -> UpConfig:
    return UpConfig(
        bank_url=str(folder / "bank"),
        port=0,
        runtime_dir=folder / "run",
        **fields,  # type: ignore[arg-type]  # each test knows its fields
    )


def gradients(value: float, refs: list[BlockRef]) -> dict[BlockRef, Array]:
    return {ref: np.full(SPEC.block_shape(ref.level), value, np.float32) for ref in refs}


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[UpConfig, Endpoint]]:
    """One service for the tests of this module; each kills what it likes."""
    config = config_in(tmp_path_factory.mktemp("service"))
    endpoint = up(config)
    try:
        with BankClient.connect(endpoint.address) as client:
            with pytest.raises(NotFoundError) as caught:
                client.info()
            assert caught.value.reason is Reason.UNKNOWN_BANK
            client.create_bank(SPEC)
        yield config, endpoint
    finally:
        down(runtime_dir=config.runtime_dir)


@pytest.fixture
def client(service: tuple[UpConfig, Endpoint]) -> Iterator[BankClient]:
    with BankClient.connect(service[1].address) as client:
        yield client


def test_both_shards_serve_their_partitions(
    service: tuple[UpConfig, Endpoint], client: BankClient
) -> None:
    found = status(runtime_dir=service[0].runtime_dir)
    assert found.has_bank
    assert found.endpoint == service[1]
    assert [shard.partitions for shard in found.shards] == [(0, 2), (1, 3)]
    assert len({shard.pid for shard in found.shards} | {found.controller_pid}) == 3
    blocks = client.fetch_blocks(list(SPEC.blocks()))
    assert len(blocks) == SPEC.num_blocks
    owners = {owner.endpoint for owner in client.info().placement.owners}
    assert owners == {shard.endpoint for shard in found.shards}


def test_a_bank_is_created_once(client: BankClient) -> None:
    with pytest.raises(AlreadyExistsError) as caught:
        client.create_bank(SPEC)
    assert caught.value.reason is Reason.BANK_EXISTS


def test_a_second_service_of_the_bank_is_refused(service: tuple[UpConfig, Endpoint]) -> None:
    config = service[0]
    with pytest.raises(FailedPreconditionError) as caught:
        up(config)
    assert caught.value.reason is Reason.BANK_IN_USE
    # Also for somebody who has no note of the first one.
    elsewhere = UpConfig(
        bank_url=config.bank_url, port=0, runtime_dir=config.runtime_dir.parent / "other"
    )
    with pytest.raises(FailedPreconditionError) as caught:
        up(elsewhere)
    assert caught.value.reason is Reason.BANK_IN_USE
    assert list_running(elsewhere.runtime_dir) == ()


def test_kill_9_of_a_shard_loses_nothing_and_applies_nothing_twice(
    service: tuple[UpConfig, Endpoint], client: BankClient
) -> None:
    refs = [BlockRef(1, cluster) for cluster in range(4)]
    base = client.fetch_blocks(refs).versions
    runtime_dir = service[0].runtime_dir
    victim = status(runtime_dir=runtime_dir).shards[0]
    versions = dict(base)
    for number in range(12):
        if number == 5:
            os.kill(victim.pid, signal.SIGKILL)
        answer = client.push(gradients(0.1, refs), base=versions)
        assert not answer.refused
        versions = dict(answer.versions)
    assert versions == {ref: version + 12 for ref, version in base.items()}
    assert client.fetch_blocks(refs).versions == versions
    back = status(runtime_dir=runtime_dir).shards[0]
    assert back.alive
    assert back.pid != victim.pid
    assert back.num_restarts == victim.num_restarts + 1
    assert client.stats().shards[0].num_restarts == back.num_restarts


def test_kill_9_of_the_controller_keeps_data_flowing_and_comes_back(
    service: tuple[UpConfig, Endpoint], client: BankClient
) -> None:
    runtime_dir = service[0].runtime_dir
    before = status(runtime_dir=runtime_dir)
    client.withhold(TOPIC)
    os.kill(before.controller_pid, signal.SIGKILL)
    # Shards answer without it; operations wait for it, at the same address.
    assert client.fetch_blocks([BlockRef(1, 2)])[BlockRef(1, 2)].weight is not None
    report = client.restore(TOPIC)
    after = status(runtime_dir=runtime_dir)
    assert after.controller_pid != before.controller_pid
    assert after.revision == report.revision
    assert [shard.pid for shard in after.shards] == [shard.pid for shard in before.shards]
    assert client.info().placement.generation >= 1


def test_a_transaction_spans_the_processes(client: BankClient) -> None:
    topics = [BlockRef(1, 0), BlockRef(1, 1)]
    weights = {ref: np.full(SPEC.block_shape(1), 0.5, np.float32) for ref in topics}
    versions = client.fetch_blocks(topics).versions
    report = client.swap(weights, expected=versions)
    fetched = client.fetch_blocks(topics)
    assert fetched.revision >= report.revision
    for ref in topics:
        np.testing.assert_array_equal(fetched[ref].weight, weights[ref])


def test_steps_span_the_processes_and_are_applied_once(
    service: tuple[UpConfig, Endpoint], client: BankClient
) -> None:
    # Of both shards: partitions 0 and 1.
    one, other, zeroed = BlockRef(1, 0), BlockRef(1, 1), BlockRef(2, 12)
    before = client.fetch_blocks([one, other])
    with client.transaction(request_id="exchange") as exchange:
        exchange.copy(one, other, expected_version=before[other].version)
        exchange.copy(other, one, expected_source_version=before[other].version)
        exchange.zero(zeroed)
    after = client.fetch_blocks([one, other, zeroed])
    np.testing.assert_array_equal(after[one].weight, before[other].weight)
    np.testing.assert_array_equal(after[other].weight, before[one].weight)
    np.testing.assert_array_equal(after[zeroed].weight, np.zeros(SPEC.block_shape(2), np.float32))
    for pid in (
        status(runtime_dir=service[0].runtime_dir).controller_pid,
        status(runtime_dir=service[0].runtime_dir).shards[1].pid,
    ):
        os.kill(pid, signal.SIGKILL)
        again = client.apply(exchange.steps, request_id="exchange")
        assert again.report == exchange.report
    assert client.fetch_blocks([one, other, zeroed]).versions == after.versions


def test_a_topic_leaves_and_comes_back_bit_for_bit(client: BankClient) -> None:
    refs = list(SPEC.subtree(TOPIC))
    before = client.fetch_blocks(refs)
    pack = client.export(TOPIC)
    client.delete(TOPIC)
    gone = client.fetch_blocks(refs)
    assert {block.header.state for block in gone.values()} == {BlockState.DELETED}
    client.import_pack(pack)
    after = client.fetch_blocks(refs)
    for ref in refs:
        np.testing.assert_array_equal(after[ref].weight, before[ref].weight)
        assert after[ref].version > before[ref].version
    # And under another topic, from the bank's own store.
    client.store_pack(TOPIC, "kept")
    other = BlockRef(TOPIC.level, TOPIC.cluster + 1)
    assert client.import_stored("kept", topic=other).topic == other
    there = client.fetch_blocks(SPEC.subtree(other))
    for ref, moved in zip(refs, there.values(), strict=True):
        np.testing.assert_array_equal(moved.weight, before[ref].weight)
    assert [stored.name for stored in client.packs()] == ["kept"]
    assert client.delete_pack("kept").topic == TOPIC


def test_earlier_states_reach_across_the_processes(client: BankClient) -> None:
    refs = [BlockRef(1, cluster) for cluster in range(4)]
    client.snapshot("then")
    then = client.fetch_blocks(refs)
    before = client.info().revision
    client.push(gradients(1.0, refs), base=then.versions)
    client.swap({TOPIC: np.full(SPEC.block_shape(1), 4.0, np.float32)})
    pinned = client.fetch_blocks(refs, snapshot="then")
    assert (pinned.revision, pinned.versions) == (before, then.versions)
    assert before in {record.revision for record in client.audit(retained_only=True)}
    client.rollback("then")
    now = client.fetch_blocks(refs)
    for ref in refs:
        np.testing.assert_array_equal(now[ref].weight, then[ref].weight)
        np.testing.assert_array_equal(pinned[ref].weight, then[ref].weight)
    client.delete_snapshot("then")
    with pytest.raises(NotFoundError) as caught:
        client.fetch_blocks(refs, snapshot="then")
    assert caught.value.reason is Reason.UNKNOWN_SNAPSHOT
    dry = client.collect_garbage(keep_revisions=1, dry_run=True)
    assert dry.num_bytes > 0
    done = client.collect_garbage(keep_revisions=1)
    assert done.history_from == client.info().revision
    assert client.audit(retained_only=True) == ()
    assert client.collect_garbage().garbage == ()
    after = client.fetch_blocks(refs)
    assert after.versions == now.versions


def test_down_ends_every_process_and_up_finds_the_bank_again(tmp_path: Path) -> None:
    config = config_in(tmp_path)
    first = up(config)
    with BankClient.connect(first.address) as client:
        client.create_bank(SPEC)
        client.push(gradients(1.0, [TOPIC]), base={TOPIC: 0})
        weight = np.array(client.fetch_blocks([TOPIC])[TOPIC].weight)
    stopped = down(runtime_dir=config.runtime_dir)
    assert stopped.endpoint == first
    assert first.ray_mark is not None
    assert marked_processes(first.ray_mark) == []
    assert first.ray_dir is not None
    assert not Path(first.ray_dir).exists()
    assert list_running(config.runtime_dir) == ()

    # With more shards than before: partitions are not bound to the shard that wrote them.
    second = up(config_in(tmp_path, num_shards=3))
    try:
        with BankClient.connect(second.address) as client:
            block = client.fetch_blocks([TOPIC])[TOPIC]
            assert block.version == 1
            np.testing.assert_array_equal(block.weight, weight)
    finally:
        down(runtime_dir=config.runtime_dir)


def test_what_cannot_start_says_why_and_leaves_nothing_behind(tmp_path: Path) -> None:
    Bank.create(str(tmp_path / "bank"), SPEC)
    with pytest.raises(InvalidArgumentError, match="partitions"):
        up(config_in(tmp_path, num_shards=9))
    (tmp_path / "bank" / "bank.json").write_text("{")
    with pytest.raises(CorruptionError) as caught:
        up(config_in(tmp_path))
    assert caught.value.reason is Reason.SPEC_CORRUPT
    assert list_running(tmp_path / "run") == ()


def test_off_loopback_it_serves_those_with_a_token_over_tls(tmp_path: Path) -> None:
    script = Path(__file__).parents[3] / "scripts" / "make_tls.sh"
    host = gateway_listening("0.0.0.0", "127.0.0.2").advertise
    tls = tmp_path / "tls"
    subprocess.run([script, tls, host], check=True, capture_output=True)
    tokens = tmp_path / "tokens"
    tokens.write_text("s3cret ada admin\nreading rita reader\n")
    config = config_in(
        tmp_path,
        host="0.0.0.0",
        tls_cert=tls / "tls.crt",
        tls_key=tls / "tls.key",
        token_file=tokens,
    )
    endpoint = up(config)
    try:
        assert endpoint.address.rpartition(":")[0] == host
        trust = TlsConfig(root_certificates=tls / "tls.crt", server_name="membank")
        with BankClient.connect(
            endpoint.address, config=ClientConfig(tls=trust, token="s3cret")
        ) as client:
            client.create_bank(SPEC)
            client.push(gradients(1.0, [TOPIC]), base={TOPIC: 0})
            client.withhold(TOPIC)
            assert client.audit()[0].principal == "ada"
        with BankClient.connect(
            endpoint.address, config=ClientConfig(tls=trust, token="reading")
        ) as reader:
            assert len(reader.fetch_blocks([BlockRef(1, 0)])) == 1
            with pytest.raises(AccessDeniedError):
                reader.push(gradients(1.0, [BlockRef(1, 0)]), base={BlockRef(1, 0): 0})
            with pytest.raises(AccessDeniedError):
                reader.delete(TOPIC)
    finally:
        down(runtime_dir=config.runtime_dir)
