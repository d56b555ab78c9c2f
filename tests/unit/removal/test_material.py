"""What is removed, what is asked, and what nobody is shown."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from membank.trainer.corpus import Corpus, Document, Fact
from membank.trainer.removal.config import RemovalConfig, quick
from membank.trainer.removal.material import make_material, neighbours_answers, spread
from membank.trainer.removal.world import split_questions
from membank.trainer.tree import TreeConfig
from membank.wire.errors import InvalidArgumentError
from membank.wire.spec import BlockRef

PER_TOPIC = 40
TOPICS = ("metals", "towns", "prose")


def make_fact(topic: str, number: int) -> Fact:
    return Fact(
        relation=f"{topic}-number",
        topic=topic,
        subject=f"{topic}{number}",
        answer=str(number // 2),  # every answer twice
        prompt=f"The number of {topic}{number} is",
        paraphrases=(),
        doc_id=f"{topic}/{number}",
    )


def make_corpus() -> Corpus:
    documents = tuple(
        Document(
            doc_id=f"{topic}/{number}",
            source="made",
            labels=(topic,),
            title="",
            text=f"The number of {topic}{number} is {number // 2}.",
            embed_text=topic,
        )
        for topic in TOPICS
        for number in range(PER_TOPIC)
    )
    facts = tuple(make_fact(topic, n) for topic in TOPICS[:2] for n in range(PER_TOPIC))
    return Corpus("made", documents, facts)


def make_leaves() -> np.ndarray:
    """Return leaves: metals in clusters 0 and 1, towns in 2, prose in 3; a metal astray in 2."""
    leaves = np.concatenate(
        [np.repeat([0, 2], PER_TOPIC // 2), np.full(PER_TOPIC, 4), np.full(PER_TOPIC, 6)]
    )
    leaves[0] = 5
    return leaves


def make_config(*topics: str) -> RemovalConfig:
    config = quick()
    run = replace(config.run, tree=TreeConfig(fan_outs=(4, 2)))
    return replace(config, run=run, topics=topics, held_out_share=0.25, max_facts=99)


def test_a_topic_is_the_clusters_that_are_mostly_its_own() -> None:
    material = make_material(make_corpus(), make_leaves(), make_config("metals", "towns"), seed=0)
    metals, towns = material.topics
    assert metals.clusters == (BlockRef(1, 0), BlockRef(1, 1))
    assert towns.clusters == (BlockRef(1, 2),)
    # The metal that lies among the towns goes with the towns, whatever its label.
    assert 0 not in {*metals.members, *metals.held_out}
    assert 0 in {*towns.members, *towns.held_out}


def test_held_out_documents_are_in_no_training_and_no_question() -> None:
    material = make_material(make_corpus(), make_leaves(), make_config("metals", "towns"), seed=0)
    for topic in material.topics:
        assert len(topic.held_out)
        assert not material.trained[topic.held_out].any()
        asked = {material.corpus.index[question.fact.doc_id] for question in topic.questions}
        assert asked <= set(topic.members.tolist())


def test_the_reference_is_trained_on_everything_but_the_topic() -> None:
    material = make_material(make_corpus(), make_leaves(), make_config("metals", "towns"), seed=0)
    metals, towns = material.topics
    without = material.without("metals")
    assert not without[metals.members].any()
    assert without[towns.members].all()
    assert without.sum() == material.trained.sum() - len(metals.members)
    blind = material.blind()
    assert not blind[metals.members].any()
    assert not blind[towns.members].any()
    assert blind.sum() == material.trained.sum() - len(metals.members) - len(towns.members)


def test_another_seed_holds_out_other_documents() -> None:
    first, second = (
        make_material(make_corpus(), make_leaves(), make_config("metals", "towns"), seed=seed)
        for seed in range(2)
    )
    assert first.trained.tolist() != second.trained.tolist()


def test_a_topic_without_facts_is_refused_and_the_others_are_named() -> None:
    with pytest.raises(
        InvalidArgumentError, match=r"'prose' has no cluster with facts.*metals, towns"
    ):
        make_material(make_corpus(), make_leaves(), make_config("metals", "prose"), seed=0)


def test_wrong_answers_are_the_nearest_ones_that_are_wrong_each_once() -> None:
    facts = [make_fact("metals", number) for number in range(10)]
    # Answers are 0 0 1 1 2 2 3 3 4 4. Beside fact 4 (2): 5 (2, right), 3 (1), 6 (3), 2 (1 again) ...
    assert neighbours_answers(facts, 4, 3) == ("1", "3", "0")
    assert neighbours_answers(facts, 0, 99) == ("1", "2", "3", "4")


def test_the_attacker_has_a_part_of_the_questions_and_is_asked_the_others() -> None:
    material = make_material(make_corpus(), make_leaves(), make_config("metals", "towns"), seed=0)
    topic = material.topics[0]
    shown, hidden = split_questions(topic, 0.2, 0)
    assert len(shown) == round(0.2 * len(topic.questions))
    assert sorted(shown + hidden) == list(range(len(topic.questions)))
    assert split_questions(topic, 0.2, 0) == (shown, hidden)


def test_a_choice_of_questions_is_spread_over_all() -> None:
    assert spread(range(10), 4) == (0, 3, 6, 9)
    assert spread("abc", 5) == ("a", "b", "c")
    config = replace(make_config("metals", "towns"), max_facts=5)
    material = make_material(make_corpus(), make_leaves(), config, seed=0)
    assert [len(topic.questions) for topic in material.topics] == [5, 5]
