"""The log of edits: what was made, and what the blocks held before. It lies beside the run.

``log.jsonl`` has a line for each transaction before it is sent to the bank (``prepared``) and one once
its fate is known (``committed`` or ``abandoned``). ``contents/TRANSACTION.safetensors`` has the content
of each block before it. Lines are synced before anything that depends on them happens, and only ever
appended; a last line that a kill has cut was never relied on, and is dropped.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from membank.trainer.training.files import held_alone, read_tensors, write_tensors
from membank.wire.errors import (
    AlreadyExistsError,
    CorruptionError,
    FailedPreconditionError,
    NotFoundError,
    Reason,
)
from membank.wire.spec import BlockRef

_KIND = "membank.edit-contents"


@dataclass(frozen=True, kw_only=True, slots=True)
class LoggedPrompt:
    """A prompt that a block was trained on."""

    edit_id: str
    """The edit that it belongs to."""
    prompt: str
    """The prompt."""
    target: str
    """Its target."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoggedNeighbour:
    """A prompt that was given to be kept."""

    edit_id: str
    """The edit that it was given with; empty in logs that are older than this field."""
    prompt: str
    """The prompt."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoggedBlock:
    """What one transaction did to one block."""

    ref: str
    """The block."""
    version_before: int
    """Version that it was made from."""
    version_after: int
    """Version after it: a swap that expects a version gives the next one."""
    prompts: tuple[LoggedPrompt, ...] = ()
    """What it was trained on; empty for an undo, which trains on what is logged already."""
    neighbours: tuple[LoggedNeighbour, ...] = ()
    """Prompts that were given to be kept."""
    remade: tuple[str, ...] = ()
    """Transactions whose edits an undo made anew on the block, in their order."""

    def without(self, edit_ids: Collection[str]) -> LoggedBlock:
        """Return it as if some edits had not been made."""
        return replace(
            self,
            prompts=tuple(p for p in self.prompts if p.edit_id not in edit_ids),
            neighbours=tuple(n for n in self.neighbours if n.edit_id not in edit_ids),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class LoggedTransaction:
    """One swap of edited blocks."""

    transaction: str
    """Its id."""
    operation: str
    """``edit`` or ``undo``."""
    bank_id: str
    """Identity of the bank."""
    edit_ids: tuple[str, ...]
    """The edits that were made, or undone."""
    blocks: tuple[LoggedBlock, ...]
    """What it did, block by block."""
    time_s: float
    """When it was prepared, in seconds since 1970-01-01 UTC."""
    revision: int | None = None
    """Revision of the bank that it made; None while that is not known."""

    @property
    def request_id(self) -> str:
        """The id under which the bank's audit log has it; it tells nothing of the facts."""
        return f"{self.operation}-{self.transaction}"

    def block(self, ref: BlockRef) -> LoggedBlock | None:
        """Return what it did to a block; None = nothing."""
        return next((block for block in self.blocks if block.ref == str(ref)), None)


