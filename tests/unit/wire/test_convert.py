"""What crosses the wire comes back as it was."""

from __future__ import annotations

import pytest

from membank.v1 import admin_service_pb2 as admin_pb
from membank.wire import convert
from membank.wire.records import Garbage, GarbageKind, GarbageReport

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
