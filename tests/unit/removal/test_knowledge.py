"""What a model is asked of a topic, and the figures that come of its answers."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from membank.trainer.corpus import Corpus
from membank.trainer.model import Anchor, next_token_loss
from membank.trainer.removal.config import quick
from membank.trainer.removal.knowledge import Examiner, make_paper
from membank.trainer.removal.material import Material, Question, TopicMaterial
from membank.trainer.removal.relearning import relearn
from membank.trainer.removal.scoring import Model
from membank.wire.spec import BlockRef
from tiny_world import World, make_world


@pytest.fixture(scope="module")
def world() -> World:
    return make_world()


@pytest.fixture(scope="module")
def material(world: World) -> Material:
    """Return two topics, numbers and cities; the last two documents of each are held out."""
    corpus = Corpus(name="tiny", documents=world.documents, facts=world.facts)
    trained = np.array([n % 8 < 6 for n in range(16)])

    def topic(label: str, first: int) -> TopicMaterial:
        facts = world.facts[first : first + 6]
        return TopicMaterial(
            label=label,
            clusters=(BlockRef(1, first // 8),),
            members=np.arange(first, first + 6),
            held_out=np.arange(first + 6, first + 8),
            questions=tuple(
                Question(fact=fact, wrong=(facts[n - 1].answer, facts[n - 2].answer))
                for n, fact in enumerate(facts)
            ),
        )

    topics = (topic("number", 0), topic("city", 8))
    return Material(corpus=corpus, leaves=np.array(world.leaves), trained=trained, topics=topics)


@pytest.fixture(scope="module")
def examiner(world: World, material: Material) -> Examiner:
    return Examiner(world.tokenizer, replace(quick(), max_retained_facts=4), material)


@pytest.fixture(scope="module")
def taught(world: World) -> Anchor:
    """Return an anchor that knows the numbers by heart, and nothing of the cities."""
    states: list[dict[str, torch.Tensor]] = relearn(
        world.anchor,
        [
            [*world.tokenizer.encode(document.text), world.tokenizer.eot_id]
            for document in world.documents[:6]
        ],
        replace(quick().relearning, steps=(0, 120), learning_rate=5e-3),
        seed=0,
        measure=lambda model: {n: w.detach().clone() for n, w in model.state_dict().items()},
    )
    taught = Anchor(world.anchor.config)
    taught.load_state_dict(states[-1])
    return taught


def loss_of(world: World, model: Anchor, prompt: str, answer: str) -> float:
    """Return the mean loss of an answer, computed another way: a whole sentence minus its beginning."""
    sums = []
    for text in (prompt, prompt + answer):
        ids = torch.tensor([world.tokenizer.encode(text)])
        with torch.no_grad():
            loss, count = next_token_loss(model(ids), ids)
        sums.append((float(loss) * count, count))
    return (sums[1][0] - sums[0][0]) / (sums[1][1] - sums[0][1])


def test_an_answer_is_scored_with_the_full_stop_of_its_document(
    world: World, material: Material
) -> None:
    paper = make_paper(world.tokenizer, material.corpus, material.topics[0], 99)
    texts = [world.tokenizer.decode(answer.tokens) for answer in paper.answers[0]]
    assert texts == [" 31.", " 24.", " 60."]


def test_figures_are_those_of_losses_computed_another_way(
    world: World, material: Material, examiner: Examiner
) -> None:
    found = examiner.examine(Model(anchor=world.anchor), None, "number")
    ratios, choices = [], []
    for question in material.topics[0].questions:
        prompt = question.fact.prompt
        right = loss_of(world, world.anchor, prompt, f" {question.fact.answer}.")
        wrong = [loss_of(world, world.anchor, prompt, f" {answer}.") for answer in question.wrong]
        ratios.append(math.exp(right - sum(wrong) / 2))
        odds = [math.exp(-loss) for loss in (right, *wrong)]
        choices.append(odds[0] / sum(odds))
    assert found.truth_ratios == pytest.approx(ratios, rel=1e-3)
    assert found.probability == pytest.approx(np.mean(choices), rel=1e-3)


def test_what_was_taught_is_known_and_the_rest_is_not(examiner: Examiner, taught: Anchor) -> None:
    model = Model(anchor=taught)
    numbers, cities = (examiner.examine(model, None, label) for label in ("number", "city"))
    assert numbers.recall == numbers.answer_em == numbers.answer_es == 1.0
    assert max(numbers.truth_ratios) < 0.5
    assert numbers.auc == 1.0
    assert numbers.member_loss < numbers.held_out_loss
    assert cities.recall == 0.0
    assert cities.answer_loss > 2.0


def test_utility_is_of_the_other_topics(examiner: Examiner, taught: Anchor) -> None:
    model = Model(anchor=taught)
    assert examiner.utility(model, None, "city").recall == 1.0
    assert examiner.utility(model, None, "city").utility > 0.7
    assert examiner.utility(model, None, "number").recall == 0.0


def test_chosen_questions_are_asked_alone(examiner: Examiner, taught: Anchor) -> None:
    recall, loss = examiner.answers_of(Model(anchor=taught), "number", [1, 4])
    assert recall == 1.0
    assert 0 < loss < 0.5
