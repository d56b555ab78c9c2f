"""Question 6: how much of a fetch hides behind computation."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from benchmarks.questions.banks import ALL_RESIDENT, NOTHING_RESIDENT, FiledBank, sized_spec
from benchmarks.questions.latency import Say, connected
from benchmarks.questions.scale import Scale
from benchmarks.questions.timing import median_ms, one_thread, timed
from membank.cli.bench.embedded import EmbeddedService
from membank.cli.bench.training import random_sequences, train_models
from membank.client import BankClient, ClientConfig
from membank.trainer.model import Anchor, AnchorConfig
from membank.trainer.model.memory import LayerMemory
from membank.trainer.model.recipes import paper_160m
from membank.trainer.training import PrefetchConfig, ServedMemory, train_memories
from membank.wire.spec import Array, BlockRef
from membank.wire.spec import Path as BlockPath

_DEPTHS = (0, 1, 2)
_NUM_LATE = 10
_AFTER, _MEANWHILE = "fetch, then compute", "compute meanwhile"
_NUM_TOKENS = 64
_RESIDENT_BYTES = 1 << 30


def measure(folder: Path, scale: Scale, say: Say) -> dict[str, Any]:
    """Return waits of training by prefetch depth, and of prompts by where the memory is placed."""
    with one_thread():
        return {
            "threads": 1,
            "training": _training(folder, scale, say),
            "prompts": _prompts(folder, scale, say),
        }


def hidden_share(shown: float, whole: float) -> float:
    """Return the share of a wait that is not seen, 0 to 1.

    Parameters
    ----------
    shown
        What is waited with overlap.
    whole
        What is waited without, in the same unit.
    """
    return min(1.0, max(0.0, 1 - shown / whole)) if whole else 0.0


# ---- training


def _training(folder: Path, scale: Scale, say: Say) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for (name, config), num_steps in zip(train_models().items(), scale.num_steps, strict=True):
        spec = replace(config.bank_spec(fingerprint=""), max_staleness=1 << 30)
        torch.manual_seed(0)
        anchor = Anchor(config.anchor)
        sequences = random_sequences(spec, config, seed=0)
        stage = replace(
            config.stage2, num_tokens=num_steps * config.stage2.batch_size * config.seq_len
        )
        taken: dict[int, list[dict[str, float]]] = {depth: [] for depth in _DEPTHS}
        with (
            EmbeddedService(
                folder / f"train-{name}", spec, num_shards=1, resident_bytes=_RESIDENT_BYTES
            ) as service,
            BankClient.connect(service.endpoint, config=ClientConfig()) as client,
        ):
            # Depths in turn; the first round makes the blocks and is left out.
            for number in range(2 + scale.num_rounds // 4):
                say(f"overlap: training {name}, round {number}")
                for depth in _DEPTHS:
                    own = replace(stage, prefetch=PrefetchConfig(depth=depth))
                    result = train_memories(anchor, ServedMemory(client), sequences, own)
                    if number:
                        taken[depth].append({**dict(result.phase_seconds), "all": result.seconds})
        rows += _training_rows(name, taken, num_steps)
    return rows


def _training_rows(
    name: str, taken: dict[int, list[dict[str, float]]], num_steps: int
) -> list[dict[str, Any]]:
    means = {
        depth: {
            phase: 1e3 * statistics.median(run[phase] for run in runs) / num_steps
            for phase in runs[0]
        }
        for depth, runs in taken.items()
    }
    return [
        {
            "model": name, "depth": depth, "step_ms": phases["all"],
            "fetch_ms": phases["fetch"], "push_ms": phases["push"],
            "compute_ms": phases["forward"] + phases["backward"],
            "hidden_share": hidden_share(
                phases["fetch"] + phases["push"], means[0]["fetch"] + means[0]["push"]
            ),
            "step_to_depth_0": phases["all"] / means[0]["all"],
        }
        for depth, phases in means.items()
    ]  # fmt: skip


# ---- prompts


class LateMemory:
    """Memory of the last layers, which may still be on its way when the first ones are computed.

    Parameters
    ----------
    blocks
        Gives the weights of each level, (layers that have memory, 3, R, D); may wait for them.
    first_layer
        First layer that has memory.
    """

    def __init__(self, blocks: Callable[[], Sequence[Array]], first_layer: int) -> None:
        self._get = blocks
        self._first_layer = first_layer
        self.waited_s = 0.0
        """Seconds that the forward pass stood still for the blocks."""

    def layer(self, number: int) -> LayerMemory | None:
        """Return the weights that a layer adds, once they are there; None = it has none."""
        if number < self._first_layer:
            return None
        parts = [block[number - self._first_layer].float() for block in self._blocks]
        return LayerMemory(weights_GPRD=torch.cat(parts, dim=1)[None], group_size=1)

    @cached_property
    def _blocks(self) -> list[Tensor]:
        begin = time.perf_counter()
        blocks = self._get()
        self.waited_s = time.perf_counter() - begin
        # torch reads no bfloat16 of numpy's, but its bits; through DLPack, as they are read-only.
        return [from_dlpack(block.view(np.int16)).view(torch.bfloat16) for block in blocks]


def _prompts(folder: Path, scale: Scale, say: Say) -> dict[str, Any]:
    """Measure prompts of a model of the paper's shape with memory in all layers, or in the last ones."""
    recipe = paper_160m()
    assert isinstance(recipe.anchor, AnchorConfig)
    config = replace(recipe.anchor, num_layers=scale.num_layers)
    num_late = min(_NUM_LATE, scale.num_layers - 1)
    widths = [width for width in recipe.memory.block_widths if width]
    # As in the paper's comparison: the same parameters, in fewer layers.
    late_widths = [width * scale.num_layers // num_late for width in widths]
    torch.manual_seed(0)
    model = Anchor(config).requires_grad_(False)
    tokens_BT = torch.randint(0, config.vocab_size, (1, _NUM_TOKENS))
    run = partial(_one_prompt, model, tokens_BT)
    rows: list[dict[str, Any]] = []
    layouts = {
        "every layer": (scale.num_layers, widths),
        f"last {num_late} of {scale.num_layers} layers": (num_late, late_widths),
    }
    plain: list[float] = []
    with torch.inference_mode():
        for name, (num_layers, block_widths) in layouts.items():
            spec = sized_spec(
                (2, 1, 1), block_widths,
                num_layers=num_layers, width=config.width, dtype="bfloat16",
            )  # fmt: skip
            bank = FiledBank.make(folder / f"prompts-{num_layers}", spec)
            for place, is_cold in _places(bank):
                say(f"overlap: prompts, memory in {name}, from {place}")
                first_layer = scale.num_layers - num_layers
                taken: dict[str, list[tuple[float, float]]] = {_AFTER: [], _MEANWHILE: []}
                with _fetcher(bank, is_cold=is_cold) as fetches:
                    # In turn, so that a slow moment of the machine is one for all.
                    for number in range(scale.num_prompts + 1):
                        seconds = timed(lambda: model(tokens_BT))
                        found = {way: run(fetches, way, first_layer) for way in taken}
                        if number:  # the first ones are a warm-up
                            plain.append(seconds)
                            for way, times in found.items():
                                taken[way].append(times)
                rows += [
                    _prompt_row(name, place, way, times, spec_bytes(bank))
                    for way, times in taken.items()
                ]
    _add_shares(rows, scale.num_layers, num_late, median_ms(plain))
    return {
        "layers": scale.num_layers, "late_layers": num_late, "tokens": _NUM_TOKENS,
        "anchor_params": config.num_params,
        "forward_ms": median_ms(plain), "rows": rows,
    }  # fmt: skip


def spec_bytes(bank: FiledBank) -> int:
    """Return the bytes of a path."""
    return sum(bank.spec.weight_bytes(level + 1) for level in range(bank.spec.num_levels))


def _places(bank: FiledBank) -> list[tuple[str, bool]]:
    return [("shared memory", False), *([("disk", True)] if bank.can_drop() else [])]


class _PathFetches:
    """Starts fetches of the paths of a bank, in turn, by a thread."""

    def __init__(
        self, bank: FiledBank, client: BankClient, thread: ThreadPoolExecutor, *, is_cold: bool
    ) -> None:
        self._bank = bank
        self._client = client
        self._thread = thread
        self._is_cold = is_cold
        leaves = bank.blocks(bank.spec.num_levels)
        self._paths = itertools.cycle([bank.spec.path_to(leaf) for leaf in leaves])
        for _ in leaves:
            _fetched(client, next(self._paths))
        self._path: BlockPath = ()

    def prepare(self) -> None:
        """Choose the next path; nothing of this is timed."""
        self._path = next(self._paths)
        if self._is_cold:
            self._bank.drop(self._path)

    def start(self) -> Future[list[Array]]:
        """Start its fetch."""
        return self._thread.submit(_fetched, self._client, self._path)


@contextmanager
def _fetcher(bank: FiledBank, *, is_cold: bool) -> Iterator[_PathFetches]:
    """Serve a bank, by a shard that has everything in memory or nothing."""
    with (
        bank.served(resident_bytes=NOTHING_RESIDENT if is_cold else ALL_RESIDENT) as endpoint,
        connected(endpoint, ClientConfig()) as client,
        ThreadPoolExecutor(1) as thread,
    ):
        yield _PathFetches(bank, client, thread, is_cold=is_cold)


def _fetched(client: BankClient, path: Sequence[BlockRef]) -> list[Array]:
    fetched = client.fetch(path)
    return [fetched.weights[ref] for ref in path]


def _one_prompt(
    model: Anchor,
    tokens_BT: Tensor,
    fetches: _PathFetches,
    way: str,
    first_layer: int,
) -> tuple[float, float]:
    """Return the seconds from the start of the fetch to the logits, and those that it was waited for."""
    fetches.prepare()
    begin = time.perf_counter()
    fetch = fetches.start()
    memory = LateMemory(fetch.result, first_layer)
    if way == _AFTER:
        fetch.result()
        waited = time.perf_counter() - begin
        model(tokens_BT, None, memory)
    else:
        model(tokens_BT, None, memory)
        waited = memory.waited_s
    return time.perf_counter() - begin, waited


def _prompt_row(
    name: str, place: str, way: str, taken: Sequence[tuple[float, float]], num_bytes: int
) -> dict[str, Any]:
    return {
        "placement": name, "place": place, "way": way, "bytes": num_bytes,
        "first_token_ms": median_ms([seconds for seconds, _ in taken]),
        "waited_ms": median_ms([waited for _, waited in taken]),
    }  # fmt: skip


def _add_shares(
    rows: Sequence[dict[str, Any]], num_layers: int, num_late: int, forward_ms: float
) -> None:
    """Add what of each fetch was hidden, and what would be by the layers' share of the time."""
    whole = {
        (row["placement"], row["place"]): row["waited_ms"] for row in rows if row["way"] == _AFTER
    }
    for row in rows:
        fetch_ms = whole[row["placement"], row["place"]]
        is_late = row["placement"] != "every layer" and row["way"] == _MEANWHILE
        before_ms = forward_ms * (num_layers - num_late) / num_layers if is_late else 0.0
        row["hidden_share"] = hidden_share(row["waited_ms"], fetch_ms)
        row["expected_share"] = min(1.0, before_ms / fetch_ms)
