"""`membank bench swap`: what tells a mixture, what counts as missed, and a whole run."""

from __future__ import annotations

import json
import re
from array import array
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from command_line import membank
from membank.cli.bench.swap_clients import TimedCalls
from membank.cli.bench.swap_load import (
    Span,
    SwapLoadConfig,
    SwapRun,
    apart_leaves,
    spread_leaves,
)
from membank.cli.bench.swap_marks import (
    MAX_MARK,
    MarkedContents,
    MixtureDetector,
    read_marks,
    write_mark,
)
from membank.cli.bench.swap_results import SwapRow
from membank.wire.errors import FailedPreconditionError, InvalidArgumentError
from membank.wire.spec import Array, BankSpec, BlockRef, LevelSpec

TOP, LEAF, ELSEWHERE = BlockRef(1, 0), BlockRef(2, 1), BlockRef(2, 9)
FIRST = {TOP: 5, LEAF: 7}


def spec_of(dtype: str = "float32", fan_outs: Sequence[int] = (4, 4)) -> BankSpec:
    """Return a bank of 4 + 16 blocks of 3 KB."""
    levels = tuple(LevelSpec(fan_out=fan_out, block_width=4) for fan_out in fan_outs)
    return BankSpec(
        name="marks", num_layers=2, width=32, levels=levels, dtype=dtype, partition_level=2
    )


def versions_of(mark: int) -> dict[BlockRef, int]:
    """Return the versions of the blocks after so many swaps."""
    return {ref: version + mark - 1 for ref, version in FIRST.items()}


def contents_of(mark: int) -> dict[BlockRef, Array]:
    """Return the contents of a swap, to keep."""
    contents = MarkedContents(spec_of(), list(FIRST), 0)
    return {ref: weight.copy() for ref, weight in contents.marked(mark).items()}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("mark", [1, 2, MAX_MARK])
def test_marks_are_read_as_they_were_written_and_are_finite(dtype: str, mark: int) -> None:
    weights = MarkedContents(spec_of(dtype), [TOP], 0).marked(mark)
    assert read_marks(weights[TOP]) == {mark}
    assert np.isfinite(weights[TOP].astype(np.float32)).all()


def test_a_mark_is_at_both_ends_and_replaces_the_one_before() -> None:
    weight = np.ones((2, 3, 4, 32), np.float32)
    write_mark(weight, 1)
    write_mark(weight, 2)
    assert read_marks(weight) == {2}
    weight.reshape(-1)[-1] = 1
    assert len(read_marks(weight)) == 2


@pytest.mark.parametrize("mark", [0, MAX_MARK + 1])
def test_a_mark_that_would_be_no_number_is_refused(mark: int) -> None:
    with pytest.raises(ValueError, match="mark"):
        write_mark(np.ones(4, np.float32), mark)


def test_swaps_that_follow_one_another_change_every_part() -> None:
    one, other = contents_of(1), contents_of(2)
    assert all((one[ref] != other[ref]).all() for ref in FIRST)


def test_fetches_that_are_wholly_of_one_swap_are_no_mixture() -> None:
    detector = MixtureDetector(FIRST)
    for mark in (1, 1, 2, 4):
        detector.check(contents_of(mark), versions_of(mark))
    # One that knows only a part of the path, and one that knows nothing of it.
    detector.check({TOP: contents_of(4)[TOP]}, versions_of(4))
    detector.check({ELSEWHERE: contents_of(1)[TOP]}, {ELSEWHERE: 0})
    assert detector.seen.num_mixed == 0
    assert detector.seen.num_checked == 5
    assert detector.seen.marks == {1, 2, 4}


def _halves(mark: int, other: int) -> Mapping[BlockRef, Array]:
    return {TOP: contents_of(mark)[TOP], LEAF: contents_of(other)[LEAF]}


def _torn() -> Mapping[BlockRef, Array]:
    contents = contents_of(2)
    half = contents[LEAF].size // 2
    contents[LEAF].reshape(-1)[:half] = contents_of(1)[LEAF].reshape(-1)[:half]
    return contents


@pytest.mark.parametrize(
    ("weights", "versions", "words"),
    [
        (_halves(1, 2), versions_of(1) | {LEAF: versions_of(2)[LEAF]}, "several swaps"),
        (_torn(), versions_of(2), r"holds marks \[1, 2\]"),
        (contents_of(2), versions_of(1), "under the versions"),
        (contents_of(1), versions_of(1) | {LEAF: versions_of(2)[LEAF]}, "under the versions"),
        (contents_of(2), versions_of(2), "went back from 3 to 2"),
    ],
)
def test_a_mixture_is_told(
    weights: Mapping[BlockRef, Array], versions: Mapping[BlockRef, int], words: str
) -> None:
    detector = MixtureDetector(FIRST)
    if "back" in words:
        detector.check(contents_of(3), versions_of(3))
    detector.check(weights, versions)
    assert detector.seen.num_mixed == 1
    (example,) = detector.seen.examples
    assert re.search(words, example), example


def calls_at(*begins_and_seconds: tuple[float, float]) -> TimedCalls:
    """Return one reader's calls."""
    begins, seconds = zip(*begins_and_seconds, strict=True)
    return TimedCalls(begins=array("d", begins), seconds=array("d", seconds))


