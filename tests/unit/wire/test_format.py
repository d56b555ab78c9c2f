"""The bank format decodes what it encoded, and nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np
import pytest

from membank.wire.crc import crc32c
from membank.wire.errors import CorruptionError, FailedPreconditionError, MembankError
from membank.wire.format import (
    NO_SLOT,
    Entry,
    Manifest,
    RevisionRecord,
    TreeDocument,
    decode_manifest,
    decode_revision,
    decode_slot,
    decode_spec,
    decode_tree,
    encode_manifest,
    encode_revision,
    encode_slot,
    encode_spec,
    encode_tree,
    initial_weight,
)
from membank.wire.format.initial import TRUNCATION
from membank.wire.format.manifest import AppliedRequest
from membank.wire.spec import BankSpec, BlockRef, BlockState, LevelSpec

SPEC = BankSpec(
    name="small",
    num_layers=2,
    width=8,
    levels=(LevelSpec(fan_out=3, block_width=4), LevelSpec(fan_out=2, block_width=2)),
    bank_id="id",
)
MANIFEST = Manifest(
    partition=1,
    number=7,
    revision=3,
    epoch=2,
    nonce="n",
    lsn=99,
    entries={
        BlockRef(1, 2): Entry(slot=4, version=1 << 40, step=5, crcs=(1, 2, 0xFFFFFFFF)),
        BlockRef(2, 0): Entry(slot=NO_SLOT, version=1, state=BlockState.WITHHELD),
    },
    requests=(AppliedRequest(request_id="r", results=((1, 2, True, 8, ""),)),),
    history_from=2,
)
TREE = TreeDocument(
    labels={BlockRef(1, 0): "metals", BlockRef(2, 1): "iron"},
    num_documents={BlockRef(1, 0): 12},
    centroids=(np.eye(3, dtype=np.float32), np.ones((6, 3), np.float32)),
    embedder={"kind": "lsa"},
    arrays={"idf": np.arange(3, dtype=np.float32)},
)
RECORD = RevisionRecord(
    revision=4,
    committed=True,
    nonce="n",
    previous_sha256="0" * 64,
    operation="delete",
    principal="ada",
    request_id="r",
    time_s=1.5,
    manifests={0: 3, 11: 9},
    detail={"topic": "1/2"},
)


def test_manifest_round_trip() -> None:
    assert decode_manifest(encode_manifest(MANIFEST), num_roles=3, key="k") == MANIFEST


def test_a_manifest_without_a_promise_of_history_promises_its_own_revision() -> None:
    data = encode_manifest(MANIFEST)
    start = len(b"MBMANIF1") + 4
    head_length = int.from_bytes(data[start - 4 : start], "little")
    header = json.loads(data[start : start + head_length])
    del header["history_from"]
    head = json.dumps(header).encode()
    body = b"MBMANIF1" + len(head).to_bytes(4, "little") + head + data[start + head_length : -4]
    older = body + crc32c(body).to_bytes(4, "little")
    assert decode_manifest(older, num_roles=3, key="k").history_from == MANIFEST.revision


def test_spec_round_trip() -> None:
    assert decode_spec(encode_spec(SPEC), where="w") == SPEC


def test_revision_round_trip() -> None:
    assert decode_revision(encode_revision(RECORD), key="k") == RECORD


def test_equal_trees_have_equal_bytes() -> None:
    assert len({encode_tree(TREE) for _ in range(20)}) == 1


def test_tree_round_trip() -> None:
    tree = decode_tree(encode_tree(TREE), key="k")
    assert (tree.labels, tree.num_documents) == (TREE.labels, TREE.num_documents)
    assert tree.embedder == TREE.embedder
    np.testing.assert_array_equal(tree.centroids[1], TREE.centroids[1])
    np.testing.assert_array_equal(tree.arrays["idf"], TREE.arrays["idf"])


DECODERS: dict[str, tuple[bytes, Callable[[bytes], object]]] = {
    "manifest": (
        encode_manifest(MANIFEST),
        lambda data: decode_manifest(data, num_roles=3, key="k"),
    ),
    "spec": (encode_spec(SPEC), lambda data: decode_spec(data, where="w")),
    "revision": (encode_revision(RECORD), lambda data: decode_revision(data, key="k")),
}


@pytest.mark.parametrize("name", DECODERS)
def test_every_cut_is_refused(name: str) -> None:
    data, decode = DECODERS[name]
    for length in range(len(data)):
        with pytest.raises(MembankError):
            decode(data[:length])


@pytest.mark.parametrize("name", DECODERS)
def test_no_flipped_bit_changes_the_answer(name: str) -> None:
    # JSON white space may flip into other white space, and a key of the envelope may change its
    # case; what must never happen is a different answer.
    data, decode = DECODERS[name]
    good = decode(data)
    for position in range(len(data)):
        for bit in range(8):
            flipped = bytearray(data)
            flipped[position] ^= 1 << bit
            try:
                answer = decode(bytes(flipped))
            except MembankError:
                continue
            assert answer == good, (position, bit)


def test_tree_with_flipped_bytes_is_refused() -> None:
    data = encode_tree(TREE)
    for position in range(len(data)):
        flipped = bytearray(data)
        flipped[position] ^= 0x10
        try:
            tree = decode_tree(bytes(flipped), key="k")
        except CorruptionError:
            continue
        assert tree.labels == TREE.labels, position
        for ours, theirs in zip(tree.centroids, TREE.centroids, strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_newer_format_is_refused_by_name() -> None:
    newer = encode_spec(SPEC).replace(b'"format": 1', b'"format": 9')
    with pytest.raises(FailedPreconditionError, match="format 9"):
        decode_spec(newer, where="w")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_slot_round_trip_and_damage(dtype: str) -> None:
    array = initial_weight(SPEC, BlockRef(1, 1)).astype(np.dtype(dtype))
    crc = crc32c(array)
    chunk = b"".join(encode_slot(array, crc))
    kwargs = {"dtype": array.dtype, "shape": array.shape, "crc": crc, "key": "k"}
    np.testing.assert_array_equal(decode_slot(chunk, **kwargs), array)  # type: ignore[arg-type]
    for damaged in (chunk[:-1], chunk + b"\0", b"", bytes(len(chunk))):
        with pytest.raises(CorruptionError):
            decode_slot(damaged, **kwargs)  # type: ignore[arg-type]
    with pytest.raises(CorruptionError):
        decode_slot(chunk, **{**kwargs, "crc": crc ^ 1})  # type: ignore[arg-type]


def test_initial_weight_is_pinned() -> None:
    # The content of every block that was never written depends on these bits.
    weight = initial_weight(SPEC, BlockRef(2, 5))
    assert weight.shape == (2, 3, 2, 8)
    assert not weight[:, 2].any()
    assert np.abs(weight).max() <= TRUNCATION * SPEC.init_std
    assert crc32c(weight) == 0x8F08B602


def test_initial_weights_differ_between_blocks() -> None:
    contents = {initial_weight(SPEC, ref).tobytes() for ref in SPEC.blocks()}
    assert len(contents) == SPEC.num_blocks


def test_initial_weight_is_truncated_normal() -> None:
    spec = BankSpec(
        name="wide",
        num_layers=8,
        width=256,
        init_std=1.0,
        levels=(LevelSpec(fan_out=1, block_width=64),),
    )
    values = initial_weight(spec, BlockRef(1, 0))[:, :2]
    # Standard deviation of a normal truncated at 1.9733: sqrt(1 - 2 a phi(a) / (2 Phi(a) - 1)).
    assert abs(float(values.std()) - 0.8747) < 5e-3
    assert abs(float(values.mean())) < 5e-3


def test_deleting_a_topic_scrubs_its_tree() -> None:
    tree = TREE.without_topic(SPEC, BlockRef(1, 0))
    assert BlockRef(1, 0) not in tree.labels
    assert BlockRef(2, 1) not in tree.labels
    assert np.isnan(tree.centroids[1][:2]).all()
    assert not np.isnan(tree.centroids[0]).any()
    assert not np.isnan(TREE.centroids[1]).any()
