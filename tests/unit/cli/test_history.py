"""Commands for the past of a bank, against a service in this process."""

from __future__ import annotations

import json
from collections.abc import Iterator

import numpy as np
import pytest

from command_line import membank
from fake_bank import SPEC, FakeBank
from fake_service import FakeService
from membank.cli.connection import connect
from membank.wire.records import Garbage, GarbageKind
from membank.wire.spec import BlockRef

TOPIC, LEAF = BlockRef(1, 0), BlockRef(2, 1)


@pytest.fixture
def bank() -> FakeBank:
    return FakeBank()


@pytest.fixture
def service(bank: FakeBank) -> Iterator[FakeService]:
    service = FakeService(bank)
    yield service
    service.close()


def swap(bank: FakeBank, request_id: str, value: float) -> None:
    weights = {
        ref: np.full(SPEC.block_shape(ref.level), value, np.float32) for ref in (TOPIC, LEAF)
    }
    bank.swap(weights, {}, request_id=request_id, dry_run=False)


def test_a_snapshot_is_made_listed_and_given_up(bank: FakeBank, service: FakeService) -> None:
    at = ("--bank", service.endpoint)
    assert membank("snapshot", "then", *at).code == 0
    (listed,) = json.loads(membank("snapshot", *at, "--json").out)
    assert (listed["snapshot"], listed["revision"]) == ("then", 0)
    ended = membank("snapshot", "then", "--delete", *at)
    assert ended.code == 0
    assert "then is given up" in ended.out
    assert bank.snapshots == {}
    ended = membank("snapshot", "then", "--delete", *at)
    assert (ended.code, "UNKNOWN_SNAPSHOT" in ended.err) == (3, True)
    ended = membank("snapshot", "--delete", *at)
    assert (ended.code, "which snapshot" in ended.err) == (2, True)


@pytest.mark.parametrize(
    ("args", "changed"),
    [
        (("--to", "then"), None),
        (("--to-revision", "1"), None),
        (("--to-revision", "1", "--topic", "topic 1/0"), {"1/0", "2/0", "2/1"}),
        (("--to", "then", "--block", "1/0"), {"1/0"}),
    ],
)
def test_rollback_to_a_name_or_a_number(
    bank: FakeBank, service: FakeService, args: tuple[str, ...], changed: set[str] | None
) -> None:
    swap(bank, "a", 1.0)
    bank.create_snapshot("then")
    swap(bank, "b", 2.0)
    dry = membank("rollback", *args, "--dry-run", "--bank", service.endpoint, "--json")
    assert json.loads(dry.out)["dry_run"]
    assert bank.revision == 2
    ended = membank("rollback", *args, "--bank", service.endpoint, "--json")
    report = json.loads(ended.out)
    blocks = {change["block"] for change in report["changes"]}
    assert blocks == (changed or {str(ref) for ref in SPEC.blocks()})
    np.testing.assert_array_equal(bank.held(TOPIC).weight, 1.0)
    expected = 1.0 if changed is None or str(LEAF) in changed else 2.0
    np.testing.assert_array_equal(bank.held(LEAF).weight, expected)


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        ((), 2, "--to-revision"),
        (("--to", "then", "--to-revision", "0"), 2, "--to-revision"),
        (("--to", "then", "--topic", "a", "--block", "1/0"), 2, "not both"),
        (("--to-revision", "0", "--block", "hafnium"), 2, "LEVEL/CLUSTER"),
        (("--to-revision=-1",), 2, "to-revision"),
        (("--to-revision", "7"), 3, "UNKNOWN_REVISION"),
        (("--to", "never"), 3, "UNKNOWN_SNAPSHOT"),
    ],
)
def test_a_wrong_rollback_is_one_line(
    service: FakeService, args: tuple[str, ...], code: int, words: str
) -> None:
    ended = membank("rollback", *args, "--bank", service.endpoint)
    assert ended.code == code
    assert words in ended.err
    assert "Traceback" not in ended.err


def test_the_ways_back_are_listed(bank: FakeBank, service: FakeService) -> None:
    for number in range(3):
        swap(bank, f"s{number}", float(number))
    everything = json.loads(membank("audit", "--bank", service.endpoint, "--json").out)
    assert [record["revision"] for record in everything] == [3, 2, 1]
    retained = membank("audit", "--retained", "--bank", service.endpoint, "--json")
    assert [record["revision"] for record in json.loads(retained.out)] == [2, 1]


def test_what_a_command_fetches_is_of_the_snapshot_that_was_named(
    bank: FakeBank, service: FakeService
) -> None:
    bank.create_snapshot("then")
    swap(bank, "a", 5.0)
    with connect(service.endpoint, snapshot="then") as client:
        assert client.fetch([TOPIC]).versions == {TOPIC: 0}
    with connect(service.endpoint) as client:
        assert client.fetch([TOPIC]).versions == {TOPIC: 1}
    assert "--snapshot" in membank("ask", "--help").out


def test_garbage_is_told_to_people_and_programs(bank: FakeBank, service: FakeService) -> None:
    bank.garbage = (
        Garbage(
            kind=GarbageKind.RETIRED_SLOT, num_objects=2, num_bytes=3_000_000, keys=("k1", "k2")
        ),
        Garbage(kind=GarbageKind.PROBE, num_objects=1, num_bytes=5, keys=(".probe-1",)),
    )
    dry = membank("gc", "--dry-run", "--bank", service.endpoint)
    assert dry.code == 0
    assert "would be removed" in dry.out
    assert "3.0 MB" in dry.out
    told = membank("gc", "--keep-revisions", "2", "--bank", service.endpoint, "--json")
    assert json.loads(told.out) == {
        "dry_run": False,
        "bytes": 3_000_005,
        "history_from": 0,
        "garbage": [
            {"kind": "retired_slot", "objects": 2, "bytes": 3_000_000, "keys": ["k1", "k2"]},
            {"kind": "probe", "objects": 1, "bytes": 5, "keys": [".probe-1"]},
        ],
    }
    assert bank.keep_revisions == 2
    nothing = membank("gc", "--bank", service.endpoint)
    assert (nothing.code, "0 bytes removed" in nothing.out) == (0, True)
    assert membank("gc", "--keep-revisions", "0", "--bank", service.endpoint).code == 2


@pytest.mark.parametrize("kind", GarbageKind)
def test_every_kind_of_garbage_has_words(
    bank: FakeBank, service: FakeService, kind: GarbageKind
) -> None:
    bank.garbage = (Garbage(kind=kind, num_objects=4321, num_bytes=1),)
    assert "4321" in membank("gc", "--bank", service.endpoint).out
