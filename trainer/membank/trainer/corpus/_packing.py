"""Packing documents into sequences of one length, each from one leaf cluster.

Shape letters: N sequences, T tokens of a sequence.

A document's tokens are its text and one end-of-text token. Within a sequence attention must not
cross documents and positions may start anew at each: ``doc_ids_NT`` numbers the segments of a row
0, 1, ... and is -1 where the row is filled up. The target of a token is the next token of the same
segment; a segment's last token, and filling, have none.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from membank.wire.errors import InvalidArgumentError

IGNORE = -1
"""Target of a position that is not scored, and segment of one that holds no document."""

NO_LEAF = -1
"""Leaf of a sequence that was packed without regard to clusters."""


@dataclass(frozen=True)
class PackedSequences:
    """Sequences of equal length, shuffled over all leaves."""

    tokens_NT: NDArray[np.int32]
    """(N, T) int32, C-contiguous; the end-of-text token where a row is filled up."""
    doc_ids_NT: NDArray[np.int32]
    """(N, T) int32; number of the segment within its row, -1 for filling."""
    leaf_N: NDArray[np.int64]
    """(N,) int64; leaf cluster that all documents of the row belong to, or `NO_LEAF`."""
    source_NT: NDArray[np.int32]
    """(N, T) int32; position of the document in the corpus, -1 for filling."""

    def __len__(self) -> int:
        return len(self.leaf_N)

    @property
    def seq_len(self) -> int:
        """Tokens of a sequence."""
        return int(self.tokens_NT.shape[1])

    @property
    def num_tokens(self) -> int:
        """Tokens of documents in all sequences, filling not counted."""
        return int(np.count_nonzero(self.doc_ids_NT != IGNORE))

    @property
    def targets_NT(self) -> NDArray[np.int32]:
        """(N, T) int32: the token to predict at each position, `IGNORE` where there is none."""
        targets_NT = np.full_like(self.tokens_NT, IGNORE)
        same_NT = self.doc_ids_NT[:, 1:] == self.doc_ids_NT[:, :-1]
        same_NT &= self.doc_ids_NT[:, 1:] != IGNORE
        targets_NT[:, :-1] = np.where(same_NT, self.tokens_NT[:, 1:], IGNORE)
        return targets_NT

    @property
    def positions_NT(self) -> NDArray[np.int32]:
        """(N, T) int32: position of each token within its segment, from 0."""
        steps_NT = np.broadcast_to(np.arange(self.seq_len, dtype=np.int32), self.tokens_NT.shape)
        first_NT = np.ones(self.tokens_NT.shape, dtype=bool)
        first_NT[:, 1:] = self.doc_ids_NT[:, 1:] != self.doc_ids_NT[:, :-1]
        start_NT = np.maximum.accumulate(np.where(first_NT, steps_NT, 0), axis=1)
        return np.asarray(steps_NT - start_NT, dtype=np.int32)

    @property
    def fingerprint(self) -> str:
        """Hex SHA-256 of tokens, segments and leaves; equal means the same training data."""
        digest = hashlib.sha256()
        for array in (self.tokens_NT, self.doc_ids_NT, self.leaf_N):
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()

    def select(self, rows: NDArray[np.int64]) -> PackedSequences:
        """Return the sequences of the given rows, copied, in that order."""
        return PackedSequences(
            self.tokens_NT[rows], self.doc_ids_NT[rows], self.leaf_N[rows], self.source_NT[rows]
        )

    def order(self, epoch: int, seed: int) -> NDArray[np.int64]:
        """Return the order of rows in one pass, (N,) int64; the same for the same arguments.

        A run that stopped goes on from index i of epoch e by taking ``order(e, seed)[i:]``.
        """
        rng = np.random.Generator(np.random.PCG64([seed, epoch]))
        return rng.permutation(len(self)).astype(np.int64)


def pack_sequences(
    tokens: Sequence[Sequence[int]],
    *,
    seq_len: int,
    eot_id: int,
    leaves: NDArray[np.int64] | None = None,
    seed: int = 0,
) -> PackedSequences:
    """Pack documents into sequences, those of each leaf apart, and shuffle the sequences.

    A document longer than a sequence is cut; a shorter one is kept whole where it fits into the
    best of the open sequences, so little is filled up and no fact is torn.

    Parameters
    ----------
    tokens
        Token ids of each document, without end-of-text.
    seq_len
        Tokens of a sequence, at least 2.
    eot_id
        Token that ends each document and fills rows up.
    leaves
        (number of documents,) leaf of each document, of which a negative one leaves the document
        out; None packs all documents together.
    seed
        Seed of the order of documents within their leaf, and of the sequences.

    Raises
    ------
    InvalidArgumentError
        `seq_len` is below 2, `leaves` has another length, or nothing is left to pack.
    """
    if seq_len < 2:
        msg = f"seq_len={seq_len}: must be at least 2"
        raise InvalidArgumentError(msg)
    if leaves is not None and len(leaves) != len(tokens):
        msg = f"leaves has {len(leaves)} entries for {len(tokens)} documents"
        raise InvalidArgumentError(msg)
    rng = np.random.Generator(np.random.PCG64(seed))
    leaf_of = np.full(len(tokens), NO_LEAF) if leaves is None else np.asarray(leaves)
    rows: list[_Row] = []
    for leaf in np.unique(leaf_of):
        if leaves is not None and leaf < 0:
            continue
        members = rng.permutation(np.flatnonzero(leaf_of == leaf))
        pieces = _pieces(tokens, members, seq_len, eot_id)
        rows += [_Row(int(leaf), row) for row in _fit(pieces, seq_len)]
    if not rows:
        msg = "there are no documents to pack"
        raise InvalidArgumentError(msg)
    return _assemble([rows[i] for i in rng.permutation(len(rows))], seq_len, eot_id)


@dataclass(frozen=True, slots=True)
class _Piece:
    document: int
    ids: list[int]


@dataclass(frozen=True, slots=True)
class _Row:
    leaf: int
    pieces: list[_Piece]


def _pieces(
    tokens: Sequence[Sequence[int]], members: NDArray[np.int64], seq_len: int, eot_id: int
) -> Iterator[_Piece]:
    for document in members:
        ids = [*tokens[document], eot_id]
        for start in range(0, len(ids), seq_len):
            yield _Piece(int(document), ids[start : start + seq_len])


def _fit(pieces: Iterator[_Piece], seq_len: int) -> list[list[_Piece]]:
    """Put each piece, longest first, into the open row that it fills best."""
    rows: list[list[_Piece]] = []
    # Rows by the room left in them: the best fit is then found without a search over rows.
    by_room: list[list[int]] = [[] for _ in range(seq_len + 1)]
    for piece in sorted(pieces, key=lambda piece: -len(piece.ids)):
        need = len(piece.ids)
        room = next((room for room in range(need, seq_len + 1) if by_room[room]), None)
        if room is None:
            row, room = len(rows), seq_len
            rows.append([])
        else:
            row = by_room[room].pop()
        rows[row].append(piece)
        by_room[room - need].append(row)
    return rows


def _assemble(rows: list[_Row], seq_len: int, eot_id: int) -> PackedSequences:
    shape = (len(rows), seq_len)
    tokens_NT = np.full(shape, eot_id, dtype=np.int32)
    doc_ids_NT = np.full(shape, IGNORE, dtype=np.int32)
    source_NT = np.full(shape, -1, dtype=np.int32)
    for n, row in enumerate(rows):
        start = 0
        for segment, piece in enumerate(row.pieces):
            end = start + len(piece.ids)
            tokens_NT[n, start:end] = piece.ids
            doc_ids_NT[n, start:end] = segment
            source_NT[n, start:end] = piece.document
            start = end
    leaf_N = np.array([row.leaf for row in rows], dtype=np.int64)
    return PackedSequences(tokens_NT, doc_ids_NT, leaf_N, source_NT)
