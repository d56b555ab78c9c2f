"""Commands that change the tree of a bank, against a service in this process, with its own retriever."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from command_line import membank
from membank.client import BankClient
from membank.trainer.corpus import Corpus
from membank.trainer.tree import LsaConfig, TreeConfig, build_tree
from membank.wire.spec import BlockRef, BlockState
from rpc_rig import RpcRig
from shard_rig import RIG_SPEC

WORDS = {
    "sea": "wave tide salt reef whale coral",
    "sky": "cloud wind rain storm star moon",
    "farm": "cow wheat barn plough sheep fence",
}


def write_texts(path: Path, topics: Sequence[str], count: int, seed: int) -> Path:
    rng = np.random.default_rng(seed)
    lines = [
        json.dumps({"text": " ".join(rng.choice(WORDS[topic].split(), 9)), "labels": [topic]})
        for topic in topics
        for _ in range(count)
    ]
    path.write_text("\n".join(lines))
    return path


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[RpcRig]:
    corpus = Corpus.from_jsonl(str(write_texts(tmp_path / "texts.jsonl", list(WORDS), 12, 0)))
    tree = build_tree(
        corpus,
        # Three topics of one leaf each, and one free cluster under each and under the root.
        TreeConfig(fan_outs=(3, 1), reserve=1),
        embedder=LsaConfig(topic_dims=8),
    ).document()
    assert [len(level) for level in tree.centroids] == [
        RIG_SPEC.num_clusters(level) for level in (1, 2)
    ]
    with RpcRig(tmp_path / "bank", tree=tree) as rig:
        yield rig


def test_a_leaf_is_split_and_retired_again(rig: RpcRig, tmp_path: Path) -> None:
    at = ("--bank", rig.address, "--json")
    texts = str(write_texts(tmp_path / "sea.jsonl", ["sea", "sky"], 10, 1))
    with BankClient.connect(rig.address) as client:
        topic, leaf = client.route(WORDS["sea"])
    split = ("split", str(leaf), "--documents", texts, "--label", "deep")
    dry = json.loads(membank(*split, "--dry-run", *at).out)
    done = json.loads(membank(*split, *at).out)
    new = BlockRef(2, leaf.cluster + 1)
    assert (dry["topic"], done["topic"], done["revision"]) == (str(new), str(new), 1)
    assert set(done["routed"]) == {str(leaf), str(new)}
    assert sum(done["routed"].values()) == 10
    assert [change["centroid"] for change in done["tree_changes"]] == ["set", "set"]
    again = membank(*split, "--bank", rig.address)
    assert (again.code, "TREE_FULL" in again.err) == (4, True)
    retired = json.loads(membank("retire", "deep", "--yes", *at).out)
    assert retired["tree_changes"][0]["centroid"] == "removed"
    with BankClient.connect(rig.address) as client:
        assert {client.route(text) for text in (WORDS["sea"], "whale reef")} == {(topic, leaf)}
        (gone,) = client.topics(parent=new)
        assert (gone.state, gone.label) == (BlockState.DELETED, "")


def test_a_topic_is_grown_with_its_texts(rig: RpcRig, tmp_path: Path) -> None:
    texts = str(write_texts(tmp_path / "farm.jsonl", ["farm"], 10, 1))
    with BankClient.connect(rig.address) as client:
        topic, _ = client.route(WORDS["farm"])
    told = membank("grow", str(topic), "--label", "animals", "--from", texts, "--bank", rig.address)
    assert told.code == 0
    assert "documents go there" in told.out
    ended = membank("grow", "root", "--label", "elsewhere", "--bank", rig.address, "--json")
    assert json.loads(ended.out)["topic"] == "1/3"
    labels = {
        t["label"] for t in json.loads(membank("topics", "--bank", rig.address, "--json").out)
    }
    assert {"animals", "elsewhere"} <= labels


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (("grow", "2/0", "--label", "x"), 2, "is a leaf"),
        (("grow", "nothing", "--label", "x"), 3, "nothing"),
        (("split", "1/0", "--documents", "texts.jsonl"), 2, "no leaf"),
        (("split", "2/0", "--documents", "gone.jsonl"), 2, "gone.jsonl"),
        (("retire", "1/9", "--yes"), 3, "no cluster 9"),
    ],
)
def test_what_cannot_be_is_said(
    rig: RpcRig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    args: tuple[str, ...],
    code: int,
    words: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    ended = membank(*args, "--bank", rig.address)
    assert ended.code == code
    assert words in " ".join(ended.err.split())
    assert "Traceback" not in ended.err


def test_retiring_asks_first(rig: RpcRig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("n\n"))
    ended = membank("retire", "1/0", "--bank", rig.address)
    assert (ended.code, rig.bank.log.committed.revision) == (1, 0)
    assert "Delete 3 blocks" in ended.err
