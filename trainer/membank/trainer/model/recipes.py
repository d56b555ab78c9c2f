"""Named recipes: an anchor and the bank that goes with it, for their sizes.

The paper's models are those of Pouransari et al., "Pretraining with hierarchical memories", arXiv
2510.02375, tables 1, 2 and 4 to 6. The demos are sized for minutes on two cores; how they are
trained is said with the runs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from membank.trainer.model.anchor import AnchorConfig

# GPT-NeoX has 50,277 tokens; 50,432 rows (a multiple of 128) reproduce the paper's counts exactly.
PAPER_VOCAB_SIZE = 50_432


@dataclass(frozen=True, kw_only=True, slots=True)
class PublicAnchor:
    """Name a public model that serves as a frozen anchor; only its sizes are known here."""

    name: str
    """Name of the published checkpoint."""
    num_layers: int
    """Transformer blocks."""
    width: int
    """Model width."""
    num_params: int
    """Parameters of the checkpoint, counted from its public configuration."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryConfig:
    """Give the shape of a bank.

    Raises
    ------
    ValueError
        If the levels disagree in number or a width or fan-out is out of range.
    """

    block_widths: tuple[int, ...]
    """r of each level, coarsest first; 0 means that the level exists in the tree and has no
    blocks."""
    fan_outs: tuple[int, ...]
    """Children per node at each level, coarsest first; each at least 2."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Type in which blocks are stored and sent."""

    def __post_init__(self) -> None:
        if len(self.block_widths) != len(self.fan_outs):
            raise ValueError(
                f"block_widths has {len(self.block_widths)} levels and fan_outs "
                f"{len(self.fan_outs)}; they must be equal"
            )
        if not self.block_widths or min(self.block_widths) < 0 or max(self.block_widths) == 0:
            raise ValueError(f"block_widths is {self.block_widths}; none below 0, one above")
        if min(self.fan_outs) < 2:
            raise ValueError(f"fan_outs is {self.fan_outs}; each must be at least 2")


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """Name an anchor and a bank that are built together."""

    name: str
    """Name on the command line."""
    anchor: AnchorConfig | PublicAnchor
    """The model that is always loaded."""
    memory: MemoryConfig
    """The bank that is fetched from."""


def paper_160m() -> Recipe:
    """Return the paper's 160M anchor (rows A) with its 4.6B bank."""
    anchor = AnchorConfig(
        num_layers=35,
        width=512,
        num_heads=12,
        head_dim=32,
        ffn_width=2048,
        vocab_size=PAPER_VOCAB_SIZE,
    )
    return Recipe(name="paper_160m", anchor=anchor, memory=_paper_memory(256, 64, 16, 0))


def paper_410m() -> Recipe:
    """Return the paper's 410M anchor (rows B) with its 12.7B bank."""
    anchor = AnchorConfig(
        num_layers=24,
        width=1024,
        num_heads=16,
        head_dim=64,
        ffn_width=2816,
        vocab_size=PAPER_VOCAB_SIZE,
        tied_head=False,
    )
    return Recipe(name="paper_410m", anchor=anchor, memory=_paper_memory(512, 128, 32, 0))


def paper_1_4b() -> Recipe:
    """Return the paper's 1.4B anchor (rows C) with its 21.1B bank."""
    anchor = AnchorConfig(
        num_layers=24,
        width=2048,
        num_heads=16,
        head_dim=128,
        ffn_width=5632,
        vocab_size=PAPER_VOCAB_SIZE,
        tied_head=False,
    )
    return Recipe(name="paper_1_4b", anchor=anchor, memory=_paper_memory(768, 256, 16, 0))


def gemma3_270m() -> Recipe:
    """Return Gemma 3 270M as a frozen anchor with the paper's 5.9B bank."""
    anchor = PublicAnchor(name="Gemma 3 270M", num_layers=18, width=640, num_params=268_098_176)
    return Recipe(name="gemma3_270m", anchor=anchor, memory=_paper_memory(512, 128, 32, 0))


def qwen2_5_0_5b() -> Recipe:
    """Return Qwen 2.5 0.5B as a frozen anchor with the paper's 11.1B bank."""
    anchor = PublicAnchor(name="Qwen 2.5 0.5B", num_layers=24, width=896, num_params=494_032_768)
    return Recipe(name="qwen2_5_0_5b", anchor=anchor, memory=_paper_memory(512, 128, 32, 0))


def llama3_2_1b() -> Recipe:
    """Return Llama 3.2 1B as a frozen anchor with the paper's 14.1B bank.

    Notes
    -----
    The paper's appendix A.6 gives widths (768, 256, 32, 0), but its table 2 (102.2M fetched, 14.1B
    in the bank) only fits (768, 256, 16, 0), which is used here.
    """
    anchor = PublicAnchor(name="Llama 3.2 1B", num_layers=16, width=2048, num_params=1_235_814_400)
    return Recipe(name="llama3_2_1b", anchor=anchor, memory=_paper_memory(768, 256, 16, 0))


def demo() -> Recipe:
    """Return the demo: a fetch of 6 % of the anchor, and a bank 24 times as large as the anchor.

    Notes
    -----
    Unlike in the paper, the finer level has the larger blocks: with facts of one sentence, what can
    be shared between topics is already in the anchor, and what cannot is in the leaf.
    """
    return Recipe(
        name="demo",
        anchor=_demo_anchor(),
        memory=MemoryConfig(block_widths=(8, 24), fan_outs=(16, 32), dtype="float32"),
    )


def fast() -> Recipe:
    """Return the demo with a smaller tree, to see that everything works; no claim rests on it."""
    return Recipe(
        name="fast",
        anchor=_demo_anchor(),
        memory=MemoryConfig(block_widths=(8, 24), fan_outs=(8, 16), dtype="float32"),
    )


def _demo_anchor() -> AnchorConfig:
    return AnchorConfig(
        num_layers=4, width=96, num_heads=4, head_dim=24, ffn_width=256, vocab_size=1536
    )


def _paper_memory(*block_widths: int) -> MemoryConfig:
    return MemoryConfig(block_widths=block_widths, fan_outs=(16,) * len(block_widths))


RECIPES: Mapping[str, Callable[[], Recipe]] = MappingProxyType(
    {
        make.__name__: make
        for make in (
            paper_160m,
            paper_410m,
            paper_1_4b,
            gemma3_270m,
            qwen2_5_0_5b,
            llama3_2_1b,
            demo,
            fast,
        )
    }
)
"""Every recipe by its name."""
