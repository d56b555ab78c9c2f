"""The models that the study compares, each trained on the documents it may know.

*Bank*: the anchor (stage 1), and the memories of the topics' subtrees (stage 2), in this process: the
same blocks, bit for bit, as the service trains with one worker. *Dense*: the same anchor, its FFNs
widened by as much as a fetch adds, then trained on as many of stage 2's sequences with all of its
weights, dealt singly: runs of one leaf help only where a leaf has weights of its own. It has the
parameters and the tokens of anchor and fetch together, and nowhere in it does one topic have a place
of its own. A generic memory beside a frozen anchor would
have the size too, but learns next to nothing of single facts (docs/log.md): there would be nothing
to unlearn.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from membank.trainer.corpus import NO_LEAF, PackedSequences, pack_sequences
from membank.trainer.model import Anchor, init_block
from membank.trainer.removal.config import RemovalConfig
from membank.trainer.removal.material import Material
from membank.trainer.run import RunDirectory
from membank.trainer.training import (
    InProcessCheckpoint,
    InProcessMemory,
    PrefetchConfig,
    ProgressCallback,
    load_anchor,
    save_anchor,
    train_anchor,
    train_memories,
)
from membank.trainer.training.files import read_json, write_json

ProgressOf = Callable[[str], AbstractContextManager[ProgressCallback]]
"""Gives, for the name of a training, what it reports to while the context lasts."""

_ANCHOR = "anchor.safetensors"
_BANK = "bank.safetensors"
_DENSE = "dense.safetensors"


@dataclass(frozen=True, kw_only=True, slots=True)
class Models:
    """What was trained on one selection of documents."""

    anchor: Anchor
    """The anchor."""
    bank: InProcessMemory
    """The memories."""
    seconds: dict[str, float]
    """Time of each training: anchor, bank; 0 where an anchor was given."""


class ModelTrainer:
    """Trains models of one seed, or finds them where an earlier run left them.

    Parameters
    ----------
    run
        Tokenizer and tree.
    config
        The study.
    material
        The documents.
    seed
        Seed of the anchor's start and of every order.
    progress
        Shows progress.
    """

    def __init__(
        self,
        run: RunDirectory,
        config: RemovalConfig,
        material: Material,
        *,
        seed: int,
        progress: ProgressOf,
    ) -> None:
        tokenizer = run.tokenizer()
        texts = [document.text for document in material.corpus.documents]
        self._tokens = tokenizer.encode_batch(texts)
        self._eot_id = tokenizer.eot_id
        self._config = config
        self._material = material
        self._seed = seed
        self._progress = progress
        self._run_config = config.run.with_vocab_size(tokenizer.vocab_size)
        self.spec = replace(
            self._run_config.bank_spec(fingerprint=""), init_seed=seed, name=config.run.name
        )

    def anchor(self, folder: Path, included: NDArray[np.bool_], title: str) -> float:
        """Train the anchor of a folder, and return the time that took, in seconds.

        Parameters
        ----------
        folder
            Where it is kept, and gone on from.
        included
            (documents,) what it is trained on.
        title
            Name for the progress.
        """
        sequences = self._packed(included, None)
        return self._once(
            folder, "anchor", lambda: self._anchor(folder, sequences, f"{title}: anchor")
        )

    def bank(
        self, folder: Path, included: NDArray[np.bool_], title: str, *, anchor: Path | None = None
    ) -> Models:
        """Return anchor and memories that know the included documents.

        Parameters
        ----------
        folder
            Where they are kept, and gone on from.
        included
            (documents,) what they are trained on.
        title
            Name for the progress.
        anchor
            Folder of an anchor that is taken as it is; None = one is trained on the same documents.
        """
        took = self.anchor(folder, included, title) if anchor is None else 0.0
        file = (anchor or folder) / _ANCHOR
        sequences = self._topics_packed(included)
        seconds = self._once(
            folder, "bank", lambda: self._bank(folder, file, sequences, f"{title}: memories")
        )
        return Models(
            anchor=load_anchor(file),
            bank=InProcessMemory.load(folder / _BANK),
            seconds={"anchor": took, "bank": seconds},
        )

    def dense(self, folder: Path, included: NDArray[np.bool_], title: str) -> tuple[Anchor, float]:
        """Return the dense model that goes on from the folder's anchor, and the time of both in s."""
        took = self.anchor(folder, included, title)
        sequences = self._topics_packed(included)
        seconds = self._once(
            folder, "dense", lambda: self._dense(folder, sequences, f"{title}: dense")
        )
        return load_anchor(folder / _DENSE), took + seconds

    def _once(self, folder: Path, name: str, train: Callable[[], None]) -> float:
        """Train unless an earlier run did, and return the seconds that it took, or took then."""
        file = folder / "seconds.json"
        seconds = read_json(file) or {}
        if name not in seconds:
            start = time.perf_counter()
            train()
            seconds = {**seconds, name: time.perf_counter() - start}
            write_json(file, seconds)
        return float(str(seconds[name]))

    def _anchor(self, folder: Path, sequences: PackedSequences, title: str) -> None:
        torch.manual_seed(self._seed)
        anchor = Anchor(self._run_config.anchor)
        self._train_all_weights(
            anchor, sequences, self._config.anchor_passes, folder / _ANCHOR, title
        )

    def _bank(self, folder: Path, anchor: Path, sequences: PackedSequences, title: str) -> None:
        memory = InProcessMemory(self.spec)
        stage = replace(
            self._run_config.stage2,
            num_tokens=_positions(sequences, self._config.memory_passes),
            seed=self._seed,
            # Nothing travels: threads would only be in the way. The result is the same.
            prefetch=PrefetchConfig(depth=0),
        )
        with self._progress(title) as on_progress:
            train_memories(
                load_anchor(anchor),
                memory,
                sequences,
                stage,
                checkpoint=InProcessCheckpoint(folder / _BANK, memory),
                on_progress=on_progress,
            )

    def _dense(self, folder: Path, sequences: PackedSequences, title: str) -> None:
        torch.manual_seed(self._seed)
        dense = widened(load_anchor(folder / _ANCHOR), sum(self._config.run.block_widths))
        self._train_all_weights(
            dense, sequences, self._config.memory_passes, folder / _DENSE, title
        )

    def _train_all_weights(
        self, model: Anchor, sequences: PackedSequences, passes: float, file: Path, title: str
    ) -> None:
        stage = replace(
            self._run_config.stage1, num_tokens=_positions(sequences, passes), seed=self._seed
        )
        checkpoint = file.with_name(f"{file.stem}.checkpoint.safetensors")
        with self._progress(title) as on_progress:
            train_anchor(
                model.requires_grad_(True),
                sequences,
                stage,
                checkpoint=checkpoint,
                on_progress=on_progress,
            )
        save_anchor(file, model)
        checkpoint.unlink(missing_ok=True)

    def _topics_packed(self, included: NDArray[np.bool_]) -> PackedSequences:
        leaf_N = np.where(included & self._in_topics(), self._material.leaves, NO_LEAF)
        return self._packed(leaf_N != NO_LEAF, leaf_N)

    def _packed(
        self, included: NDArray[np.bool_], leaf_N: NDArray[np.int64] | None
    ) -> PackedSequences:
        rows = np.flatnonzero(included)
        return pack_sequences(
            [self._tokens[row] for row in rows],
            seq_len=self._config.run.seq_len,
            eot_id=self._eot_id,
            leaves=None if leaf_N is None else leaf_N[rows],
            seed=self._seed,
        )

    def _in_topics(self) -> NDArray[np.bool_]:
        """Return which documents lie in a topic of the study: only these subtrees are trained."""
        inside = np.zeros(len(self._material.trained), dtype=bool)
        for topic in self._material.topics:
            inside[topic.members] = True
        return inside


def widened(anchor: Anchor, width: int) -> Anchor:
    """Return an anchor whose FFNs have `width` more hidden units; it computes the same at first.

    Parameters
    ----------
    anchor
        The anchor; it is left alone.
    width
        Units to add, at least 1. They start as a new block does: their outputs are zero.
    """
    config = anchor.config
    wider = Anchor(replace(config, ffn_width=config.ffn_width + width))
    extra_LPRD = init_block(config.num_layers, width, config.width)
    state = {name: value.clone() for name, value in anchor.state_dict().items()}
    for layer in range(config.num_layers):
        gate_RD, up_RD, down_RD = extra_LPRD[layer]
        for part, added in (("gate", gate_RD), ("up", up_RD), ("down", down_RD.T)):
            name = f"blocks.{layer}.ffn.{part}.weight"
            state[name] = torch.cat((state[name], added), dim=1 if part == "down" else 0)
    wider.load_state_dict(state)
    return nn.Module.requires_grad_(wider, True)


def _positions(sequences: PackedSequences, passes: float) -> int:
    return max(1, round(passes * len(sequences) * sequences.seq_len))
