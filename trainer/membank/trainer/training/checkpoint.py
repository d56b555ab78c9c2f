"""What a run goes on from after it was stopped or killed.

Stage 1 keeps anchor, optimizer and position in one file. In stage 2 the bank is the checkpoint of
the memories, and a worker keeps its position alone; memory in this process is kept with it.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from membank.trainer.model import Anchor, AnchorConfig
from membank.trainer.training.files import read_json, read_tensors, write_json, write_tensors
from membank.trainer.training.in_process import InProcessMemory
from membank.wire.errors import CorruptionError, FailedPreconditionError, Reason

_ANCHOR = "membank.anchor"
_ANCHOR_STAGE = "membank.anchor-stage"
_MODEL = "model."
_OPTIMIZER = "optimizer."


def anchor_fingerprint(anchor: Anchor) -> str:
    """Return the hex SHA-256 of an anchor's configuration and weights."""
    digest = hashlib.sha256(json.dumps(asdict(anchor.config), sort_keys=True).encode())
    for name, tensor in sorted(anchor.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def save_anchor(path: Path, anchor: Anchor) -> None:
    """Write an anchor to one safetensors file, atomically; its configuration is in the header."""
    write_tensors(path, anchor.state_dict(), kind=_ANCHOR, meta=_config_json(anchor))


def load_anchor(path: Path) -> Anchor:
    """Read an anchor, its weights frozen.

    Raises
    ------
    NotFoundError
        There is no such file.
    CorruptionError
        It is damaged or something else.
    """
    tensors, meta = read_tensors(path, kind=_ANCHOR)
    try:
        anchor = Anchor(AnchorConfig(**json.loads(meta)["config"]))
        anchor.load_state_dict(tensors)
    except (KeyError, TypeError, ValueError, RuntimeError) as err:
        raise _damaged(path, err) from err
    return anchor.requires_grad_(False)


@dataclass(frozen=True, kw_only=True, slots=True)
class AnchorCheckpoint:
    """Anchor, AdamW state and position of stage 1, in one file."""

    path: Path
    """The file."""

    def save(self, anchor: Anchor, optimizer: torch.optim.AdamW, *, step: int, run: str) -> None:
        """Write the state before step `step`, atomically.

        Parameters
        ----------
        anchor, optimizer
            As they are.
        step
            Step that comes next.
        run
            What the run consists of (configuration, data); `load` asks for the same.
        """
        tensors = {_MODEL + name: tensor for name, tensor in anchor.state_dict().items()}
        for name, parameter in anchor.named_parameters():
            for key, value in optimizer.state.get(parameter, {}).items():
                tensors[f"{_OPTIMIZER}{key}.{name}"] = torch.as_tensor(value)
        meta = json.dumps({"step": step, "run": run, "config": asdict(anchor.config)})
        write_tensors(self.path, tensors, kind=_ANCHOR_STAGE, meta=meta)

    def load(self, anchor: Anchor, optimizer: torch.optim.AdamW, *, run: str) -> int:
        """Fill anchor and optimizer, and return the step that comes next; 0 where there is none.

        Raises
        ------
        FailedPreconditionError
            The checkpoint is of another run.
        CorruptionError
            It is damaged.
        """
        if not self.path.exists():
            return 0
        tensors, text = read_tensors(self.path, kind=_ANCHOR_STAGE)
        try:
            meta = json.loads(text)
            _check_run(self.path, meta["run"], run)
            names = [name for name in tensors if name.startswith(_MODEL)]
            anchor.load_state_dict({n.removeprefix(_MODEL): tensors[n] for n in names})
            for name, parameter in anchor.named_parameters():
                optimizer.state[parameter] = _optimizer_state(tensors, name, parameter.device)
            return int(meta["step"])
        except (KeyError, TypeError, ValueError, RuntimeError) as err:
            raise _damaged(self.path, err) from err


class StageCheckpoint(Protocol):
    """Remembers how far stage 2 is."""

    def load(self, run: str) -> int:
        """Return the step to go on from, 0 at first.

        Raises
        ------
        FailedPreconditionError
            What is kept is of another run.
        """
        ...

    def acknowledge(self, step: int, run: str) -> None:
        """Note that the push of `step` was acknowledged, and with it all before."""
        ...

    def finish(self, run: str) -> None:
        """Note that the last push was acknowledged."""
        ...


class PositionCheckpoint:
    """Keeps the position of a worker, and its process id, in a JSON file.

    The memories themselves are in a served bank.

    Parameters
    ----------
    path
        The file; one per worker.

    Notes
    -----
    Written at every acknowledged push, and not forced to the disk: after the death of the process
    at most the pushes under way are made again, under the request ids that `run_id` gives them, so
    that the service applies them once. After a loss of power more steps may be done again.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        record = read_json(path) or {}
        step, run_id = record.get("step", 0), record.get("run_id", "")
        if not isinstance(step, int) or not isinstance(run_id, str):
            raise _damaged(path, TypeError("step or run_id has the wrong type"))
        self._step = step
        self._run = record.get("run")
        # Random, not derived from the run: a second run of the same configuration is not a repeat.
        self.run_id = run_id or uuid.uuid4().hex
        """Identity of this run of this worker, kept with the position."""

    def load(self, run: str) -> int:
        # docstring inherited
        if self._run is None:
            self._write(0, run)
        _check_run(self._path, self._run, run)
        return self._step

    def acknowledge(self, step: int, run: str) -> None:
        # docstring inherited
        self._write(step + 1, run)

    def finish(self, run: str) -> None:
        # docstring inherited
        del run  # the last acknowledgement wrote everything

    def _write(self, step: int, run: str) -> None:
        record = {"step": step, "run": run, "run_id": self.run_id, "pid": os.getpid()}
        write_json(self._path, record, sync=False)
        self._step, self._run = step, run


class InProcessCheckpoint:
    """Keeps memory of this process in a file, and with it how far it was trained.

    Parameters
    ----------
    path
        The file; a sibling with ``.run`` added says which run it belongs to.
    memory
        The memory to keep.
    every_steps
        Steps between two writes, at least 1.
    """

    def __init__(self, path: Path, memory: InProcessMemory, *, every_steps: int = 500) -> None:
        self._path = path
        self._memory = memory
        self._every_steps = every_steps

    def load(self, run: str) -> int:
        # docstring inherited
        record = read_json(self._run_path)
        if record is None or not self._path.exists():
            return 0
        _check_run(self._path, record.get("run"), run)
        self._memory.restore(InProcessMemory.load(self._path))
        return self._memory.num_steps

    def acknowledge(self, step: int, run: str) -> None:
        # docstring inherited
        if (step + 1) % self._every_steps == 0:
            self.finish(run)

    def finish(self, run: str) -> None:
        # docstring inherited
        # The run first: a memory file without one would be trained over by any run.
        write_json(self._run_path, {"run": run})
        # The memory's own position counts, not `step`: with prefetch it may be one push ahead.
        self._memory.save(self._path)

    @property
    def _run_path(self) -> Path:
        return self._path.with_name(self._path.name + ".run")


def _optimizer_state(
    tensors: dict[str, Tensor], name: str, device: torch.device
) -> dict[str, Tensor]:
    keys = ("step", "exp_avg", "exp_avg_sq")
    return {key: tensors[f"{_OPTIMIZER}{key}.{name}"].to(device) for key in keys}


def _config_json(anchor: Anchor) -> str:
    return json.dumps({"config": asdict(anchor.config)}, sort_keys=True)


def _check_run(path: Path, found: object, wanted: str) -> None:
    if found != wanted:
        raise FailedPreconditionError(
            f"{path} belongs to another run: its configuration, data or anchor differ; "
            "use another folder, or delete it to start afresh",
            reason=Reason.FINGERPRINT_MISMATCH,
            metadata={"path": str(path)},
        )


def _damaged(path: Path, err: Exception) -> CorruptionError:
    return CorruptionError(
        f"{path} is damaged ({err}); delete it to start afresh",
        reason=Reason.CHECKSUM_MISMATCH,
        metadata={"path": str(path)},
    )
