"""Paths, gradients and settings of the tests of the client's logic."""

import numpy as np
from numpy.typing import NDArray

from fake_bank import SPEC
from membank.client import ClientConfig, RetryConfig
from membank.wire.spec import BlockRef

# Partitions are dealt to two shards in turns: 1/0, 1/2 and what is under them lie on the first.
PATH = (BlockRef(1, 0), BlockRef(2, 1))
ACROSS = (BlockRef(1, 0), BlockRef(1, 1), BlockRef(2, 1), BlockRef(2, 3))
RETRY = RetryConfig(max_attempts=5, initial_backoff_s=0.001, max_backoff_s=0.002)
CONFIG = ClientConfig(timeout_s=5.0, retry=RETRY)


def ones(ref: BlockRef) -> NDArray[np.float32]:
    """Return a gradient of ones."""
    return np.ones(SPEC.block_shape(ref.level), np.float32)


def gradients(*refs: BlockRef) -> dict[BlockRef, NDArray[np.float32]]:
    """Return a gradient of ones for each block."""
    return {ref: ones(ref) for ref in refs}


def base(*refs: BlockRef) -> dict[BlockRef, int]:
    """Return version 0 for each block."""
    return dict.fromkeys(refs, 0)
