"""A controller's work without Ray: claim, gateway and shards, over restarts and replacement."""

from __future__ import annotations

import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from claim_reader import read_claim
from local_actors import LocalActors, away
from membank.bank_service.cluster.claim import BankClaim, require_claim
from membank.bank_service.cluster.config import UpConfig
from membank.bank_service.cluster.identity import ShardSettings
from membank.bank_service.cluster.service import Service
from membank.bank_service.store import Bank, Data, open_objects
from membank.client import BankClient, ClientConfig, RetryConfig
from membank.wire.errors import (
    CorruptionError,
    FailedPreconditionError,
    MembankError,
    Reason,
    UnavailableError,
)
from membank.wire.format.layout import CLAIMS, manifest_key
from membank.wire.spec import BlockRef
from storage_faults import Outage
from tiny_bank import make_update, tiny_spec

A = BlockRef(1, 0)
NEVER_S = 60.0
SHARDS = ("shard-0", "shard-1")


class Host:
    """A machine with one service on it, whose controller may be started again."""

    def __init__(self, url: str, folder: Path) -> None:
        self.config = UpConfig(
            bank_url=url,
            port=0,
            journal_dir=folder / "journals",
            lease_s=0.0,
            service_id=folder.name,
            rebalance=False,
            start_timeout_s=10.0,
        )
        self.actors = LocalActors()
        self.storage = Outage(open_objects(url))
        self._services: list[Service] = []

    def service(self, *, is_restart: bool = False, beat_every_s: float = NEVER_S) -> Service:
        service = Service(
            self.config,
            self.actors,
            is_restart=is_restart,
            open_storage=lambda url: self.storage,
            beat_every_s=beat_every_s,
        )
        self._services.append(service)
        return service

    def end(self) -> None:
        for service in self._services:
            service.stop(1.0)
        self.actors.end()

    def push(self, request_id: str) -> None:
        shard = self.actors.servers["shard-0"].shard
        shard.push(make_update(shard, [A], request_id))


@pytest.fixture
def url() -> str:
    return f"memory://{uuid.uuid4().hex}"


@pytest.fixture
def bank(url: str) -> Bank:
    return Bank.create(url, tiny_spec())


@pytest.fixture
def host(url: str, tmp_path: Path) -> Iterator[Host]:
    host = Host(url, tmp_path / "one")
    yield host
    host.end()


def take_over(url: str) -> BankClaim:
    """Claim the bank as another service does to which this one was silent."""
    return BankClaim.take(
        open_objects(url),
        service="other",
        host="elsewhere",
        endpoint="other:1",
        beat_every_s=NEVER_S,
        sleep=lambda seconds: None,
    )


@contextmanager
def start_under_way(service: Service, came: threading.Event) -> Iterator[None]:
    """Start a service in a thread, from when it has come somewhere until it has ended."""

    def start() -> None:
        with suppress(MembankError):
            service.start()

    starting = threading.Thread(target=start)
    starting.start()
    came.wait()
    yield
    starting.join()


def is_closed(host: Host, shard_id: str) -> bool:
    try:
        host.actors.call(host.actors.find(shard_id), "identity", timeout_s=1.0, who=shard_id)
    except MembankError:
        return True
    return False


def test_a_service_that_lost_its_claim_closes_its_shards_whatever_became_of_the_other(
    bank: Bank, host: Host
) -> None:
    service = host.service(beat_every_s=0.01)
    service.start()
    host.push("u0")
    host.storage.is_down = True
    take_over(bank.url).release()  # its start failed, and no manifest of its ever came
    host.storage.is_down = False
    while not service.status().problem:  # the test's timeout bounds it
        pass
    service.supervise()
    assert [is_closed(host, shard_id) for shard_id in SHARDS] == [True, True]
    assert [shard.alive for shard in service.status().shards] == [False, False]
    assert host.actors.servers["shard-0"].shard.is_folded
    with (
        pytest.raises(FailedPreconditionError) as caught,
        BankClient.connect(service.status().address) as client,
    ):
        client.info()
    assert caught.value.reason is Reason.BANK_IN_USE
    assert service.stop(5.0) == ()
    # The next one need not know that this one was there.
    take_over(bank.url).release()


def test_a_controller_that_comes_back_to_another_s_claim_closes_the_shards(
    bank: Bank, host: Host
) -> None:
    host.service().start()
    take_over(bank.url).release()
    again = host.service(is_restart=True)
    again.start()
    assert again.status().problem
    again.supervise()
    assert [is_closed(host, shard_id) for shard_id in SHARDS] == [True, True]
    with pytest.raises(FailedPreconditionError):
        require_claim(bank.objects, host.config.service_id)


def test_a_controller_that_comes_back_serves_the_shards_that_open(bank: Bank, host: Host) -> None:
    host.service().start()
    host.actors.kill(host.actors.find("shard-1"))
    number = bank.manifest_numbers(1)[-1]
    bank.objects.put(manifest_key(1, number), b"not a manifest")
    again = host.service(is_restart=True)
    again.start()
    status = again.status()
    assert status.has_bank
    assert [shard.alive for shard in status.shards] == [True, False]
    with BankClient.connect(status.address) as client:
        assert client.fetch_blocks([A]).versions == {A: 0}
    # Whoever starts it for the first time is told instead.
    assert again.stop(5.0) == ("shard-1",)
    with pytest.raises(CorruptionError):
        host.service().start()


