"""The pure parts of the benchmark of peers: who is measured when, statistics, ratios, blocks."""

from collections.abc import Callable

import numpy as np
import pytest

from benchmarks.peers.blocks import Blocks
from benchmarks.peers.contestant import Reach
from benchmarks.peers.lineup import blocks_stage, paths_stage
from benchmarks.peers.ratios import Figure, Rule, changes, judge, rules, tally
from benchmarks.peers.rounds import Round, Samples, interleave
from benchmarks.peers.rules import adagrad_step, adamw_step, after_first_step
from benchmarks.peers.tasks import FULL, QUICK, Scale


def samples(*costs_s: float) -> Samples:
    return Samples(tuple(Round((cost_s,)) for cost_s in costs_s))


def rule(**changed: object) -> Rule:
    settings: dict[str, object] = {
        "name": "ours-to-theirs",
        "task": "task",
        "ours": "ours",
        "others": ("slow", "fast"),
        "limit": 1.0,
    }
    return Rule(**(settings | changed))  # type: ignore[arg-type]


def test_everybody_is_measured_in_every_round_and_nobody_always_first() -> None:
    calls: list[tuple[str, int]] = []

    def measure(name: str, number: int) -> Round:
        calls.append((name, number))
        return Round((1.0,))

    taken, failed = interleave(["a", "b", "c"], 5, measure)
    assert failed == {}
    assert {name: len(s.rounds) for name, s in taken.items()} == {"a": 5, "b": 5, "c": 5}
    orders = [[name for name, number in calls if number == n] for n in range(6)]
    assert all(sorted(order) == ["a", "b", "c"] for order in orders)
    assert {order[0] for order in orders} == {"a", "b", "c"}


def test_the_first_round_does_not_count() -> None:
    taken, _ = interleave(["a"], 2, lambda name, number: Round((float(number),)))
    assert taken["a"].costs_s == (1.0, 2.0)


def test_who_fails_is_left_out_with_the_reason_and_the_others_go_on() -> None:
    def measure(name: str, number: int) -> Round:
        if (name, number) == ("b", 1):
            raise ConnectionError("gone")
        return Round((1.0,))

    taken, failed = interleave(["a", "b"], 3, measure)
    assert failed == {"b": "gone"}
    assert list(taken) == ["a"]
    assert len(taken["a"].rounds) == 3


def test_a_round_costs_the_median_call_of_one_client_and_the_share_of_the_wall_time_of_many() -> (
    None
):
    assert Round((1.0, 2.0, 9.0)).cost_s == 2.0
    assert Round((4.0, 4.0, 4.0, 4.0), wall_s=8.0).cost_s == 2.0


@pytest.mark.parametrize(
    ("percent", "value"), [(50, 50.0), (95, 95.0), (99, 99.0), (100, 100.0), (0, 1.0)]
)
def test_percentiles_are_of_all_calls(percent: float, value: float) -> None:
    first, second = (tuple(map(float, r)) for r in (range(1, 51), range(51, 101)))
    assert Samples((Round(second), Round(first))).percentile_s(percent) == value


def test_a_ratio_is_the_median_over_rounds_with_the_fastest_of_the_others() -> None:
    results = {
        "task": {
            "ours": samples(1.0, 1.0, 4.0),
            "slow": samples(9.0, 9.0, 9.0),
            "fast": samples(2.0, 3.0, 4.0),
        }
    }
    ratio = judge(rule(), results)
    assert ratio.other == "fast"
    assert ratio.rounds == (2.0, 3.0, 1.0)
    assert ratio.value == 2.0
    assert ratio.passed is True
    assert judge(rule(limit=2.1), results).passed is False


def test_where_time_is_compared_less_is_better() -> None:
    results = {"task": {"ours": samples(1.2), "fast": samples(1.0)}}
    assert judge(rule(figure=Figure.COST, limit=1.1), results).passed is False
    assert judge(rule(figure=Figure.COST, limit=1.3), results).passed is True


def test_a_time_of_its_own_is_compared_with_nobody() -> None:
    ratio = judge(rule(figure=Figure.SECONDS, limit=0.002), {"task": {"ours": samples(0.001)}})
    assert (ratio.value, ratio.other, ratio.passed) == (0.001, "", True)


@pytest.mark.parametrize(
    ("there", "missing"), [({}, "ours"), ({"ours": samples(1.0)}, "slow, fast")]
)
def test_a_ratio_that_cannot_be_computed_says_who_is_missing(
    there: dict[str, Samples], missing: str
) -> None:
    ratio = judge(rule(), {"task": there})
    assert ratio.value is None
    assert ratio.passed is None
    assert missing in ratio.reason
    assert ratio.to_json()["not_run"] == ratio.reason


