"""Receipts: what is written is read, and no byte of them can be another one."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from membank.wire.errors import CorruptionError, Reason
from membank.wire.format.receipt import (
    Acknowledgement,
    Deletion,
    DeletionOwner,
    DestroyedBlock,
    ProcessLife,
    Receipt,
    Recycling,
    decode_public_key,
    decode_receipt,
    encode_public_key,
    sign_receipt,
)
from membank.wire.signing import Signer
from membank.wire.spec import BlockRef

OLD, NEW = (ProcessLife(host="a", pid=pid, start_time_s=1.5) for pid in (10, 11))
DELETION = Deletion(
    topics=(BlockRef(1, 1),),
    blocks=(
        DestroyedBlock(ref=BlockRef(1, 1), version=3, num_slots=2, sha256={"weight": "ab"}),
        DestroyedBlock(ref=BlockRef(2, 2), version=0, num_slots=0),
    ),
    owners=(
        DeletionOwner(
            shard_id="shard-0",
            partitions=(0, 2),
            num_slots=2,
            num_manifests=1,
            journal_bytes=99,
            process=OLD,
        ),
    ),
    coordinator=OLD,
    trees=("trees/0000000000.safetensors",),
    packs=("old",),
    public_key="k",
)
RECEIPT = Receipt(
    bank_id="b",
    revision=7,
    record_sha256="00",
    operation="delete",
    principal="é",
    request_id="r",
    time_s=1.25,
    deletion=DELETION,
    recycling=Recycling.DONE,
    acknowledgements=(
        Acknowledgement(
            shard_id="shard-0", partitions=(0, 2), confirmed_by=OLD, now=NEW, time_s=2.5
        ),
    ),
    issuer=NEW,
    issue_time_s=3.0,
)


@pytest.fixture(scope="module")
def signer() -> Signer:
    return Signer.generate()


def test_what_is_signed_is_read(signer: Signer) -> None:
    signed = decode_receipt(sign_receipt(RECEIPT, signer), what="it")
    assert signed.receipt == RECEIPT
    assert signed.signature.public_key == signer.public_key


def test_a_deletion_survives_the_detail_of_a_record() -> None:
    body = json.loads(json.dumps(DELETION.to_json()))
    assert Deletion.from_json(body, what="it") == DELETION
    assert DELETION.to_json() == body
    assert DELETION.partitions == {0, 2}


@pytest.mark.parametrize("flip", [1, 0x20, 0x80])
def test_no_byte_of_a_receipt_can_be_another(signer: Signer, flip: int) -> None:
    data = sign_receipt(RECEIPT, signer)
    for place in range(len(data)):
        changed = bytearray(data)
        changed[place] ^= flip
        with pytest.raises(CorruptionError):
            decode_receipt(bytes(changed), what="it")


def test_a_receipt_in_another_form_is_refused(signer: Signer) -> None:
    data = sign_receipt(RECEIPT, signer)
    for other in (json.dumps(json.loads(data)).encode(), data + b"\n", data[:-1], b""):
        with pytest.raises(CorruptionError) as caught:
            decode_receipt(other, what="it")
        assert caught.value.reason is Reason.BAD_SIGNATURE


def test_another_s_signature_is_not_taken_over(signer: Signer) -> None:
    forged = json.loads(sign_receipt(replace(RECEIPT, principal="mallory"), Signer.generate()))
    honest = json.loads(sign_receipt(RECEIPT, signer))
    for mixed in (
        {**forged, "signature": honest["signature"]},
        {
            **forged,
            "signature": {
                **forged["signature"],
                "public_key": honest["signature"]["public_key"],
            },
        },
    ):
        data = json.dumps(mixed, sort_keys=True, indent=1).encode()
        with pytest.raises(CorruptionError) as caught:
            decode_receipt(data, what="it")
        assert caught.value.reason is Reason.BAD_SIGNATURE


@pytest.mark.parametrize("body", [None, {}, [], {"topics": 1}, DELETION.to_json() | {"more": 1}])
def test_what_is_no_deletion_is_refused(body: object) -> None:
    with pytest.raises(CorruptionError):
        Deletion.from_json(body, what="it")


def test_a_public_key_is_written_in_one_way(signer: Signer) -> None:
    data = encode_public_key(signer.public_key)
    assert decode_public_key(data, what="it") == signer.public_key
    for place in range(len(data)):
        changed = bytearray(data)
        changed[place] ^= 1
        # A changed key may be one as well, but then it has another id.
        with pytest.raises(CorruptionError):
            decode_public_key(bytes(changed), what="it")