class EditLog:
    """The log of one run.

    Parameters
    ----------
    folder
        Where it is kept; made when something is written.

    Notes
    -----
    Whoever writes holds `exclusive`, so that two commands cannot number their edits alike. What
    another client does to the bank is not in it; that shows in the versions.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._file = folder / "log.jsonl"

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Keep other processes from editing by this log until the block ends.

        Raises
        ------
        FailedPreconditionError
            If another one is at it.
        """
        busy = (
            f"another edit is being made by the log in {self._folder}; wait until it is done, then "
            "give the command again"
        )
        with held_alone(self._folder / "lock", busy=busy):
            yield

    def transactions(self) -> tuple[LoggedTransaction, ...]:
        """Return the transactions in their order; those whose fate is not known among them.

        Raises
        ------
        CorruptionError
            If a line other than a cut last one cannot be read.
        """
        found: dict[str, LoggedTransaction] = {}
        for number, line in enumerate(self._whole_lines(), start=1):
            try:
                body = json.loads(line)
                match body["event"]:
                    case "prepared":
                        transaction = _TRANSACTION.validate_python(_upgraded(body["transaction"]))
                        found[transaction.transaction] = transaction
                    case "committed":
                        name = body["transaction"]
                        found[name] = replace(found[name], revision=int(body["revision"]))
                    case "abandoned":
                        del found[body["transaction"]]
                    case other:
                        raise ValueError(f"unknown event {other!r}")
            except (KeyError, TypeError, ValueError, ValidationError) as err:
                raise CorruptionError(
                    f"{self._file}, line {number} is damaged ({err}); mend or remove the log: "
                    "without it the bank is as it is, but nothing can be undone",
                    reason=Reason.SPEC_CORRUPT,
                    metadata={"path": str(self._file), "line": str(number)},
                ) from err
        return tuple(found.values())

    def prepare(
        self, transaction: LoggedTransaction, before: Mapping[tuple[str, BlockRef], Tensor]
    ) -> None:
        """Put on record what is about to be sent.

        Parameters
        ----------
        transaction
            The transaction.
        before
            (L, P, R, D) content of a block before the edits of a transaction were made on it, by
            that transaction and block: "" = this one's own; for an undo also all that it makes anew.
        """
        write_tensors(
            self._contents(transaction.transaction),
            # Clones: two entries may be one tensor, which a file of tensors may not hold.
            {
                f"{name or transaction.transaction}:{ref}": w.clone()
                for (name, ref), w in before.items()
            },
            kind=_KIND,
            meta="{}",
        )
        self._append({"event": "prepared", "transaction": asdict(transaction)})

    def commit(self, transaction: str, revision: int) -> None:
        """Put on record that the bank has made it, at `revision`."""
        self._append({"event": "committed", "transaction": transaction, "revision": revision})

    def abandon(self, transaction: str) -> None:
        """Put on record that the bank has not made it and never will."""
        self._append({"event": "abandoned", "transaction": transaction})
        self._contents(transaction).unlink(missing_ok=True)

    def content(self, stored_by: str, made_by: str, ref: BlockRef) -> Tensor:
        """Return the content of a block before the edits of a transaction.

        Parameters
        ----------
        stored_by
            The transaction that has put it on record.
        made_by
            The transaction whose edits are meant.
        ref
            The block.

        Returns
        -------
        Tensor
            (L, P, R, D) float32.

        Raises
        ------
        NotFoundError
            If its file is gone.
        """
        path = self._contents(stored_by)
        try:
            tensors, _ = read_tensors(path, kind=_KIND)
            return tensors[f"{made_by}:{ref}"]
        except (NotFoundError, KeyError) as err:
            raise NotFoundError(
                f"{path} does not hold what block {ref} was before; this edit cannot be undone, but "
                "`membank audit --retained` lists revisions to go back to",
                reason=Reason.OBJECT_MISSING,
                metadata={"path": str(path)},
            ) from err

    def _contents(self, transaction: str) -> Path:
        return self._folder / "contents" / f"{transaction}.safetensors"

    def _append(self, record: Mapping[str, object]) -> None:
        whole = sum(len(line) + 1 for line in self._whole_lines())
        line = json.dumps(record, sort_keys=True, ensure_ascii=False).encode() + b"\n"
        with self._file.open("ab") as file:
            # What a kill has cut off would otherwise be the beginning of this line.
            file.truncate(whole)
            file.write(line)
            file.flush()
            os.fsync(file.fileno())

    def _whole_lines(self) -> list[bytes]:
        try:
            return self._file.read_bytes().split(b"\n")[:-1]
        except FileNotFoundError:
            return []


