"""The whole pipeline in small: a tiny anchor with memories learns tiny facts, the controls do not."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from membank.trainer.evaluation import (
    Condition,
    EvaluationPaths,
    evaluate_perplexity,
    evaluate_recall,
)
from membank.trainer.training import (
    AnchorStageConfig,
    InProcessMemory,
    MemoryStageConfig,
    PrefetchConfig,
    generic_spec,
    leaf_path,
    train_anchor,
    train_memories,
)
from membank.wire.errors import InvalidArgumentError
from membank.wire.spec import BlockRef, BlockState
from tiny_world import World, make_world

# The first test that needs the trained world pays for it, about a second.
slow = pytest.mark.slow


@pytest.fixture(scope="module")
def trained() -> tuple[World, InProcessMemory]:
    """A world whose anchor knows the sentences' form, and whose memories know the facts."""
    torch.set_num_threads(1)
    world = make_world()
    stage_1 = AnchorStageConfig(num_tokens=24 * 8 * 36, batch_size=8, learning_rate=1e-2)
    train_anchor(world.anchor, world.sequences, stage_1)
    memory = InProcessMemory(world.spec)
    stage_2 = MemoryStageConfig(
        num_tokens=24 * 8 * 200, batch_size=8, run_length=2, prefetch=PrefetchConfig(depth=0)
    )
    train_memories(world.anchor, memory, world.sequences, stage_2)
    return world, memory


@slow
def test_memories_recall_the_facts_they_were_trained_on(
    trained: tuple[World, InProcessMemory],
) -> None:
    world, memory = trained
    generic = InProcessMemory(generic_spec(world.spec))  # untrained: it must change nothing
    told: list[tuple[int, int]] = []
    report = evaluate_recall(
        world.anchor,
        world.tokenizer,
        world.facts,
        memory=memory,
        generic=generic,
        paths=world.paths,
        batch_size=5,
        on_progress=lambda done, total: told.append((done, total)),
    )
    assert set(report.relations) == {"number", "city"}
    for relation in report.relations.values():
        assert relation.num_facts == 8
        assert set(relation.recall) == {str(condition) for condition in Condition}
        assert relation.recall["fetched"] == relation.recall["oracle"] >= 0.8
        assert relation.recall["generic"] == relation.recall["anchor"] <= 0.4
        assert relation.recall["random"] <= 0.4
        assert relation.recall["withheld"] == min(relation.without_level) <= 0.6
        assert relation.routed_share == (1.0, 1.0)
        for fact in relation.facts:
            assert set(fact.completions) == set(relation.recall)
    assert told[-1] == (16 * 7, 16 * 7)
    body = json.loads(json.dumps(report.to_json()))
    assert body["relations"]["city"]["facts"][0]["answer"] == "rome"
    assert (
        "facts" not in json.dumps(report.to_json(facts=False)["relations"]).split('"num_facts"')[0]
    )


@slow
def test_the_batch_size_changes_no_completion(trained: tuple[World, InProcessMemory]) -> None:
    world, memory = trained
    reports = [
        evaluate_recall(
            world.anchor,
            world.tokenizer,
            world.facts,
            memory=memory,
            generic=None,
            paths=world.paths,
            batch_size=batch_size,
        )
        for batch_size in (1, 3, 64)
    ]
    assert reports[0] == reports[1] == reports[2]


@slow
def test_a_withheld_topic_falls_to_the_anchor_and_others_stay(
    trained: tuple[World, InProcessMemory],
) -> None:
    world, memory = trained
    topic = BlockRef(1, 0)

    def completions() -> dict[str, tuple[str, str, str]]:
        report = evaluate_recall(
            world.anchor,
            world.tokenizer,
            world.facts,
            memory=memory,
            generic=None,
            paths=world.paths,
        )
        return {
            f"{relation.relation}/{fact.subject}": (
                fact.holding.split()[0],
                fact.completions["fetched"],
                fact.completions["anchor"],
            )
            for relation in report.relations.values()
            for fact in relation.facts
        }

    before = completions()
    memory.set_state(topic, BlockState.WITHHELD)
    try:
        after = completions()
    finally:
        memory.set_state(topic, BlockState.ACTIVE)
    assert completions() == before
    for name, (root, fetched, anchor) in after.items():
        assert fetched == (anchor if root == str(topic) else before[name][1])


@slow
def test_misrouted_prompts_are_told_from_unlearnt_facts(
    trained: tuple[World, InProcessMemory],
) -> None:
    world, memory = trained
    wrong = tuple(leaf_path(world.spec, 3 - leaf) for leaf in world.leaves)
    paths = replace(world.paths, routed=wrong)
    report = evaluate_recall(
        world.anchor, world.tokenizer, world.facts, memory=memory, generic=None, paths=paths
    )
    for relation in report.relations.values():
        assert relation.routed_share == (0.0, 0.0)
        assert relation.recall["fetched"] <= 0.4 < 0.8 <= relation.recall["oracle"]


@slow
def test_perplexity_falls_with_the_right_memory_alone(
    trained: tuple[World, InProcessMemory],
) -> None:
    world, memory = trained
    report = evaluate_perplexity(
        world.anchor,
        world.tokenizer,
        [document.text for document in world.documents],
        [document.labels[0] for document in world.documents],
        memory=memory,
        generic=InProcessMemory(generic_spec(world.spec)),
        paths=world.paths,
        max_documents_per_topic=6,
        batch_size=4,
    )
    assert set(report.topics) == {"number", "city"}
    for topic in report.topics.values():
        assert topic.num_documents == 6
        found = topic.perplexity
        assert found["fetched"] == found["oracle"] < 0.85 * found["anchor"]
        assert found["generic"] == pytest.approx(found["anchor"])
        assert found["random"] > found["fetched"]
        assert found["withheld"] == max(topic.without_level) > found["fetched"]
    json.dumps(report.to_json())


def test_perplexity_equals_the_loss_by_hand(world: World) -> None:
    document = world.documents[0]
    report = evaluate_perplexity(
        world.anchor,
        world.tokenizer,
        [document.text, world.documents[9].text],
        ["a", "b"],
        memory=InProcessMemory(world.spec),
        generic=None,
        paths=world.paths.select([0, 9]),
    )
    ids = torch.tensor([world.tokenizer.encode(document.text)])
    with torch.inference_mode():
        logits = world.anchor(ids)[0, :-1]
    loss = torch.nn.functional.cross_entropy(logits, ids[0, 1:])
    assert report.topics["a"].num_tokens == ids.shape[1] - 1
    # An untrained block adds exactly nothing.
    for condition in (Condition.ANCHOR, Condition.FETCHED):
        assert report.topics["a"].perplexity[condition] == pytest.approx(
            float(loss.exp()), rel=1e-5
        )


def test_texts_without_paths_are_refused(world: World) -> None:
    with pytest.raises(InvalidArgumentError, match="texts"):
        evaluate_perplexity(
            world.anchor,
            world.tokenizer,
            ["a text"],
            ["a"],
            memory=InProcessMemory(world.spec),
            generic=None,
            paths=EvaluationPaths(routed=(), holding=(), leaves=(0,)),
        )
