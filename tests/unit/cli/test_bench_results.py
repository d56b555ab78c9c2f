"""Statistics of the load generator: quantiles, rates, memory, comparison with an earlier run."""

from __future__ import annotations

import json
import os
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from membank.cli.bench.comparison import compare, differences, read_results
from membank.cli.bench.plot import check_plot, draw
from membank.cli.bench.process_watch import ProcessFigures, ProcessWatch, growth
from membank.cli.bench.results import Latencies, LoadRow
from membank.cli.bench.workload import Operation
from membank.wire.errors import InvalidArgumentError

MB = 10**6


def group(**changes: int | float | None) -> ProcessFigures:
    """Return figures of one process whose memory is flat."""
    figures = ProcessFigures(
        num_processes=1, cpu_s=3.0, rss_begin_bytes=50 * MB, rss_end_bytes=60 * MB,
        rss_growth_bytes=0,
    )  # fmt: skip
    return replace(figures, **changes)  # type: ignore[arg-type]  # names are those of fields


def row(**changes: object) -> LoadRow:
    """Return a row of 100 fetches of 10 MB in 2 seconds, of 1 to 100 ms each."""
    found = LoadRow(
        name="fetch-x-1-client",
        what="fetches",
        operation=Operation.FETCH,
        seconds=2.0,
        latencies=Latencies(seconds=np.arange(1, 101) / 1e3),
        num_bytes=1000 * MB,
        num_gradients=0,
        num_refused=0,
        run_bytes=1000 * MB,
        errors=Counter(),
        last_error="",
        gave_up=False,
        client=group(),
        server=group(cpu_s=1.5),
        warm_up_s=0.5,
    )
    return replace(found, **changes)  # type: ignore[arg-type]  # names are those of fields


def test_quantiles_are_times_of_calls() -> None:
    latencies = Latencies(seconds=np.array([0.004, 0.001, 0.003, 0.002]))
    assert latencies.quantile_ms(0.5) == 2.0
    assert latencies.quantile_ms(0.75) == 3.0
    assert latencies.quantile_ms(0.99) == latencies.quantile_ms(1.0) == 4.0
    assert Latencies(seconds=np.array([])).quantile_ms(0.5) is None


def test_figures_are_per_second_and_per_gb() -> None:
    assert row().figures == {
        "p50_ms": 50.0,
        "p95_ms": 95.0,
        "p99_ms": 99.0,
        "mb_per_s": 500.0,
        "requests_per_s": 50.0,
        "client_cpu_s_per_gb": 3.0,
        "server_cpu_s_per_gb": 1.5,
    }


def test_a_row_without_calls_or_processes_is_still_a_document() -> None:
    empty = row(latencies=Latencies(seconds=np.array([])), num_bytes=0, run_bytes=0, server=None)
    document = json.loads(json.dumps(empty.to_json()))
    assert document["figures"] == {"mb_per_s": 0.0, "requests_per_s": 0.0}
    assert document["server"] is None
    assert document["client"]["cpu_s_per_gb"] is None


@pytest.mark.parametrize(
    ("changes", "good"),
    [
        ({}, True),
        ({"errors": Counter({"UNAVAILABLE": 1})}, False),
        ({"num_refused": 1}, False),
        ({"gave_up": True}, False),
        ({"server": group(rss_growth_bytes=20 * MB)}, False),
        ({"server": group(rss_growth_bytes=None)}, True),
        ({"client": None, "server": None}, True),
    ],
)
def test_a_run_is_good_unless_something_failed_or_grew(
    changes: dict[str, object], good: bool
) -> None:
    assert row(**changes).is_good is good


def test_memory_is_flat_within_8_mib_or_2_percent() -> None:
    assert group(rss_growth_bytes=8 << 20).is_flat is True
    assert group(rss_growth_bytes=9 << 20).is_flat is False
    assert group(rss_growth_bytes=9 << 20, rss_end_bytes=1000 * MB).is_flat is True
    assert group(rss_growth_bytes=None).is_flat is None


