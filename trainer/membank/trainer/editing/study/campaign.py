"""Changes facts one after another and measures each: right after its edit, and after all of them.

Resumable: what was measured before an edit is on disk before the edit is made, so a run that was
stopped in between knows what to compare with.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path as FilePath
from typing import Any

from membank.trainer.corpus import Corpus
from membank.trainer.editing.answers import Answers
from membank.trainer.editing.config import EditConfig
from membank.trainer.editing.contract import EditedBank, EditReport
from membank.trainer.editing.editor import Editor
from membank.trainer.editing.log import EditLog
from membank.trainer.editing.staging import ReplaySequences, Router
from membank.trainer.editing.study.cases import Case, draw_cases, untouched_prompts
from membank.trainer.editing.study.measures import (
    BankView,
    case_prompts,
    mean_measures,
    measure_case,
)
from membank.trainer.evaluation import states
from membank.trainer.training.files import write_atomically
from membank.trainer.training.schedule import check_range
from membank.wire.errors import FailedPreconditionError, Reason
from membank.wire.spec import BlockRef, Path

StudyProgress = Callable[[str, int, int], None]
"""Told what is being done, how many of it are done, and how many there are."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StudyConfig:
    """How many facts are changed, and how."""

    num_edits: int = 100
    """Facts changed one after another, >= 1."""
    num_undone: int = 5
    """Edits undone at the end, those with most later edits in their blocks, >= 0."""
    num_elsewhere: int = 200
    """Prompts routed to untouched blocks that are compared bit by bit at the end, >= 1."""
    num_elsewhere_each: int = 8
    """Prompts routed elsewhere that are compared bit by bit at each edit, >= 1."""
    seed: int = 0
    """Seed of all choices."""
    edit: EditConfig = field(default_factory=EditConfig)
    """How each fact is trained."""

    def __post_init__(self) -> None:
        for name in ("num_edits", "num_elsewhere", "num_elsewhere_each"):
            check_range(name, getattr(self, name), 1, float("inf"), open_high=True)
        check_range("num_undone", self.num_undone, 0, float("inf"), open_high=True)