class EditHistory:
    """The committed transactions of one bank, and what they mean for its blocks.

    Parameters
    ----------
    log
        The log.
    bank_id
        Identity of the bank.
    """

    def __init__(self, log: EditLog, bank_id: str) -> None:
        every = [t for t in log.transactions() if t.bank_id == bank_id]
        self._log = log
        self.transactions = tuple(t for t in every if t.revision is not None)
        """Committed ones, in their order."""
        self.pending = tuple(t for t in every if t.revision is None)
        """Those whose fate is not known."""
        self.undone = frozenset(
            name for t in self.transactions if t.operation == "undo" for name in t.edit_ids
        )
        """Edits that were undone."""

    def check_new(self, edit_id: str, where: str) -> None:
        """Raise `AlreadyExistsError` if an edit has this id."""
        if any(t.operation == "edit" and edit_id in t.edit_ids for t in self.transactions):
            raise AlreadyExistsError(
                f"{where}: there is an edit {edit_id!r} in the log; give another id",
                reason=Reason.OBJECT_EXISTS,
                metadata={"edit": edit_id},
            )

    def made_by(self, edit_id: str) -> LoggedTransaction:
        """Return the transaction that made a standing edit.

        Raises
        ------
        NotFoundError
            If there is no such edit.
        FailedPreconditionError
            If it was undone already.
        """
        if edit_id in self.undone:
            raise FailedPreconditionError(
                f"edit {edit_id!r} was undone already; make it again from its facts, under a new id",
                reason=Reason.BAD_ARGUMENT,
                metadata={"edit": edit_id},
            )
        for transaction in self.transactions:
            if transaction.operation == "edit" and edit_id in transaction.edit_ids:
                return transaction
        raise NotFoundError(
            f"no edit {edit_id!r} of this bank is in the log; `membank edit --list` shows them",
            reason=Reason.OBJECT_MISSING,
            metadata={"edit": edit_id},
        )

    def standing(self, ref: BlockRef) -> list[tuple[LoggedTransaction, LoggedBlock]]:
        """Return the edits of a block that were not undone, as transactions with what is left."""
        found = []
        for transaction in self.transactions:
            block = transaction.block(ref)
            if transaction.operation != "edit" or block is None:
                continue
            left = block.without(self.undone)
            if left.prompts:
                found.append((transaction, left))
        return found

    def told(self, ref: BlockRef) -> dict[str, str]:
        """Return what the standing edits have taught a block: prompt -> newest target."""
        return {p.prompt: p.target for _, block in self.standing(ref) for p in block.prompts}

    def before(self, transaction: str, ref: BlockRef, *, version: int) -> Tensor:
        """Return the content of a block before a transaction's edits of it were last made.

        Parameters
        ----------
        transaction
            The transaction.
        ref
            The block.
        version
            Present version of the block.

        Returns
        -------
        Tensor
            (L, P, R, D) float32.

        Raises
        ------
        FailedPreconditionError
            If something that is not in the log changed the block since: going back would lose it.
        """
        touching = [t for t in self.transactions if t.block(ref) is not None]
        names = [t.transaction for t in touching]
        first = names.index(transaction)
        # An undo of an earlier edit makes all later ones of the block anew, and stores for each what
        # it was made on: from then on that counts.
        last = max(
            n for n, t in enumerate(touching) if n == first or transaction in _remade(t, ref)
        )
        expected = None
        for t in touching[last:]:
            block = t.block(ref)
            assert block is not None
            if expected not in (None, block.version_before):
                raise _changed(ref, expected or 0, block.version_before)
            expected = block.version_after
        if expected != version:
            raise _changed(ref, expected or 0, version)
        return self._log.content(touching[last].transaction, transaction, ref)


def _upgraded(transaction: dict[str, Any]) -> dict[str, Any]:
    """Return a transaction as it is logged now: neighbours were prompts alone once."""
    for block in transaction["blocks"]:
        block["neighbours"] = [
            {"edit_id": "", "prompt": said} if isinstance(said, str) else said
            for said in block["neighbours"]
        ]
    return transaction


def _remade(transaction: LoggedTransaction, ref: BlockRef) -> tuple[str, ...]:
    block = transaction.block(ref)
    return () if block is None else block.remade


def _changed(ref: BlockRef, logged: int, found: int) -> FailedPreconditionError:
    return FailedPreconditionError(
        f"block {ref} was changed by something that is not in this log (version {logged} -> {found}: "
        "training, a swap, a rollback or another run's edit); undoing would lose that. Go back with "
        f"`membank rollback --to-revision N --block {ref}`, or make the edit that says the opposite",
        reason=Reason.VERSION_MISMATCH,
        metadata={"block": str(ref), "logged": str(logged), "found": str(found)},
    )


_TRANSACTION = TypeAdapter(LoggedTransaction)
