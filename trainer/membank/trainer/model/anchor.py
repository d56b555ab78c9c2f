"""The anchor: the small causal transformer that is always loaded.

Pre-norm blocks with RMSNorm, rotary positions, normalised queries and keys, and a SwiGLU
feed-forward network without biases. Fetched memory is added to each feed-forward network and to
nothing else.

Shape suffixes: B sequences, T tokens, V vocabulary, D model width, H heads, E head width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from membank.trainer.model.memory import LayerMemory, MemoryOfLayers, add_memory

PADDING_SEGMENT = -1


@dataclass(frozen=True, kw_only=True, slots=True)
class AnchorConfig:
    """Give the shape of an anchor.

    Raises
    ------
    ValueError
        If a size is not positive or the head width is odd (rotary positions turn pairs).
    """

    num_layers: int
    """Number of transformer blocks; every one of them receives memory."""
    width: int
    """Model width D."""
    num_heads: int
    """Attention heads H. ``num_heads * head_dim`` need not equal ``width``."""
    head_dim: int
    """Width E of one head; even."""
    ffn_width: int
    """Inner width of the anchor's own SwiGLU."""
    vocab_size: int
    """Rows of the token embedding, padding rows included."""
    tied_head: bool = True
    """Whether the output layer is the token embedding itself."""
    rope_base: float = 100_000.0
    """Base of the rotary frequencies."""
    norm_eps: float = 1e-5
    """Added to the mean square inside every RMSNorm."""
    init_std: float = 0.02
    """Standard deviation of the truncated normal from which weights start."""

    def __post_init__(self) -> None:
        sizes = ("num_layers", "width", "num_heads", "head_dim", "ffn_width", "vocab_size")
        for name in sizes:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.head_dim % 2:
            raise ValueError(f"head_dim is {self.head_dim}; it must be even")
        for name in ("rope_base", "norm_eps", "init_std"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be above 0")

    @property
    def attention_width(self) -> int:
        """Width of all heads together, ``num_heads * head_dim``."""
        return self.num_heads * self.head_dim

    @property
    def num_params(self) -> int:
        """Number of trained parameters, a tied head counted once."""
        attention = 4 * self.width * self.attention_width + 2 * self.attention_width
        block = attention + 3 * self.width * self.ffn_width + 2 * self.width
        embeddings = (1 if self.tied_head else 2) * self.vocab_size * self.width
        return embeddings + self.num_layers * block + self.width


class Anchor(nn.Module):
    """Predict the next token from the tokens before it, with or without fetched memory.

    Parameters
    ----------
    config : AnchorConfig
        Sizes. Weights are float32 on the current default device and start from a truncated normal;
        the two projections that write to the residual stream are scaled down by
        ``sqrt(2 * num_layers)``.
    """

    def __init__(self, config: AnchorConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        self.blocks = nn.ModuleList(_Block(config) for _ in range(config.num_layers))
        self.norm = nn.RMSNorm(config.width, eps=config.norm_eps)
        self.head = (
            None if config.tied_head else nn.Linear(config.width, config.vocab_size, bias=False)
        )
        self._reset()

    def forward(
        self,
        tokens_BT: Tensor,
        segments_BT: Tensor | None = None,
        memory: MemoryOfLayers | None = None,
    ) -> Tensor:
        """Return the logits of the token that follows each position.

        Parameters
        ----------
        tokens_BT : Tensor
            (B, T) int64 token ids.
        segments_BT : Tensor, optional
            (B, T) int64. A position attends only to earlier ones of its own segment, so documents
            packed into one window do not see each other. None means one segment per sequence,
            which takes the fused causal kernel.
        memory : MemoryOfLayers, optional
            Blocks added to the feed-forward networks, chosen per sequence. None runs the anchor
            alone; the result is the same as with memory whose down part is zero.

        Returns
        -------
        Tensor
            (B, T, V) in the dtype of the weights. Gradients reach the anchor's weights unless they
            are frozen, and the distinct blocks of ``memory``.
        """
        x_BTD = functional.embedding(tokens_BT, self.embedding.weight)
        mask = None if segments_BT is None else _causal_mask(segments_BT)
        angles = _rotary(self.config, tokens_BT.shape[1], x_BTD.device, x_BTD.dtype)
        for number, block in enumerate(self.blocks):
            layer_memory = None if memory is None else memory.layer(number)
            x_BTD = block(x_BTD, angles, mask, layer_memory)
        weight_VD = self.embedding.weight if self.head is None else self.head.weight
        return functional.linear(self.norm(x_BTD), weight_VD)

    def _reset(self) -> None:
        std = self.config.init_std
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.trunc_normal_(module.weight, std=std, a=-3 * std, b=3 * std)
        scale = 1 / math.sqrt(2 * self.config.num_layers)
        with torch.no_grad():
            for block in self.blocks:
                assert isinstance(block, _Block)
                block.attention.out.weight.mul_(scale)
                block.ffn.down.weight.mul_(scale)


def next_token_loss(
    logits_BTV: Tensor, tokens_BT: Tensor, segments_BT: Tensor | None = None
) -> tuple[Tensor, int]:
    """Return the mean cross-entropy of the next tokens and how many were scored.

    Parameters
    ----------
    logits_BTV : Tensor
        (B, T, V) output of :class:`Anchor`.
    tokens_BT : Tensor
        (B, T) int64, the tokens that gave the logits.
    segments_BT : Tensor, optional
        (B, T) int64. A token is scored from the position before it in the same segment; the first
        token of a segment and everything in segment ``-1`` (padding) are not scored.

    Returns
    -------
    tuple of Tensor and int
        Scalar float32 loss in nats per scored token (0 if none is), and the number scored.
    """
    targets = tokens_BT[:, 1:]
    if segments_BT is not None:
        same = segments_BT[:, 1:] == segments_BT[:, :-1]
        scored = same & (segments_BT[:, 1:] != PADDING_SEGMENT)
        targets = targets.masked_fill(~scored, -100)
    num_scored = int((targets != -100).sum())
    total = functional.cross_entropy(
        logits_BTV[:, :-1].flatten(0, 1).float(),
        targets.flatten(),
        ignore_index=-100,
        reduction="sum",
    )
    return total / max(1, num_scored), num_scored


class _Block(nn.Module):
    def __init__(self, config: AnchorConfig) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.width, eps=config.norm_eps)
        self.attention = _Attention(config)
        self.ffn_norm = nn.RMSNorm(config.width, eps=config.norm_eps)
        self.ffn = _SwiGLU(config)

    def forward(
        self,
        x_BTD: Tensor,
        angles: tuple[Tensor, Tensor],
        mask: Tensor | None,
        memory: LayerMemory | None,
    ) -> Tensor:
        x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD), angles, mask)
        h_BTD = self.ffn_norm(x_BTD)
        y_BTD: Tensor = self.ffn(h_BTD)
        if memory is not None:
            y_BTD = y_BTD + add_memory(h_BTD, memory)
        return x_BTD + y_BTD


