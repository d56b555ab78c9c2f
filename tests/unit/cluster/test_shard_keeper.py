"""A shard in its process: opened, closed when it was replaced, opened again only where it may be."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from full_disk import files_up_to
from membank.bank_service.cluster.claim import BankClaim
from membank.bank_service.cluster.config import journal_name
from membank.bank_service.cluster.identity import ShardSettings
from membank.bank_service.cluster.shard_keeper import ShardKeeper
from membank.bank_service.cluster.shard_server import ShardServer
from membank.bank_service.rpc.server import ServerConfig
from membank.bank_service.shard import ShardConfig
from membank.bank_service.store import Bank, Data, LocalObjects
from membank.wire.errors import (
    FailedPreconditionError,
    MembankError,
    NotFoundError,
    Reason,
    ResourceExhaustedError,
    UnavailableError,
)
from membank.wire.spec import BlockRef
from tiny_bank import create_bank, make_update, tiny_spec

A = BlockRef(1, 0)
NEVER_S = 60.0


class Machine:
    """One machine of several that can reach the bank: its disk, and the shard that it runs."""

    def __init__(self, bank: Bank, folder: Path, *, claims: bool) -> None:
        self.name = folder.name
        self.settings = ShardSettings(
            shard_id=f"shard-of-{self.name}",
            bank_url=bank.url,
            partitions=(0,),
            service=self.name if claims else "",
            server=ServerConfig(host="127.0.0.1", port=0),
            # A replaced owner finds out when it publishes.
            shard=ShardConfig(journal_dir=str(folder), lease_s=0),
            max_in_flight_bytes=1 << 20,
        )
        self.keeper = ShardKeeper(
            self.settings.shard_id, lambda: ShardServer(self.settings), returns=claims
        )

    def claim(self, bank: Bank) -> BankClaim:
        return BankClaim.take(
            bank.objects,
            service=self.name,
            host=self.name,
            endpoint=f"{self.name}:1",
            beat_every_s=NEVER_S,
            sleep=lambda seconds: None,
        )

    def push(self, request_id: str) -> None:
        shard = self.keeper.server().shard
        shard.push(make_update(shard, [A], request_id))


@pytest.fixture
def bank(tmp_path: Path) -> Bank:
    return create_bank(tmp_path / "bank")


@pytest.fixture
def machines(bank: Bank, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[list[Machine]]:
    """Two machines; whether their services claim the bank is the parameter."""
    claims: bool = getattr(request, "param", True)
    made = [Machine(bank, tmp_path / name, claims=claims) for name in ("one", "two")]
    yield made
    for machine in made:
        machine.keeper.stop()


def reason_of(machine: Machine) -> Reason:
    with pytest.raises(MembankError) as caught:
        machine.keeper.identity()
    return caught.value.reason


def version_on(machine: Machine) -> int:
    (status,) = machine.keeper.server().shard.describe([A])
    return status.version


def test_a_shard_without_its_service_s_claim_does_not_open(
    bank: Bank, machines: list[Machine]
) -> None:
    one, two = machines
    one.keeper.open()
    with pytest.raises(UnavailableError) as caught:
        one.keeper.identity()
    assert caught.value.reason is Reason.STORE_FAILED
    claim = two.claim(bank)
    one.keeper.open()
    with pytest.raises(FailedPreconditionError, match="two:1 on two") as refused:
        one.keeper.identity()
    assert refused.value.reason is Reason.BANK_IN_USE
    assert bank.manifest_numbers(0) == [], "it must not even have touched the partition"
    claim.release()


def test_a_shard_takes_no_partition_whose_bank_was_claimed_while_it_opened(
    bank: Bank, machines: list[Machine]
) -> None:
    one, two = machines
    claims = [one.claim(bank)]

    class Interrupted(LocalObjects):
        """Storage that keeps the shard waiting while the other service takes the bank."""

        def put_if_absent(self, key: str, data: Data, *, durable: bool = False) -> None:
            super().put_if_absent(key, data, durable=durable)
            if len(claims) == 1:
                claims.append(two.claim(bank))

    def start() -> ShardServer:
        objects = Interrupted(Path(bank.url))
        return ShardServer(one.settings, open_bank=lambda url: Bank.open(objects))

    keeper = ShardKeeper("shard-of-one", start, returns=True)
    keeper.open()
    with pytest.raises(FailedPreconditionError) as caught:
        keeper.identity()
    assert caught.value.reason is Reason.BANK_IN_USE
    assert bank.manifest_numbers(0) == []
    two.keeper.open()
    two.push("u0")
    for claim in claims:
        claim.release()


def test_a_replaced_shard_closes_and_leaves_the_bank_to_the_one_that_claimed_it(
    bank: Bank, machines: list[Machine]
) -> None:
    one, two = machines
    claims = [one.claim(bank)]
    one.keeper.open()
    endpoint = one.keeper.identity().endpoint
    one.push("u0")
    claims.append(two.claim(bank))
    two.keeper.open()
    two.keeper.identity()
    # It finds out as it would: by the manifest of another owner.
    with pytest.raises(UnavailableError):
        one.keeper.server().shard.consolidate()
    assert reason_of(one) is Reason.FENCED
    with pytest.raises(UnavailableError):
        one.keeper.server()
    numbers = bank.manifest_numbers(0)
    for _ in range(3):
        # Supervision asks for that again and again, and so does Ray after a crash.
        one.keeper.open()
        assert reason_of(one) is Reason.BANK_IN_USE
    assert bank.manifest_numbers(0) == numbers
    two.push("u1")
    two.keeper.server().shard.consolidate()
    assert two.keeper.identity().endpoint != endpoint
    for claim in claims:
        claim.release()


def test_the_service_with_the_claim_takes_back_what_somebody_without_one_took(
    bank: Bank, machines: list[Machine], tmp_path: Path
) -> None:
    one = machines[0]
    claim = one.claim(bank)
    one.keeper.open()
    first = one.keeper.identity()
    one.push("u0")
    stranger = Machine(bank, tmp_path / "stranger", claims=False)
    stranger.keeper.open()
    stranger.keeper.identity()
    with pytest.raises(UnavailableError):
        one.keeper.server().shard.consolidate()
    assert reason_of(one) is Reason.FENCED
    one.keeper.open()
    again = one.keeper.identity()
    assert again.incarnation != first.incarnation
    # As after the loss of a machine: the stranger had no part of the journal, and opened without.
    assert version_on(one) == 0
    one.push("u1")
    assert version_on(one) == 1
    stranger.keeper.stop()
    claim.release()


@pytest.mark.parametrize("machines", [False], indirect=True)
def test_where_there_are_no_claims_a_replaced_shard_stays_closed(
    bank: Bank, machines: list[Machine]
) -> None:
    one, two = machines
    one.keeper.open()
    one.push("u0")
    two.keeper.open()
    with pytest.raises(UnavailableError):
        one.keeper.server().shard.consolidate()
    assert reason_of(one) is Reason.FENCED
    one.keeper.open()
    assert reason_of(one) is Reason.FENCED
    two.push("u1")


def test_what_keeps_a_shard_from_opening_is_told_until_it_opens(
    bank: Bank, machines: list[Machine]
) -> None:
    one = machines[0]
    claim = one.claim(bank)
    spec = bank.objects.get("bank.json")
    bank.objects.put("bank.json", b"{")
    one.keeper.open()
    assert reason_of(one) is Reason.SPEC_CORRUPT
    bank.objects.put("bank.json", spec)
    one.keeper.open()
    one.keeper.identity()
    claim.release()


def test_attempts_that_fail_leave_no_threads(bank: Bank, machines: list[Machine]) -> None:
    settings = dataclasses.replace(machines[0].settings, service="", partitions=(99,))
    keeper = ShardKeeper("s", lambda: ShardServer(settings), returns=True)
    before = threading.active_count()
    for _ in range(3):
        keeper.open()
        with pytest.raises(NotFoundError):
            keeper.identity()
    assert threading.active_count() == before


def test_a_defect_is_told_as_one(caplog: pytest.LogCaptureFixture) -> None:
    def start() -> ShardServer:
        raise ZeroDivisionError("by zero")

    keeper = ShardKeeper("shard-0", start, returns=True)
    keeper.open()
    with pytest.raises(MembankError, match="ZeroDivisionError: by zero"):
        keeper.identity()
    assert "by zero" in caplog.text


def test_a_stopped_shard_says_whether_its_journal_is_empty_and_opens_again(
    bank: Bank, machines: list[Machine]
) -> None:
    one = machines[0]
    claim = one.claim(bank)
    one.keeper.open()
    one.push("u0")
    assert one.keeper.stop()
    with pytest.raises(UnavailableError):
        one.keeper.identity()
    assert one.keeper.stop(), "nothing came since"
    one.keeper.open()
    (status,) = one.keeper.server().shard.describe([A])
    assert status.version == 1
    claim.release()


def test_a_shard_that_did_not_open_does_not_say_that_its_journal_is_empty(
    bank: Bank, machines: list[Machine]
) -> None:
    one, two = machines
    claim = one.claim(bank)
    assert not one.keeper.stop(), "whatever an earlier life of it left"
    one.keeper.open()
    one.push("u0")
    one.keeper.server().shard.close(consolidate=False)  # as if it was killed
    killed = ShardKeeper(one.settings.shard_id, lambda: ShardServer(one.settings), returns=True)
    spec = bank.objects.get("bank.json")
    bank.objects.put("bank.json", b"{")
    killed.open()
    assert not killed.stop()
    bank.objects.put("bank.json", spec)
    killed.open()
    assert killed.stop()
    claim.release()
    claim = two.claim(bank)
    two.keeper.open()
    assert version_on(two) == 1
    claim.release()


def test_a_replaced_shard_says_whether_it_left_something(
    bank: Bank, machines: list[Machine]
) -> None:
    one, two = machines
    claims = [one.claim(bank)]
    one.keeper.open()
    one.push("u0")
    claims.append(two.claim(bank))
    two.keeper.open()
    with pytest.raises(UnavailableError):
        one.keeper.server().shard.consolidate()
    assert reason_of(one) is Reason.FENCED
    assert not one.keeper.stop()
    for claim in claims:
        claim.release()


def test_a_server_that_cannot_be_made_leaves_no_partition_locked(
    bank: Bank, machines: list[Machine], tmp_path: Path
) -> None:
    one = machines[0]
    claim = one.claim(bank)
    tokens = tmp_path / "tokens"
    server = ServerConfig(host="127.0.0.1", port=0, token_file=tokens)
    settings = dataclasses.replace(one.settings, server=server)
    keeper = ShardKeeper("s", lambda: ShardServer(settings), returns=True)
    keeper.open()
    with pytest.raises(MembankError, match="tokens"):
        keeper.identity()
    tokens.write_text("s3cret ada admin\n")
    keeper.open()
    keeper.identity()
    assert keeper.stop()
    claim.release()


def test_a_shard_that_cannot_fold_says_so_and_finds_everything_when_it_opens_again(
    bank: Bank, machines: list[Machine]
) -> None:
    one = machines[0]
    claim = one.claim(bank)
    one.keeper.open()
    one.push("u0")
    with files_up_to(100), pytest.raises(ResourceExhaustedError):
        one.keeper.stop()
    with pytest.raises(UnavailableError):
        one.keeper.identity()
    one.keeper.open()
    (status,) = one.keeper.server().shard.describe([A])
    assert status.version == 1
    claim.release()


def test_each_machine_finds_a_place_for_the_journals_of_a_bank_behind_a_url(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEMBANK_RUNTIME_DIR", str(tmp_path / "disk"))
    url = f"memory://{tmp_path.name}"
    bank = Bank.create(url, tiny_spec())
    settings = ShardSettings(
        shard_id="shard-0",
        bank_url=url,
        partitions=(0,),
        server=ServerConfig(host="127.0.0.1", port=0),
        shard=ShardConfig(),
        max_in_flight_bytes=1 << 20,
    )
    server = ShardServer(settings)
    server.shard.push(make_update(server.shard, [A], "u0"))
    folder = tmp_path / "disk" / journal_name(url) / bank.spec.bank_id / "0000"
    assert [path for path in folder.iterdir() if path.suffix == ".log"]
    assert server.stop()
