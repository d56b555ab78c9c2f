"""Settings of a shard are checked where they are made."""

from __future__ import annotations

import pytest

from membank.bank_service.shard import Durability, ShardConfig
from membank.wire.errors import InvalidArgumentError


def test_durability_may_be_given_by_name() -> None:
    assert ShardConfig(durability="host").durability is Durability.HOST  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("durability", "forever"),
        ("consolidate_bytes", 0),
        ("consolidate_updates", 0),
        ("spare_bytes", -1),
        ("segment_bytes", 0),
        ("resident_bytes", -1),
        ("retained_revisions", 0),
        ("retained_s", -1.0),
        ("retained_requests", 0),
        ("hold_wait_s", -0.5),
        ("settle_after_s", float("nan")),
        ("watch_queue_events", 0),
    ],
)
def test_what_is_out_of_range_is_named(name: str, value: object) -> None:
    with pytest.raises(InvalidArgumentError, match=name):
        ShardConfig(**{name: value})  # type: ignore[arg-type]