def row_of(*readers: TimedCalls, pushers: Sequence[TimedCalls] = ()) -> SwapRow:
    """Return a row of two pairs of phases of 10 s, with swaps of 2 s in the middle of each."""
    run = SwapRun(
        quiet=[Span(0, 10), Span(20, 30)],
        swapping=[Span(10, 20), Span(30, 40)],
        swaps=[Span(14, 16), Span(34, 36)],
        readers=list(readers),
        pushers=list(pushers),
    )
    return SwapRow(name="swap-x", what="fetches", run=run, path_bytes=36)


def test_a_fetch_belongs_to_the_phase_in_which_it_began() -> None:
    row = row_of(calls_at((9, 2), (11, 3), (13, 2), (15, 5)), calls_at((25, 4), (41, 9)))
    assert row.quiet.seconds.tolist() == [2, 4]
    assert row.swapping.seconds.tolist() == [3, 2, 5]
    # Under way at 14 to 16: those that began at 11, 13 and 15.
    assert row.beside.seconds.tolist() == [3, 2, 5]


def test_the_ratio_is_that_of_all_phases_and_is_told_by_pairs_too() -> None:
    row = row_of(calls_at((1, 1), (11, 1.2), (21, 2), (31, 2.8)))
    assert row.ratio == pytest.approx(1.4)
    assert row.pair_ratios == pytest.approx((1.2, 1.4))
    assert row.passed


@pytest.mark.parametrize("what", ["slow", "failed", "failed push", "mixed", "nothing"])
def test_a_row_is_missed_where_it_is_slow_or_wrong(what: str) -> None:
    reader = calls_at((1, 1), (11, 1.6 if what == "slow" else 1.4), (15, 0.1))
    pusher = TimedCalls()
    if what == "failed":
        reader.errors["deadline"] += 1
    elif what == "failed push":
        pusher.errors["deadline"] += 1
    elif what == "mixed":
        reader.seen.num_mixed += 1
    row = row_of(TimedCalls() if what == "nothing" else reader, pushers=[pusher])
    assert not row.passed
    json.dumps(row.to_json(), allow_nan=False)


@pytest.mark.parametrize(
    "fields",
    [
        {"num_pairs": 0},
        {"num_readers": 0},
        {"num_leaves": 0},
        {"phase_s": 0.0},
        {"every_s": 0.0},
        {"phase_s": 1.0, "every_s": 2.0},
        {"num_pairs": 100_000},
    ],
)
def test_a_run_that_cannot_be_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgumentError, match=next(iter(fields))):
        SwapLoadConfig(**fields)


def test_the_swapped_path_lies_on_as_many_shards_as_there_are() -> None:
    spec = spec_of()
    owners = {partition: f"shard-{partition % 2}" for partition in range(spec.num_partitions)}
    leaves = spread_leaves(spec, owners, 5)
    assert len(set(leaves)) == 5
    path = spec.path_to(leaves[0])
    assert len({owners[spec.partition_of(ref)] for ref in path}) == 2
    assert len(spread_leaves(spec, owners, 100)) == 16


def test_pushes_leave_the_swapped_path_alone() -> None:
    spec = spec_of()
    path = set(spec.path_to(LEAF))
    leaves = apart_leaves(spec, LEAF, 3)
    assert leaves
    assert all(path.isdisjoint(spec.path_to(leaf)) for leaf in leaves)
    with pytest.raises(FailedPreconditionError, match="every path"):
        apart_leaves(spec_of(fan_outs=(1, 4)), LEAF, 3)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("--preset", "3tb"), "paper_1_4b"),
        (("--every", "9"), "every_s"),
        (("--plot", "figure.docx"), "figure.docx"),
        (("--clients", "0"), "--clients"),
    ],
)
def test_bad_input_is_said_before_anything_is_started(args: tuple[str, ...], words: str) -> None:
    ended = membank("bench", "swap", *args)
    assert ended.code == 2, ended.err
    assert words in ended.err
    assert "Traceback" not in ended.err


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(400)
def test_a_path_is_swapped_whole_under_load(tmp_path: Path) -> None:
    out, plot = tmp_path / "swap.json", tmp_path / "swap.png"
    ended = membank(
        "bench", "swap", "--quick", "--leaves", "3", "--pushers", "1", "--dir", str(tmp_path / "d"),
        "--json", str(out), "--plot", str(plot),
    )  # fmt: skip
    assert ended.code == 0, ended.err
    document = json.loads(out.read_text())
    assert {"commit", "versions", "machine", "config", "time_utc"} <= document.keys()
    row, quiet, swapping = document["rows"]
    assert row["name"] == "swap-100kb-2-clients-3-leaves-pushes"
    assert row["fetches"]["mixed"] == 0
    assert row["fetches"]["checked"] > 0
    assert row["fetches"]["swaps_seen"] > 1
    assert row["errors"] == {}
    # Two phases with three swaps each, unless one takes longer than its interval.
    assert 2 <= row["swaps"] <= 6
    assert row["pushes"] > 0
    assert row["figures"]["p99_ratio"] > 0
    assert quiet["latency_ms"]["p99"] > 0
    assert swapping["latency_ms"]["p99"] > 0
    assert plot.stat().st_size > 0
    assert list((tmp_path / "d").iterdir()) == []