def test_a_bank_whose_shards_failed_is_created_by_the_next_attempt(host: Host) -> None:
    failures = [UnavailableError("the storage failed", reason=Reason.STORE_FAILED)] * 3

    def before_start(settings: ShardSettings) -> None:
        if failures:
            raise failures.pop()

    host.actors.before_start = before_start
    service = host.service()
    service.start()
    with BankClient.connect(service.status().address) as client:
        client.create_bank(tiny_spec())
        assert client.fetch_blocks([A]).versions == {A: 0}
    assert failures == []


def test_a_service_without_a_bank_leaves_nothing_unfolded(host: Host) -> None:
    service = host.service()
    service.start()
    assert service.stop(5.0) == ()
    assert read_claim(open_objects(host.config.bank_url)) is None


def test_the_time_to_stop_is_one_deadline_for_gateway_shards_and_claim(
    bank: Bank, host: Host
) -> None:
    mended = threading.Event()

    class Hangs(Outage):
        def put(self, key: str, data: Data, *, durable: bool = False) -> None:
            mended.wait()

    host.storage = Hangs(bank.objects)
    service = host.service()
    service.start()
    began = time.monotonic()
    assert service.stop(1.5) == ()
    assert host.actors.waits["stop"] <= 1.3
    assert time.monotonic() - began < 5.0
    mended.set()


def test_a_call_that_hangs_at_the_gateway_takes_no_time_from_the_shards(
    bank: Bank, host: Host
) -> None:
    service = host.service()
    service.start()
    host.push("u0")
    came, mended = threading.Event(), threading.Event()

    def before_call(shard_id: str, method: str) -> None:
        if method == "stats":
            came.set()
            mended.wait(20.0)
            raise away(shard_id)

    def ask(address: str) -> None:
        once = ClientConfig(retry=RetryConfig(max_attempts=1))
        with suppress(MembankError), BankClient.connect(address, config=once) as client:
            client.stats()

    host.actors.before_call = before_call
    asking = threading.Thread(target=ask, args=[service.status().address])
    asking.start()
    came.wait()
    shard = host.actors.servers["shard-0"].shard
    assert service.stop(3.0) == ()
    assert shard.is_folded
    assert host.actors.waits["stop"] > 1.0, "more than is left when nothing is left"
    mended.set()
    asking.join()


def test_a_start_under_way_makes_no_shard_anew_after_the_stop(bank: Bank, host: Host) -> None:
    came, stopped = threading.Event(), threading.Event()

    def before_call(shard_id: str, method: str) -> None:
        if method == "identity":
            came.set()
            stopped.wait(20.0)
            raise away(shard_id)

    host.actors.before_call = before_call
    service = host.service()
    with start_under_way(service, came):
        service.stop(2.0)
        stopped.set()
    assert [host.actors.find(shard_id) for shard_id in SHARDS] == [None, None]


def test_a_start_under_way_keeps_no_claim_after_the_stop(bank: Bank, host: Host) -> None:
    came, stopped = threading.Event(), threading.Event()

    class Slow(Outage):
        def put_if_absent(self, key: str, data: Data, *, durable: bool = False) -> None:
            came.set()
            stopped.wait(20.0)
            super().put_if_absent(key, data, durable=durable)

    host.storage = Slow(bank.objects)
    service = host.service()
    with start_under_way(service, came):
        service.stop(2.0)
        stopped.set()
    assert host.storage.list(CLAIMS) != []
    assert read_claim(bank.objects) is None
    assert [host.actors.find(shard_id) for shard_id in SHARDS] == [None, None]


def test_a_shard_that_an_earlier_service_left_is_replaced(
    bank: Bank, host: Host, tmp_path: Path
) -> None:
    before = host.service()
    before.start()
    left = host.actors.find("shard-0")
    assert left is not None
    # Its controller is gone, and its claim; its shards were left.
    host.storage.is_down = True
    take_over(bank.url).release()
    new = Host(bank.url, tmp_path / "new")
    new.actors = host.actors
    service = new.service()
    service.start()
    assert [shard.alive for shard in service.status().shards] == [True, True]
    assert host.actors.find("shard-0") is not left
    assert service.stop(5.0) == ()


def test_a_controller_that_has_not_found_its_shards_yet_stops_them_all_the_same(
    bank: Bank, host: Host
) -> None:
    host.service().start()
    host.push("u0")
    host.storage.is_down = True
    again = host.service(is_restart=True)
    with pytest.raises(UnavailableError):
        again.start()
    assert host.actors.find("shard-0") is not None
    assert again.stop(5.0) == ()
    assert [host.actors.find(shard_id) for shard_id in SHARDS] == [None, None]
    # Of those that were ended without it, nobody knows.
    assert host.service(is_restart=True).stop(5.0) == SHARDS


def test_a_controller_that_comes_back_keeps_its_claim_although_it_cannot_listen(
    bank: Bank, host: Host
) -> None:
    host.service().start()
    before = read_claim(bank.objects)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        again = Service(
            UpConfig(
                bank_url=bank.url,
                port=taken.getsockname()[1],
                service_id=host.config.service_id,
            ),
            host.actors,
            is_restart=True,
            beat_every_s=NEVER_S,
        )
        with pytest.raises(FailedPreconditionError) as caught:
            again.start()
    assert caught.value.reason is Reason.PORT_IN_USE
    after = read_claim(bank.objects)
    assert before is not None
    assert after is not None
    assert (after.service, after.beat) == (before.service, before.beat + 1)


def test_a_service_that_cannot_listen_claims_nothing(bank: Bank, host: Host) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        config = UpConfig(bank_url=bank.url, port=taken.getsockname()[1], service_id="x")
        with pytest.raises(FailedPreconditionError):
            Service(config, host.actors, is_restart=False).start()
    assert read_claim(bank.objects) is None
