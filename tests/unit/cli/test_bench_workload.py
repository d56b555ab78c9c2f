"""What the load generator asks for: reproducible, skewed, bounded, with the paper's sizes."""

from __future__ import annotations

from collections import Counter
from itertools import islice

import pytest

from membank.cli.bench.presets import BLOCK_PRESETS, PAPER_PRESETS, preset_spec
from membank.cli.bench.workload import (
    Operation,
    Traffic,
    ZipfPaths,
    choose_leaves,
    in_batches,
    touched_blocks,
)
from membank.wire.errors import InvalidArgumentError
from membank.wire.spec import BlockRef

# Blocks of each level, one fetch and the bank, in MB of bfloat16: arXiv 2510.02375, tables 1 to 3
# and 4 to 6 (3 * layers * width * r parameters a block, 16 children per cluster).
PAPER_MB = {
    "paper_160m": ((27.5, 6.88, 1.72), 36.1, 9_240),
    "paper_410m": ((75.5, 18.9, 4.72), 99.1, 25_400),
    "paper_1_4b": ((226.5, 75.5, 4.72), 306.7, 42_300),
    "gemma3_270m": ((35.4, 8.85, 2.21), 46.4, 11_900),
    "qwen2_5_0_5b": ((66.1, 16.5, 4.13), 86.7, 22_200),
    "llama3_2_1b": ((151.0, 50.3, 3.15), 204.5, 28_200),
}


@pytest.mark.parametrize("name", PAPER_PRESETS)
def test_a_model_of_the_paper_has_the_papers_sizes(name: str) -> None:
    spec = preset_spec(name)
    blocks, fetch, bank = PAPER_MB[name]
    sizes = [spec.weight_bytes(level) / 1e6 for level in range(1, spec.num_levels + 1)]
    assert sizes == pytest.approx(blocks, rel=0.005)
    assert sum(sizes) == pytest.approx(fetch, rel=0.005)
    counts = [spec.num_clusters(level) for level in range(1, spec.num_levels + 1)]
    assert counts == [16, 256, 4096]
    assert sum(n * mb for n, mb in zip(counts, sizes, strict=True)) == pytest.approx(
        bank, rel=0.005
    )


@pytest.mark.parametrize("name", BLOCK_PRESETS)
def test_a_block_preset_has_blocks_of_its_name(name: str) -> None:
    spec = preset_spec(name)
    wanted = float(name.removesuffix("kb").removesuffix("mb")) * (1e3 if "kb" in name else 1e6)
    for level in range(1, spec.num_levels + 1):
        assert spec.weight_bytes(level) == pytest.approx(wanted, rel=0.02)


def test_an_unknown_preset_is_refused_with_those_that_exist() -> None:
    with pytest.raises(InvalidArgumentError, match="paper_160m"):
        preset_spec("paper_9000b")


def test_the_same_seed_gives_the_same_paths_and_another_one_others() -> None:
    spec = preset_spec("100kb")
    leaves = choose_leaves(spec, max_bytes=10**9, with_optimizer=False, seed=5)
    assert leaves == choose_leaves(spec, max_bytes=10**9, with_optimizer=False, seed=5)
    assert leaves != choose_leaves(spec, max_bytes=10**9, with_optimizer=False, seed=6)

    def first(seed: tuple[int, ...]) -> list[object]:
        return list(islice(ZipfPaths(spec, leaves, 1.0, seed), 200))

    assert first((5, 0)) == first((5, 0))
    assert first((5, 0)) != first((5, 1))
    # Written down: a baseline is only worth something if the same calls are made.
    paths = islice(ZipfPaths(spec, leaves, 1.0, (5, 0)), 5)
    assert [path[-1].cluster for path in paths] == [2074, 3253, 21, 3446, 2092]


