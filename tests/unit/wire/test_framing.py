"""Payload streams come out as they went in, or not at all."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from membank.wire.crc import crc32c
from membank.wire.errors import CorruptionError, InvalidArgumentError, Reason
from membank.wire.framing import CHECK_BYTES, Payload, PayloadAssembler, iter_chunks


def _announce(payloads: list[bytes], *, max_bytes: int = 1 << 20) -> PayloadAssembler:
    assembler = PayloadAssembler(max_bytes=max_bytes)
    for payload in payloads:
        assembler.expect(Payload(len(payload), crc32c(payload), "block"))
    return assembler


@given(st.lists(st.binary(max_size=40), max_size=8), st.integers(1, 17))
def test_round_trip(payloads: list[bytes], chunk_bytes: int) -> None:
    assembler = _announce(payloads)
    chunks = list(iter_chunks(payloads, chunk_bytes=chunk_bytes))
    assert all(0 < len(chunk) <= chunk_bytes for chunk in chunks)
    for chunk in chunks:
        assembler.feed(chunk)
    assert [bytes(payload) for payload in assembler.finish()] == payloads


def test_missing_and_surplus_bytes_are_refused() -> None:
    assembler = _announce([b"abcd"])
    assembler.feed(b"abc")
    with pytest.raises(InvalidArgumentError, match="3 of 4"):
        assembler.finish()
    with pytest.raises(InvalidArgumentError, match="more bytes"):
        assembler.feed(b"de")


def test_damage_is_named() -> None:
    assembler = _announce([b"abcd"])
    assembler.feed(b"abcx")
    with pytest.raises(CorruptionError, match="block"):
        assembler.finish()


def test_bound_is_enforced_before_allocation() -> None:
    assembler = PayloadAssembler(max_bytes=10)
    with pytest.raises(InvalidArgumentError) as caught:
        assembler.expect(Payload(1 << 60, 0, "block"))
    assert caught.value.reason is Reason.MESSAGE_TOO_LARGE


def test_arrays_are_cut_without_a_format() -> None:
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    assert b"".join(iter_chunks([array], chunk_bytes=5)) == array.tobytes()


@given(
    st.lists(st.binary(max_size=40), max_size=8), st.integers(1, 17), st.integers(1, 3), st.data()
)
def test_bytes_that_are_written_where_there_is_room(
    payloads: list[bytes], max_bytes: int, max_pieces: int, drawn: st.DataObject
) -> None:
    assembler = _announce(payloads)
    rest = b"".join(payloads)
    while rest:
        pieces = assembler.room(max_bytes, max_pieces=max_pieces)
        assert len(pieces) <= max_pieces
        assert all(pieces)
        room = sum(map(len, pieces))
        assert 1 <= room <= max_bytes
        count = drawn.draw(st.integers(1, room))
        arrived, rest = rest[:count], rest[count:]
        for piece in pieces:
            part = arrived[: len(piece)]
            piece[: len(part)] = part
            arrived = arrived[len(part) :]
        assembler.landed(count)
    with pytest.raises(InvalidArgumentError, match="more bytes"):
        assembler.room(1)
    assert [bytes(payload) for payload in assembler.finish()] == payloads


def test_large_payloads_are_checked_piece_by_piece() -> None:
    payload = np.random.default_rng(0).integers(0, 256, 2 * CHECK_BYTES + 5, np.uint8)
    for damaged in (None, 3, CHECK_BYTES, payload.size - 1):
        assembler = _announce([payload.tobytes()], max_bytes=payload.size)
        sent = payload.copy()
        if damaged is not None:
            sent[damaged] ^= 1
        while sent.size:
            (piece,) = assembler.room(CHECK_BYTES - 1)
            piece[:] = sent[: len(piece)].tobytes()
            assembler.landed(len(piece))
            sent = sent[len(piece) :]
        if damaged is None:
            assert assembler.finish()[0].tobytes() == payload.tobytes()
        else:
            with pytest.raises(CorruptionError):
                assembler.finish()
