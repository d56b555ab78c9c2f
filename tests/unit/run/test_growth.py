"""Topics that are grown, split off and retired while the bank is served."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from membank.client import BankClient
from membank.client.retriever import unit
from membank.trainer.corpus import Document
from membank.trainer.run.growth import TreeGrower
from membank.wire.errors import FailedPreconditionError, InvalidArgumentError, MembankError, Reason
from membank.wire.format import TreeDocument, initial_weight
from membank.wire.spec import BlockRef, BlockState
from rpc_rig import RpcRig
from shard_rig import RIG_SPEC

NAN = [np.nan, np.nan]
# Topics 0..2 have leaves; of topic 1 one leaf is free, and topic 3 is free with all under it.
TREE = TreeDocument(
    labels={BlockRef(1, 0): "east", BlockRef(1, 1): "north", BlockRef(2, 2): "north leaf"},
    num_documents={BlockRef(1, 1): 10, BlockRef(2, 2): 10},
    centroids=(
        np.array([[1, 0], [0, 1], [-1, 0], NAN], np.float32),
        np.array([[1, 0.2], [1, -0.2], [0, 1], NAN, [-1, 0], [-1, 0.5], NAN, NAN], np.float32),
    ),
    embedder={"kind": "numbers"},
)
NORTH, LEAF, FREE = BlockRef(1, 1), BlockRef(2, 2), BlockRef(2, 3)


class NumberEmbedder:
    """Reads a vector from the text itself."""

    @property
    def config(self) -> Mapping[str, object]:
        return {"kind": "numbers"}

    @property
    def arrays(self) -> Mapping[str, NDArray[np.generic]]:
        return {}

    @property
    def level_dims(self) -> tuple[int, ...]:
        return (2,)

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        return unit(np.array([[float(word) for word in text.split()] for text in texts], "f4"))


def documents(*texts: str) -> list[Document]:
    return [
        Document(doc_id=text, source="test", labels=(), title="", text=text, embed_text=text)
        for text in texts
    ]


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[RpcRig]:
    with RpcRig(tmp_path / "bank", tree=TREE) as rig:
        yield rig


@pytest.fixture
def client(rig: RpcRig) -> Iterator[BankClient]:
    with BankClient.connect(rig.address, embedder=NumberEmbedder()) as client:
        yield client


@pytest.fixture
def grower(client: BankClient) -> TreeGrower:
    return TreeGrower(client, embedder=NumberEmbedder())


def test_a_leaf_is_grown_where_there_is_room(client: BankClient, grower: TreeGrower) -> None:
    texts = documents("-0.3 1", "-0.4 1", "-0.35 1")
    dry = grower.grow(NORTH, label="north-west", documents=texts, dry_run=True)
    assert (dry.topic, dry.report.dry_run, client.info().revision) == (FREE, True, 0)
    grown = grower.grow(NORTH, label="north-west", documents=texts)
    assert (grown.topic, grown.routed, dry.routed) == (FREE, {FREE: 3}, {FREE: 3})
    assert client.route("-0.33 1") == (NORTH, FREE)
    assert client.route("0.1 1") == (NORTH, LEAF)
    (topic,) = client.topics(parent=FREE)
    assert (topic.label, topic.num_documents, topic.state) == ("north-west", 3, BlockState.ACTIVE)
    fetched = client.fetch([FREE])
    np.testing.assert_array_equal(fetched.weights[FREE], initial_weight(RIG_SPEC, FREE))


def test_a_topic_is_grown_under_the_root_and_a_leaf_under_it(
    client: BankClient, grower: TreeGrower
) -> None:
    south = grower.grow(None, label="south", documents=documents("0 -1"))
    assert (south.topic, south.routed) == (BlockRef(1, 3), {BlockRef(1, 3): 1})
    assert client.route("0 -1") == (BlockRef(1, 3),)
    leaf = grower.grow(south.topic, label="south leaf", documents=documents("0 -1", "1 0"))
    assert leaf.routed == {leaf.topic: 1, BlockRef(2, 0): 1}
    assert client.route("0 -1") == (BlockRef(1, 3), BlockRef(2, 6))


def test_without_texts_nothing_is_routed_there(client: BankClient, grower: TreeGrower) -> None:
    grown = grower.grow(NORTH, label="later")
    assert (grown.topic, grown.routed) == (FREE, {})
    assert client.route("-0.3 1") == (NORTH, LEAF)
    # Its cluster is taken all the same.
    with pytest.raises(FailedPreconditionError, match="--reserve") as caught:
        grower.grow(NORTH, label="more")
    assert caught.value.reason is Reason.TREE_FULL


def test_what_is_deleted_makes_room(client: BankClient, grower: TreeGrower) -> None:
    full = BlockRef(1, 0)
    with pytest.raises(FailedPreconditionError) as caught:
        grower.grow(full, label="x")
    assert caught.value.reason is Reason.TREE_FULL
    client.delete(BlockRef(2, 1))
    grown = grower.grow(full, label="anew", documents=documents("1 -0.1"))
    assert grown.topic == BlockRef(2, 1)
    assert client.route("1 -0.1") == (full, BlockRef(2, 1))


def test_content_without_a_centroid_is_no_room(client: BankClient, grower: TreeGrower) -> None:
    client.swap({FREE: np.ones(RIG_SPEC.block_shape(2), np.float32)})
    with pytest.raises(FailedPreconditionError) as caught:
        grower.grow(NORTH, label="x")
    assert caught.value.reason is Reason.TREE_FULL


def test_a_leaf_is_split_in_two(client: BankClient, grower: TreeGrower) -> None:
    client.swap({LEAF: np.full(RIG_SPEC.block_shape(2), 3.0, np.float32)})
    own = ["0.02 1", "0.03 1", "0.01 1", "-0.6 1", "-0.62 1"]
    other = ["1 0", "-1 0"]
    split = grower.split(LEAF, documents=documents(*own, *other))
    assert (split.topic, dict(split.routed)) == (FREE, {LEAF: 3, FREE: 2})
    weights = client.fetch_blocks([LEAF, FREE]).weights
    np.testing.assert_array_equal(weights[FREE], weights[LEAF])
    labels = {topic.ref: (topic.label, topic.num_documents) for topic in client.topics(LEAF)}
    labels |= {topic.ref: (topic.label, topic.num_documents) for topic in client.topics(FREE)}
    assert labels == {LEAF: ("north leaf", 3), FREE: ("north leaf (2)", 2)}
    assert client.route("0 1") == (NORTH, LEAF)
    assert client.route("-0.6 1") == (NORTH, FREE)
    # All of it is one transaction.
    assert client.info().revision == 2


@pytest.mark.parametrize(
    ("ref", "texts", "problem"),
    [
        (NORTH, ["0 1", "0.1 1"], "no leaf"),
        (LEAF, ["0 1", "1 0"], "1 of the 2 documents"),
        (LEAF, ["0 1", "0 1", "0 1"], "too much alike"),
    ],
)
def test_what_cannot_be_split_is_said(
    client: BankClient, grower: TreeGrower, ref: BlockRef, texts: list[str], problem: str
) -> None:
    with pytest.raises(InvalidArgumentError, match=problem):
        grower.split(ref, documents=documents(*texts))
    assert client.info().revision == 0


@pytest.mark.parametrize(
    ("parent", "texts", "reason"),
    [(LEAF, [], Reason.BAD_ARGUMENT), (NORTH, ["0 0"], Reason.BAD_ARGUMENT)],
)
def test_what_cannot_grow_is_said(
    client: BankClient, grower: TreeGrower, parent: BlockRef, texts: list[str], reason: Reason
) -> None:
    with pytest.raises(MembankError) as caught:
        grower.grow(parent, label="x", documents=documents(*texts))
    assert caught.value.reason is reason
    assert client.info().revision == 0
