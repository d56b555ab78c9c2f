"""What the operations of a transaction make of blocks, before anything is written."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from membank.bank_service.shard.combining import combined_weight
from membank.bank_service.shard.content import (
    INITIAL_ENTRY,
    BlockRecord,
    Content,
    content_crcs,
    kept,
)
from membank.bank_service.shard.contract import (
    BlockOperation,
    Combine,
    Erase,
    RestoreEntry,
    SetContent,
    SetState,
)
from membank.bank_service.shard.optimizer import is_finite
from membank.wire.errors import (
    ConflictError,
    FailedPreconditionError,
    InvalidArgumentError,
    Reason,
)
from membank.wire.format import NO_SLOT, Entry, Manifest
from membank.wire.records import BlockChange
from membank.wire.spec import Array, BankSpec, BlockRef, BlockState, Role


@dataclass(frozen=True, slots=True)
class Draft:
    """A block as a transaction would leave it."""

    ref: BlockRef
    """The block."""
    before: Entry
    """Its entry before."""
    after: BlockRecord
    """The block after; dirty where content must be written."""

    def change(self, spec: BankSpec) -> BlockChange:
        """Return the change for the report."""
        level, after = self.ref.level, self.after.entry
        return BlockChange(
            ref=self.ref,
            version_before=self.before.version,
            version_after=after.version,
            state_before=self.before.state,
            state_after=after.state,
            num_bytes=spec.weight_bytes(level) + spec.optimizer_bytes(level),
        )

    @property
    def erases(self) -> bool:
        """True where the block is deleted."""
        return self.after.entry.state is BlockState.DELETED


class PresentBlocks(Protocol):
    """The blocks of a partition as a transaction finds them."""

    def record(self, ref: BlockRef) -> BlockRecord:
        """Return what is known of a block."""

    def weight(self, ref: BlockRef, record: BlockRecord) -> Array:
        """Return the (L, P, R, D) weight of a block that is not deleted, in the bank's dtype.

        Parameters
        ----------
        ref
            The block.
        record
            What is known of it.
        """

    def manifest(self, ref: BlockRef, number: int) -> Manifest:
        """Return a retained manifest of the partition of a block."""


def check_operations(spec: BankSpec, operations: Sequence[BlockOperation]) -> None:
    """Raise unless every operation is well formed.

    Raises
    ------
    NotFoundError
        If a block does not exist.
    InvalidArgumentError
        If a block occurs twice, or an array does not fit.
    """
    seen: set[BlockRef] = set()
    for operation in operations:
        spec.check_ref(operation.ref)
        if operation.ref in seen:
            raise InvalidArgumentError(
                f"block {operation.ref} occurs twice in one transaction; merge its operations"
            )
        seen.add(operation.ref)
        match operation:
            case SetContent():
                _check_content(spec, operation)
            case Combine(ref=ref, other=other) if other is not None:
                what = f"content to be combined with block {ref}"
                check_array(other, spec.block_shape(ref.level), {spec.dtype}, what)
            case SetState(ref=ref, state=BlockState.DELETED):
                raise InvalidArgumentError(
                    f"the state of block {ref} cannot be set to DELETED; erase the block"
                )


def draft_changes(
    spec: BankSpec,
    operations: Iterable[BlockOperation],
    now: PresentBlocks,
) -> list[Draft]:
    """Return what `operations` change; those without effect are left out.

    Parameters
    ----------
    spec
        Spec of the bank.
    operations
        Checked by `check_operations`.
    now
        The blocks as they are.

    Raises
    ------
    ConflictError
        If a block does not have the expected version.
    FailedPreconditionError
        If content of a deleted block is needed (BLOCK_DELETED).
    InvalidArgumentError
        If what is computed is not finite (NOT_FINITE).
    NotFoundError
        If a manifest is not retained any more.
    """
    drafts = []
    for operation in operations:
        before = now.record(operation.ref)
        _check_version(operation, before.entry)
        after = _after(spec, operation, before, now)
        if after is not None:
            drafts.append(Draft(operation.ref, before.entry, after))
    return drafts


def _after(
    spec: BankSpec,
    operation: BlockOperation,
    before: BlockRecord,
    now: PresentBlocks,
) -> BlockRecord | None:
    entry = before.entry
    match operation:
        case SetContent():
            return _set_content(spec, operation, entry)
        case Combine():
            return _combine(spec, operation, before, now)
        case SetState(state=state):
            if entry.state in {state, BlockState.DELETED}:
                return None
            return BlockRecord(_changed(entry, state=state), before.content)
        case Erase():
            if entry.state is BlockState.DELETED:
                return None
            return BlockRecord(
                Entry(slot=NO_SLOT, version=entry.version + 1, state=BlockState.DELETED)
            )
        case RestoreEntry(ref=ref, manifest=number):
            target = now.manifest(ref, number).entries.get(ref) if number else None
            return _restore(entry, target or INITIAL_ENTRY)


def _check_version(operation: BlockOperation, entry: Entry) -> None:
    if isinstance(operation, RestoreEntry) or operation.expected_version is None:
        return
    if operation.expected_version != entry.version:
        raise ConflictError(
            f"block {operation.ref} has version {entry.version}, not "
            f"{operation.expected_version}; fetch it and decide again",
            metadata={"block": str(operation.ref), "version": str(entry.version)},
        )


def _set_content(spec: BankSpec, operation: SetContent, entry: Entry) -> BlockRecord:
    arrays: dict[Role, Array] = {Role.WEIGHT: operation.weight, **operation.optimizer_state}
    if not operation.is_given:
        arrays = {role: kept(array) for role, array in arrays.items()}
    return _new_content(spec, entry, arrays, BlockState.ACTIVE, operation.step)


def _combine(
    spec: BankSpec, operation: Combine, before: BlockRecord, now: PresentBlocks
) -> BlockRecord:
    ref, entry = operation.ref, before.entry
    state = entry.state
    if state is BlockState.DELETED:
        if operation.keep:
            raise FailedPreconditionError(
                f"block {ref} is deleted and has no content to keep {operation.keep:g} of; copy or "
                "swap it, which creates it anew, or import it",
                reason=Reason.BLOCK_DELETED,
                metadata={"block": str(ref)},
            )
        state = BlockState.ACTIVE
    weight = combined_weight(spec, operation, lambda: now.weight(ref, before))
    return _new_content(spec, entry, {Role.WEIGHT: weight}, state, step=0)


def _new_content(
    spec: BankSpec, entry: Entry, arrays: dict[Role, Array], state: BlockState, step: int
) -> BlockRecord:
    # A state of zeros is neither kept nor stored: it is several times as large as the weight.
    crcs = content_crcs(spec, arrays)
    after = Entry(slot=NO_SLOT, version=entry.version + 1, state=state, step=step, crcs=crcs)
    return BlockRecord(after, Content(arrays, crcs[0]))


def _restore(entry: Entry, target: Entry) -> BlockRecord | None:
    # Deleted stays deleted; and a rollback never deletes what was created since.
    if BlockState.DELETED in {entry.state, target.state}:
        return None
    if _same_content(entry, target) and entry.state is target.state:
        return None
    return BlockRecord(
        Entry(
            slot=target.slot,
            version=entry.version + 1,
            state=target.state,
            step=target.step,
            crcs=target.crcs,
        )
    )


def _same_content(one: Entry, other: Entry) -> bool:
    return (one.slot, one.crcs, one.step) == (other.slot, other.crcs, other.step)


def _changed(entry: Entry, *, state: BlockState) -> Entry:
    return Entry(
        slot=entry.slot,
        version=entry.version + 1,
        state=state,
        step=entry.step,
        crcs=entry.crcs,
    )


def _check_content(spec: BankSpec, operation: SetContent) -> None:
    ref, state = operation.ref, operation.optimizer_state
    if state and set(state) != set(spec.optimizer.state_roles):
        raise InvalidArgumentError(
            f"block {ref}: optimizer state has roles {sorted(state)}, expected "
            f"{sorted(spec.optimizer.state_roles)} or none",
            metadata={"block": str(ref)},
        )
    if operation.step < 0:
        raise InvalidArgumentError(f"block {ref}: step is {operation.step}; accepted: >= 0")
    for role, array in {Role.WEIGHT: operation.weight, **state}.items():
        what = f"{role} of block {ref}"
        check_array(array, spec.block_shape(ref.level), {spec.role_dtype(role).name}, what)
        if not is_finite(array):
            raise InvalidArgumentError(
                f"{what} holds a number that is not finite", reason=Reason.NOT_FINITE
            )


def check_array(array: Array, shape: tuple[int, ...], dtypes: Iterable[str], what: str) -> None:
    """Raise `InvalidArgumentError` unless `array` has this shape and one of these dtypes."""
    if array.shape != shape:
        raise InvalidArgumentError(
            f"{what} has shape {array.shape}, expected {shape}", reason=Reason.BAD_SHAPE
        )
    if array.dtype.name not in dtypes:
        raise InvalidArgumentError(
            f"{what} has dtype {array.dtype.name}, expected {' or '.join(sorted(dtypes))}",
            reason=Reason.BAD_DTYPE,
        )
