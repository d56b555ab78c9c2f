"""What a model knows of a topic: its facts, its documents, and documents that nobody was trained on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
from numpy.typing import NDArray

from membank.trainer.corpus import Corpus, Tokenizer
from membank.trainer.evaluation import normalised_words, states
from membank.trainer.removal import metrics
from membank.trainer.removal.config import RemovalConfig
from membank.trainer.removal.material import Material, Question, TopicMaterial, spread
from membank.trainer.removal.scoring import (
    Continuation,
    Model,
    TokenScores,
    complete,
    score,
)
from membank.wire.spec import Path

Router = Callable[[Sequence[str]], list[Path]]
"""Gives the path of each text."""

_SPARE_TOKENS = 2
_DOCUMENT_TOKENS = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class Knowledge:
    """What a model knows of one topic."""

    truth_ratios: tuple[float, ...]
    """Truth ratio R of each fact."""
    probability: float
    """Mean over facts of p(right) / (p(right) + sum of p(wrong)), each per token."""
    rouge: float
    """Mean ROUGE-L recall of the greedy answers."""
    recall: float
    """Share of facts whose greedy answer states the right one."""
    answer_loss: float
    """Loss of the right answers, in nats per token."""
    answer_em: float
    """Exact memorization of the right answers."""
    answer_es: float
    """Extraction strength of the right answers."""
    member_loss: float
    """Loss of documents of the training, in nats per token."""
    held_out_loss: float
    """Loss of documents of the topic that no model was trained on, in nats per token."""
    member_em: float
    """Exact memorization of the documents of the training, after their first token."""
    member_es: float
    """Extraction strength of the same."""
    auc: float
    """How well Min-40% tells the documents of the training from the held-out ones."""

    def to_json(self) -> dict[str, object]:
        """Return the fields as JSON-able values."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class Utility:
    """What a model still can where a topic was removed."""

    utility: float
    """Harmonic mean of probability, ROUGE-L and truth of every other topic's facts, 0 to 1."""
    recall: float
    """Share of these facts whose greedy answer states the right one."""
    held_out_loss: float
    """Loss of the other topics' held-out documents, in nats per token."""


class Examiner:
    """Asks models about the topics of one seed; every model gets the same questions and texts.

    Parameters
    ----------
    tokenizer
        The vocabulary.
    config
        How much is asked.
    material
        Topics with their facts and documents.
    """

    def __init__(self, tokenizer: Tokenizer, config: RemovalConfig, material: Material) -> None:
        self._tokenizer = tokenizer
        self._config = config
        self._material = material
        self._papers = {
            topic.label: make_paper(tokenizer, material.corpus, topic, config.max_documents)
            for topic in material.topics
        }

    def examine(self, model: Model, router: Router | None, label: str) -> Knowledge:
        """Return what a model knows of a topic.

        Parameters
        ----------
        model
            The model.
        router
            Gives each prompt and each document, by its own text, the path whose blocks it is scored
            with; None = no memory.
        label
            The topic.
        """
        paper = self._papers[label]
        facts = self._facts(model, router, paper)
        members, held_out = (
            score(model, part.tokens, None if router is None else router(part.raw))
            for part in (paper.members, paper.held_out)
        )
        return Knowledge(
            truth_ratios=facts.truth_ratios,
            probability=facts.probability,
            rouge=facts.rouge,
            recall=facts.recall,
            answer_loss=_token_loss(facts.right),
            answer_em=_mean(metrics.exact_memorization(one.hits) for one in facts.right),
            answer_es=_mean(metrics.extraction_strength(one.hits) for one in facts.right),
            member_loss=_token_loss(members),
            held_out_loss=_token_loss(held_out),
            member_em=_mean(metrics.exact_memorization(one.hits) for one in members),
            member_es=_mean(metrics.extraction_strength(one.hits) for one in members),
            auc=metrics.membership_auc(
                [metrics.min_k_score(one.log_probs) for one in members],
                [metrics.min_k_score(one.log_probs) for one in held_out],
            ),
        )

    def utility(self, model: Model, router: Router | None, forgotten: str) -> Utility:
        """Return what a model still can where a topic was removed."""
        parts: list[float] = []
        recalls: list[float] = []
        losses: list[float] = []
        for label, whole in self._papers.items():
            if label == forgotten:
                continue
            paper = whole.shortened(self._config.max_retained_facts)
            facts = self._facts(model, router, paper)
            parts += [facts.probability, facts.rouge, metrics.known_truth(facts.truth_ratios)]
            recalls.append(facts.recall)
            texts = paper.held_out
            paths = None if router is None else router(texts.raw)
            losses.append(_token_loss(score(model, texts.tokens, paths)))
        return Utility(
            utility=metrics.model_utility(parts),
            recall=_mean(recalls),
            held_out_loss=_mean(losses),
        )

    def answers_of(self, model: Model, label: str, rows: Sequence[int]) -> tuple[float, float]:
        """Return recall of some facts of a topic and the loss of their answers, without memory.

        Parameters
        ----------
        model
            The model.
        label
            The topic.
        rows
            Which of its questions.

        Returns
        -------
        tuple of float
            Share of the facts that are stated, and nats per token.
        """
        paper = self._papers[label].chosen(rows)
        texts = self._completions(model, paper, None)
        scores = score(model, [answers[0] for answers in paper.answers])
        stated = [
            states(text, question.fact.answer)
            for text, question in zip(texts, paper.questions, strict=True)
        ]
        return _mean(stated), _token_loss(scores)

    def _facts(self, model: Model, router: Router | None, paper: Paper) -> _Facts:
        facts = [question.fact for question in paper.questions]
        paths = None if router is None else router([fact.prompt for fact in facts])
        answers = _score_answers(model, paper, paths)
        losses = [[one.loss for one in scores] for scores in answers]
        texts = self._completions(model, paper, paths)
        pairs = list(zip(texts, facts, strict=True))
        return _Facts(
            right=[scores[0] for scores in answers],
            truth_ratios=tuple(metrics.truth_ratio(row[0], row[1:]) for row in losses),
            probability=_mean(metrics.choice_probability(row[0], row[1:]) for row in losses),
            rouge=_mean(
                metrics.rouge_l_recall(normalised_words(text), normalised_words(fact.answer))
                for text, fact in pairs
            ),
            recall=_mean(states(text, fact.answer) for text, fact in pairs),
        )

    def _completions(self, model: Model, paper: Paper, paths: Sequence[Path] | None) -> list[str]:
        lengths = [len(answers[0].tokens) + _SPARE_TOKENS for answers in paper.answers]
        found = complete(
            model, paper.prompts, paths,
            max_new_tokens=max(lengths), stop_token=self._tokenizer.eot_id,
        )  # fmt: skip
        return [
            # Its own length: a batch mate's longer answer must not make it longer.
            self._tokenizer.decode(tokens[:length])
            for tokens, length in zip(found, lengths, strict=True)
        ]


