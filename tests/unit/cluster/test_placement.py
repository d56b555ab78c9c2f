"""Which shard owns what, and how often that is said to have changed."""

from __future__ import annotations

import pytest

from membank.bank_service.cluster.placement import PlacementTable, assign_partitions, next_move
from membank.wire.errors import InvalidArgumentError


@pytest.mark.parametrize(("num_partitions", "num_shards"), [(4, 1), (4, 2), (7, 3), (5, 5)])
def test_every_partition_has_one_owner_and_loads_differ_by_one(
    num_partitions: int, num_shards: int
) -> None:
    dealt = assign_partitions(num_partitions, [f"s{index}" for index in range(num_shards)])
    assert sorted(p for parts in dealt.values() for p in parts) == list(range(num_partitions))
    sizes = {len(parts) for parts in dealt.values()}
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("num_shards", [0, 5])
def test_a_shard_without_a_partition_is_refused(num_shards: int) -> None:
    with pytest.raises(InvalidArgumentError):
        assign_partitions(4, [str(index) for index in range(num_shards)])


def test_generation_grows_with_every_new_endpoint_and_only_then() -> None:
    table = PlacementTable({"a": (0, 2), "b": (1,)}, clock=lambda: 100.9)
    assert table.current().owners == ()
    table.set_endpoint("a", "host:1")
    table.set_endpoint("b", "host:2")
    assert table.current().generation == 101
    table.set_endpoint("a", "host:1")
    assert table.current().generation == 101
    table.set_endpoint("a", "host:3")
    owners = table.current().owners
    assert table.current().generation == 102
    assert [(o.partition, o.shard_id, o.endpoint) for o in owners] == [
        (0, "a", "host:3"),
        (1, "b", "host:2"),
        (2, "a", "host:3"),
    ]


def test_the_next_controller_goes_on_above_the_last() -> None:
    first = PlacementTable({"a": (0,)}, clock=lambda: 100.0)
    first.set_endpoint("a", "host:1")
    second = PlacementTable({"a": (0,)}, clock=lambda: 105.0)
    second.set_endpoint("a", "host:1")
    assert second.current().generation > first.current().generation


def test_moving_evens_nodes_out_and_comes_to_an_end() -> None:
    located = {f"s{index}": "old" for index in range(5)}
    moves = 0
    while (move := next_move(["new", "newer", "old"], located)) is not None:
        shard_id, node = move
        assert located[shard_id] != node
        located[shard_id] = node
        moves += 1
    assert moves == 3
    assert sorted(list(located.values()).count(node) for node in ("new", "newer", "old")) == [
        1,
        2,
        2,
    ]


@pytest.mark.parametrize(
    ("nodes", "located"),
    [
        (["a"], {"s0": "a", "s1": "a"}),
        (["a", "b"], {"s0": "a"}),
        (["a", "b"], {"s0": "a", "s1": "a", "s2": "b"}),
        ([], {"s0": "gone"}),
    ],
)
def test_what_is_even_enough_stays(nodes: list[str], located: dict[str, str]) -> None:
    assert next_move(nodes, located) is None
