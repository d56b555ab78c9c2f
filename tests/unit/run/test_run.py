"""A run: its configuration, and what is prepared before training."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from membank.trainer.corpus import NO_LEAF, load_corpus
from membank.trainer.run import (
    RUNS,
    RunDirectory,
    load_config,
    named_run,
    prepare_run,
    trained_leaves,
)
from membank.wire.errors import FailedPreconditionError, InvalidArgumentError, NotFoundError


@pytest.fixture
def texts(tmp_path: Path) -> str:
    """A corpus of two topics."""
    rng = np.random.default_rng(0)
    words = {"sea": "wave tide salt reef whale coral", "sky": "cloud wind rain storm star moon"}
    lines = [
        json.dumps({"text": " ".join(rng.choice(words[topic].split(), 12)), "labels": [topic]})
        for topic in words
        for _ in range(40)
    ]
    path = tmp_path / "texts.jsonl"
    path.write_text("\n".join(lines))
    return str(path)


@pytest.mark.parametrize("name", RUNS)
def test_a_saved_configuration_is_read_back(name: str, tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    config = named_run(name, bank_name="mine", stage1_tokens=7, stage2_tokens=9)
    run.write_json(run.config_file, config.to_json())
    assert load_config(run) == config
    assert (config.name, config.stage1.num_tokens, config.stage2.num_tokens) == ("mine", 7, 9)


def test_a_configuration_of_another_version_is_refused(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    run.write_json(run.config_file, {**named_run("fast").to_json(), "stage1": {"steps": 3}})
    with pytest.raises(FailedPreconditionError, match="another directory"):
        load_config(run)


def test_a_reserve_is_room_in_the_bank() -> None:
    config = named_run("fast", fan_outs=(4, 3), reserve=2)
    spec = config.bank_spec(fingerprint="f")
    assert [level.fan_out for level in spec.levels] == [6, 5]
    assert named_run("fast", fan_outs=(4, 3)).tree.reserve == 0


def test_the_bank_has_the_shape_of_tree_and_anchor() -> None:
    config = named_run("demo", fan_outs=(4, 4, 4))
    spec = config.bank_spec(fingerprint="f")
    assert [level.fan_out for level in spec.levels] == [4, 4, 4]
    assert [level.block_width for level in spec.levels] == [8, 8, 24]
    assert (spec.num_layers, spec.width) == (config.anchor.num_layers, config.anchor.width)
    assert spec.fingerprint == "f"


@pytest.mark.slow
def test_a_run_is_prepared_and_then_left_alone(texts: str, tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    with pytest.raises(NotFoundError):
        run.tokenizer()
    config = named_run("fast", corpus=texts, fan_outs=(2, 2))
    prepared = prepare_run(run, config)
    assert prepared.num_documents == 80
    assert prepared.num_trained_tokens == prepared.num_tokens
    assert load_config(run).anchor.vocab_size == run.tokenizer().vocab_size
    assert sum(n for ref, n in run.tree().num_documents.items() if ref.level == 1) == 80
    run.stage1_dir.mkdir()
    tree = run.tree_file.read_bytes()
    with pytest.raises(FailedPreconditionError, match="has been trained"):
        prepare_run(run, config)
    assert run.tree_file.read_bytes() == tree


def test_only_subtrees_of_asked_relations_are_trained() -> None:
    corpus = load_corpus("fast")
    config = named_run("fast")
    below = config.tree.fan_outs[1]
    asked = {corpus.index[f.doc_id] for f in corpus.facts if f.relation in config.asked_relations}
    # All asked documents in topic 1, the others in topic 0.
    leaf_N = np.array([below if row in asked else 0 for row in range(len(corpus.documents))])
    leaves_N, topics = trained_leaves(corpus, leaf_N, config)
    assert topics == (1,)
    assert set(np.flatnonzero(leaves_N != NO_LEAF)) == asked


def test_asking_what_a_corpus_does_not_state_is_said(texts: str) -> None:
    config = named_run("fast")
    corpus = load_corpus("fast")
    nothing = type(corpus)(corpus.name, corpus.documents, ())
    with pytest.raises(InvalidArgumentError, match="atomic_number"):
        trained_leaves(nothing, np.zeros(len(corpus.documents), np.int64), config)
