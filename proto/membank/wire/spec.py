"""What a bank is: its blocks, levels, optimizer, and how blocks are numbered.

Shapes: L layers, P parts (gate, up, down), R block width, D model width. A block is one array of
shape (L, P, R, D); the down part is kept transposed so that all three parts have the same shape.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import IntEnum, StrEnum
from typing import NamedTuple

import ml_dtypes
import numpy as np
import numpy.typing as npt

from membank.wire.errors import InvalidArgumentError, NotFoundError, Reason

NUM_PARTS = 3
"""Parts of a SwiGLU block: gate, up, down (transposed)."""

NAME_PATTERN = re.compile(r"[a-z]([a-z0-9-]{0,61}[a-z0-9])?")
"""What names of banks and snapshots look like (AIP-122)."""

Array = npt.NDArray[np.generic]
"""An array of any element type; the docstring at hand says which."""


class BlockRef(NamedTuple):
    """Name of one block: ``level`` counts from 1 (coarsest), ``cluster`` from 0 in its level."""

    level: int
    cluster: int

    def __str__(self) -> str:
        return f"{self.level}/{self.cluster}"

    @classmethod
    def parse(cls, text: str) -> BlockRef:
        """Read ``LEVEL/CLUSTER``, such as ``2/37``."""
        match = re.fullmatch(r"(\d+)/(\d+)", text.strip())
        if match is None:
            raise InvalidArgumentError(
                f"{text!r} is not a block; write LEVEL/CLUSTER, such as 2/37"
            )
        return cls(int(match[1]), int(match[2]))


Path = tuple[BlockRef, ...]
"""One block per level, root to leaf; shorter where the tree ends early."""


class BlockState(IntEnum):
    """What a block may be used for; the numbers are those of the wire and the manifest."""

    ACTIVE = 1
    WITHHELD = 2
    DELETED = 3


class Durability(StrEnum):
    """What an acknowledged update survives."""

    PROCESS = "process"
    """The death of the shard's process."""
    HOST = "host"
    """The loss of power of its machine: the update is synced to the disk of its journal."""
    STORE = "store"
    """The loss of its machine: the update lies in the bank's own storage."""

    @classmethod
    def of(cls, value: str) -> Durability:
        """Return the level called `value`.

        Raises
        ------
        InvalidArgumentError
            If there is none.
        """
        try:
            return cls(value)
        except ValueError:
            known = ", ".join(kind.value for kind in cls)
            raise InvalidArgumentError(
                f"durability is {value!r}; accepted: {known}", reason=Reason.BAD_CONFIG
            ) from None


class Role(StrEnum):
    """What a zarr array of a bank holds."""

    WEIGHT = "weight"
    EXP_AVG = "exp_avg"
    EXP_AVG_SQ = "exp_avg_sq"
    SUM_SQ = "sum_sq"
    MOMENTUM = "momentum"


class OptimizerKind(StrEnum):
    """Optimizers that a shard can run."""

    SGD = "sgd"
    ADAGRAD = "adagrad"
    ADAMW = "adamw"


DTYPES: dict[str, np.dtype[np.generic]] = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}
"""Element types that blocks may have, by name."""


def dtype_of(name: str) -> np.dtype[np.generic]:
    """Return the numpy dtype called `name`.

    Raises
    ------
    InvalidArgumentError
        If membank has no such element type.
    """
    try:
        return DTYPES[name]
    except KeyError:
        raise InvalidArgumentError(
            f"unknown dtype {name!r}; use one of {', '.join(DTYPES)}",
            reason=Reason.BAD_DTYPE,
            metadata={"dtype": name},
        ) from None


