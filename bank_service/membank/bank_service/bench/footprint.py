"""What a run of the memory probe tells its parent."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Footprint:
    """Memory of one run."""

    num_blocks: int
    """Blocks of the bank."""
    bank_bytes: int
    """Bytes of all blocks with their optimizer state."""
    peak_accounted_bytes: int
    """Largest number of resident bytes that the shard reported after any call."""
    peak_rss_growth_bytes: int | None
    """Peak of the resident set less what it was before; None = the kernel does not tell."""
