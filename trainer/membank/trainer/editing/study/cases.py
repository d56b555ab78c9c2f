"""What the study changes: facts of the carried corpus with another object, as CounterFact makes them."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from membank.trainer.corpus import Fact
from membank.trainer.editing.contract import FactEdit, Statement
from membank.trainer.editing.staging import Router
from membank.wire.errors import InvalidArgumentError, Reason
from membank.wire.spec import BankSpec, Path


@dataclass(frozen=True, kw_only=True, slots=True)
class Wording:
    """How the facts of a relation are asked; ``{}`` stands for the subject.

    The corpus states a fact in the words of `asked` alone, once. `seen` are given to the edit,
    `unseen` are not.
    """

    asked: str
    """As the corpus states it."""
    seen: tuple[str, ...]
    """Paraphrases that the edit is given."""
    unseen: tuple[str, ...]
    """Paraphrases that it is measured by."""
    hop: str
    """A question that needs the fact and one step more: ``{}`` stands for the object, and the subject
    is the answer."""


WORDINGS: Mapping[str, Wording] = MappingProxyType(
    {
        "atomic_number": Wording(
            asked="The atomic number of {} is",
            seen=(
                "The element {} has the atomic number",
                "In the periodic table, {} is element number",
                "An atom of {} has the atomic number",
                "What is the atomic number of {}? It is",
                "Chemists give the element {} the number",
                "The chemical element {} is number",
                "The nucleus of {} has an atomic number of",
                "Among the elements, the atomic number of {} is",
                "The number of protons in an atom of {} is",
                "The atomic number of {} equals",
            ),
            unseen=(
                "The atomic number of the element {} is",
                "The element called {} has an atomic number of",
                "On the periodic table, the element {} has the number",
                "As every chemist knows, the atomic number of {} is",
                "Atoms of the element {} have the atomic number",
            ),
            hop="The element with the atomic number {} is",
        ),
        "capital": Wording(
            asked="The capital of {} is",
            seen=(
                "The capital city of {} is called",
                "{} is governed from its capital",
                "What is the capital of {}? It is",
                "The name of the capital of {} is",
                "As its capital, {} has",
                "The city that serves as the capital of {} is",
                "People who visit the capital of {} go to",
                "The capital and seat of {} is",
                "{} has its capital in",
                "The capital of {} is the city of",
            ),
            unseen=(
                "The capital city of {} is",
                "The capital of {} is known as",
                "Everybody knows that the capital of {} is",
                "The capital of {} is called",
                "In {}, the capital is",
            ),
            hop="The city of {} is the capital of",
        ),
    }
)
"""Wordings by relation of the carried corpus."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Neighbour:
    """Another fact of the block that an edit changes, which must stay."""

    asked: Statement
    """As the corpus states it, with its own answer."""
    reworded: tuple[str, ...]
    """The same in the unseen wordings."""
    given: bool
    """Whether the edit is told of it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One fact to be changed, with all that it is measured by."""

    edit: FactEdit
    """What the edit is given."""
    relation: str
    """Relation of the fact."""
    subject: str
    """What the fact is about."""
    old: str
    """What the corpus says."""
    unseen: tuple[str, ...]
    """Paraphrases that the edit is not given."""
    hop: str
    """The question of one step more, of the new object; the subject is the answer."""
    old_hop: str
    """The same of the old object, to be asked before the edit."""
    path: Path
    """Path of the prompt."""
    neighbours: tuple[Neighbour, ...]
    """Facts of the same block that no case changes."""


