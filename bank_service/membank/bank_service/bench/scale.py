"""How much is measured."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Scale:
    """Sizes and counts of a run; reported with the results."""

    num_pairs: int = 9
    """Pairs per row."""
    num_slow_pairs: int = 5
    """Pairs per row whose samples take about a second."""
    sample_bytes: int = 64 << 20
    """Bytes that one sample of a throughput row reads or writes, roughly."""
    num_blocks_large: int = 65_536
    """Blocks of the large bank."""
    num_blocks_small: int = 256
    """Blocks of the small bank, and blocks that updates go to in both."""
    num_updates: int = 4096
    """Updates per sample; one consolidation of every partition is part of each sample."""
    budget_bytes: int = 128 << 20
    """`resident_bytes` of the shard whose memory is measured."""
    bank_budgets: int = 10
    """Size of the bank of that shard, in budgets."""
    is_quick: bool = False
    """True for a run that only shows that everything works; no claims follow from it."""


FULL = Scale()
"""What results are made with."""

QUICK = Scale(
    num_pairs=2,
    num_slow_pairs=1,
    sample_bytes=1 << 20,
    num_blocks_large=256,
    num_blocks_small=16,
    num_updates=64,
    budget_bytes=4 << 20,
    is_quick=True,
)
"""Tiny, for tests."""
