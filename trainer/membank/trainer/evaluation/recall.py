"""Recall of facts by completion, under every memory condition side by side."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass

from membank.trainer.corpus import Fact, Tokenizer
from membank.trainer.evaluation.answers import states
from membank.trainer.evaluation.conditions import Condition, ConditionMemory, EvaluationPaths
from membank.trainer.model import Anchor, generate
from membank.trainer.training import MemorySource

# Tokens generated beyond the length of the answer: a number must be seen to end.
_SPARE_TOKENS = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class FactCompletion:
    """One fact and what was generated for it."""

    subject: str
    """What was asked about."""
    prompt: str
    """The prompt."""
    answer: str
    """The right answer."""
    completions: Mapping[str, str]
    """What was generated, by condition."""
    correct: Mapping[str, bool]
    """Whether it states the answer, by condition."""
    routed: str
    """Path that the retriever found, such as ``1/3 2/51``."""
    holding: str
    """Path that holds the fact."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RelationRecall:
    """Recall of the facts of one relation."""

    relation: str
    """Name of the relation."""
    num_facts: int
    """Facts asked."""
    recall: Mapping[str, float]
    """Part of them that was stated, 0 to 1, by condition."""
    without_level: tuple[float, ...]
    """The same with the fetched path less its block of each level, coarsest first. The lowest of
    them is ``recall["withheld"]``."""
    routed_share: tuple[float, ...]
    """Per level, the part of the prompts routed to the block that holds the fact."""
    facts: tuple[FactCompletion, ...]
    """Every fact with its completions."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RecallReport:
    """Recall of every relation that was asked."""

    relations: Mapping[str, RelationRecall]
    """By name of the relation."""

    def to_json(self, *, facts: bool = True) -> dict[str, object]:
        """Return the report as JSON-able values; `facts` False leaves out single completions."""
        body = {name: asdict(relation) for name, relation in self.relations.items()}
        if not facts:
            for relation in body.values():
                del relation["facts"]
        return {"relations": body}


RecallProgress = Callable[[int, int], None]
"""Told completions done and completions in all."""


def evaluate_recall(
    anchor: Anchor,
    tokenizer: Tokenizer,
    facts: Sequence[Fact],
    *,
    memory: MemorySource,
    generic: MemorySource | None,
    paths: EvaluationPaths,
    seed: int = 0,
    batch_size: int = 64,
    on_progress: RecallProgress | None = None,
) -> RecallReport:
    """Let the anchor complete the prompts of facts, with each kind of memory.

    Parameters
    ----------
    anchor, tokenizer
        The model and its vocabulary.
    facts
        Facts to ask, of any relations.
    memory
        The bank, in process or served. A withheld or deleted block ends a path, as when it is used.
    generic
        The generic memory; None leaves that condition out.
    paths
        Paths of each fact: `routed` from the prompt alone, `holding` of the fact's document.
    seed
        Seed of the random leaves.
    batch_size
        Prompts completed together, at least 1.
    on_progress
        Told after each batch.

    Returns
    -------
    RecallReport
        Recall by relation and condition, with every completion.
    """
    device = anchor.embedding.weight.device
    memories = ConditionMemory(memory, generic, paths, seed=seed, device=device)
    asker = _Asker(anchor, tokenizer, facts, memories, batch_size, on_progress)
    answers = {str(condition): asker.ask(condition) for condition in memories.conditions}
    ablated = [
        asker.ask(Condition.FETCHED, without_level=level)
        for level in range(1, memories.num_levels + 1)
    ]
    rows_of: dict[str, list[int]] = defaultdict(list)
    for row, fact in enumerate(facts):
        rows_of[fact.relation].append(row)
    return RecallReport(
        relations={
            relation: _relation(relation, rows, facts, answers, ablated, paths)
            for relation, rows in rows_of.items()
        }
    )


def _relation(
    relation: str,
    rows: Sequence[int],
    facts: Sequence[Fact],
    answers: Mapping[str, Sequence[str]],
    ablated: Sequence[Sequence[str]],
    paths: EvaluationPaths,
) -> RelationRecall:
    def share(completions: Sequence[str]) -> float:
        return sum(states(completions[row], facts[row].answer) for row in rows) / len(rows)

    without_level = tuple(share(completions) for completions in ablated)
    withheld = ablated[without_level.index(min(without_level))]
    by_condition = {**answers, str(Condition.WITHHELD): withheld}
    return RelationRecall(
        relation=relation,
        num_facts=len(rows),
        recall={name: share(completions) for name, completions in by_condition.items()},
        without_level=without_level,
        routed_share=paths.select(rows).routed_share(len(ablated)),
        facts=tuple(_completion(facts[row], row, by_condition, paths) for row in rows),
    )


def _completion(
    fact: Fact, row: int, by_condition: Mapping[str, Sequence[str]], paths: EvaluationPaths
) -> FactCompletion:
    completions = {name: texts[row] for name, texts in by_condition.items()}
    return FactCompletion(
        subject=fact.subject,
        prompt=fact.prompt,
        answer=fact.answer,
        completions=completions,
        correct={name: states(text, fact.answer) for name, text in completions.items()},
        routed=_text(paths.routed[row]),
        holding=_text(paths.holding[row]),
    )


def _text(path: Iterable[object]) -> str:
    return " ".join(str(ref) for ref in path)


class _Asker:
    def __init__(
        self,
        anchor: Anchor,
        tokenizer: Tokenizer,
        facts: Sequence[Fact],
        memories: ConditionMemory,
        batch_size: int,
        on_progress: RecallProgress | None,
    ) -> None:
        self._anchor = anchor
        self._tokenizer = tokenizer
        self._prompts = tokenizer.encode_batch([fact.prompt for fact in facts])
        answers = tokenizer.encode_batch([" " + fact.answer for fact in facts])
        self._lengths = [len(answer) + _SPARE_TOKENS for answer in answers]
        self._memories = memories
        self._batch_size = batch_size
        self._on_progress = on_progress
        self._done = 0
        self._total = len(facts) * (len(memories.conditions) + memories.num_levels)

    def ask(self, condition: Condition, *, without_level: int | None = None) -> list[str]:
        """Return the completion of every fact, in the order of the facts."""
        completions = [""] * len(self._prompts)
        order = self._memories.order(condition)
        for start in range(0, len(order), self._batch_size):
            rows = order[start : start + self._batch_size]
            found = generate(
                self._anchor,
                [self._prompts[row] for row in rows],
                self._memories.batch(condition, rows, without_level=without_level),
                max_new_tokens=max(self._lengths[row] for row in rows),
                stop_token=self._tokenizer.eot_id,
            )
            for row, tokens in zip(rows, found, strict=True):
                # Its own length: a batch mate's longer answer must not make it longer.
                completions[row] = self._tokenizer.decode(tokens[: self._lengths[row]])
            self._done += len(rows)
            if self._on_progress is not None:
                self._on_progress(self._done, self._total)
        return completions
