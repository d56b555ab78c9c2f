"""Files that a run can be resumed from: written whole or not at all, tensors as safetensors."""

from __future__ import annotations

import fcntl
import json
import os
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import safetensors
import safetensors.torch
from torch import Tensor

from membank.wire.errors import CorruptionError, FailedPreconditionError, NotFoundError, Reason

_KIND_KEY = "membank.kind"
_META_KEY = "membank.meta"


def write_atomically(path: Path, data: bytes, *, sync: bool = True) -> None:
    """Replace the file at `path` by `data`; a reader sees the old file or the new one.

    Parameters
    ----------
    path
        File to write; its folder is made.
    data
        All of its content.
    sync
        True waits until the content is on the disk, so that it survives a loss of power. False
        survives the death of the process alone and costs no disk access.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not tempfile: its files are for the owner alone, and a run may belong to a group.
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with temporary.open("xb") as file:
            file.write(data)
            if sync:
                # Before the rename: a name must never point at content that is not there.
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_tensors(path: Path, tensors: Mapping[str, Tensor], *, kind: str, meta: str) -> None:
    """Write tensors and a JSON text as one safetensors file, atomically.

    Parameters
    ----------
    path
        File to write.
    tensors
        Any device, any strides; no two may share storage.
    kind
        What the file is; `read_tensors` asks for the same.
    meta
        JSON text, kept in the header of the file.
    """
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_atomically(
        path,
        safetensors.torch.save(contiguous, metadata={_KIND_KEY: kind, _META_KEY: meta}),
    )


def read_tensors(path: Path, *, kind: str) -> tuple[dict[str, Tensor], str]:
    """Read what `write_tensors` wrote.

    Returns
    -------
    tuple
        The tensors, on the CPU, and the JSON text.

    Raises
    ------
    NotFoundError
        There is no such file.
    CorruptionError
        It is damaged, or of another kind.
    """
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError as err:
        raise NotFoundError(f"{path} does not exist", reason=Reason.OBJECT_MISSING) from err
    except (safetensors.SafetensorError, OSError) as err:
        raise _damaged(path, str(err)) from err
    if metadata.get(_KIND_KEY) != kind:
        raise _damaged(path, f"it is {metadata.get(_KIND_KEY)!r}, not {kind!r}")
    return tensors, metadata.get(_META_KEY, "{}")


def write_json(path: Path, record: Mapping[str, object], *, sync: bool = True) -> None:
    """Write a record as a JSON file, atomically."""
    write_atomically(path, (json.dumps(record, sort_keys=True) + "\n").encode(), sync=sync)


def read_json(path: Path) -> dict[str, object] | None:
    """Read a JSON object, or None where there is no such file.

    Raises
    ------
    CorruptionError
        It is not a JSON object.
    """
    try:
        record = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError as err:
        raise _damaged(path, str(err)) from err
    if not isinstance(record, dict):
        raise _damaged(path, "it is not a JSON object")
    return record


@contextmanager
def held_alone(path: Path, *, busy: str) -> Iterator[None]:
    """Keep other processes out until the block ends; a process that dies lets go.

    Parameters
    ----------
    path
        File that is locked; it and its folder are made.
    busy
        What an error says of the other process.

    Raises
    ------
    FailedPreconditionError
        If another one holds it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as err:
            raise FailedPreconditionError(busy, reason=Reason.TRANSACTION_IN_PROGRESS) from err
        yield


def _damaged(path: Path, why: str) -> CorruptionError:
    return CorruptionError(
        f"{path} is damaged ({why}); delete it to start afresh",
        reason=Reason.CHECKSUM_MISMATCH,
        metadata={"path": str(path)},
    )