class _Attention(nn.Module):
    def __init__(self, config: AnchorConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        inner = config.attention_width
        self.query = nn.Linear(config.width, inner, bias=False)
        self.key = nn.Linear(config.width, inner, bias=False)
        self.value = nn.Linear(config.width, inner, bias=False)
        self.out = nn.Linear(inner, config.width, bias=False)
        # One norm over all heads together: the paper's parameter counts come out exactly with
        # weights of H*E here, and with no other width.
        self.query_norm = nn.RMSNorm(inner, eps=config.norm_eps)
        self.key_norm = nn.RMSNorm(inner, eps=config.norm_eps)

    def forward(self, x_BTD: Tensor, angles: tuple[Tensor, Tensor], mask: Tensor | None) -> Tensor:
        q_BHTE = _rotate(self._heads(self.query_norm(self.query(x_BTD))), angles)
        k_BHTE = _rotate(self._heads(self.key_norm(self.key(x_BTD))), angles)
        v_BHTE = self._heads(self.value(x_BTD))
        y_BHTE = functional.scaled_dot_product_attention(
            q_BHTE, k_BHTE, v_BHTE, attn_mask=mask, is_causal=mask is None
        )
        y_BTD: Tensor = self.out(y_BHTE.transpose(1, 2).flatten(2))
        return y_BTD

    def _heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], self.num_heads, -1).transpose(1, 2)


class _SwiGLU(nn.Module):
    def __init__(self, config: AnchorConfig) -> None:
        super().__init__()
        self.gate = nn.Linear(config.width, config.ffn_width, bias=False)
        self.up = nn.Linear(config.width, config.ffn_width, bias=False)
        self.down = nn.Linear(config.ffn_width, config.width, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        y_BTD: Tensor = self.down(functional.silu(self.gate(x_BTD)) * self.up(x_BTD))
        return y_BTD


def _causal_mask(segments_BT: Tensor) -> Tensor:
    num_tokens = segments_BT.shape[1]
    same_BTT = segments_BT[:, :, None] == segments_BT[:, None, :]
    causal_TT = torch.ones(num_tokens, num_tokens, dtype=torch.bool, device=segments_BT.device)
    return (same_BTT & causal_TT.tril())[:, None]


def _rotary(
    config: AnchorConfig, num_tokens: int, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    # Positions count from the start of the window, also for packed documents: only differences of
    # positions matter, and the mask keeps documents apart.
    half = torch.arange(0, config.head_dim, 2, device=device, dtype=torch.float32)
    frequencies = config.rope_base ** (-half / config.head_dim)
    angles = torch.outer(torch.arange(num_tokens, device=device).float(), frequencies)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def _rotate(x_BHTE: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
    cos, sin = angles
    a, b = x_BHTE.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
