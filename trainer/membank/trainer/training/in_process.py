"""A bank in the memory of this process: the reference that the service must equal.

It is also the home of the generic memory: the same thing with one cluster at every level.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.optim.adagrad import adagrad
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd

from membank.trainer.training.files import read_tensors, write_tensors
from membank.trainer.training.source import Acknowledged, Fetched
from membank.wire.errors import (
    CorruptionError,
    FailedPreconditionError,
    InvalidArgumentError,
    Reason,
)
from membank.wire.format import decode_spec, encode_spec, initial_weight
from membank.wire.records import UpdateResult
from membank.wire.spec import BankSpec, BlockRef, BlockState, OptimizerKind, OptimizerSpec, Role

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_KIND = "membank.in-process-memory"


def generic_spec(spec: BankSpec, *, learning_rates: Sequence[float] | None = None) -> BankSpec:
    """Return the bank of a generic memory: one block per level, used whatever the context.

    Parameters
    ----------
    spec
        The bank that it is the control of; a fetch from either has the same size.
    learning_rates
        Learning rate of each level, coarsest first; None keeps those of `spec`.

    Returns
    -------
    BankSpec
        `spec` with a fan-out of 1 at every level and a name that ends in ``-generic``.
    """
    rates = learning_rates or [level.learning_rate for level in spec.levels]
    if len(rates) != len(spec.levels):
        raise InvalidArgumentError(
            f"learning_rates has {len(rates)} entries; the bank has {len(spec.levels)} levels"
        )
    levels = tuple(
        replace(level, fan_out=1, learning_rate=rate)
        for level, rate in zip(spec.levels, rates, strict=True)
    )
    name = f"{spec.name[:55].rstrip('-')}-generic"
    return replace(spec, name=name, levels=levels, num_partitions=1, bank_id="")


class InProcessMemory:
    """Keeps every block of a bank here and runs the bank's optimizer on it.

    Parameters
    ----------
    spec
        What the bank is. Blocks start as `membank.wire.format.initial_weight` says and take
        memory when they are first asked for.

    Notes
    -----
    Safe to call from threads. Moments and step count of a block advance only when it is pushed to
    (lazy): an inactive block keeps its content, without decay. Weights are kept in the dtype of
    the bank and stepped in float32.
    """

    def __init__(self, spec: BankSpec) -> None:
        self._spec = spec
        self._blocks: dict[BlockRef, _Block] = {}
        self._absent: dict[BlockRef, BlockState] = {}
        self._num_steps = 0
        self._lock = threading.Lock()

    @property
    def spec(self) -> BankSpec:
        # docstring inherited
        return self._spec

    @property
    def num_steps(self) -> int:
        """Number of the last step that was pushed, plus one; 0 before the first."""
        return self._num_steps

    def fetch(self, refs: Sequence[BlockRef]) -> Fetched:
        # docstring inherited
        with self._lock:
            blocks = {ref: self._block(ref) for ref in refs}
            absent = {ref: self._absent[ref] for ref in refs if ref in self._absent}
            return Fetched(
                weights={
                    ref: block.weight.float()
                    for ref, block in blocks.items()
                    if ref not in self._absent
                },
                versions={ref: block.version for ref, block in blocks.items()},
                absent=absent,
            )

    def push(
        self,
        gradients: Mapping[BlockRef, Tensor],
        versions: Mapping[BlockRef, int],
        *,
        step: int,
        learning_rate_scale: float = 1.0,
        first: Sequence[BlockRef] = (),
        then: Callable[[], None] | None = None,
    ) -> tuple[Acknowledged, ...]:
        # docstring inherited
        del first  # all at once: a saved state never holds half a step
        for ref, gradient in gradients.items():
            self._check_gradient(ref, gradient)
        with self._lock:
            refusals = {ref: self._refusal(ref, versions[ref]) for ref in gradients}
            for number, level in enumerate(self._spec.levels, start=1):
                taken = [r for r in gradients if r.level == number and refusals[r] is None]
                if taken:
                    self._step(taken, gradients, level.learning_rate * learning_rate_scale)
            self._num_steps = step + 1
            results = tuple(
                UpdateResult(
                    ref=ref,
                    accepted=refusals[ref] is None,
                    version=self._block(ref).version,
                    reason=refusals[ref],
                )
                for ref in gradients
            )
        if then is not None:
            then()
        return (Acknowledged(step=step, results=results),)

    def flush(self) -> tuple[Acknowledged, ...]:
        # docstring inherited
        return ()

    def set_state(self, ref: BlockRef, state: BlockState) -> None:
        """Withhold a block, or make it active again."""
        self._spec.check_ref(ref)
        with self._lock:
            self._absent.pop(ref, None)
            if state is not BlockState.ACTIVE:
                self._absent[ref] = state

    def restore(self, other: InProcessMemory) -> None:
        """Take over blocks, moments and position of `other`, which must not be used any more.

        Raises
        ------
        FailedPreconditionError
            `other` is of another bank.
        """
        if other.spec != self._spec:
            raise FailedPreconditionError(
                f"the memory to restore is of bank {other.spec.name}, configured differently from "
                f"{self._spec.name}; delete its file to start afresh",
                reason=Reason.FINGERPRINT_MISMATCH,
            )
        with self._lock:
            self._blocks = other._blocks
            self._absent = other._absent
            self._num_steps = other._num_steps

    def save(self, path: Path) -> None:
        """Write blocks, moments and position to one safetensors file, atomically."""
        tensors: dict[str, Tensor] = {}
        with self._lock:
            states = {}
            for ref, block in self._blocks.items():
                tensors[f"{ref}/{Role.WEIGHT.value}"] = block.weight
                tensors |= {f"{ref}/{role.value}": t for role, t in block.state.items()}
                states[str(ref)] = [block.version, block.step]
            meta = {
                "spec": encode_spec(self._spec).decode(),
                "blocks": states,
                "absent": {str(ref): int(state) for ref, state in self._absent.items()},
                "num_steps": self._num_steps,
            }
            # Under the lock: the file holds one moment, also while a prefetch thread pushes.
            write_tensors(path, tensors, kind=_KIND, meta=json.dumps(meta, sort_keys=True))

    @classmethod
    def load(cls, path: Path) -> InProcessMemory:
        """Read what `save` wrote.

        Raises
        ------
        NotFoundError
            There is no such file.
        CorruptionError
            It is damaged or something else.
        """
        tensors, text = read_tensors(path, kind=_KIND)
        try:
            meta = json.loads(text)
            memory = cls(decode_spec(meta["spec"].encode(), where=str(path)))
            roles = memory.spec.optimizer.state_roles
            for name, (version, step) in meta["blocks"].items():
                memory._blocks[BlockRef.parse(name)] = _Block(
                    weight=tensors[f"{name}/{Role.WEIGHT.value}"],
                    state={role: tensors[f"{name}/{role.value}"] for role in roles},
                    version=version,
                    step=step,
                )
            memory._absent = {BlockRef.parse(r): BlockState(s) for r, s in meta["absent"].items()}
            memory._num_steps = int(meta["num_steps"])
        except (KeyError, TypeError, ValueError) as err:
            raise CorruptionError(
                f"{path} is damaged ({err}); delete it to start afresh",
                reason=Reason.SPEC_CORRUPT,
                metadata={"path": str(path)},
            ) from err
        return memory

    def _block(self, ref: BlockRef) -> _Block:
        block = self._blocks.get(ref)
        if block is None:
            self._spec.check_ref(ref)
            block = self._blocks[ref] = _Block.initial(self._spec, ref)
        return block

    def _check_gradient(self, ref: BlockRef, gradient: Tensor) -> None:
        self._spec.check_ref(ref)
        expected = self._spec.block_shape(ref.level)
        if tuple(gradient.shape) != expected:
            raise InvalidArgumentError(
                f"gradient of block {ref} has shape {tuple(gradient.shape)}; it must be {expected}",
                reason=Reason.BAD_SHAPE,
                metadata={"block": str(ref)},
            )
        if not bool(torch.isfinite(gradient).all()):
            raise InvalidArgumentError(
                f"gradient of block {ref} holds NaN or infinity; lower the learning rate",
                reason=Reason.NOT_FINITE,
                metadata={"block": str(ref)},
            )

    def _refusal(self, ref: BlockRef, base_version: int) -> Reason | None:
        state = self._absent.get(ref)
        if state is not None:
            withheld = state is BlockState.WITHHELD
            return Reason.BLOCK_WITHHELD if withheld else Reason.BLOCK_DELETED
        lag = self._block(ref).version - base_version
        return None if 0 <= lag <= self._spec.max_staleness else Reason.STALE_VERSION

    def _step(
        self, refs: Sequence[BlockRef], gradients: Mapping[BlockRef, Tensor], rate: float
    ) -> None:
        blocks = [self._block(ref) for ref in refs]
        # New tensors, not in place: a fetched block must not change under its reader.
        weights = [block.weight.to(torch.float32, copy=True) for block in blocks]
        values = [gradients[ref].detach().to(torch.float32) for ref in refs]
        _apply(self._spec.optimizer, weights, values, blocks, rate)
        dtype = _DTYPES[self._spec.dtype]
        for block, weight in zip(blocks, weights, strict=True):
            block.weight = weight.to(dtype)
            block.version += 1
            block.step += 1


@dataclass(slots=True)
class _Block:
    weight: Tensor
    state: dict[Role, Tensor]
    version: int = 0
    step: int = 0

    @classmethod
    def initial(cls, spec: BankSpec, ref: BlockRef) -> _Block:
        # Through float32, which holds the other dtypes exactly: torch knows no ml_dtypes arrays.
        values = torch.from_numpy(initial_weight(spec, ref).astype(np.float32, copy=False))
        zeros = {role: torch.zeros_like(values) for role in spec.optimizer.state_roles}
        return cls(weight=values.to(_DTYPES[spec.dtype]), state=zeros)


@torch.no_grad()
def _apply(
    spec: OptimizerSpec,
    weights: list[Tensor],
    gradients: list[Tensor],
    blocks: Sequence[_Block],
    rate: float,
) -> None:
    """Step float32 `weights` and the moments of `blocks` in place."""
    steps = [torch.tensor(float(block.step)) for block in blocks]
    match spec.kind:
        case OptimizerKind.ADAMW:
            adamw(
                weights,
                gradients,
                [block.state[Role.EXP_AVG] for block in blocks],
                [block.state[Role.EXP_AVG_SQ] for block in blocks],
                [],
                steps,
                fused=True,
                amsgrad=False,
                beta1=spec.beta1,
                beta2=spec.beta2,
                lr=rate,
                weight_decay=spec.weight_decay,
                eps=spec.eps,
                maximize=False,
            )
        case OptimizerKind.ADAGRAD:
            adagrad(
                weights,
                gradients,
                [block.state[Role.SUM_SQ] for block in blocks],
                steps,
                foreach=False,
                lr=rate,
                weight_decay=spec.weight_decay,
                lr_decay=0.0,
                eps=spec.eps,
                maximize=False,
            )
        case OptimizerKind.SGD:
            momenta = [block.state.get(Role.MOMENTUM) for block in blocks]
            sgd(
                weights,
                gradients,
                momenta,
                foreach=False,
                weight_decay=spec.weight_decay,
                momentum=spec.beta1,
                lr=rate,
                dampening=0.0,
                nesterov=False,
                maximize=False,
            )
