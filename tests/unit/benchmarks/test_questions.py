"""The pure parts of the benchmark of open questions: lines, traces, caches, tables."""

import json
import math
import threading

import ml_dtypes
import numpy as np
import pytest
import torch

from benchmarks.questions.batching import Ways
from benchmarks.questions.hierarchy import Layout, num_distinct, replay
from benchmarks.questions.latency import paper_model_s
from benchmarks.questions.layers import WaitedLayers
from benchmarks.questions.overlap import LateMemory, hidden_share
from benchmarks.questions.rendering import TABLES, filled, markdown, size_of
from benchmarks.questions.timing import fit_line, quantiles_ms
from benchmarks.questions.trace import interleave, sessions_of, stays, windows_of
from membank.client import CacheConfig, Eviction
from membank.trainer.corpus import Document
from membank.trainer.model import AnchorConfig
from membank.wire.errors import InvalidArgumentError
from membank.wire.spec import Array, BlockRef, Path


def path(*clusters: int) -> Path:
    return tuple(BlockRef(level, cluster) for level, cluster in enumerate(clusters, start=1))


def document(title: str, text: str) -> Document:
    return Document(doc_id=text, source="book", labels=(), title=title, text=text, embed_text=text)


def test_a_line_gives_back_constant_and_rate() -> None:
    sizes = (1e5, 1e6, 8e7)
    line = fit_line(sizes, [1e-3 + size / 2e9 for size in sizes])
    assert line.constant_s == pytest.approx(1e-3)
    assert line.units_per_s == pytest.approx(2e9)
    assert line.knee == pytest.approx(2e6)


@pytest.mark.parametrize(
    ("seconds", "constant", "rate"),
    [((2.0, 2.0, 1.9), pytest.approx(1.97, abs=0.05), math.inf), ((0.5, 2.0, 3.0), 0.0, None)],
)
def test_no_part_of_a_line_is_negative(
    seconds: tuple[float, ...], constant: float, rate: float | None
) -> None:
    line = fit_line((1.0, 2.0, 3.0), seconds)
    assert line.constant_s == constant
    assert rate is None or line.units_per_s == rate


def test_a_quantile_is_the_time_of_a_call() -> None:
    found = quantiles_ms([0.001 * n for n in range(1, 101)])
    assert found == {
        "p50_ms": pytest.approx(50),
        "p95_ms": pytest.approx(95),
        "p99_ms": pytest.approx(99),
        "calls": 100,
    }


def test_the_papers_figures_follow_from_its_bytes() -> None:
    # Blocks of 3 * 24 * 1024 * r elements of two bytes.
    model = paper_model_s([147_456 * r for r in (512, 128, 32)])
    assert {case: round(1e3 * seconds) for case, seconds in model.items()} == {
        "flat": 198,
        "hierarchy": 38,
        "reload": 47,
    }


def test_layers_note_how_long_they_are_waited_for() -> None:
    first, second = (np.full((3, r, 2), r, ml_dtypes.bfloat16) for r in (1, 2))

    class Slow:
        def layer(self, number: int) -> dict[BlockRef, Array]:
            opened.wait(0.01)
            return {BlockRef(1, 0): first, BlockRef(2, 0): second}

    opened = threading.Event()
    memory = WaitedLayers(Slow())
    layer = memory.layer(0)
    assert memory.waited_s >= 0.01
    assert layer.weights_GPRD.shape == (1, 3, 3, 2)
    assert layer.weights_GPRD[0, 0, :, 0].tolist() == [1, 2, 2]


def test_streams_are_told_by_model_link_and_way() -> None:
    row = {"first_layer_ms": 1.0, "all_layers_ms": 2.0, "first_token_ms": 300.0, "waited_ms": 4.0}
    model = {
        "model": "m", "layers": 7, "bytes": 36_000_000, "forward_ms": 250.0,
        "rows": [{"link": "1 GB/s", "way": way, **row} for way in ("whole fetch", "stream")],
    }  # fmt: skip
    table = TABLES["streams"][1]({"models": [model]})
    assert table.splitlines()[2:] == [
        "| 36 MB, 7 layers, no memory | - | - | 250 | - |",
        "| 36 MB, 7 layers, 1 GB/s, whole fetch | 1 | 2 | 300 | 4 |",
        "| 36 MB, 7 layers, 1 GB/s, stream | 1 | 2 | 300 | 4 |",
    ]


def test_windows_and_sessions_keep_the_order_of_the_text() -> None:
    assert windows_of("a b c d e", 2) == ["a b", "c d", "e"]
    documents = [document("x", "a b c"), document("x", "d"), document("y", "e"), document("x", "f")]
    # A title that comes back later is another visit.
    assert sessions_of(documents, 2) == [["a b", "c", "d"], ["e"], ["f"]]


def test_sessions_take_turns() -> None:
    assert interleave([["a1", "a2", "a3"], ["b1"], [], ["c1", "c2"]], 2) == [
        "a1", "b1", "a2", "c1", "a3", "c2",
    ]  # fmt: skip


