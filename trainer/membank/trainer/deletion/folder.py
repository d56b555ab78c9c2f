"""What a deletion keeps while it is under way, so that the same command goes on where it stopped."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from membank.trainer.deletion.exchange import TopicWords
from membank.trainer.deletion.plan import DeletionPlan
from membank.trainer.training import Fetched
from membank.trainer.training.files import (
    held_alone,
    read_json,
    read_tensors,
    write_json,
    write_tensors,
)
from membank.wire.errors import CorruptionError, Reason
from membank.wire.spec import BlockRef, BlockState

_KIND = "membank.fixed-blocks"


class Phase(StrEnum):
    """How far a deletion is."""

    TRAINING = "training"
    """The bank is as it was."""
    DESTROYING = "destroying"
    """The old blocks are to be deleted, or are already."""
    INSTALLING = "installing"
    """They are deleted; the new ones are to be created, or are already."""
    DONE = "done"
    """The new ones are in place."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DeletionState:
    """How far a deletion is, and what it found on its way."""

    plan: DeletionPlan
    """What is done."""
    bank_id: str = ""
    """Identity of the bank; empty in accounts that are older than this field."""
    recipe: str
    """Digest of what blocks are trained anew on, and how; empty where none is."""
    phase: Phase = Phase.TRAINING
    """How far it is."""
    job_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    """Identity of this job; its transactions have request ids that begin with it."""
    words: Mapping[str, TopicWords] = field(default_factory=dict)
    """What the tree is to say of each block that is created anew."""
    versions: Mapping[str, int] = field(default_factory=dict)
    """Version of each of these blocks once it is deleted; empty before that."""
    figures: Mapping[str, object] = field(default_factory=dict)
    """What the report says of the steps that are done; JSON-able."""


_STATE = TypeAdapter(DeletionState)


class DeletionFolder:
    """The files of one deletion.

    Parameters
    ----------
    path
        The folder; it is made when something is saved.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def staged_file(self) -> Path:
        """The blocks that are trained anew."""
        return self.path / "staged.safetensors"

    @property
    def losses_file(self) -> Path:
        """Losses of their training."""
        return self.path / "losses.jsonl"

    @property
    def receipt_file(self) -> Path:
        """Receipt of the deletion, where the service gave one."""
        return self.path / "receipt.json"

    def load(self) -> DeletionState | None:
        """Return how far the deletion is; None where it has not begun.

        Raises
        ------
        CorruptionError
            The file is damaged.
        """
        try:
            record = read_json(self._state_file)
            return None if record is None else _STATE.validate_python(record)
        except (ValidationError, CorruptionError) as err:
            # Not "start afresh": its blocks may be deleted, and the staged ones all that there is.
            raise CorruptionError(
                f"{self._state_file} is damaged; restore it from a copy. Without one, remove its "
                "folder, and import or swap the blocks that are deleted",
                reason=Reason.CHECKSUM_MISMATCH,
                metadata={"path": str(self._state_file)},
            ) from err

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Keep other processes from deleting documents by this run until the block ends.

        Raises
        ------
        FailedPreconditionError
            If another one is at it.
        """
        folder = self.path.parent
        busy = (
            f"another deletion of documents is under way in {folder}; wait until it is done, then "
            "give the command again"
        )
        with held_alone(folder / "lock", busy=busy):
            yield

    def unfinished_beside(self, bank_id: str) -> tuple[Path, DeletionState] | None:
        """Return another deletion from the bank that has begun to destroy and is not done; or None.

        Raises
        ------
        CorruptionError
            The account of one is damaged.
        """
        for file in sorted(self.path.parent.glob(f"*/{self._state_file.name}")):
            state = DeletionFolder(file.parent).load() if file.parent != self.path else None
            if (
                state is not None
                and state.bank_id == bank_id
                and state.phase in (Phase.DESTROYING, Phase.INSTALLING)
            ):
                return file.parent, state
        return None

    def begin(self, plan: DeletionPlan, recipe: str, bank_id: str) -> DeletionState:
        """Begin a job; what an earlier one left is removed."""
        self.discard_weights()
        return self.save(DeletionState(plan=plan, bank_id=bank_id, recipe=recipe))

    def save(self, state: DeletionState) -> DeletionState:
        """Write how far the deletion is, and return it."""
        write_json(self._state_file, _STATE.dump_python(state, mode="json"))
        return state

    def save_fixed(self, fixed: Fetched) -> None:
        """Keep the blocks that are not trained: a job that goes on uses the same."""
        meta = {
            "versions": {str(ref): version for ref, version in fixed.versions.items()},
            "absent": {str(ref): int(state) for ref, state in fixed.absent.items()},
        }
        weights = {str(ref): weight for ref, weight in fixed.weights.items()}
        write_tensors(self._fixed_file, weights, kind=_KIND, meta=json.dumps(meta))

    def load_fixed(self) -> Fetched | None:
        """Return them; None where they were not kept.

        Raises
        ------
        CorruptionError
            The file is damaged.
        """
        if not self._fixed_file.is_file():
            return None
        tensors, text = read_tensors(self._fixed_file, kind=_KIND)
        meta = json.loads(text)
        return Fetched(
            weights={BlockRef.parse(name): tensor for name, tensor in tensors.items()},
            versions={BlockRef.parse(name): v for name, v in meta["versions"].items()},
            absent={BlockRef.parse(name): BlockState(s) for name, s in meta["absent"].items()},
        )

    def discard_weights(self) -> None:
        """Remove every file but the account of what was done."""
        for file in (self._fixed_file, self.staged_file, self.losses_file, self._run_file):
            file.unlink(missing_ok=True)
            # What a kill left of a file that was being written.
            for cut_off in self.path.glob(f".{file.name}.*"):
                cut_off.unlink(missing_ok=True)

    @property
    def _state_file(self) -> Path:
        return self.path / "deletion.json"

    @property
    def _fixed_file(self) -> Path:
        return self.path / "fixed.safetensors"

    @property
    def _run_file(self) -> Path:
        # Which run the staged blocks belong to; `InProcessCheckpoint` writes it.
        return self.staged_file.with_name(self.staged_file.name + ".run")