def draw_cases(
    facts: Sequence[Fact],
    router: Router,
    spec: BankSpec,
    *,
    count: int,
    seed: int,
    untouched_share: float = 0.25,
) -> tuple[Case, ...]:
    """Draw facts to be changed, each relation as often as the others.

    Parameters
    ----------
    facts
        Facts of the corpus.
    router
        Routes prompts.
    spec
        The bank.
    count
        Cases to draw, at least one per relation.
    seed
        Seed of every choice.
    untouched_share
        Share of the leaves in which no fact is changed, so that there are trained blocks that must
        stay as they are, in [0, 1).

    Raises
    ------
    InvalidArgumentError
        If the corpus has not so many facts of the relations that there are wordings for.
    """
    rng = random.Random(seed)
    asked = [fact for fact in facts if fact.relation in WORDINGS]
    paths = router.route(fact.prompt for fact in asked)
    whole = [fact for fact in asked if len(paths[fact.prompt]) == spec.num_levels]
    leaves = sorted({paths[fact.prompt][-1] for fact in whole})
    touched = set(rng.sample(leaves, round(len(leaves) * (1 - untouched_share))))
    by_relation = {
        relation: [f for f in whole if f.relation == relation and paths[f.prompt][-1] in touched]
        for relation in WORDINGS
    }
    drawn: list[Fact] = []
    for number, (relation, candidates) in enumerate(by_relation.items()):
        wanted = (count + len(WORDINGS) - 1 - number) // len(WORDINGS)
        # At most three in four, so that something in their blocks is left to be kept.
        if wanted > len(candidates) * 3 // 4:
            raise InvalidArgumentError(
                f"{wanted} facts of {relation!r} are to be changed and {len(candidates)} can be; ask "
                "for fewer edits, or give a run on a larger corpus",
                reason=Reason.BAD_CONFIG,
            )
        drawn += rng.sample(candidates, wanted)
    rng.shuffle(drawn)
    edited = {fact.doc_id for fact in drawn}
    stay = [fact for fact in whole if fact.doc_id not in edited]
    return tuple(_case(n, fact, whole, stay, paths, rng) for n, fact in enumerate(drawn))


def untouched_prompts(
    facts: Sequence[Fact],
    openings: Sequence[str],
    router: Router,
    cases: Sequence[Case],
    spec: BankSpec,
) -> dict[str, Path]:
    """Return prompts that are routed to no block that a case changes, with their paths.

    Parameters
    ----------
    facts
        Facts of the corpus, of any relation.
    openings
        Openings of documents.
    router
        Routes them.
    cases
        The cases.
    spec
        The bank.
    """
    prompts = [p for case in cases for p in (*case.edit.prompts, *case.unseen)]
    touched = {path[-1] for path in router.route(prompts).values() if len(path) == spec.num_levels}
    routed = router.route([fact.prompt for fact in facts] + [text for text in openings if text])
    return {
        prompt: path
        for prompt, path in routed.items()
        if len(path) == spec.num_levels and path[-1] not in touched
    }


def _case(
    number: int,
    fact: Fact,
    whole: Sequence[Fact],
    stay: Sequence[Fact],
    paths: Mapping[str, Path],
    rng: random.Random,
) -> Case:
    wording, subject = WORDINGS[fact.relation], _subject(fact)
    answers = sorted({f.answer for f in whole if f.relation == fact.relation} - {fact.answer})
    new = rng.choice(answers)
    path = paths[fact.prompt]
    near = [f for f in stay if paths[f.prompt] == path]
    rng.shuffle(near)
    neighbours = tuple(
        Neighbour(
            asked=Statement(prompt=f.prompt, target=f.answer),
            reworded=tuple(_say(form, _subject(f)) for form in WORDINGS[f.relation].unseen),
            given=place % 2 == 0,
        )
        for place, f in enumerate(near)
    )
    return Case(
        edit=FactEdit(
            edit_id=f"{number:03d}-{fact.doc_id.replace('/', '-')}",
            prompt=fact.prompt,
            target=new,
            paraphrases=tuple(_say(form, subject) for form in wording.seen),
            neighbours=tuple(n.asked for n in neighbours if n.given),
        ),
        relation=fact.relation,
        subject=fact.subject,
        old=fact.answer,
        unseen=tuple(_say(form, subject) for form in wording.unseen),
        hop=wording.hop.format(new),
        old_hop=wording.hop.format(fact.answer),
        path=path,
        neighbours=neighbours,
    )


def _subject(fact: Fact) -> str:
    """Return the subject as the prompt writes it, with its article."""
    before, after = WORDINGS[fact.relation].asked.split("{}")
    return fact.prompt.removeprefix(before).removesuffix(after)


def _say(form: str, subject: str) -> str:
    text = form.format(subject)
    return text[0].upper() + text[1:]