@pytest.mark.parametrize("scale", [FULL, QUICK])
def test_every_ratio_is_of_contestants_and_tasks_that_there_are(scale: Scale) -> None:
    stages = [make(scale) for make in (blocks_stage, paths_stage)]
    large, small = (c.name for c in stages[1].contestants)
    reaches = {c.name: c.reach for stage in stages for c in stage.contestants}
    doing = {who: set(tasks) for stage in stages for who, tasks in stage.tasks.items()}
    for made in rules(reaches, large, small):
        assert made.task in doing[made.ours], made.name
        if made.figure is not Figure.SECONDS:
            assert any(made.task in doing[other] for other in made.others), made.name
            assert made.ours not in made.others


def test_copies_are_not_compared_with_views_nor_networks_with_shared_memory() -> None:
    reaches = {
        "net": Reach.NETWORK,
        "host": Reach.SAME_HOST,
        "view": Reach.VIEW,
        "raw": Reach.FLOOR,
    }
    by_name = {made.name: made for made in rules(reaches, "large", "small")}
    assert by_name["grpc-fetch-8mb-to-fastest-networked-peer"].others == ("net",)
    assert by_name["same-host-fetch-8mb-to-fastest-copying-peer"].others == ("net", "host")


def test_targets_are_counted_apart_from_what_has_none() -> None:
    here = {"task": {"ours": samples(1.0), "fast": samples(2.0)}}
    limits = (1.0, 3.0, 4.0, None)
    ratios = [judge(rule(limit=limit), here).to_json() for limit in limits]
    ratios.append(judge(rule(ours="nobody"), here).to_json())
    assert tally(ratios) == {"reached": 1, "missed": 2, "not_run": 1}


def test_views_have_no_target_and_say_what_differs() -> None:
    by_name = {made.name: made for made in rules({"ray view": Reach.VIEW}, "large", "small")}
    for size in ("8mb", "36mb"):
        view = by_name[f"view-fetch-{size}-to-ray-view"]
        assert view.limit is None
        assert "CRC" in view.note
        assert judge(view, {}).to_json()["note"] == view.note


def test_changes_are_of_the_ratios_that_both_results_have() -> None:
    now: list[dict[str, object]] = [
        {"name": "a", "value": 2.0},
        {"name": "b", "value": None},
        {"name": "c", "value": 1.0},
    ]
    before: list[dict[str, object]] = [{"name": "a", "value": 1.0}, {"name": "b", "value": 1.0}]
    assert changes(now, before) == [("a", 1.0, 2.0)]


def test_blocks_differ_and_are_the_same_in_every_process() -> None:
    blocks = Blocks.of(2)
    assert blocks.count("100kb") >= 1000
    first, second = blocks.content("1mb/0"), blocks.content("1mb/1")
    assert first.shape == blocks.size("1mb").shape
    assert not np.array_equal(first, second)
    assert np.array_equal(first, Blocks.of(2).content("1mb/0"))


def test_topics_are_drawn_by_a_zipf_law_and_otherwise_in_turn() -> None:
    tasks = blocks_stage(FULL).tasks["memcpy"]
    zipf, plain = tasks["zipf-1mb-clients-1"], tasks["fetch-1mb"]
    drawn = [key for number in range(50) for (key,) in zipf.draw(number, 0)]
    assert drawn.count("1mb/0") > len(drawn) / len(zipf.keys) * 4
    assert zipf.draw(1, 0) == zipf.draw(1, 0) != zipf.draw(1, 1)
    assert [key for (key,) in plain.draw(0, 0)] == list(plain.keys[: plain.num_calls])


@pytest.mark.parametrize(
    ("name", "step", "num_states"), [("adagrad", adagrad_step, 1), ("adamw", adamw_step, 2)]
)
def test_the_arithmetic_that_pushes_are_checked_by_is_that_of_the_kernels(
    name: str, step: Callable[..., None], num_states: int
) -> None:
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    weight, gradient = (rng.standard_normal(1000, np.float32) for _ in range(2))
    stepped = torch.from_numpy(weight.copy())
    state = [torch.zeros(1000) for _ in range(num_states)]
    step(stepped, torch.from_numpy(gradient), state[0] if num_states == 1 else tuple(state))
    assert np.allclose(stepped.numpy(), after_first_step(name, weight, gradient), atol=1e-6)