def test_growth_looks_past_the_beginning_and_through_noise() -> None:
    times = list(np.linspace(0, 30, 61))
    jump = [50 * MB if t < 5 else 150 * MB for t in times]
    assert growth(times, jump) == pytest.approx(0, abs=1000)
    rng = np.random.default_rng(0)
    # 1 MB a second: 20 MB over the last 20 of 30 seconds.
    leak = [int(100 * MB + MB * t + rng.normal(0, MB)) for t in times]
    assert growth(times, leak) == pytest.approx(20 * MB, rel=0.1)
    assert growth(times[:8], leak[:8]) is None


def test_a_watch_sees_this_process_work() -> None:
    watch = ProcessWatch([os.getpid()])
    kept = bytearray(64 << 20)
    kept[::4096] = b"x" * len(kept[::4096])
    total = 0
    while (figures := watch.figures()) is not None and figures.cpu_s < 0.05:
        total += sum(range(10_000))
    if figures is None:
        pytest.skip("this system has no /proc")
    assert figures.rss_end_bytes - figures.rss_begin_bytes > 50 << 20
    assert figures.num_processes == 1


def test_a_watch_of_a_process_that_is_not_here_sees_nothing() -> None:
    assert ProcessWatch([]).figures() is None
    assert ProcessWatch([2**22 + 1]).figures() is None


def test_rows_of_the_same_name_are_compared() -> None:
    now = [row(seconds=1.0).to_json(), row(name="push-x-1-client").to_json()]
    before = [row().to_json(), row(name="fetch-y-1-client").to_json()]
    ratios = {compared.figure: compared.ratio for compared in compare(now, before)}
    assert ratios["mb_per_s"] == ratios["requests_per_s"] == 2.0
    assert ratios["p50_ms"] == 1.0
    assert {compared.row for compared in compare(now, before)} == {"fetch-x-1-client"}


def test_rows_that_set_two_things_side_by_side_are_compared_too() -> None:
    now = [{"name": "train", "ours": 3.0, "raw": 4.0, "ratio": 0.75, "unit": "tokens/s"}]
    before = [{"name": "train", "ours": 2.0, "raw": 4.0, "ratio": 0.5, "unit": "tokens/s"}]
    assert {c.figure: c.ratio for c in compare(now, before)} == {
        "ours": 1.5,
        "raw": 1.0,
        "ratio": 1.5,
    }


def test_a_figure_that_was_0_has_no_ratio_in_the_document() -> None:
    (compared,) = compare(
        [{"name": "a", "figures": {"mb_per_s": 1.0}}], [{"name": "a", "figures": {"mb_per_s": 0.0}}]
    )
    assert compared.ratio == float("inf")
    assert compared.to_json()["ratio"] is None


def test_what_else_differs_is_said() -> None:
    now = {"machine": {"cores": 2, "load_5_minutes": 1.0}, "config": {"zipf": 1.0}}
    before = {"machine": {"cores": 4, "load_5_minutes": 0.0}, "config": {"zipf": 1.0}}
    assert differences(now, before) == ["machine cores: 4 -> 2"]


@pytest.mark.parametrize("text", ["", "[]", '{"rows": 3}', '{"rows": [{"no": "name"}]}'])
def test_a_baseline_that_is_none_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "then.json"
    path.write_text(text)
    with pytest.raises(InvalidArgumentError, match=r"then\.json"):
        read_results(path)


def test_a_baseline_that_is_missing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError, match="cannot be read"):
        read_results(tmp_path / "then.json")


@pytest.mark.slow
def test_latencies_are_drawn_with_those_of_before(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "latencies.png"
    check_plot(path)
    draw([row().to_json(), {"name": "no curve"}], path, [row().to_json()])
    assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["latencies.docx", "no-such-folder/latencies.png"])
def test_a_plot_that_cannot_be_written_is_refused_beforehand(tmp_path: Path, name: str) -> None:
    pytest.importorskip("matplotlib")
    with pytest.raises(InvalidArgumentError, match="latencies"):
        check_plot(tmp_path / name)