@dataclass(frozen=True, slots=True)
class _Facts:
    """What a model knows of some facts; fields as in `Knowledge`."""

    right: list[TokenScores]
    truth_ratios: tuple[float, ...]
    probability: float
    rouge: float
    recall: float


def _score_answers(
    model: Model, paper: Paper, paths: Sequence[Path] | None
) -> list[list[TokenScores]]:
    """Return the scores of each question's answers, the right one first."""
    flat = [(row, text) for row, texts in enumerate(paper.answers) for text in texts]
    scores = score(
        model,
        [text for _, text in flat],
        None if paths is None else [paths[row] for row, _ in flat],
    )
    found: list[list[TokenScores]] = [[] for _ in paper.answers]
    for (row, _), one in zip(flat, scores, strict=True):
        found[row].append(one)
    return found


@dataclass(frozen=True, kw_only=True, slots=True)
class Texts:
    """Documents to be scored."""

    raw: list[str]
    """What the retriever is asked with."""
    tokens: list[Continuation]
    """Each document, its first token as the prompt."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Paper:
    """The questions and texts of a topic, encoded once."""

    questions: Sequence[Question]
    """The questions."""
    prompts: list[tuple[int, ...]]
    """Tokens of each question's prompt."""
    answers: list[list[Continuation]]
    """Per question the right answer, then the wrong ones."""
    members: Texts
    """Documents of the training."""
    held_out: Texts
    """Documents that no model was trained on."""

    def shortened(self, limit: int) -> Paper:
        """Return the paper with so many questions at most, spread over all."""
        return self.chosen(spread(range(len(self.questions)), limit))

    def chosen(self, rows: Sequence[int]) -> Paper:
        """Return the paper with some of the questions."""
        return replace(
            self,
            questions=[self.questions[row] for row in rows],
            prompts=[self.prompts[row] for row in rows],
            answers=[self.answers[row] for row in rows],
        )


def make_paper(
    tokenizer: Tokenizer, corpus: Corpus, topic: TopicMaterial, max_documents: int
) -> Paper:
    """Return the questions of a topic and a choice of its documents, encoded."""
    prompts = [
        tuple(ids) for ids in tokenizer.encode_batch([q.fact.prompt for q in topic.questions])
    ]

    def answers(question: Question, prompt: tuple[int, ...]) -> list[Continuation]:
        # With the character that follows in the document: " 7" alone would begin " 72" too.
        text = corpus.documents[corpus.index[question.fact.doc_id]].text
        stated = f"{question.fact.prompt} {question.fact.answer}"
        end = text[len(stated) : len(stated) + 1] if text.startswith(stated) else ""
        every = [f" {answer}{end}" for answer in (question.fact.answer, *question.wrong)]
        return [
            Continuation(prompt=prompt, tokens=tuple(ids)) for ids in tokenizer.encode_batch(every)
        ]

    def texts(positions: NDArray[np.int64]) -> Texts:
        chosen = spread(positions.tolist(), max_documents)
        raw = [corpus.documents[row].text for row in chosen]
        encoded = [ids[:_DOCUMENT_TOKENS] for ids in tokenizer.encode_batch(raw)]
        kept = [row for row, ids in enumerate(encoded) if len(ids) > 1]
        return Texts(
            raw=[raw[row] for row in kept],
            tokens=[
                Continuation(prompt=tuple(encoded[row][:1]), tokens=tuple(encoded[row][1:]))
                for row in kept
            ],
        )

    return Paper(
        questions=topic.questions,
        prompts=prompts,
        answers=[answers(*pair) for pair in zip(topic.questions, prompts, strict=True)],
        members=texts(topic.members),
        held_out=texts(topic.held_out),
    )


def _mean(values: Iterable[float]) -> float:
    return float(np.mean(list(values)))


def _token_loss(scores: Sequence[TokenScores]) -> float:
    return -float(np.mean(np.concatenate([one.log_probs for one in scores])))
