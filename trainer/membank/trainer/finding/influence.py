"""What each block does for some texts, measured: the loss with it, less of it, and nothing else changed.

The influence of a block on a text is ``loss without the block - loss with it``, in nats per scored
token. The block is left out of the forward pass here, in the reader; nothing is changed in the bank,
and the other blocks of the path stay: this differs from withholding, which ends the path.

Shape suffixes: N pieces of texts, B pieces of a batch, T tokens.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace

import torch

from membank.trainer.corpus import Tokenizer
from membank.trainer.evaluation.token_losses import token_losses
from membank.trainer.model import NO_BLOCK, Anchor, LevelBlocks, MemoryBatch
from membank.trainer.training import Fetched, join
from membank.trainer.training.schedule import check_range
from membank.wire.errors import InvalidArgumentError
from membank.wire.spec import BankSpec, BlockRef, BlockState, Path


@dataclass(frozen=True, kw_only=True, slots=True)
class InfluenceConfig:
    """How texts are scored."""

    seq_len: int = 64
    """Tokens of a piece, at least 2; a longer text is cut as training cuts it."""
    batch_size: int = 32
    """Pieces that are computed together, at least 1."""

    def __post_init__(self) -> None:
        check_range("seq_len", self.seq_len, 2, float("inf"), open_high=True)
        check_range("batch_size", self.batch_size, 1, float("inf"), open_high=True)


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockInfluence:
    """What one block does for the texts whose path holds it."""

    ref: BlockRef
    """The block."""
    version: int
    """Its version when it was measured."""
    state: BlockState
    """Its state; of a withheld or deleted block nothing can be measured, and the path ends there."""
    num_documents: int
    """Texts whose path holds it."""
    num_tokens: int
    """Tokens of them that were scored with it."""
    nats: float | None
    """Summed loss that its absence adds, in nats; None where it was never in use: it, or a block
    above it, is withheld or deleted."""

    @property
    def nats_per_token(self) -> float | None:
        """The influence: `nats` over `num_tokens`; None as there, or where nothing was scored."""
        if self.nats is None or not self.num_tokens:
            return None
        return self.nats / self.num_tokens

    def to_json(self) -> dict[str, object]:
        """Return the fields as JSON-able values."""
        return {
            **asdict(self),
            "ref": str(self.ref),
            "state": self.state.name.lower(),
            "nats_per_token": self.nats_per_token,
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class InfluenceReport:
    """What the blocks of some paths do for the texts on them."""

    num_documents: int
    """Texts."""
    num_tokens: int
    """Tokens scored; the first of each piece is not."""
    anchor_nats_per_token: float | None
    """Loss of the anchor alone; None where no token was scored."""
    memory_nats_per_token: float | None
    """Loss with the whole path."""
    blocks: tuple[BlockInfluence, ...]
    """Every block of the paths, the one that does most for the texts together first."""

    def to_json(self) -> dict[str, object]:
        """Return the report as JSON-able values."""
        return {**asdict(self), "blocks": [block.to_json() for block in self.blocks]}


def measure_influence(
    anchor: Anchor,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    paths: Sequence[Path],
    fetched: Fetched,
    spec: BankSpec,
    config: InfluenceConfig | None = None,
) -> InfluenceReport:
    """Measure what each block of some paths does for the texts on them.

    Parameters
    ----------
    anchor, tokenizer
        The model that the blocks belong to.
    texts
        The texts.
    paths
        Path of each text.
    fetched
        Every block of the paths, of one fetch.
    spec
        What the bank is.
    config
        How texts are scored; None is the defaults.

    Returns
    -------
    InfluenceReport
        Of a block that is on no path nothing is said: its influence is 0, since it is in no
        computation.

    Raises
    ------
    InvalidArgumentError
        `texts` and `paths` differ in length.
    """
    if len(texts) != len(paths):
        raise InvalidArgumentError(f"{len(texts)} texts and {len(paths)} paths; each has one")
    config = config or InfluenceConfig()
    scorer = _Scorer(anchor, _pieces(tokenizer, texts, config.seq_len), paths, fetched, spec)
    with_path_N = scorer.losses(config.batch_size)
    without_LN = {
        level: scorer.losses(config.batch_size, without_level=level)
        for level in range(1, spec.num_levels + 1)
    }
    anchor_N = scorer.losses(config.batch_size, with_memory=False)
    blocks = scorer.by_block(with_path_N, without_LN)
    total = scorer.total_scored
    return InfluenceReport(
        num_documents=len(texts),
        num_tokens=total,
        anchor_nats_per_token=sum(anchor_N) / total if total else None,
        memory_nats_per_token=sum(with_path_N) / total if total else None,
        blocks=tuple(sorted(blocks, key=lambda block: (-(block.nats or 0.0), block.ref))),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class TextLoss:
    """How hard some texts are to predict."""

    num_tokens: int
    """Tokens scored; the first of each piece is not."""
    anchor_nats_per_token: float | None
    """Loss of the anchor alone; None where no token was scored."""
    memory_nats_per_token: float | None
    """Loss with the blocks of their paths."""


def measure_loss(
    anchor: Anchor,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    paths: Sequence[Path],
    fetched: Fetched,
    spec: BankSpec,
    config: InfluenceConfig,
) -> TextLoss:
    """Measure how hard texts are to predict, with their blocks and without any.

    Parameters
    ----------
    anchor, tokenizer
        The model that the blocks belong to.
    texts, paths
        The texts, and the path of each.
    fetched
        Every block of the paths.
    spec
        What the bank is.
    config
        How texts are scored.
    """
    scorer = _Scorer(anchor, _pieces(tokenizer, texts, config.seq_len), paths, fetched, spec)
    total = scorer.total_scored
    with_path = sum(scorer.losses(config.batch_size))
    alone = sum(scorer.losses(config.batch_size, with_memory=False))
    return TextLoss(
        num_tokens=total,
        anchor_nats_per_token=alone / total if total else None,
        memory_nats_per_token=with_path / total if total else None,
    )


@dataclass(frozen=True, slots=True)
class _Piece:
    document: int
    ids: list[int]


def _pieces(tokenizer: Tokenizer, texts: Sequence[str], seq_len: int) -> list[_Piece]:
    """Cut texts as packing does; a piece of one token has nothing to be scored."""
    return [
        _Piece(document, ids[start : start + seq_len])
        for document, ids in enumerate(tokenizer.encode_batch(list(texts)))
        for start in range(0, len(ids), seq_len)
        if len(ids) - start > 1
    ]


class _Scorer:
    """Scores pieces with their path, or with one level of it left out."""

    def __init__(
        self,
        anchor: Anchor,
        pieces: list[_Piece],
        paths: Sequence[Path],
        fetched: Fetched,
        spec: BankSpec,
    ) -> None:
        self.pieces = pieces
        self._anchor = anchor
        self._paths = paths
        self._fetched = fetched
        self._spec = spec
        # One path a batch: its weights are read once, and no block elsewhere is in the computation.
        self._of_path: dict[Path, list[int]] = defaultdict(list)
        for n, piece in enumerate(pieces):
            self._of_path[paths[piece.document]].append(n)

    @property
    def total_scored(self) -> int:
        return sum(self.num_scored(n) for n in range(len(self.pieces)))

    def num_scored(self, piece: int) -> int:
        return len(self.pieces[piece].ids) - 1

    @torch.inference_mode()
    def losses(
        self, batch_size: int, *, without_level: int = 0, with_memory: bool = True
    ) -> list[float]:
        """Return the summed loss of each piece, nats, float64."""
        losses_N = [0.0] * len(self.pieces)
        device = self._anchor.embedding.weight.device
        for rows in self._batches(batch_size):
            memory = self._memory(rows, without_level, device) if with_memory else None
            loss_BT = token_losses(self._anchor, [self.pieces[n].ids for n in rows], memory)
            for n, value in zip(rows, loss_BT.double().sum(1).tolist(), strict=True):
                losses_N[n] = value
        return losses_N

    def by_block(
        self, with_path_N: Sequence[float], without_LN: dict[int, list[float]]
    ) -> Iterator[BlockInfluence]:
        """Yield the influence of each block of the paths."""
        users: dict[BlockRef, list[int]] = defaultdict(list)
        for document, path in enumerate(self._paths):
            for ref in path:
                users[ref].append(document)
        pieces_of: dict[int, list[int]] = defaultdict(list)
        for n, piece in enumerate(self.pieces):
            pieces_of[piece.document].append(n)
        for ref, documents in users.items():
            rows = [n for document in documents for n in pieces_of[document]]
            used = not any(above in self._fetched.absent for above in self._spec.path_to(ref))
            without_N = without_LN[ref.level]
            yield BlockInfluence(
                ref=ref,
                version=self._fetched.versions[ref],
                state=self._fetched.absent.get(ref, BlockState.ACTIVE),
                num_documents=len(documents),
                num_tokens=sum(self.num_scored(n) for n in rows),
                nats=sum(without_N[n] - with_path_N[n] for n in rows) if used else None,
            )

    def _batches(self, batch_size: int) -> Iterator[list[int]]:
        for rows in self._of_path.values():
            for start in range(0, len(rows), batch_size):
                yield rows[start : start + batch_size]

    def _memory(
        self, rows: Sequence[int], without_level: int, device: torch.device
    ) -> MemoryBatch | None:
        paths = [self._paths[self.pieces[n].document] for n in rows]
        levels = join(self._spec, paths, self._fetched, device=device).memory.levels
        return MemoryBatch(
            [
                _left_out(level) if number == without_level else level
                for number, level in enumerate(levels, start=1)
            ]
        )


def _left_out(level: LevelBlocks) -> LevelBlocks:
    return replace(level, index_B=torch.full_like(level.index_B, NO_BLOCK))
