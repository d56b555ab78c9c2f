"""From the steps of a transaction to a plan: what each asks of shards, of the tree and of the record."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from membank.bank_service.knowledge.revisions import RevisionLog
from membank.bank_service.knowledge.shards import ShardGroup
from membank.bank_service.knowledge.transactions import Plan
from membank.bank_service.knowledge.trees import TreeStore, placed, tree_changes
from membank.bank_service.shard import contract as shard
from membank.bank_service.shard.contract import BlockOperation, BlockStatus
from membank.wire.errors import (
    ConflictError,
    FailedPreconditionError,
    InvalidArgumentError,
    Reason,
)
from membank.wire.format import TreeDocument
from membank.wire.spec import Array, BankSpec, BlockRef, BlockState
from membank.wire.steps import Combine, Delete, Place, Restore, Step, Swap, Withhold

MIXED = "transaction"
"""Name in the audit log of a transaction with steps of several kinds."""


def operation_of(steps: Sequence[Step]) -> str:
    """Return the name of a transaction in the audit log: the kind of its steps, where it is one."""
    kinds = {step.kind for step in steps}
    return kinds.pop() if len(kinds) == 1 else MIXED


def deleted_topic(topic: BlockRef) -> FailedPreconditionError:
    """Return the error for a topic of which nothing is left."""
    return FailedPreconditionError(
        f"topic {topic} is deleted; only an import, a swap or a copy creates it anew",
        reason=Reason.BLOCK_DELETED,
        metadata={"topic": str(topic)},
    )


@dataclass(frozen=True, slots=True)
class _Other:
    """A block that others are combined with, as it was read."""

    version: int
    weight: Array


class StepPlanner:
    """Makes plans; to be asked under the coordinator's lock, which keeps other transactions out.

    Parameters
    ----------
    spec
        Spec of the bank.
    shards
        All shards.
    log
        The bank's records.
    trees
        The bank's tree documents.
    """

    def __init__(
        self, spec: BankSpec, shards: ShardGroup, log: RevisionLog, trees: TreeStore
    ) -> None:
        self._spec = spec
        self._shards = shards
        self._log = log
        self._trees = trees

    def plan(self, steps: Sequence[Step]) -> Plan:
        """Return what `steps` ask for; errors are those of `BankAdmin.apply`."""
        if not steps:
            raise InvalidArgumentError("a transaction of no steps; give at least one")
        changed = self._changed(steps)
        needed = {*changed, *_others(steps), *(s.topic for s in steps if isinstance(s, Place))}
        for ref in needed:
            self._spec.check_ref(ref)
        statuses = self._shards.describe(sorted(needed))
        others = self._read_others(steps, statuses)
        operations = [
            operation for step in steps for operation in self._operations(step, statuses, others)
        ]
        before = self._trees.read(self._log.committed.tree_revision)
        after = self._tree_after(before, steps, _deleted_after(operations, statuses))
        changes = tree_changes(before, after)
        destroys = any(isinstance(step, Delete) for step in steps)
        return Plan(
            operations=operations,
            detail={"steps": [_account(step, others) for step in steps]},
            # A deletion writes it even where nothing in it tells of the topic: the old one is
            # destroyed for sure.
            tree=after if changes or (destroys and (before.labels or before.centroids)) else None,
            tree_changes=changes,
        )

    # ---- what steps name

    def _changed(self, steps: Sequence[Step]) -> set[BlockRef]:
        """Return the blocks that are changed, by one step each."""
        by_block: dict[BlockRef, Step] = {}
        by_place: dict[BlockRef, Step] = {}
        for step in steps:
            taken = by_place if isinstance(step, Place) else by_block
            for ref in self._scope(step):
                if (first := taken.setdefault(ref, step)) is not step:
                    raise InvalidArgumentError(
                        f"block {ref} is changed by two steps of the transaction: {_named(first)}, "
                        f"and {_named(step)}; make one of them",
                        metadata={"block": str(ref)},
                    )
        return set(by_block)

    def _scope(self, step: Step) -> Iterator[BlockRef]:
        match step:
            case Swap(ref=ref) | Combine(ref=ref):
                yield ref
            case Place(topic=topic):
                yield topic
            case Withhold(topic=topic) | Restore(topic=topic) | Delete(topic=topic):
                self._spec.check_ref(topic)
                yield from [topic] if step.only_block else self._spec.subtree(topic)

    # ---- what they ask of shards

    def _operations(
        self,
        step: Step,
        statuses: Mapping[BlockRef, BlockStatus],
        others: Mapping[BlockRef, _Other],
    ) -> list[BlockOperation]:
        def expected(ref: BlockRef, by_caller: int | None = None) -> int | None:
            # Who is read and changed must not move on in between: an update that it took would be
            # in neither block.
            return others[ref].version if by_caller is None and ref in others else by_caller

        match step:
            case Swap(ref=ref, weight=weight, expected_version=version):
                return [
                    shard.SetContent(
                        ref=ref, weight=weight, expected_version=expected(ref, version)
                    )
                ]
            case Combine(ref=ref, expected_version=version):
                other = None if step.other is None else others[step.other].weight
                return [
                    shard.Combine(
                        ref=ref,
                        keep=step.keep,
                        other=other,
                        add=step.add,
                        expected_version=expected(ref, version),
                    )
                ]
            case Place():
                return []
        left = [ref for ref in self._scope(step) if statuses[ref].state is not BlockState.DELETED]
        if not left:
            raise deleted_topic(step.topic)
        if isinstance(step, Delete):
            return [shard.Erase(ref=ref, expected_version=expected(ref)) for ref in left]
        state = BlockState.WITHHELD if isinstance(step, Withhold) else BlockState.ACTIVE
        return [
            shard.SetState(ref=ref, state=state, expected_version=expected(ref)) for ref in left
        ]

    def _read_others(
        self, steps: Sequence[Step], statuses: Mapping[BlockRef, BlockStatus]
    ) -> dict[BlockRef, _Other]:
        combined = [step for step in steps if isinstance(step, Combine)]
        for step in combined:
            if step.other is not None:
                self._check_other(step, step.other, statuses[step.other].state)
        contents = self._shards.read(sorted(_others(steps)))
        others = {content.ref: _Other(content.version, content.weight) for content in contents}
        for step in combined:
            if step.other is not None:
                _check_version(step.other, others, step.expected_other_version)
        return others

    def _check_other(self, step: Combine, other: BlockRef, state: BlockState) -> None:
        if state is not BlockState.ACTIVE:
            mend = "restore" if state is BlockState.WITHHELD else "import"
            raise FailedPreconditionError(
                f"block {step.ref} cannot be combined with block {other}, which is "
                f"{state.name.lower()}; {mend} it first",
                reason=Reason.BLOCK_WITHHELD
                if state is BlockState.WITHHELD
                else Reason.BLOCK_DELETED,
                metadata={"block": str(other)},
            )
        own, others = (self._spec.block_shape(ref.level) for ref in (step.ref, other))
        if own != others:
            raise InvalidArgumentError(
                f"block {step.ref} has shape {own} and block {other} {others}; only blocks of one "
                "shape are combined",
                reason=Reason.BAD_SHAPE,
                metadata={"block": str(step.ref), "other": str(other)},
            )

    # ---- what they ask of the tree

    def _tree_after(
        self, tree: TreeDocument, steps: Sequence[Step], deleted: set[BlockRef]
    ) -> TreeDocument:
        for step in steps:
            if isinstance(step, Delete):
                tree = tree.without_topic(self._spec, step.topic, only_block=step.only_block)
        for step in steps:
            if isinstance(step, Place):
                if step.topic in deleted and (
                    step.label or step.num_documents or not step.remove_centroid
                ):
                    raise FailedPreconditionError(
                        f"topic {step.topic} is to be placed, and its block is deleted then; give "
                        "it content in the same transaction, or only remove its centroid",
                        reason=Reason.BLOCK_DELETED,
                        metadata={"topic": str(step.topic)},
                    )
                tree = placed(tree, step)
        return tree


def _others(steps: Sequence[Step]) -> set[BlockRef]:
    return {step.other for step in steps if isinstance(step, Combine) and step.other is not None}


def _check_version(
    ref: BlockRef, others: Mapping[BlockRef, _Other], expected_version: int | None
) -> None:
    if ref not in others:
        # Its owner has another opinion of its state than it had a moment ago.
        raise ConflictError(f"block {ref} changed while it was read; decide again")
    version = others[ref].version
    if expected_version is not None and expected_version != version:
        raise ConflictError(
            f"block {ref} has version {version}, not {expected_version}; fetch it and decide again",
            metadata={"block": str(ref), "version": str(version)},
        )


def _deleted_after(
    operations: Sequence[BlockOperation], statuses: Mapping[BlockRef, BlockStatus]
) -> set[BlockRef]:
    """Return which blocks, of those that are known, are deleted once `operations` are done."""
    deleted = {ref for ref, status in statuses.items() if status.state is BlockState.DELETED}
    for operation in operations:
        if isinstance(operation, shard.Erase):
            deleted.add(operation.ref)
        elif isinstance(operation, shard.SetContent | shard.Combine):
            deleted.discard(operation.ref)
    return deleted


def _named(step: Step) -> str:
    match step:
        case Swap(ref=ref) | Combine(ref=ref):
            return f"{step.kind} of block {ref}"
        case Place(topic=topic):
            return f"place of topic {topic}"
        case _:
            what = "block" if step.only_block else "topic"
            return f"{step.kind} of {what} {step.topic}"


def _account(step: Step, others: Mapping[BlockRef, _Other]) -> dict[str, object]:
    """Return what the audit log says of a step: neither content nor labels."""
    match step:
        case Swap(ref=ref):
            return {"step": step.kind, "block": str(ref)}
        case Combine(ref=ref, keep=keep, other=other, add=add):
            account: dict[str, object] = {"step": step.kind, "block": str(ref), "keep": keep}
            if other is not None:
                version = others[other].version
                account |= {"other": str(other), "other_version": version, "add": add}
            return account
        case Place(topic=topic):
            return {"step": step.kind, "topic": str(topic)}
        case _:
            only = {"only_block": True} if step.only_block else {}
            return {"step": step.kind, "topic": str(step.topic), **only}
