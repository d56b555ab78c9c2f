"""Makes edits of a served bank, and undoes them: staged here, swapped in as one transaction."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from membank.trainer.editing.answers import Answers
from membank.trainer.editing.config import EditConfig
from membank.trainer.editing.contract import (
    BlockTraining,
    EditedBank,
    EditReport,
    FactEdit,
    NeighbourChange,
    PromptChange,
)
from membank.trainer.editing.log import EditHistory, EditLog, LoggedBlock, LoggedTransaction
from membank.trainer.editing.staging import (
    FetchedContents,
    Lesson,
    ReplaySequences,
    Router,
    fetch_contents,
    make_lessons,
)
from membank.trainer.editing.training import train_block
from membank.trainer.evaluation import states
from membank.wire.errors import ConflictError, FailedPreconditionError, Reason
from membank.wire.records import AuditRecord
from membank.wire.spec import BankSpec, BlockRef, Path

Notice = Callable[[str], None]
"""Told what is being done."""

_AUDIT_RECORDS = 1000
"""Newest records of the audit log that are searched at first for a transaction whose fate is not known."""

_MOST_AUDIT_RECORDS = 10_000
"""Most records that a service gives."""

_CLOCKS_DIFFER_S = 3600.0
"""By how much the clocks of client and service may differ, in seconds."""


@dataclass(slots=True)
class _Staged:
    """A transaction in this process: what was fetched, and what it becomes."""

    operation: str
    edit_ids: tuple[str, ...]
    contents: FetchedContents
    after: dict[BlockRef, Tensor] = field(default_factory=dict)
    logged: list[LoggedBlock] = field(default_factory=list)
    before: dict[tuple[str, BlockRef], Tensor] = field(default_factory=dict)
    trainings: list[BlockTraining] = field(default_factory=list)
    reapplied: list[str] = field(default_factory=list)
    prompts: list[PromptChange] = field(default_factory=list)
    undone: list[PromptChange] = field(default_factory=list)
    neighbours: list[NeighbourChange] = field(default_factory=list)


class Editor:
    """Edits one bank by the log of one run.

    Parameters
    ----------
    bank
        The bank; a connected `membank.client.BankClient`.
    answers
        Anchor and tokenizer of the run that the bank belongs to.
    log
        The run's log of edits.
    config
        How to train; None = the defaults.
    replay
        The run's training text; None = none.
    notice
        Told what is being done.

    Notes
    -----
    Nothing is changed before the swap, which is one transaction with the versions that the blocks
    were fetched at: whoever reads sees all of an edit or nothing. Where a block was changed meanwhile,
    the edit is made anew from what it holds then. A process that is killed between log and bank
    leaves a transaction whose fate the next command looks up in the bank's audit log.
    """

    def __init__(
        self,
        bank: EditedBank,
        answers: Answers,
        log: EditLog,
        *,
        config: EditConfig | None = None,
        replay: ReplaySequences | None = None,
        notice: Notice = lambda _: None,
    ) -> None:
        self._bank = bank
        self._answers = answers
        self._log = log
        self._config = config or EditConfig()
        self._replay = replay or ReplaySequences(None)
        self._notice = notice
        self._router = Router(bank)
        answers.anchor.requires_grad_(False)

    def edit(
        self, facts: Sequence[FactEdit], *, dry_run: bool = False, force: bool = False
    ) -> EditReport:
        """Teach the bank some facts.

        Parameters
        ----------
        facts
            The facts; all of them become one transaction.
        dry_run
            True trains and shows, and changes nothing.
        force
            True swaps also what fell short: prompts that do not answer as they should, or guards that
            were not kept.

        Returns
        -------
        EditReport
            What was done. Where it fell short, and `force` is False, `refused` says why and nothing
            was swapped.

        Raises
        ------
        AlreadyExistsError
            If the log has an edit of the same id.
        FailedPreconditionError
            If a prompt routes to no leaf, or to a block that is withheld or deleted.
        ConflictError
            If its blocks were changed at each of ``config.max_attempts`` attempts; nothing was done.
        UnavailableError
            If the bank does not answer. An edit that was sent may have been made; the next command
            finds out.
        """

        def stage(history: EditHistory) -> _Staged:
            for fact in facts:
                history.check_new(fact.edit_id, fact.where)
            return self._stage_edit(facts, history)

        return self._run(stage, dry_run=dry_run, force=force)

    def undo(self, edit_id: str, *, dry_run: bool = False, force: bool = False) -> EditReport:
        """Take one edit back: its blocks as they were before it, and later edits made anew on that.

        Parameters
        ----------
        edit_id
            The edit.
        dry_run
            True shows what would be, and changes nothing.
        force
            As for `edit`.

        Returns
        -------
        EditReport
            What was done; its prompts are those of the later edits.

        Raises
        ------
        NotFoundError
            If the log has no such edit of this bank, or what was before it is gone.
        FailedPreconditionError
            If it was undone already, or something that is not in the log changed a block since.
        ConflictError
            As for `edit`.
        """
        return self._run(
            lambda history: self._stage_undo(edit_id, history), dry_run=dry_run, force=force
        )

    def history(self) -> EditHistory:
        """Return the log of this bank, after the fate of every transaction was looked up."""
        bank_id = self._bank.info().spec.bank_id
        history = EditHistory(self._log, bank_id)
        if not history.pending:
            return history
        with self._log.exclusive():
            self._settle(EditHistory(self._log, bank_id))
        return EditHistory(self._log, bank_id)

    # ---- one transaction

    def _run(
        self, stage: Callable[[EditHistory], _Staged], *, dry_run: bool, force: bool
    ) -> EditReport:
        start = time.perf_counter()
        with self._log.exclusive():
            bank_id = self._bank.info().spec.bank_id
            self._settle(EditHistory(self._log, bank_id))
            for attempt in range(1, self._config.max_attempts + 1):
                staged = stage(EditHistory(self._log, bank_id))
                transaction = LoggedTransaction(
                    transaction=uuid.uuid4().hex,
                    operation=staged.operation,
                    bank_id=bank_id,
                    edit_ids=staged.edit_ids,
                    blocks=tuple(staged.logged),
                    time_s=time.time(),
                )
                refused = "" if force or dry_run else self._shortfall(staged)
                revision: int | None = staged.contents.revision
                if not (dry_run or refused):
                    revision = self._swap(transaction, staged)
                if revision is not None:
                    seconds = time.perf_counter() - start
                    return _report(
                        transaction, staged, revision, attempt, seconds, dry_run, refused
                    )
                self._notice("a block was changed meanwhile; making the edit anew")
        raise ConflictError(
            f"blocks {', '.join(b.ref for b in transaction.blocks)} were changed at each of "
            f"{self._config.max_attempts} attempts; stop what trains or edits them, then try again",
            reason=Reason.VERSION_MISMATCH,
        )

    def _swap(self, transaction: LoggedTransaction, staged: _Staged) -> int | None:
        """Return the revision that the swap made; None where a block was changed meanwhile."""
        self._notice("swapping")
        self._log.prepare(transaction, staged.before)
        # Exact: what is staged is as the bank keeps it, and it takes nothing else.
        dtype = staged.contents.spec.numpy_dtype
        try:
            report = self._bank.swap(
                {ref: weight.numpy().astype(dtype) for ref, weight in staged.after.items()},
                expected={ref: staged.contents.versions[ref] for ref in staged.after},
                request_id=transaction.request_id,
            )
        except ConflictError:
            self._log.abandon(transaction.transaction)
            return None
        self._log.commit(transaction.transaction, report.revision)
        return report.revision

    def _settle(self, history: EditHistory) -> None:
        """Find out what became of transactions whose answer never came."""
        if not history.pending:
            return
        self._wait_for_turn(history.pending[0])
        made = self._made_since(min(transaction.time_s for transaction in history.pending))
        for transaction in history.pending:
            record = made.get(transaction.request_id)
            if record is None or record.operation == "aborted":
                self._log.abandon(transaction.transaction)
            else:
                self._log.commit(transaction.transaction, record.revision)

    def _wait_for_turn(self, lost: LoggedTransaction) -> None:
        """Return once no transaction of before can be committed any more.

        One whose caller was killed may still be under way in the service. A dry run is asked for under
        the lock of transactions, so it is answered after that one; and those that still wait for
        their turn then are given up, as nobody waits for their answer.
        """
        spec = self._bank.info().spec
        ref = BlockRef.parse(lost.blocks[0].ref)
        nothing = np.zeros(spec.block_shape(ref.level), spec.numpy_dtype)
        self._bank.swap({ref: nothing}, dry_run=True)

    def _made_since(self, time_s: float) -> dict[str, AuditRecord]:
        """Return what the bank's audit log has since a time, by request id; what is older may lack."""
        limit = _AUDIT_RECORDS
        while True:
            records = self._bank.audit(limit=limit)
            if len(records) < limit or records[-1].time_s < time_s - _CLOCKS_DIFFER_S:
                return {record.request_id: record for record in records}
            if limit >= _MOST_AUDIT_RECORDS:
                # Not "it was not made": then an undo would bring the edit back, and say it is gone.
                raise FailedPreconditionError(
                    f"{limit} transactions or more came after an edit whose fate is not known, so the "
                    "bank's audit log does not tell any more; keep the log of edits elsewhere and "
                    "begin a new one, without the undoing of what is in it",
                    reason=Reason.OBJECT_MISSING,
                )
            limit = min(10 * limit, _MOST_AUDIT_RECORDS)

    # ---- what is swapped in

    def _stage_edit(self, facts: Sequence[FactEdit], history: EditHistory) -> _Staged:
        self._notice("routing and fetching")
        spec = self._bank.info().spec
        paths = self._router.route_facts(spec, facts)
        taught = {paths[prompt] for fact in facts for prompt in fact.prompts}
        shown = [paths[n.prompt] for fact in facts for n in fact.neighbours]
        contents = fetch_contents(self._bank, [*taught, *shown])
        staged = _Staged("edit", tuple(fact.edit_id for fact in facts), contents)
        for lesson in make_lessons(facts, paths):
            ref = lesson.path[-1]
            staged.after[ref] = self._teach(
                lesson, contents.weights[ref], history.told(ref), staged
            )
            version = contents.versions[ref]
            staged.logged.append(lesson.logged(version=version))
            staged.before["", ref] = contents.weights[ref]
            staged.prompts += self._prompt_changes([lesson], staged)
        for fact in facts:
            staged.neighbours += self._neighbour_changes(fact, paths, staged)
        return staged

    def _stage_undo(self, edit_id: str, history: EditHistory) -> _Staged:
        self._notice("fetching")
        spec = self._bank.info().spec
        made = history.made_by(edit_id)
        refs = [
            BlockRef.parse(block.ref)
            for block in made.blocks
            if any(prompt.edit_id == edit_id for prompt in block.prompts)
        ]
        contents = fetch_contents(self._bank, [spec.path_to(ref) for ref in refs])
        staged = _Staged("undo", (edit_id,), contents)
        for ref in refs:
            self._undo_block(edit_id, made, ref, history, staged)
        return staged

    def _undo_block(
        self,
        edit_id: str,
        made: LoggedTransaction,
        ref: BlockRef,
        history: EditHistory,
        staged: _Staged,
    ) -> None:
        spec, version = staged.contents.spec, staged.contents.versions[ref]
        weight = history.before(made.transaction, ref, version=version)
        staged.before["", ref] = staged.contents.weights[ref]
        standing = history.standing(ref)
        order = [t.transaction for t in history.transactions]
        first = order.index(made.transaction)
        told: dict[str, str] = {}
        lessons, remade = [], []
        for transaction, block in standing:
            kept = block.without({edit_id})
            left = kept.prompts
            if order.index(transaction.transaction) >= first and left:
                lesson = Lesson.again(spec, kept)
                staged.before[transaction.transaction, ref] = weight
                weight = self._teach(lesson, weight, told, staged)
                lessons.append(lesson)
                remade.append(transaction.transaction)
                staged.reapplied += [
                    name for name in dict.fromkeys(p.edit_id for p in left)
                    if name not in staged.reapplied
                ]  # fmt: skip
            told |= {p.prompt: p.target for p in left}
        staged.after[ref] = weight
        staged.logged.append(
            LoggedBlock(
                ref=str(ref),
                version_before=version,
                version_after=version + 1,
                remade=tuple(remade),
            )
        )
        staged.prompts += self._prompt_changes(lessons, staged)
        undone = made.block(ref)
        assert undone is not None
        gone = tuple(prompt for prompt in undone.prompts if prompt.edit_id == edit_id)
        staged.undone += self._prompt_changes(
            [Lesson(path=spec.path_to(ref), prompts=gone, neighbours=())], staged
        )

    def _teach(
        self, lesson: Lesson, weight: Tensor, told: Mapping[str, str], staged: _Staged
    ) -> Tensor:
        ref = lesson.path[-1]
        self._notice(f"training block {ref}")
        trained = train_block(
            self._answers,
            lesson.task(told, self._replay, self._answers.tokenizer, self._config),
            {**staged.contents.weights, ref: weight},
            self._config,
            version=staged.contents.versions[ref],
        )
        staged.trainings.append(trained.training)
        return _as_kept(staged.contents.spec, trained.weight)

    # ---- what is shown

    def _prompt_changes(self, lessons: Iterable[Lesson], staged: _Staged) -> list[PromptChange]:
        # The newest target of a prompt counts, where an edit was made again by a later one.
        taught = {p.prompt: p for lesson in lessons for p in lesson.prompts}
        path = next((lesson.path for lesson in lessons), ())
        if not taught:
            return []
        prompts, pairs = list(taught), [(p.prompt, p.target) for p in taught.values()]
        weights = {**staged.contents.weights, **staged.after}
        sides = [
            (
                self._answers.complete(path, side, prompts),
                self._answers.probabilities(path, side, pairs),
            )
            for side in (staged.contents.weights, weights)
        ]
        (before, log_before), (after, log_after) = sides
        return [
            PromptChange(
                edit_id=prompt.edit_id,
                prompt=prompt.prompt,
                block=str(path[-1]),
                target=prompt.target,
                before=before[row],
                after=after[row],
                probability_before=float(log_before[row].sum().exp()),
                probability_after=float(log_after[row].sum().exp()),
                reached=states(after[row], prompt.target),
            )
            for row, prompt in enumerate(taught.values())
        ]

    def _neighbour_changes(
        self, fact: FactEdit, paths: Mapping[str, Path], staged: _Staged
    ) -> list[NeighbourChange]:
        weights = {**staged.contents.weights, **staged.after}
        found = []
        for neighbour in fact.neighbours:
            path = paths[neighbour.prompt]
            (before,) = self._answers.complete(path, staged.contents.weights, [neighbour.prompt])
            (after,) = self._answers.complete(path, weights, [neighbour.prompt])
            found.append(
                NeighbourChange(
                    edit_id=fact.edit_id,
                    prompt=neighbour.prompt,
                    block=str(path[-1]) if path else "",
                    expected=neighbour.target,
                    before=before,
                    after=after,
                )
            )
        return found

    def _shortfall(self, staged: _Staged) -> str:
        """Return why what was staged may not be swapped in; empty = it may."""
        missed = [prompt for prompt in staged.prompts if not prompt.reached]
        if missed:
            first = missed[0]
            return (
                f"{len(missed)} of {len(staged.prompts)} prompts were not learnt, such as "
                f"{first.prompt!r}, which answers {first.after!r} and not {first.target!r}"
            )
        lost = [t for t in staged.trainings if t.kept_share < self._config.least_kept]
        if lost:
            return (
                f"block {lost[0].ref} kept {100 * lost[0].kept_share:.0f} % of what is guarded, less "
                f"than {100 * self._config.least_kept:.0f} %"
            )
        return ""


def _as_kept(spec: BankSpec, weight: Tensor) -> Tensor:
    """Return a block as the bank will keep it, so that what is shown is what will be read."""
    dtype: torch.dtype = getattr(torch, spec.dtype)
    return weight.to(dtype).float()


def _report(
    transaction: LoggedTransaction,
    staged: _Staged,
    revision: int,
    attempts: int,
    seconds: float,
    dry_run: bool,
    refused: str,
) -> EditReport:
    swapped = not (dry_run or refused)
    return EditReport(
        transaction=transaction.transaction,
        operation=staged.operation,
        edit_ids=staged.edit_ids,
        reapplied=tuple(staged.reapplied),
        prompts=tuple(staged.prompts),
        undone=tuple(staged.undone),
        neighbours=tuple(staged.neighbours),
        blocks=tuple(staged.trainings),
        changed={block.ref: (block.version_before, block.version_after) for block in staged.logged}
        if swapped
        else {},
        revision=revision,
        attempts=attempts,
        seconds=seconds,
        dry_run=dry_run,
        refused=refused,
    )
