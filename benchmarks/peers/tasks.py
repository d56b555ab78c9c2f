"""The work that is measured: what one call is, how often it is made, by how many clients."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np

from benchmarks.peers.blocks import Blocks
from benchmarks.peers.contestant import Work
from benchmarks.peers.membank_service import path_keys

NUM_BLOCKS_OF_MANY = 1000
_ZIPF_EXPONENT = 1.1


@dataclass(frozen=True, kw_only=True, slots=True)
class Scale:
    """How much is measured."""

    num_rounds: int = 9
    """Rounds that count; one more is made first and thrown away."""
    calls_share: float = 1.0
    """Share of the calls of a round that are made."""
    with_small: bool = True
    """Whether single blocks of 1 MB are fetched too, by one client and by several."""
    num_large: int = 4
    """Blocks of each of the large sizes."""
    num_clients: int = 4
    """Measuring processes where there are several."""
    num_leaves: int = 65_536
    """Leaves of the large bank."""
    num_leaves_small: int = 256
    """Leaves of the small bank."""

    def to_json(self) -> dict[str, object]:
        """Return it as a JSON document."""
        return asdict(self)


FULL = Scale()
QUICK = Scale(
    num_rounds=2, calls_share=0.5, with_small=False, num_large=2, num_clients=2, num_leaves=1296
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """One kind of call, made by every contestant that can."""

    name: str
    """Name, such as ``fetch-8mb``."""
    what: str
    """What one call does, in a sentence."""
    work: Work
    """What the client is asked to do."""
    keys: tuple[str, ...]
    """Blocks, or paths, that calls are made for."""
    num_calls: int
    """Calls of one client in a round."""
    keys_per_call: int = 1
    """Blocks that one call names."""
    amount: float
    """What one call moves or computes, in `unit`."""
    unit: str
    """``bytes``, ``parameters`` or ``calls``."""
    num_clients: int = 1
    """Measuring processes, all at a time."""
    zipf: bool = False
    """Whether blocks are drawn as topics are asked for: few of them often. Else in turn."""

    def draw(self, round_number: int, client: int) -> list[list[str]]:
        """Return the blocks of each call of a round."""
        if self.keys_per_call > 1:
            return [list(self.keys[: self.keys_per_call])] * self.num_calls
        if self.zipf:
            weights = np.arange(1, len(self.keys) + 1, dtype=float) ** -_ZIPF_EXPONENT
            rng = np.random.default_rng((round_number, client))
            drawn = rng.choice(len(self.keys), self.num_calls, p=weights / weights.sum())
        else:
            drawn = np.arange(self.num_calls) + round_number * self.num_calls
        return [[self.keys[index % len(self.keys)]] for index in drawn]


def block_tasks(blocks: Blocks, scale: Scale) -> list[Task]:
    """Return the tasks that are about blocks."""

    def calls(count: int) -> int:
        return max(1, round(count * scale.calls_share))

    tasks = [
        _fetch(blocks, "8mb", calls(8)),
        _fetch(blocks, "32mb", calls(4)),
        _fetch(blocks, "36mb", calls(4)),
        Task(
            name="fetch-1000x100kb",
            what=f"{NUM_BLOCKS_OF_MANY} blocks of 98,304 bytes by one request (Redis: MGET)",
            work=Work.FETCH,
            keys=tuple(blocks.keys("100kb")),
            num_calls=calls(2),
            keys_per_call=NUM_BLOCKS_OF_MANY,
            amount=NUM_BLOCKS_OF_MANY * blocks.size("100kb").num_bytes,
            unit="bytes",
        ),
        Task(
            name="push-4m",
            what=f"a gradient of one block of {blocks.size('16mb').num_params} parameters, float32, "
            "from the client to where the optimizer has made a step with it",
            work=Work.PUSH,
            keys=tuple(blocks.keys("16mb")),
            num_calls=calls(4),
            amount=blocks.size("16mb").num_params,
            unit="parameters",
        ),
    ]
    if not scale.with_small:
        return tasks
    small = _fetch(blocks, "1mb", calls(20))
    return [small, *tasks, *(_zipf(blocks, calls(20), count) for count in (1, scale.num_clients))]


def path_task(num_leaves: int, scale: Scale) -> Task:
    """Return the fetch of a path in a bank of `num_leaves` leaves."""
    return Task(
        name="path-fetch",
        what="a path of 4 blocks of 3,072 bytes, by BankClient.fetch",
        work=Work.FETCH,
        keys=tuple(path_keys(num_leaves)),
        num_calls=max(1, round(200 * scale.calls_share)),
        amount=1,
        unit="calls",
    )


def conditional_task(num_leaves: int, scale: Scale) -> Task:
    """Return the fetch of a path that the client holds and that has not changed."""
    return Task(
        name="conditional-fetch",
        what="a path of 4 blocks whose current versions the client holds: nothing travels",
        work=Work.CONDITIONAL,
        keys=tuple(path_keys(num_leaves)[:1]),
        num_calls=max(1, round(200 * scale.calls_share)),
        amount=1,
        unit="calls",
    )


def _fetch(blocks: Blocks, label: str, num_calls: int) -> Task:
    size = blocks.size(label)
    return Task(
        name=f"fetch-{label}",
        what=f"one block of {size.num_bytes} bytes",
        work=Work.FETCH,
        keys=tuple(blocks.keys(label)),
        num_calls=num_calls,
        amount=size.num_bytes,
        unit="bytes",
    )


def _zipf(blocks: Blocks, num_calls: int, num_clients: int) -> Task:
    size = blocks.size("1mb")
    return Task(
        name=f"zipf-1mb-clients-{num_clients}",
        what=f"one of {blocks.count('1mb')} blocks of {size.num_bytes} bytes, drawn by a Zipf law, "
        f"by {num_clients} client process(es) at a time",
        work=Work.FETCH,
        keys=tuple(blocks.keys("1mb")),
        num_calls=num_calls,
        amount=size.num_bytes,
        unit="bytes",
        num_clients=num_clients,
        zipf=True,
    )