def test_how_long_sessions_stay() -> None:
    sessions = [[path(0, 0), path(0, 1), path(0, 1)], [path(1, 2)]]
    assert stays(sessions, 1) == {"stay_share": 1.0, "mean_run": 2.0}
    assert stays(sessions, 2) == {"stay_share": 0.5, "mean_run": 4 / 3}


def test_paths_that_end_stay_nowhere() -> None:
    assert stays([[path(0), path(0)]], 2)["stay_share"] == 0.0


def test_a_replay_counts_what_the_cache_lacks() -> None:
    layout = Layout("hierarchy", {1: 100, 2: 10})
    paths = [path(0, 0), path(0, 1), path(0, 0)]
    found = replay(paths, layout, CacheConfig(max_bytes=120))
    assert found.hits == {1: 2 / 3, 2: 1 / 3}
    assert found.bytes_per_request == (110 + 10) / 3


def test_what_is_pinned_stays_in_a_replay() -> None:
    layout = Layout("hierarchy", {1: 100, 2: 100})
    paths = [path(0, 0), path(0, 1), path(0, 2)] * 2
    # Under LRU alone, level 1 is used as often and goes as often as it must.
    pinned = replay(paths, layout, CacheConfig(max_bytes=150, pinned_levels=(1,)))
    assert pinned.hits == {1: 5 / 6, 2: 0.0}
    assert replay(paths, layout, CacheConfig(max_bytes=150)).hits[1] == 0.0


def test_what_is_asked_for_often_stays_under_lfu() -> None:
    layout = Layout("flat", {1: 1})
    often, once = path(0), [path(n) for n in range(1, 9)]
    paths = [often] * 5 + once + [often]
    lfu = CacheConfig(max_bytes=2, eviction=Eviction.LFU)
    assert (
        replay(paths, layout, lfu).hits[1] > replay(paths, layout, CacheConfig(max_bytes=2)).hits[1]
    )


def test_distinct_blocks_of_a_batch() -> None:
    paths = [path(0, 0), path(0, 1), path(1, 2), path(1)]
    assert [num_distinct(paths, level) for level in (1, 2)] == [2, 3]


@pytest.mark.parametrize(
    ("shown", "whole", "share"),
    [(0.0, 2.0, 1.0), (0.5, 2.0, 0.75), (3.0, 2.0, 0.0), (1.0, 0.0, 0.0)],
)
def test_hidden_share(shown: float, whole: float, share: float) -> None:
    assert hidden_share(shown, whole) == share


def test_all_ways_of_a_batch_compute_the_same() -> None:
    config = AnchorConfig(
        num_layers=2, width=8, num_heads=2, head_dim=4, ffn_width=16, vocab_size=32
    )
    with torch.inference_mode():
        ways = Ways(config, 6, 3, 5)
        ways.check()
        found = ways.all()
        # And the memory matters.
        assert not torch.allclose(found["anchor alone"](), found["loop"](), atol=1e-4)


def test_late_memory_waits_at_its_first_layer() -> None:
    asked: list[str] = []
    block = torch.arange(2 * 3 * 4 * 8).view(2, 3, 4, 8).to(torch.bfloat16)

    def get() -> list[object]:
        asked.append("asked")
        return [block.view(torch.int16).numpy()]

    memory = LateMemory(get, 3)  # type: ignore[arg-type]
    assert memory.layer(2) is None
    assert not asked
    layer = memory.layer(4)
    assert layer is not None
    assert torch.equal(layer.weights_GPRD[0], block[1].float())
    assert memory.layer(3) is not None
    assert asked == ["asked"]


def test_tables_replace_what_stands_between_marks() -> None:
    assert markdown(["a", "b"], [["1", "2"]]) == "| a | b |\n| --- | --: |\n| 1 | 2 |"
    assert [size_of(n) for n in (98_304, 1e6, 5.2e6, 99e6)] == ["98 kB", "1 MB", "5.2 MB", "99 MB"]
    stays_row = {
        "level": 1, "stay_share": 0.5, "by_chance": 0.1, "mean_run": 2.0, "mean_session": 4.0,
    }  # fmt: skip
    answer = {
        "figures": {"stays": [stays_row]}, "quick": True, "commit": "abc", "time_utc": "now",
        "machine": {
            "cores": 2, "architecture": "x", "file_system": "ext4", "load_5_minutes": 0.5,
        },
    }  # fmt: skip
    text = "before\n<!-- figures: stays -->\nold\n<!-- end -->\nafter"
    document = json.loads(json.dumps({"questions": {"hierarchy": answer}}))
    once = filled(text, document)
    assert "| 1 | 50 % | 10 % | 2.0 | 4.0 |" in once
    assert "old" not in once
    assert "A quick run" in once
    assert once.startswith("before\n")
    assert once.endswith("\nafter")
    assert filled(once, document) == once


def test_marks_of_questions_that_were_not_measured_stay() -> None:
    text = "<!-- figures: latency -->\nold\n<!-- end -->"
    assert filled(text, {"questions": {}}) == text


def test_an_unknown_mark_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="no table 'nothing'"):
        filled("<!-- figures: nothing -->\n<!-- end -->", {"questions": {}})
