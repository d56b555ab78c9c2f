"""What the study measures: one bank, asked before and after.

Formulas: CounterFact's ES, PS, NS and their harmonic mean S (Meng et al., ROME, arXiv 2202.05262), with
the mean log-probability per token in the place of the probability, as their code has it; reliability,
generalisation, locality and portability as in EasyEdit (arXiv 2308.07269).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from membank.trainer.editing.answers import Answers, path_memory
from membank.trainer.editing.contract import EditedBank
from membank.trainer.editing.staging import Router, fetch_contents
from membank.trainer.editing.study.cases import Case
from membank.trainer.evaluation import states
from membank.wire.spec import BlockRef, Path

_MAX_NEW_TOKENS = 12


class BankView:
    """Asks a bank as it is now; every call fetches what it needs.

    Parameters
    ----------
    bank
        The bank.
    answers
        Anchor and tokenizer.
    router
        Routes prompts.
    """

    def __init__(self, bank: EditedBank, answers: Answers, router: Router) -> None:
        self._bank = bank
        self._answers = answers
        self._router = router

    def answers(self, prompts: Iterable[str]) -> dict[str, str]:
        """Return what each prompt is answered, routed by itself; empty where its path is none."""
        found: dict[str, str] = {}
        for path, group in self._by_path(prompts).items():
            weights = self._weights(path)
            texts = self._answers.complete(path, weights, group, max_new_tokens=_MAX_NEW_TOKENS)
            found |= dict(zip(group, texts, strict=True))
        return found

    def scores(self, pairs: Sequence[tuple[str, str]]) -> dict[tuple[str, str], float]:
        """Return the mean log-probability per token, in nats, of targets after prompts."""
        found: dict[tuple[str, str], float] = {}
        paths = self._router.route(prompt for prompt, _ in pairs)
        groups: dict[Path, list[tuple[str, str]]] = {}
        for pair in dict.fromkeys(pairs):
            groups.setdefault(paths[pair[0]], []).append(pair)
        for path, group in groups.items():
            logs = self._answers.probabilities(path, self._weights(path), group)
            found |= {pair: float(log.mean()) for pair, log in zip(group, logs, strict=True)}
        return found

    @torch.inference_mode()
    def digests(self, prompts: Mapping[str, Path]) -> dict[str, str]:
        """Return a digest of all logits of each prompt: equal digests mean equal bits.

        Each prompt is computed by itself, so that only its own blocks can change a bit.
        """
        weights = {path: self._weights(path) for path in dict.fromkeys(prompts.values())}
        found = {}
        for prompt, path in prompts.items():
            tokens_BT = torch.tensor([self._answers.tokenizer.encode(prompt)])
            logits = self._answers.anchor(tokens_BT, None, path_memory(path, weights[path], 1))
            found[prompt] = hashlib.sha256(logits.numpy().tobytes()).hexdigest()
        return found

    def _weights(self, path: Path) -> Mapping[BlockRef, Tensor]:
        return fetch_contents(self._bank, [path]).weights

    def _by_path(self, prompts: Iterable[str]) -> dict[Path, list[str]]:
        groups: dict[Path, list[str]] = {}
        for prompt, path in self._router.route(prompts).items():
            groups.setdefault(path, []).append(prompt)
        return groups


@dataclass(frozen=True, kw_only=True, slots=True)
class CaseMeasures:
    """How one changed fact and its neighbours are answered; shares are 0 to 1, None = none asked."""

    reliability: float
    """1 where the prompt states the new object, else 0."""
    seen: float
    """Share of the given paraphrases that state it."""
    generalisation: float
    """Share of the unseen paraphrases that state it."""
    unseen_routed: float
    """Share of the unseen paraphrases that are routed to a block that the edit changed."""
    neighbours_given: float | None
    """Share of the neighbours that the edit was given whose answer is as it was, word by word."""
    neighbours_held: float | None
    """The same of neighbours that it was not given."""
    neighbours_leaked: float | None
    """Share of the neighbours, asked in the unseen wordings, that state the new object and did not;
    without those whose own object it is, as in `neighbourhood`."""
    neighbours_harmed: float | None
    """Of those of them that were answered right: the share that is not any more."""
    efficacy: float
    """ES: 1 where the new object is likelier than the old one, else 0."""
    paraphrase: float
    """PS: share of the unseen paraphrases where it is."""
    neighbourhood: float | None
    """NS: share of the neighbours that the edit was not given whose own object is likelier than the
    new one."""
    portability: float
    """1 where the question of one step more is answered with the subject, else 0."""


def case_prompts(case: Case) -> tuple[str, ...]:
    """Return every prompt of a case that is answered, none twice."""
    reworded = (text for n in case.neighbours for text in n.reworded)
    near = (n.asked.prompt for n in case.neighbours)
    return tuple(dict.fromkeys((*case.edit.prompts, *case.unseen, *near, *reworded, case.hop)))


def measure_case(
    case: Case,
    view: BankView,
    before: Mapping[str, str],
    *,
    touched: frozenset[BlockRef],
    router: Router,
) -> CaseMeasures:
    """Measure one case on the bank as it is now.

    Parameters
    ----------
    case
        The case, after its edit.
    view
        The bank.
    before
        Answers of the prompts of `case_prompts` before.
    touched
        Blocks that its edit changed.
    router
        Routes prompts.
    """
    new = case.edit.target
    now = view.answers(case_prompts(case))
    scores = view.scores(_pairs(case))

    def said(prompts: Sequence[str]) -> float:
        return float(np.mean([states(now[prompt], new) for prompt in prompts]))

    def likelier(prompts: Sequence[str]) -> float:
        return float(np.mean([scores[p, new] > scores[p, case.old] for p in prompts]))

    reworded = [(text, n.asked.target) for n in case.neighbours for text in n.reworded]
    # A neighbour may have the new object by right: there it neither leaks nor is likelier than itself.
    others = [n for n in case.neighbours if n.asked.target != new]
    routed = router.route(case.unseen)
    return CaseMeasures(
        reliability=said([case.edit.prompt]),
        seen=said(case.edit.paraphrases),
        generalisation=said(case.unseen),
        unseen_routed=float(np.mean([bool(touched & set(path)) for path in routed.values()])),
        neighbours_given=_share(
            now[n.asked.prompt] == before[n.asked.prompt] for n in case.neighbours if n.given
        ),
        neighbours_held=_share(
            now[n.asked.prompt] == before[n.asked.prompt] for n in case.neighbours if not n.given
        ),
        neighbours_leaked=_share(
            states(now[text], new) and not states(before[text], new)
            for n in others
            for text in n.reworded
        ),
        neighbours_harmed=_share(
            not states(now[text], right) for text, right in reworded if states(before[text], right)
        ),
        efficacy=likelier([case.edit.prompt]),
        paraphrase=likelier(case.unseen),
        neighbourhood=_share(
            scores[n.asked.prompt, n.asked.target] > scores[n.asked.prompt, new]
            for n in others
            if not n.given
        ),
        portability=float(states(now[case.hop], case.subject)),
    )


def mean_measures(measures: Sequence[Mapping[str, float | None]]) -> dict[str, float | None]:
    """Return the mean of each figure over cases that have it, and the harmonic mean of ES, PS, NS."""
    names = measures[0] if measures else ()
    means: dict[str, float | None] = {}
    for name in names:
        values = [value for case in measures if (value := case[name]) is not None]
        means[name] = float(np.mean(values)) if values else None
    parts = [means.get(name) for name in ("efficacy", "paraphrase", "neighbourhood")]
    known = [part for part in parts if part is not None]
    whole = len(known) == len(parts) and all(known)
    means["score"] = len(known) / sum(1 / part for part in known) if whole else None
    return means


def _pairs(case: Case) -> list[tuple[str, str]]:
    own = [
        (prompt, target)
        for prompt in (case.edit.prompt, *case.unseen)
        for target in (case.edit.target, case.old)
    ]
    near = [
        (n.asked.prompt, target)
        for n in case.neighbours
        for target in (n.asked.target, case.edit.target)
    ]
    return own + near


def _share(flags: Iterable[bool]) -> float | None:
    found = list(flags)
    return float(np.mean(found)) if found else None
