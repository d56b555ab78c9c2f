"""What crosses the wire comes back as it was."""

from __future__ import annotations

import pytest

from membank.v1 import admin_service_pb2 as admin_pb
from membank.wire import convert
from membank.wire.codec import PUSH_CODECS
from membank.wire.errors import InvalidArgumentError, Reason
from membank.wire.records import BankInfo, Garbage, GarbageKind, GarbageReport, Placement
from membank.wire.spec import Durability
from tiny_bank import tiny_spec

REPORT = GarbageReport(
    garbage=tuple(
        Garbage(kind=kind, num_objects=int(kind), num_bytes=1 << 40, keys=(f"key-{kind}",))
        for kind in GarbageKind
        if kind is not GarbageKind.UNKNOWN
    ),
    history_from=7,
    dry_run=True,
)


def test_garbage_round_trip() -> None:
    assert convert.garbage_from_pb(convert.garbage_to_pb(REPORT)) == REPORT


def test_every_kind_of_garbage_has_the_number_of_its_name() -> None:
    names = {kind.name: int(kind) for kind in GarbageKind if kind is not GarbageKind.UNKNOWN}
    prefix = "GARBAGE_KIND_"
    sent = {name.removeprefix(prefix): n for name, n in admin_pb.GarbageKind.items() if n}
    assert names == sent


@pytest.mark.parametrize("number", [0, 99])
def test_garbage_of_a_newer_service_is_counted(number: int) -> None:
    message = admin_pb.CollectGarbageResponse(
        garbage=[
            admin_pb.Garbage(
                kind=admin_pb.GarbageKind.ValueType(number), num_objects=3, num_bytes=9
            )
        ]
    )
    (found,) = convert.garbage_from_pb(message).garbage
    assert (found.kind, found.num_objects, found.num_bytes) == (GarbageKind.UNKNOWN, 3, 9)


@pytest.mark.parametrize("durability", list(Durability))
def test_what_an_acknowledgement_means_crosses(durability: Durability) -> None:
    info = BankInfo(
        spec=tiny_spec(),
        revision=3,
        placement=Placement(generation=1, owners=()),
        durability=durability,
        ship_every_s=2.5,
    )
    assert convert.info_from_pb(convert.info_to_pb(info)) == info


def test_an_older_server_promises_the_least() -> None:
    message = convert.info_to_pb(
        BankInfo(spec=tiny_spec(), revision=0, placement=Placement(generation=1, owners=()))
    )
    message.ClearField("durability")
    assert convert.info_from_pb(message).durability is Durability.PROCESS


@pytest.mark.parametrize("name", PUSH_CODECS)
def test_every_encoding_has_a_number(name: str) -> None:
    assert convert.dtype_from_pb(convert.dtype_to_pb(name)) == name


@pytest.mark.parametrize("dtype", ["int8", "sparse"])
def test_no_bank_keeps_what_is_for_the_wire_only(dtype: str) -> None:
    message = convert.spec_to_pb(tiny_spec())
    message.dtype = convert.dtype_to_pb(dtype)
    with pytest.raises(InvalidArgumentError) as caught:
        convert.spec_from_pb(message)
    assert caught.value.reason is Reason.BAD_DTYPE
