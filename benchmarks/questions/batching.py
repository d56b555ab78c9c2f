"""Question 7: requests of different topics in one batch, each with weights of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.questions.latency import Say
from benchmarks.questions.scale import Scale
from benchmarks.questions.timing import one_thread, timed
from membank.cli.bench.training import train_models
from membank.trainer.model import Anchor, AnchorConfig, LevelBlocks, MemoryBatch
from membank.wire.errors import InternalError

_LENGTHS = {"prompt of 64 tokens": 64, "one token": 1}
_AT_LEAST_S = 0.02


class Merged:
    """An anchor whose feed-forward networks have spare columns, into which a memory is copied.

    Parameters
    ----------
    anchor
        The anchor without memory.
    block_width
        r of all levels together.
    """

    def __init__(self, anchor: Anchor, block_width: int) -> None:
        own = anchor.config.ffn_width
        self.model = Anchor(replace(anchor.config, ffn_width=own + block_width))
        self._own = own
        state = anchor.state_dict()
        for name, weight in self.model.state_dict().items():
            rows, columns = state[name].shape if state[name].dim() == 2 else (len(state[name]), 0)
            target = weight[:rows, :columns] if columns else weight[:rows]
            target.copy_(state[name])

    def merge(self, block_LPRD: Tensor) -> None:
        """Take a memory in, (L, 3, R, D), in place of the one before."""
        for number, layer in enumerate(self.model.blocks):
            gate_RD, up_RD, down_RD = block_LPRD[number]
            layer.ffn.gate.weight[self._own :] = gate_RD  # type: ignore[union-attr,operator]
            layer.ffn.up.weight[self._own :] = up_RD  # type: ignore[union-attr,operator]
            layer.ffn.down.weight[:, self._own :] = down_RD.T  # type: ignore[union-attr,operator]


class Ways:
    """The ways to run a batch of requests that all have different memories.

    Parameters
    ----------
    config
        Shape of the anchor.
    block_width
        r of all levels together.
    num_requests
        B.
    num_tokens
        T, tokens of each request.
    """

    def __init__(
        self, config: AnchorConfig, block_width: int, num_requests: int, num_tokens: int
    ) -> None:
        generator = torch.Generator().manual_seed(0)
        torch.manual_seed(0)
        self._anchor = Anchor(config).requires_grad_(False)
        shape = (num_requests, config.num_layers, 3, block_width, config.width)
        self._blocks_BLPRD = torch.randn(shape, generator=generator) * 0.02
        self._tokens_BT = torch.randint(
            0, config.vocab_size, (num_requests, num_tokens), generator=generator
        )
        self._merged = Merged(self._anchor, block_width)
        self._all = _memory(self._blocks_BLPRD)
        self._each = [_memory(block[None]) for block in self._blocks_BLPRD]

    def all(self) -> dict[str, Callable[[], Tensor]]:
        """Return the ways by name; each returns logits, (B, T, V)."""
        return {
            "anchor alone": lambda: self._anchor(self._tokens_BT),
            "grouped (bmm)": lambda: self._anchor(self._tokens_BT, None, self._all),
            "loop": self._loop,
            "merge, then loop": self._merge,
        }

    def check(self) -> None:
        """Make sure that all ways with memory compute the same.

        Raises
        ------
        InternalError
            If they do not.
        """
        ways = self.all()
        expected = ways["grouped (bmm)"]()
        for name in ("loop", "merge, then loop"):
            if not torch.allclose(ways[name](), expected, atol=1e-3, rtol=1e-3):
                raise InternalError(f"{name} computes something else than the grouped way")

    def _loop(self) -> Tensor:
        pairs = zip(self._tokens_BT, self._each, strict=True)
        return torch.cat([self._anchor(tokens_T[None], None, memory) for tokens_T, memory in pairs])

    def _merge(self) -> Tensor:
        found = []
        for tokens_T, block_LPRD in zip(self._tokens_BT, self._blocks_BLPRD, strict=True):
            self._merged.merge(block_LPRD)
            found.append(self._merged.model(tokens_T[None]))
        return torch.cat(found)


def _memory(blocks_BLPRD: Tensor) -> MemoryBatch:
    # Levels joined beforehand: how they are joined costs all ways alike.
    index_B = torch.arange(len(blocks_BLPRD))
    return MemoryBatch([LevelBlocks(blocks_KLPRD=blocks_BLPRD, index_B=index_B)])


def measure(scale: Scale, say: Say) -> dict[str, Any]:
    """Return tokens per second by model, length, batch size and way."""
    rows: list[dict[str, Any]] = []
    with one_thread(), torch.inference_mode():
        for model, run in train_models().items():
            for length, num_tokens in _LENGTHS.items():
                say(f"batching: {model}, {length}")
                for size in scale.batch_sizes:
                    ways = Ways(run.anchor, sum(run.block_widths), size, num_tokens)
                    ways.check()
                    rows += [
                        {"model": model, "length": length, "batch_size": size, "way": way,
                         "tokens_per_s": size * num_tokens / seconds}
                        for way, seconds in _times(ways.all(), 1 + scale.num_rounds // 4).items()
                    ]  # fmt: skip
    return {"threads": 1, "rows": rows}


def _times(ways: dict[str, Callable[[], Tensor]], num_rounds: int) -> dict[str, float]:
    """Return the least seconds of each way, taken in turn.

    The least, not the median: others on the machine can only add to the time of a computation.
    """
    found: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(num_rounds + 1):
        for name, way in ways.items():
            seconds = _mean(way)
            if number:
                found[name].append(seconds)
    return {name: min(seconds) for name, seconds in found.items()}


def _mean(way: Callable[[], Tensor]) -> float:
    taken: Sequence[float] = [timed(way)]
    # A single short call would be measured by its beginning.
    while sum(taken) < _AT_LEAST_S:
        taken = [*taken, timed(way)]
    return sum(taken) / len(taken)
