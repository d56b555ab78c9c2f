"""Computing on several cores."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import cache
from typing import TypeVar

import torch

from membank.wire.loaders import Loaders

S = TypeVar("S")


def compute(work: Callable[[S], None], items: Sequence[S]) -> None:
    """Do `work` on each of `items`, in no certain order, on the processor's cores.

    The cores are those of the process, whatever the number of its shards, so its threads are too.
    Where torch spreads an operation over several cores by itself, fewer threads take part.
    """
    num_threads = _num_cores() // torch.get_num_threads()
    if num_threads <= 1 or len(items) <= 1:
        for item in items:
            work(item)
    else:
        _crew(num_threads).map(work, items)


@cache
def _crew(num_threads: int) -> Loaders:
    return Loaders(num_threads, "membank-compute")


# Threads do not survive a fork: a child makes some of its own.
os.register_at_fork(after_in_child=_crew.cache_clear)


def _num_cores() -> int:
    # Not those of the machine: a container may have few of them.
    return len(os.sched_getaffinity(0))
