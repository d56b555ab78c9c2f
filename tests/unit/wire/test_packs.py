"""Packs as files: every byte guarded, old ones readable, signatures of exactly one pack."""

from __future__ import annotations

import dataclasses
import io
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import safetensors
from hypothesis import given
from hypothesis import strategies as st

from membank.wire.errors import (
    CorruptionError,
    FailedPreconditionError,
    InvalidArgumentError,
    MembankError,
    NotFoundError,
    Reason,
)
from membank.wire.format.pack import (
    BlockBase,
    Pack,
    PackBase,
    PackedBlock,
    PackWriter,
    check_signatures,
    decode_pack,
    encode_pack,
    moved,
    sign_pack,
)
from membank.wire.signing import Context, Signer, TrustedKeys
from membank.wire.spec import BlockRef
from shard_rig import RIG_SPEC

OLD = Path(__file__).parents[2] / "fixtures" / "pack-v1.pack"
TOPIC, LEAF, OTHER = BlockRef(1, 1), BlockRef(2, 2), BlockRef(2, 3)
JO, SAM = Signer.generate(), Signer.generate()


def small_pack(**fields: object) -> Pack:
    blocks = tuple(
        PackedBlock(
            ref=ref,
            version=3,
            step=2,
            weight=np.full(RIG_SPEC.block_shape(ref.level), ref.cluster, np.float32),
        )
        for ref in RIG_SPEC.subtree(TOPIC)
    )
    pack = Pack(spec=RIG_SPEC, topic=TOPIC, revision=7, blocks=blocks, labels={TOPIC: "métaux"})
    return dataclasses.replace(pack, **fields)  # type: ignore[arg-type]


SIGNED = encode_pack(small_pack(), signers=[JO])


def signed(data: bytes, signer: Signer) -> bytes:
    target = io.BytesIO()
    sign_pack(data, target, signer)
    return target.getvalue()


def spliced(data: bytes, old: bytes, new: bytes) -> bytes:
    """Replace bytes of the header by as many others."""
    assert data.count(old) == 1
    assert len(old) == len(new)
    return data.replace(old, new)


def test_a_pack_of_the_first_version_is_read_and_written_to_the_byte() -> None:
    data = OLD.read_bytes()
    pack = decode_pack(data)
    assert [block.ref for block in pack.blocks] == [TOPIC, LEAF]
    assert (pack.base, pack.signatures) == (None, ())
    assert pack.labels[TOPIC] == "metals, métaux"
    assert encode_pack(pack) == data


@given(position=st.integers(0, len(SIGNED) - 1), flipped=st.integers(1, 255))
def test_no_byte_of_a_signed_pack_can_be_changed(position: int, flipped: int) -> None:
    damaged = bytearray(SIGNED)
    damaged[position] ^= flipped
    with pytest.raises((CorruptionError, InvalidArgumentError, FailedPreconditionError)):
        check_signatures(decode_pack(bytes(damaged)))


@given(length=st.integers(0, len(SIGNED) - 1))
def test_no_part_of_a_pack_is_one(length: int) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        decode_pack(SIGNED[:length])
    assert caught.value.reason is Reason.BAD_PACK


@given(junk=st.binary(max_size=200))
def test_junk_is_called_so(junk: bytes) -> None:
    for data in (junk, len(junk).to_bytes(8, "little") + junk):
        with pytest.raises(InvalidArgumentError) as caught:
            decode_pack(data)
        assert caught.value.reason is Reason.BAD_PACK


def test_a_header_that_is_nested_too_deeply_is_no_crash() -> None:
    text = b'{"__metadata__":' + b"[" * 200_000
    with pytest.raises(InvalidArgumentError):
        decode_pack(len(text).to_bytes(8, "little") + text)


def test_other_readers_open_a_signed_pack() -> None:
    tensors = dict(safetensors.deserialize(SIGNED))  # type: ignore[no-untyped-call]
    assert bytes(tensors["2/3/weight"]["data"]) == small_pack().blocks[2].weight.tobytes()


def test_signatures_add_up_and_name_their_keys() -> None:
    twice = signed(signed(SIGNED, SAM), JO)
    pack = decode_pack(twice)
    assert {s.public_key for s in pack.signatures} == {JO.public_key, SAM.public_key}
    assert set(check_signatures(pack)) == {JO.public_key.key_id, SAM.public_key.key_id}
    assert pack.sha256 == decode_pack(SIGNED).sha256


def test_signing_a_file_is_signing_as_it_is_written() -> None:
    assert signed(encode_pack(small_pack()), JO) == SIGNED


def test_a_signature_of_another_pack_is_refused() -> None:
    other = decode_pack(encode_pack(small_pack(revision=8), signers=[JO]))
    forged = dataclasses.replace(decode_pack(SIGNED), signatures=other.signatures)
    with pytest.raises(CorruptionError) as caught:
        check_signatures(forged)
    assert caught.value.reason is Reason.BAD_SIGNATURE
    assert caught.value.metadata["key_id"] == JO.public_key.key_id