@dataclass(frozen=True, kw_only=True, slots=True)
class LevelSpec:
    """One level of a bank's topic tree."""

    fan_out: int
    """Children per cluster of the level above (for level 1: clusters), at least 1."""
    block_width: int
    """Columns r that a block of this level adds to every FFN, at least 1."""
    learning_rate: float = 1e-3
    """Learning rate of the blocks of this level, >= 0."""

    def __post_init__(self) -> None:
        _require(1 <= self.fan_out <= 65_536, "fan_out", self.fan_out, "1..65536")
        _require(1 <= self.block_width <= 1 << 20, "block_width", self.block_width, "1..2^20")
        ok = math.isfinite(self.learning_rate) and self.learning_rate >= 0
        _require(ok, "learning_rate", self.learning_rate, "finite and >= 0")


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerSpec:
    """The optimizer that shards run on pushed gradients."""

    kind: OptimizerKind = OptimizerKind.ADAMW
    """Which optimizer."""
    beta1: float = 0.9
    """AdamW: decay of the first moment; SGD: momentum (0 = none); in [0, 1)."""
    beta2: float = 0.95
    """AdamW: decay of the second moment; in [0, 1)."""
    eps: float = 1e-8
    """Added to the denominator (Adagrad, AdamW), > 0."""
    weight_decay: float = 0.0
    """Decoupled for AdamW, added to the gradient otherwise; >= 0."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "kind", _optimizer_kind(self.kind))
        _require(0 <= self.beta1 < 1, "beta1", self.beta1, "[0, 1)")
        _require(0 <= self.beta2 < 1, "beta2", self.beta2, "[0, 1)")
        _require(0 < self.eps < math.inf, "eps", self.eps, "> 0")
        _require(0 <= self.weight_decay < math.inf, "weight_decay", self.weight_decay, ">= 0")

    @property
    def state_roles(self) -> tuple[Role, ...]:
        """Roles of the float32 arrays kept beside each weight, in their stored order."""
        match self.kind:
            case OptimizerKind.ADAMW:
                return (Role.EXP_AVG, Role.EXP_AVG_SQ)
            case OptimizerKind.ADAGRAD:
                return (Role.SUM_SQ,)
            case OptimizerKind.SGD:
                return (Role.MOMENTUM,) if self.beta1 else ()


@dataclass(frozen=True, kw_only=True, slots=True)
class BankSpec:
    """Everything that is fixed when a bank is created."""

    name: str
    """Name of the bank: lower case letters, digits, hyphens, at most 63 characters."""
    num_layers: int
    """Layers L of the anchor that memories are added to."""
    width: int
    """Model width D of the anchor."""
    levels: tuple[LevelSpec, ...]
    """Levels, coarsest first; at least one."""
    dtype: str = "float32"
    """Element type in which weights are kept: float32, bfloat16 or float16."""
    optimizer: OptimizerSpec = field(default_factory=OptimizerSpec)
    """Optimizer of the bank."""
    num_partitions: int = 4
    """Fixed logical pieces that blocks are spread over, 1..4096."""
    partition_level: int = 1
    """Level whose clusters are kept whole inside one partition."""
    init_seed: int = 0
    """Seed of the initial content."""
    init_std: float = 0.02
    """Standard deviation of the initial gate and up parts; the down part starts at 0."""
    max_staleness: int = 16
    """Largest accepted lag, in versions, of the base version of an asynchronous update."""
    bank_id: str = ""
    """Random identity given at creation; empty before."""
    fingerprint: str = ""
    """Digest of anchor and tokenizer that the blocks belong to; empty = not bound."""

    def __post_init__(self) -> None:
        ok = NAME_PATTERN.fullmatch(self.name) is not None
        _require(ok, "name", self.name, "lower case letters, digits and hyphens, at most 63")
        _require(1 <= self.num_layers <= 4096, "num_layers", self.num_layers, "1..4096")
        _require(1 <= self.width <= 1 << 16, "width", self.width, "1..65536")
        _require(1 <= len(self.levels) <= 8, "levels", len(self.levels), "1 to 8 levels")
        dtype_of(self.dtype)
        _require(1 <= self.num_partitions <= 4096, "num_partitions", self.num_partitions, "1..4096")
        ok = 1 <= self.partition_level <= len(self.levels)
        _require(ok, "partition_level", self.partition_level, f"1..{len(self.levels)}")
        _require(0 <= self.init_seed < 1 << 64, "init_seed", self.init_seed, "0..2^64-1")
        _require(0 <= self.init_std < math.inf, "init_std", self.init_std, ">= 0")
        _require(self.max_staleness >= 0, "max_staleness", self.max_staleness, ">= 0")
        _require(self.num_clusters(self.num_levels) < 1 << 32, "levels", "fan-out", "< 2^32 leaves")

    @property
    def num_levels(self) -> int:
        """Number of levels."""
        return len(self.levels)

    @property
    def numpy_dtype(self) -> np.dtype[np.generic]:
        """Element type of the weights."""
        return dtype_of(self.dtype)

    @property
    def roles(self) -> tuple[Role, ...]:
        """Roles of all arrays of a block, the weight first."""
        return (Role.WEIGHT, *self.optimizer.state_roles)

    def role_dtype(self, role: Role) -> np.dtype[np.generic]:
        """Return the element type of the arrays of `role`; optimizer state is always float32."""
        return self.numpy_dtype if role is Role.WEIGHT else np.dtype(np.float32)

    def num_clusters(self, level: int) -> int:
        """Return the number of clusters of `level` (1 = coarsest)."""
        return math.prod(spec.fan_out for spec in self.levels[:level])

    @property
    def num_blocks(self) -> int:
        """Number of blocks of all levels."""
        return sum(self.num_clusters(level) for level in range(1, self.num_levels + 1))

    def block_shape(self, level: int) -> tuple[int, int, int, int]:
        """Return the shape (L, P, R, D) of the blocks of `level`."""
        return (self.num_layers, NUM_PARTS, self.levels[level - 1].block_width, self.width)

    def block_params(self, level: int) -> int:
        """Return the parameters of one block of `level`: 3 * r * L * D."""
        return math.prod(self.block_shape(level))

    def weight_bytes(self, level: int) -> int:
        """Return the bytes of the weight of one block of `level`."""
        return self.block_params(level) * self.numpy_dtype.itemsize

    def optimizer_bytes(self, level: int) -> int:
        """Return the bytes of the optimizer state of one block of `level`."""
        return self.block_params(level) * 4 * len(self.optimizer.state_roles)

    def check_ref(self, ref: BlockRef) -> None:
        """Raise `NotFoundError` unless `ref` is a block of this bank."""
        if not 1 <= ref.level <= self.num_levels:
            raise NotFoundError(
                f"bank {self.name} has no level {ref.level}; its levels are 1..{self.num_levels}",
                reason=Reason.UNKNOWN_LEVEL,
                metadata={"bank": self.name, "level": str(ref.level)},
            )
        count = self.num_clusters(ref.level)
        if not 0 <= ref.cluster < count:
            raise NotFoundError(
                f"bank {self.name} has no cluster {ref.cluster} at level {ref.level}; "
                f"its clusters there are 0..{count - 1}",
                reason=Reason.UNKNOWN_CLUSTER,
                metadata={"bank": self.name, "block": str(ref)},
            )

    def ancestor(self, ref: BlockRef, level: int) -> BlockRef:
        """Return the cluster of `level` (at most ``ref.level``) above `ref`, or `ref` itself."""
        below = math.prod(spec.fan_out for spec in self.levels[level : ref.level])
        return BlockRef(level, ref.cluster // below)

    def path_to(self, ref: BlockRef) -> Path:
        """Return the path from level 1 down to `ref`."""
        return tuple(self.ancestor(ref, level) for level in range(1, ref.level + 1))

    def subtree(self, topic: BlockRef) -> Iterator[BlockRef]:
        """Yield `topic` and every block under it, by level, then by cluster."""
        first, count = topic.cluster, 1
        for level in range(topic.level, self.num_levels + 1):
            if level > topic.level:
                fan_out = self.levels[level - 1].fan_out
                first, count = first * fan_out, count * fan_out
            for cluster in range(first, first + count):
                yield BlockRef(level, cluster)

    def blocks(self) -> Iterator[BlockRef]:
        """Yield every block, by level, then by cluster."""
        for level in range(1, self.num_levels + 1):
            for cluster in range(self.num_clusters(level)):
                yield BlockRef(level, cluster)

    def partition_of(self, ref: BlockRef) -> int:
        """Return the partition that holds `ref`; a subtree below `partition_level` shares one."""
        return (
            self.ancestor(ref, min(ref.level, self.partition_level)).cluster % self.num_partitions
        )


def _optimizer_kind(value: str) -> OptimizerKind:
    try:
        return OptimizerKind(value)
    except ValueError:
        known = ", ".join(kind.value for kind in OptimizerKind)
        raise InvalidArgumentError(
            f"unknown optimizer {value!r}; use one of {known}", reason=Reason.BAD_CONFIG
        ) from None


def _require(ok: bool, name: str, value: object, accepted: str) -> None:
    if not ok:
        raise InvalidArgumentError(
            f"{name} is {value!r}; accepted: {accepted}",
            reason=Reason.BAD_CONFIG,
            metadata={"field": name, "value": str(value)},
        )
