from collections import defaultdict

import numpy as np

from membank.trainer.corpus import Document
from membank.trainer.tree import TopicTree, topic_labels
from membank.wire.spec import BlockRef


def documents(*texts: str) -> list[Document]:
    return [
        Document(doc_id=str(i), source="s", labels=(), title="", text=text, embed_text=text)
        for i, text in enumerate(texts)
    ]


def tree(leaves: list[int], fan_outs: tuple[int, ...] = (2, 2)) -> TopicTree:
    return TopicTree(fan_outs, (), np.array(leaves, dtype=np.int64))


def test_a_label_holds_what_tells_a_cluster_from_its_siblings() -> None:
    texts = [
        "the page about iron metal",
        "the page about gold metal",
        "the page about cats and purring",
        "the page about dogs and barking",
    ]
    labels = topic_labels(documents(*texts), tree([0, 1, 2, 3]))
    assert "metal" in labels[BlockRef(1, 0)]
    assert "metal" not in labels[BlockRef(1, 1)]
    # Beside its sibling, what both share tells nothing.
    assert labels[BlockRef(2, 0)].startswith("iron")
    assert labels[BlockRef(2, 1)].startswith("gold")


def test_labels_are_unique_among_siblings_even_if_texts_are_not() -> None:
    texts = ["red apple tree", "red apple tree", "red apple tree", "12", "34"]
    labels = topic_labels(documents(*texts), tree([0, 1, 2, 3, 4], fan_outs=(1, 5)))
    siblings = defaultdict(list)
    for ref, label in labels.items():
        siblings[ref.level].append(label)
    for names in siblings.values():
        assert all(names)
        assert len(set(names)) == len(names)
    assert labels[BlockRef(2, 1)] == "apple, red, tree (2)"


def test_only_clusters_with_documents_have_labels() -> None:
    labels = topic_labels(documents("iron", "gold"), tree([0, 3]))
    assert set(labels) == {BlockRef(1, 0), BlockRef(1, 1), BlockRef(2, 0), BlockRef(2, 3)}


def test_the_order_of_documents_does_not_matter() -> None:
    texts = ["iron metal", "gold metal coin", "cats purr", "dogs bark"]
    forward = topic_labels(documents(*texts), tree([0, 0, 2, 3]))
    backward = topic_labels(documents(*reversed(texts)), tree([3, 2, 0, 0]))
    assert forward == backward