def test_a_signature_of_another_kind_of_document_is_refused() -> None:
    pack = decode_pack(SIGNED)
    receipt = JO.sign(Context.RECEIPT, bytes.fromhex(pack.sha256))
    with pytest.raises(CorruptionError):
        check_signatures(dataclasses.replace(pack, signatures=(receipt,)))


def test_a_key_put_in_the_place_of_the_signers_is_noticed() -> None:
    text = JO.public_key.text.encode()
    with pytest.raises(CorruptionError) as caught:
        check_signatures(decode_pack(spliced(SIGNED, text, SAM.public_key.text.encode())))
    assert caught.value.reason is Reason.BAD_SIGNATURE


def test_a_damaged_pack_is_never_signed() -> None:
    damaged = bytearray(SIGNED)
    damaged[-1] ^= 1
    with pytest.raises(CorruptionError):
        sign_pack(bytes(damaged), io.BytesIO(), SAM)


@pytest.mark.parametrize(
    ("signers", "reason"), [((), Reason.UNSIGNED), ((JO,), Reason.UNTRUSTED_KEY)]
)
def test_who_is_not_trusted_is_refused(signers: tuple[Signer, ...], reason: Reason) -> None:
    pack = decode_pack(encode_pack(small_pack(), signers=signers))
    with pytest.raises(FailedPreconditionError) as caught:
        check_signatures(pack, TrustedKeys({SAM.public_key: "Sam"}))
    assert caught.value.reason is reason


def test_one_trusted_signature_is_enough_and_a_bad_one_too_much() -> None:
    trusted = TrustedKeys({SAM.public_key: "Sam"})
    pack = decode_pack(signed(SIGNED, SAM))
    assert check_signatures(pack, trusted) == ("Sam",)
    bad = dataclasses.replace(pack.signatures[0], value=bytes(64))
    with pytest.raises(CorruptionError):
        check_signatures(dataclasses.replace(pack, signatures=(bad, pack.signatures[1])), trusted)


def test_a_diff_says_what_it_is_against_and_old_readers_refuse_it() -> None:
    base = BlockBase(version=1, crc32c=5)
    first, second, _ = small_pack().blocks
    diff = small_pack(
        blocks=(dataclasses.replace(first, base=base), second),
        base=PackBase(revision=3, snapshot="then", unchanged={OTHER: base}),
    )
    data = encode_pack(diff)
    pack = decode_pack(data)
    assert pack.base == diff.base
    assert [block.base for block in pack.blocks] == [base, None]
    # A reader of the first version would take it for the whole topic.
    assert b'\\"format\\":2' in data
    assert b'\\"format\\":1' in SIGNED


def test_blocks_wait_in_the_spool_in_any_order() -> None:
    pack = small_pack()
    spool = io.BytesIO()
    writer = PackWriter(spool)
    for block in reversed(pack.blocks):
        writer.add(block)
    finished = writer.finish(pack, signers=[JO])
    assert b"".join(finished.chunks(7)) == SIGNED
    assert b"".join(finished.pieces(memoryview(spool.getvalue()))) == SIGNED
    assert finished.num_bytes == len(SIGNED)


def test_a_pack_moves_to_a_topic_of_its_level() -> None:
    pack = small_pack(num_documents={LEAF: 4}, centroids={OTHER: np.ones(3, np.float32)})
    there = moved(pack, BlockRef(1, 3), RIG_SPEC)
    assert [block.ref for block in there.blocks] == [
        BlockRef(1, 3),
        BlockRef(2, 6),
        BlockRef(2, 7),
    ]
    assert there.labels == {BlockRef(1, 3): "métaux"}
    assert there.num_documents == {BlockRef(2, 6): 4}
    assert list(there.centroids) == [BlockRef(2, 7)]


@pytest.mark.parametrize(
    ("topic", "leaf", "reason"),
    [
        (LEAF, "", Reason.BAD_SHAPE),
        (BlockRef(1, 4), "", Reason.UNKNOWN_CLUSTER),
        (BlockRef(1, 3), "a leaf of another topic", Reason.BAD_PACK),
    ],
)
def test_what_cannot_move_is_refused(topic: BlockRef, leaf: str, reason: Reason) -> None:
    pack = small_pack(labels={BlockRef(2, 0): leaf} if leaf else {})
    with pytest.raises((InvalidArgumentError, NotFoundError)) as caught:
        moved(pack, topic, RIG_SPEC)
    assert isinstance(caught.value, MembankError)
    assert caught.value.reason is reason


def test_a_pack_is_written_without_being_in_memory(tmp_path: Path) -> None:
    weight = np.ones((64, 1024, 16), np.float32)
    with (tmp_path / "spool").open("w+b") as spool:
        tracemalloc.start()
        try:
            writer = PackWriter(spool)
            for cluster in range(16):
                writer.add(PackedBlock(ref=BlockRef(2, cluster), version=1, step=0, weight=weight))
            finished = writer.finish(small_pack(blocks=()), signers=[JO])
            assert sum(map(len, finished.chunks())) == finished.num_bytes > 16 * weight.nbytes
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    # 64 MiB, of which a chunk or two at a time.
    assert peak < weight.nbytes
