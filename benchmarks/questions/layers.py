"""Question 6 over a network: what is gained where layers are used as they come."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from benchmarks.questions.banks import ALL_RESIDENT, FiledBank, sized_spec
from benchmarks.questions.latency import Say
from benchmarks.questions.link import linked
from benchmarks.questions.scale import Scale
from benchmarks.questions.timing import median_ms, one_thread, timed
from membank.client import BankClient, FetchedBlocks
from membank.trainer.model import Anchor, AnchorConfig, LayerMemory, Recipe
from membank.trainer.model.recipes import paper_160m, paper_410m
from membank.wire.spec import Array, BlockRef
from membank.wire.spec import Path as BlockPath

LINKS: Mapping[str, float | None] = {"loopback": None, "1 GB/s": 1e9, "100 MB/s": 1e8}
"""Bandwidth towards the client, in bytes per second; None = as it comes."""
WHOLE, STREAM = "whole fetch", "stream"
_NUM_TOKENS = 64


class Layers(Protocol):
    """A path, layer by layer."""

    def layer(self, number: int) -> dict[BlockRef, Array]:
        """Return a layer of all blocks."""


@dataclass(frozen=True, slots=True)
class _Whole:
    fetched: FetchedBlocks

    def layer(self, number: int) -> dict[BlockRef, Array]:
        return {ref: weight[number] for ref, weight in self.fetched.weights.items()}


class WaitedLayers:
    """Memory of one prompt that notes how long its layers are waited for.

    Parameters
    ----------
    layers
        The path, in bfloat16.
    """

    def __init__(self, layers: Layers) -> None:
        self._layers = layers
        self.waited_s = 0.0
        """Seconds that the forward pass stood still."""

    def layer(self, number: int) -> LayerMemory:
        """Return the weights that a layer adds, once they are there."""
        begin = time.perf_counter()
        blocks = self._layers.layer(number)
        self.waited_s += time.perf_counter() - begin
        parts = [_tensor(block).float() for block in blocks.values()]
        return LayerMemory(weights_GPRD=torch.cat(parts, dim=1)[None], group_size=1)


def measure(folder: Path, scale: Scale, say: Say) -> dict[str, Any]:
    """Return times to the first layer, to all of them and to the first token, by link and way."""
    with one_thread(), torch.inference_mode():
        models = [_model(folder, recipe(), scale, say) for recipe in (paper_160m, paper_410m)]
    return {"threads": 1, "tokens": _NUM_TOKENS, "layers_per_part": 1, "models": models}


def _model(folder: Path, recipe: Recipe, scale: Scale, say: Say) -> dict[str, Any]:
    assert isinstance(recipe.anchor, AnchorConfig)
    num_layers = min(recipe.anchor.num_layers, scale.num_layers)
    config = replace(recipe.anchor, num_layers=num_layers)
    torch.manual_seed(0)
    model = Anchor(config).requires_grad_(False)
    tokens_BT = torch.randint(0, config.vocab_size, (1, _NUM_TOKENS))
    widths = [width for width in recipe.memory.block_widths if width]
    spec = sized_spec(
        (2, 1, 1), widths, num_layers=num_layers, width=config.width, dtype="bfloat16"
    )
    bank = FiledBank.make(folder / recipe.name, spec)
    paths = [spec.path_to(leaf) for leaf in bank.blocks(spec.num_levels)]
    plain: list[float] = []
    rows: list[dict[str, Any]] = []
    with bank.served(resident_bytes=ALL_RESIDENT) as endpoint:
        for link, bytes_per_s in LINKS.items():
            say(f"layers: {recipe.name} over {link}")
            with linked(endpoint, paths[0][0], bytes_per_s) as client:
                _check(bank, client, paths)
                taken = _rounds(model, tokens_BT, client, paths, scale.num_prompts, plain)
            rows += [{"link": link, **row} for row in taken]
    return {
        "model": recipe.name, "layers": num_layers, "anchor_params": config.num_params,
        "bytes": sum(spec.weight_bytes(level + 1) for level in range(spec.num_levels)),
        "forward_ms": median_ms(plain), "rows": rows,
    }  # fmt: skip


def _check(bank: FiledBank, client: BankClient, paths: Sequence[BlockPath]) -> None:
    """Compare what streams bring with what was written; also brings all of it into the shard's memory."""
    for path in paths:
        with client.stream(path) as stream:
            for ref, weight in stream.memory().weights.items():
                bank.check(ref, weight)


def _rounds(
    model: Anchor,
    tokens_BT: Tensor,
    client: BankClient,
    paths: Sequence[BlockPath],
    num_rounds: int,
    plain: list[float],
) -> list[dict[str, Any]]:
    """Measure both ways in turn, without computation and with it."""
    taken: dict[str, list[dict[str, float]]] = {WHOLE: [], STREAM: []}
    path = itertools.cycle(paths)
    for number in range(num_rounds + 1):
        seconds = timed(lambda: model(tokens_BT))
        found = {
            way: {
                **_received(client, way, next(path)),
                **_answered(client, way, next(path), lambda memory: model(tokens_BT, None, memory)),
            }
            for way in taken
        }
        if number:  # the first round is a warm-up
            plain.append(seconds)
            for way, times in found.items():
                taken[way].append(times)
    return [
        {
            "way": way,
            **{name: median_ms([times[name] for times in all_times]) for name in all_times[0]},
        }
        for way, all_times in taken.items()
    ]


def _received(client: BankClient, way: str, path: BlockPath) -> dict[str, float]:
    """Return the seconds to the first layer and to the last one, where nobody computes."""
    begin = time.perf_counter()
    with _opened(client, way, path) as layers:
        layers.layer(0)
        first = time.perf_counter() - begin
        layers.layer(client.spec.num_layers - 1)
        return {"first_layer_ms": first, "all_layers_ms": time.perf_counter() - begin}


def _answered(
    client: BankClient, way: str, path: BlockPath, compute: Callable[[WaitedLayers], object]
) -> dict[str, float]:
    """Return the seconds to the logits of a prompt, and those that the forward pass stood still."""
    begin = time.perf_counter()
    with _opened(client, way, path) as layers:
        opened = time.perf_counter() - begin
        memory = WaitedLayers(layers)
        compute(memory)
        answered = time.perf_counter() - begin
    return {"first_token_ms": answered, "waited_ms": opened + memory.waited_s}


@contextmanager
def _opened(client: BankClient, way: str, path: BlockPath) -> Iterator[Layers]:
    if way == WHOLE:
        yield _Whole(client.fetch(path))
    else:
        with client.stream(path) as stream:
            yield stream


def _tensor(block: Array) -> Tensor:
    # torch reads no bfloat16 of numpy's, but its bits; through DLPack, as they are read-only.
    return from_dlpack(block.view(np.int16)).view(torch.bfloat16)
