"""What a block answers: completions of prompts, and the probability of targets.

Shape suffixes: B sequences, T tokens, V vocabulary, L layers, P parts, R block width, D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from membank.trainer.corpus import Tokenizer
from membank.trainer.model import Anchor, LevelBlocks, MemoryBatch, generate
from membank.wire.spec import BlockRef, Path


@dataclass(frozen=True, kw_only=True, slots=True)
class Continuations:
    """Prompts with what follows, padded on the right, and which positions are predictions."""

    tokens_BT: Tensor
    """(B, T) int64."""
    predicts_BT: Tensor
    """(B, T) bool: positions whose next token belongs to what follows."""
    next_BT: Tensor
    """(B, T) int64: the next token; 0 at the end."""

    def __len__(self) -> int:
        return len(self.tokens_BT)

    def rows(self, rows: Tensor) -> Continuations:
        """Return some of the sequences."""
        return Continuations(
            tokens_BT=self.tokens_BT[rows],
            predicts_BT=self.predicts_BT[rows],
            next_BT=self.next_BT[rows],
        )

    @classmethod
    def of(cls, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Continuations:
        """Join tokens of prompts and of what follows; neither may be empty."""
        length = max(len(prompt) + len(rest) for prompt, rest in pairs)
        tokens_BT = torch.zeros(len(pairs), length, dtype=torch.int64)
        predicts_BT = torch.zeros(len(pairs), length, dtype=torch.bool)
        for row, (prompt, rest) in enumerate(pairs):
            end = len(prompt) + len(rest)
            tokens_BT[row, :end] = torch.tensor([*prompt, *rest])
            predicts_BT[row, len(prompt) - 1 : end - 1] = True
        next_BT = functional.pad(tokens_BT[:, 1:], (0, 1))
        return cls(tokens_BT=tokens_BT, predicts_BT=predicts_BT, next_BT=next_BT)


def path_memory(path: Path, weights: Mapping[BlockRef, Tensor], num_sequences: int) -> MemoryBatch:
    """Return the memory of sequences that all have one path.

    Parameters
    ----------
    path
        The path.
    weights
        (L, P, R, D) float32 of each block of the path. A gradient reaches them.
    num_sequences
        B.
    """
    index_B = torch.zeros(num_sequences, dtype=torch.int64)
    return MemoryBatch(
        [LevelBlocks(blocks_KLPRD=weights[ref][None], index_B=index_B) for ref in path]
    )


class Answers:
    """Asks the anchor with the blocks of one path at a time.

    Parameters
    ----------
    anchor
        The anchor, frozen, on the CPU.
    tokenizer
        Its vocabulary.
    ending
        Text that ends a statement.
    """

    def __init__(self, anchor: Anchor, tokenizer: Tokenizer, *, ending: str) -> None:
        self.anchor = anchor
        self.tokenizer = tokenizer
        self._ending = ending

    def target_tokens(self, target: str) -> list[int]:
        """Return the tokens that follow a prompt: space, target, ending, end of text."""
        return [*self.tokenizer.encode(f" {target}{self._ending}"), self.tokenizer.eot_id]

    def statements(self, pairs: Sequence[tuple[str, str]]) -> Continuations:
        """Return prompts with their targets as tokens."""
        return Continuations.of(
            [(self.tokenizer.encode(prompt), self.target_tokens(t)) for prompt, t in pairs]
        )

    def complete_tokens(
        self,
        path: Path,
        weights: Mapping[BlockRef, Tensor],
        prompts: Sequence[str],
        *,
        max_new_tokens: int,
    ) -> list[list[int]]:
        """Return the greedy completion of each prompt, up to the end-of-text token."""
        return generate(
            self.anchor,
            [self.tokenizer.encode(prompt) for prompt in prompts],
            path_memory(path, weights, len(prompts)),
            max_new_tokens=max_new_tokens,
            stop_token=self.tokenizer.eot_id,
        )

    def complete(
        self,
        path: Path,
        weights: Mapping[BlockRef, Tensor],
        prompts: Sequence[str],
        *,
        max_new_tokens: int = 16,
    ) -> list[str]:
        """Return the answer of each prompt: what follows up to the end of text or the line's end.

        Parameters
        ----------
        path
            Path of all of them.
        weights
            The blocks of the path.
        prompts
            The prompts, none empty.
        max_new_tokens
            Longest answer.
        """
        if not prompts:
            return []
        found = self.complete_tokens(path, weights, prompts, max_new_tokens=max_new_tokens)
        return [self._line(self.tokenizer.decode(tokens)) for tokens in found]

    @torch.inference_mode()
    def probabilities(
        self, path: Path, weights: Mapping[BlockRef, Tensor], pairs: Sequence[tuple[str, str]]
    ) -> list[Tensor]:
        """Return log-probabilities of the tokens of each target, in nats.

        Parameters
        ----------
        path
            Path of all of them.
        weights
            The blocks of the path.
        pairs
            Prompts and targets.

        Returns
        -------
        list of Tensor
            For each pair, (tokens of the target and its ending,) float32.
        """
        if not pairs:
            return []
        batch = self.statements(pairs)
        logits_BTV = self.anchor(batch.tokens_BT, None, path_memory(path, weights, len(pairs)))
        log_BTV = functional.log_softmax(logits_BTV, dim=-1)
        log_BT = log_BTV.gather(2, batch.next_BT[..., None])[..., 0]
        return [log_T[mask_T] for log_T, mask_T in zip(log_BT, batch.predicts_BT, strict=True)]

    def _line(self, text: str) -> str:
        # Not cut at the first stop: answers such as "St. John's" hold one. A statement that was
        # trained ends with the end-of-text token.
        return text.split("\n")[0].strip().removesuffix(self._ending).strip()