class EditingStudy:
    """One run of the study on one bank, which it changes.

    Parameters
    ----------
    bank
        The bank, not edited before; a copy of one that is still needed.
    answers
        Anchor and tokenizer of its run.
    corpus
        The run's corpus.
    folder
        Where the log of edits and what was measured are kept, and gone on from.
    config
        What to do.
    replay
        The run's training sequences.
    on_progress
        Told what is being done.
    """

    def __init__(
        self,
        bank: EditedBank,
        answers: Answers,
        corpus: Corpus,
        folder: FilePath,
        *,
        config: StudyConfig | None = None,
        replay: ReplaySequences | None = None,
        on_progress: StudyProgress = lambda what, done, total: None,
    ) -> None:
        self._config = config or StudyConfig()
        self._corpus = corpus
        self._spec = bank.info().spec
        self._router = Router(bank)
        self._view = BankView(bank, answers, self._router)
        self._editor = Editor(
            bank, answers, EditLog(folder / "edits"), config=self._config.edit, replay=replay
        )
        self._notes = _Notes(folder / "study.jsonl", self._config, self._spec.bank_id)
        self._on_progress = on_progress

    def run(self) -> dict[str, Any]:
        """Do what is left of the study.

        Returns
        -------
        dict
            Figures, JSON-able: ``right_after``, ``after_all``, ``before``, ``elsewhere``, ``undo``,
            ``course`` (after each tenth of the edits), ``cases``.
        """
        if not self._notes.has("start"):
            self._on_progress("asking before", 0, 1)
            self._notes.add("start", self._start())
        for number, case in enumerate(self.cases):
            self._on_progress("editing", number, len(self.cases))
            self._edit(number, case)
            self._mark_course(number + 1)
        if not self._notes.has("end"):
            self._on_progress("asking after", 0, 1)
            self._notes.add("end", self._end())
        if not self._notes.has("undo"):
            self._on_progress("undoing", 0, self._config.num_undone)
            self._notes.add("undo", self._undo())
        return self._document()

    @cached_property
    def cases(self) -> tuple[Case, ...]:
        """The facts to be changed, in their order; the same in every process."""
        return draw_cases(
            self._corpus.facts,
            self._router,
            self._spec,
            count=self._config.num_edits,
            seed=self._config.seed,
        )

    # ---- the steps

    def _start(self) -> object:
        prompts = {p for case in self.cases for p in (*case_prompts(case), case.old_hop)}
        return {
            "answers": self._view.answers(sorted(prompts)),
            "elsewhere": self._view.digests(self._elsewhere),
        }

    def _edit(self, number: int, case: Case) -> None:
        name = case.edit.edit_id
        if self._notes.has(f"after {name}"):
            return
        if not self._notes.has(f"before {name}"):
            self._notes.add(
                f"before {name}",
                {
                    "answers": self._view.answers(case_prompts(case)),
                    "elsewhere": self._view.digests(self._elsewhere_of(number, case)),
                },
            )
        before: Any = self._notes.get(f"before {name}")
        made = {n for t in self._editor.history().transactions for n in t.edit_ids}
        # A run that was stopped after the swap has made it.
        report = None if name in made else self._editor.edit([case.edit], force=True)
        measures = measure_case(
            case, self._view, before["answers"], touched=self._touched(name), router=self._router
        )
        digests = self._view.digests(self._elsewhere_of(number, case))
        self._notes.add(
            f"after {name}",
            {
                "measures": asdict(measures),
                "elsewhere": [digests[p] == digest for p, digest in before["elsewhere"].items()],
                "training": None if report is None else _training(report),
            },
        )

    def _mark_course(self, count: int) -> None:
        """Note how the edits so far are answered, after each tenth of them."""
        last = count == len(self.cases)
        following = "end" if last else f"before {self.cases[count].edit.edit_id}"
        due = count % max(1, len(self.cases) // 10) == 0
        # Not where the study went on already: it would be of another moment.
        if due and not (self._notes.has(f"course {count}") or self._notes.has(following)):
            self._notes.add(f"course {count}", self._course(count))

    def _course(self, count: int) -> object:
        """Return how the edits so far are answered."""
        so_far = self.cases[:count]
        now = self._view.answers(p for case in so_far for p in (case.edit.prompt, *case.unseen))
        reached = [states(now[case.edit.prompt], case.edit.target) for case in so_far]
        unseen = [states(now[p], case.edit.target) for case in so_far for p in case.unseen]
        return {
            "edits": count,
            "reliability": sum(reached) / len(reached),
            "generalisation": sum(unseen) / len(unseen),
        }

    def _end(self) -> object:
        start: Any = self._notes.get("start")
        measures = [
            asdict(
                measure_case(
                    case,
                    self._view,
                    start["answers"],
                    touched=self._touched(case.edit.edit_id),
                    router=self._router,
                )
            )
            for case in self.cases
        ]
        digests = self._view.digests(self._elsewhere)
        return {
            "measures": measures,
            "elsewhere": [digests[p] == digest for p, digest in start["elsewhere"].items()],
        }

    def _undo(self) -> object:
        start: Any = self._notes.get("start")
        chosen = self._to_undo()
        known = self._editor.history().undone
        blocks = {case.path for case in chosen}
        others = [c for c in self.cases if c.path in blocks and c not in chosen]
        if not self._notes.has("standing"):
            # Kept, as an undo that a rerun finds made may have cost one of them.
            standing = [c.edit.edit_id for c in others if self._answers_right(c)]
            self._notes.add("standing", standing)
        reached: Any = self._notes.get("standing")
        seconds = []
        for number, case in enumerate(chosen):
            self._on_progress("undoing", number, len(chosen))
            if case.edit.edit_id not in known:
                seconds.append(self._editor.undo(case.edit.edit_id, force=True).seconds)
        now = self._view.answers(case.edit.prompt for case in chosen)
        old = start["answers"]
        return {
            "undone": len(chosen),
            "new_object_gone": _mean(not states(now[c.edit.prompt], c.edit.target) for c in chosen),
            "answer_as_at_first": _mean(now[c.edit.prompt] == old[c.edit.prompt] for c in chosen),
            "other_edits_of_the_blocks": len(reached),
            "other_edits_kept": _mean(
                self._answers_right(c) for c in others if c.edit.edit_id in reached
            ),
            "seconds": seconds,
        }

    def _to_undo(self) -> list[Case]:
        """Return the earliest edits of the blocks that were edited most often."""
        by_path: dict[Path, list[Case]] = {}
        for case in self.cases:
            by_path.setdefault(case.path, []).append(case)
        busiest = sorted(by_path.values(), key=lambda group: -len(group))
        return [group[0] for group in busiest[: self._config.num_undone]]

    def _answers_right(self, case: Case) -> bool:
        now = self._view.answers([case.edit.prompt])
        return states(now[case.edit.prompt], case.edit.target)

    # ---- what the steps share

    @cached_property
    def _elsewhere(self) -> dict[str, Path]:
        """Prompts of untouched blocks: facts of all relations, and openings of documents."""
        rng = random.Random(self._config.seed)
        openings = [" ".join(d.text.split()[:8]) for d in self._corpus.documents]
        found = untouched_prompts(
            self._corpus.facts,
            rng.sample(openings, min(len(openings), self._config.num_elsewhere)),
            self._router,
            self.cases,
            self._spec,
        )
        drawn = rng.sample(sorted(found), min(len(found), self._config.num_elsewhere))
        return {prompt: found[prompt] for prompt in drawn}

    def _elsewhere_of(self, number: int, case: Case) -> dict[str, Path]:
        """Prompts of blocks that one edit does not touch, those of other edits among them."""
        rng = random.Random(f"{self._config.seed} {number}")
        prompts = [p for c in self.cases for p in (c.edit.prompt, *c.unseen)]
        routed = self._router.route(prompts)
        own = {path[-1] for path in self._router.route(case.edit.prompts).values()}
        far = sorted(
            prompt
            for prompt, path in routed.items()
            if len(path) == self._spec.num_levels and path[-1] not in own
        )
        drawn = rng.sample(far, min(len(far), self._config.num_elsewhere_each))
        return {prompt: routed[prompt] for prompt in drawn}

    def _touched(self, edit_id: str) -> frozenset[BlockRef]:
        return frozenset(
            BlockRef.parse(block.ref)
            for transaction in self._editor.history().transactions
            if edit_id in transaction.edit_ids and transaction.operation == "edit"
            for block in transaction.blocks
        )

    def _document(self) -> dict[str, Any]:
        after: list[Any] = [self._notes.get(f"after {c.edit.edit_id}") for c in self.cases]
        end: Any = self._notes.get("end")
        start: Any = self._notes.get("start")
        trainings = [case["training"] for case in after if case["training"] is not None]
        return {
            "num_edits": len(self.cases),
            "num_blocks": len({case.path[-1] for case in self.cases}),
            "num_neighbours": sum(len(case.neighbours) for case in self.cases),
            "right_after": {
                **mean_measures([case["measures"] for case in after]),
                "elsewhere": _mean(flag for case in after for flag in case["elsewhere"]),
            },
            "after_all": {
                **mean_measures(end["measures"]),
                "elsewhere": _mean(end["elsewhere"]),
                "num_elsewhere": len(end["elsewhere"]),
            },
            "before": self._before(start["answers"]),
            "course": [self._notes.get(key) for key in self._notes.keys("course ")],
            "undo": self._notes.get("undo"),
            "seconds_per_edit": [training["seconds"] for training in trainings],
            "steps_per_edit": [training["steps"] for training in trainings],
            "fell_short": sum(bool(training["missed"]) for training in trainings),
            "config": asdict(self._config),
            "cases": [
                {
                    "edit": case.edit.edit_id,
                    "prompt": case.edit.prompt,
                    "old": case.old,
                    "new": case.edit.target,
                    "block": str(case.path[-1]),
                    "right_after": one["measures"],
                    "after_all": last,
                }
                for case, one, last in zip(self.cases, after, end["measures"], strict=True)
            ],
        }

    def _before(self, answers: Mapping[str, str]) -> dict[str, float | None]:
        """Return how the unedited bank answered the same questions, of the old objects."""
        return {
            "reliability": _mean(states(answers[c.edit.prompt], c.old) for c in self.cases),
            "generalisation": _mean(
                states(answers[prompt], c.old) for c in self.cases for prompt in c.unseen
            ),
            "portability": _mean(states(answers[c.old_hop], c.subject) for c in self.cases),
        }


class _Notes:
    """What was measured, one JSON line each, so that a rerun goes on where it was stopped."""

    def __init__(self, file: FilePath, config: StudyConfig, bank_id: str) -> None:
        self._file = file
        self._found: dict[str, object] = {}
        made_with = json.loads(json.dumps({**asdict(config), "bank_id": bank_id}))
        if file.exists():
            # A cut last line is of a step that is done again.
            for line in file.read_bytes().split(b"\n")[:-1]:
                key, value = json.loads(line)
                self._found[key] = value
        if self._found.setdefault("made with", made_with) != made_with:
            raise FailedPreconditionError(
                f"{file} is of a study with other settings or of another bank; give another folder, "
                "or remove this one",
                reason=Reason.BAD_CONFIG,
                metadata={"file": str(file)},
            )

    def has(self, key: str) -> bool:
        """Return whether a step was measured."""
        return key in self._found

    def get(self, key: str) -> object:
        """Return what was measured."""
        return self._found[key]

    def keys(self, prefix: str) -> list[str]:
        """Return the steps whose names begin so, in their order."""
        return [key for key in self._found if key.startswith(prefix)]

    def add(self, key: str, value: object) -> None:
        """Keep what was measured."""
        self._found[key] = json.loads(json.dumps(value))
        lines = (json.dumps([key, value], ensure_ascii=False) for key, value in self._found.items())
        write_atomically(self._file, ("\n".join(lines) + "\n").encode(), sync=False)


def _training(report: EditReport) -> dict[str, object]:
    return {
        "steps": sum(block.steps for block in report.blocks),
        "seconds": report.seconds,
        "attempts": report.attempts,
        "blocks": len(report.blocks),
        "missed": [prompt.prompt for prompt in report.missed],
        "kept_share": min((block.kept_share for block in report.blocks), default=1.0),
    }


def _mean(flags: Iterable[bool] | Sequence[bool]) -> float | None:
    """Return the share that is true; None where there is nothing to claim it of."""
    found = list(flags)
    return sum(found) / len(found) if found else None