def test_popularity_follows_zipf() -> None:
    spec = preset_spec("100kb")
    leaves = [BlockRef(3, cluster) for cluster in range(10)]
    drawn = Counter(path[-1] for path in islice(ZipfPaths(spec, leaves, 1.0, (0,)), 40_000))
    total = sum(1 / rank for rank in range(1, 11))
    for rank, leaf in enumerate(leaves, start=1):
        assert drawn[leaf] / 40_000 == pytest.approx(1 / rank / total, rel=0.12)


def test_with_exponent_0_all_leaves_are_alike() -> None:
    spec = preset_spec("100kb")
    leaves = [BlockRef(3, cluster) for cluster in range(4)]
    drawn = Counter(path[-1] for path in islice(ZipfPaths(spec, leaves, 0.0, (0,)), 8_000))
    assert all(drawn[leaf] == pytest.approx(2_000, rel=0.1) for leaf in leaves)


def test_a_path_has_one_block_of_each_level_above_its_leaf() -> None:
    spec = preset_spec("1mb")
    leaf = BlockRef(3, 0x123)
    (path,) = islice(ZipfPaths(spec, [leaf], 1.0, (0,)), 1)
    assert path == (BlockRef(1, 0x1), BlockRef(2, 0x12), leaf)


@pytest.mark.parametrize("with_optimizer", [False, True])
def test_what_is_touched_stays_within_its_bytes(with_optimizer: bool) -> None:
    spec = preset_spec("paper_160m")
    limit = 400_000_000
    leaves = choose_leaves(spec, max_bytes=limit, with_optimizer=with_optimizer, seed=0)
    refs = touched_blocks(spec, leaves)
    held = sum(
        spec.weight_bytes(ref.level) + with_optimizer * spec.optimizer_bytes(ref.level)
        for ref in refs
    )
    assert 0.9 * limit < held <= limit
    assert len(leaves) > 5


def test_one_path_is_touched_whatever_it_has() -> None:
    spec = preset_spec("paper_1_4b")
    assert len(choose_leaves(spec, max_bytes=1, with_optimizer=True, seed=0)) == 1


def test_a_large_limit_touches_every_leaf_once() -> None:
    spec = preset_spec("100kb")
    leaves = choose_leaves(spec, max_bytes=1 << 40, with_optimizer=False, seed=0)
    assert len(set(leaves)) == len(leaves) == 4096


def test_batches_hold_all_blocks_in_order_and_not_too_many_bytes() -> None:
    spec = preset_spec("1mb")
    refs = [BlockRef(3, cluster) for cluster in range(10)]
    batches = list(in_batches(spec, refs, 3 * spec.weight_bytes(1)))
    assert [len(batch) for batch in batches] == [3, 3, 3, 1]
    assert [ref for batch in batches for ref in batch] == refs
    assert [len(batch) for batch in in_batches(spec, refs, 1)] == [1] * 10


def test_clients_share_the_requests() -> None:
    traffic = Traffic(num_requests=10)
    assert [traffic.requests_of(n, 4) for n in range(4)] == [3, 3, 2, 2]
    assert Traffic(duration_s=1).requests_of(0, 4) is None


def test_the_share_of_pushes_says_which_calls_occur() -> None:
    assert Traffic(duration_s=1).operations == (Operation.FETCH,)
    assert Traffic(duration_s=1, push_share=1).operations == (Operation.PUSH,)
    assert Traffic(duration_s=1, push_share=0.5).operations == tuple(Operation)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"num_requests": 0},
        {"duration_s": 0.0},
        {"duration_s": 1.0, "push_share": 1.5},
        {"duration_s": 1.0, "zipf": -1.0},
        {"duration_s": 1.0, "dtype": "float64"},
        {"duration_s": 1.0, "seed": -1},
    ],
)
def test_traffic_out_of_range_is_refused(fields: dict[str, object]) -> None:
    with pytest.raises(InvalidArgumentError):
        Traffic(**fields)  # type: ignore[arg-type]  # on purpose
