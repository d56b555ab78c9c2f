from collections import Counter, defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from membank.trainer.corpus import IGNORE, NO_LEAF, PackedSequences, pack_sequences
from membank.wire.errors import InvalidArgumentError

EOT = 0

documents = st.lists(st.lists(st.integers(1, 50), min_size=1, max_size=40), min_size=1, max_size=30)


def pack(
    tokens: list[list[int]], leaves: list[int] | None = None, seq_len: int = 16, seed: int = 0
) -> PackedSequences:
    leaf_of = None if leaves is None else np.array(leaves, dtype=np.int64)
    return pack_sequences(tokens, seq_len=seq_len, eot_id=EOT, leaves=leaf_of, seed=seed)


@settings(max_examples=40)
@given(documents, st.integers(2, 24), st.integers(0, 5))
def test_every_token_is_packed_exactly_once(
    tokens: list[list[int]], seq_len: int, seed: int
) -> None:
    packed = pack(tokens, seq_len=seq_len, seed=seed)
    found: Counter[tuple[int, int]] = Counter()
    for ids, sources in zip(packed.tokens_NT, packed.source_NT, strict=True):
        found.update(
            (int(source), int(token))
            for source, token in zip(sources, ids, strict=True)
            if source >= 0
        )
    wanted = Counter((i, token) for i, ids in enumerate(tokens) for token in [*ids, EOT])
    assert found == wanted
    assert packed.num_tokens == sum(len(ids) + 1 for ids in tokens)


@settings(max_examples=40)
@given(documents, st.data())
def test_a_sequence_holds_documents_of_one_leaf(
    tokens: list[list[int]], data: st.DataObject
) -> None:
    leaves = data.draw(
        st.lists(st.integers(-1, 3), min_size=len(tokens), max_size=len(tokens)).filter(
            lambda drawn: max(drawn) >= 0
        )
    )
    packed = pack(tokens, leaves)
    seen: set[int] = set()
    for leaf, sources in zip(packed.leaf_N, packed.source_NT, strict=True):
        members = {int(source) for source in sources if source >= 0}
        assert {leaves[member] for member in members} == {int(leaf)}
        seen |= members
    # Those without a leaf are left out, and only those.
    assert seen == {i for i, leaf in enumerate(leaves) if leaf >= 0}


@settings(max_examples=40)
@given(documents)
def test_short_documents_stay_whole_and_in_one_segment(tokens: list[list[int]]) -> None:
    packed = pack(tokens, seq_len=16)
    pieces = defaultdict(list)
    for row, (segments, sources) in enumerate(
        zip(packed.doc_ids_NT, packed.source_NT, strict=True)
    ):
        for segment in np.unique(segments[segments != IGNORE]):
            owners = set(sources[segments == segment].tolist())
            assert len(owners) == 1
            pieces[owners.pop()].append((row, int((segments == segment).sum())))
    for source, ids in enumerate(tokens):
        if len(ids) + 1 <= 16:
            assert [size for _, size in pieces[source]] == [len(ids) + 1]


@settings(max_examples=40)
@given(documents, st.integers(2, 24))
def test_a_target_is_the_next_token_of_the_same_document(
    tokens: list[list[int]], seq_len: int
) -> None:
    packed = pack(tokens, seq_len=seq_len)
    targets, positions = packed.targets_NT, packed.positions_NT
    for row in range(len(packed)):
        for t in range(seq_len):
            segment = packed.doc_ids_NT[row, t]
            inside = (
                t + 1 < seq_len and segment != IGNORE and packed.doc_ids_NT[row, t + 1] == segment
            )
            wanted = packed.tokens_NT[row, t + 1] if inside else IGNORE
            assert targets[row, t] == wanted
            starts_anew = t == 0 or packed.doc_ids_NT[row, t - 1] != segment
            assert positions[row, t] == (0 if starts_anew else positions[row, t - 1] + 1)


def test_short_facts_share_sequences() -> None:
    tokens = [[1] * 9 for _ in range(60)]
    packed = pack(tokens, [0] * 60, seq_len=64)
    assert len(packed) == 10
    assert packed.num_tokens / packed.tokens_NT.size > 0.9


def test_filling_is_never_scored() -> None:
    packed = pack([[1, 2, 3]], seq_len=8)
    assert packed.tokens_NT.tolist() == [[1, 2, 3, EOT, EOT, EOT, EOT, EOT]]
    assert packed.doc_ids_NT.tolist() == [[0, 0, 0, 0, -1, -1, -1, -1]]
    assert packed.targets_NT.tolist() == [[2, 3, EOT, -1, -1, -1, -1, -1]]
    assert packed.leaf_N.tolist() == [NO_LEAF]


def test_the_same_seed_gives_the_same_sequences_and_another_seed_others() -> None:
    tokens = [[i + 1] * 5 for i in range(40)]
    leaves = [i % 3 for i in range(40)]
    assert pack(tokens, leaves).fingerprint == pack(tokens, leaves).fingerprint
    assert pack(tokens, leaves).fingerprint != pack(tokens, leaves, seed=1).fingerprint


def test_leaves_are_shuffled_among_each_other() -> None:
    packed = pack([[1] * 15 for _ in range(200)], [i // 100 for i in range(200)])
    changes = int(np.count_nonzero(np.diff(packed.leaf_N)))
    assert changes > 50


def test_an_epoch_can_be_resumed_at_any_index() -> None:
    packed = pack([[1] * 15 for _ in range(50)])
    order = packed.order(epoch=3, seed=7)
    assert sorted(order.tolist()) == list(range(50))
    assert np.array_equal(order[20:], packed.order(epoch=3, seed=7)[20:])
    assert not np.array_equal(order, packed.order(epoch=4, seed=7))
    chosen = packed.select(order[:4])
    assert np.array_equal(chosen.tokens_NT, packed.tokens_NT[order[:4]])
    assert len(chosen) == 4


def test_arrays_have_the_documented_types() -> None:
    packed = pack([[1, 2], [3]])
    for array in (packed.tokens_NT, packed.doc_ids_NT, packed.targets_NT, packed.positions_NT):
        assert array.dtype == np.int32
        assert array.shape == (len(packed), packed.seq_len)
    assert packed.leaf_N.dtype == np.int64


def test_bad_input_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="seq_len"):
        pack([[1]], seq_len=1)
    with pytest.raises(InvalidArgumentError, match="leaves"):
        pack([[1], [2]], [0])
    with pytest.raises(InvalidArgumentError, match="no documents"):
        pack([[1]], [-1])
