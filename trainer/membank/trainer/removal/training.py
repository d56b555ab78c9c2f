"""The models that the study compares, each trained on the documents it may know.

*Bank*: the anchor (stage 1), and the memories of the topics' subtrees (stage 2), in this process: the
same blocks, bit for bit, as the service trains with one worker. *Dense*: the same anchor, its FFNs
widened by as much as a fetch adds, then trained on stage 2's sequences in the same order and number
with all of its weights. It has the parameters and the tokens of anchor and fetch together, and
nowhere in it does one topic have a place of its own. A generic memory beside a frozen anchor would
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


@dataclass(frozen=True, kw_only=True, slots=True)
class Models:
    """What was trained on one selection of documents."""

    anchor: Anchor
    """The anchor."""
    bank: InProcessMemory
    """The memories."""
    dense: Anchor
    """The dense model."""
    seconds: dict[str, float]
    """Time of each training: anchor, bank, dense."""


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

    def train(self, folder: Path, included: NDArray[np.bool_], title: str) -> Models:
        """Return the models that know the included documents.

        Parameters
        ----------
        folder
            Where they are kept, and gone on from.
        included
            (documents,) what is trained on.
        title
            Name for the progress.
        """
        anchor_passed = self._passed(included, None)
        leaf_N = np.where(included & self._in_topics(), self._material.leaves, NO_LEAF)
        memory_passed = self._passed(leaf_N != NO_LEAF, leaf_N)
        seconds = read_json(folder / "seconds.json") or {}
        stages: dict[str, Callable[[], None]] = {
            "anchor": lambda: self._anchor(folder, anchor_passed, f"{title}: anchor"),
            "bank": lambda: self._bank(folder, memory_passed, f"{title}: memories"),
            "dense": lambda: self._dense(folder, memory_passed, f"{title}: dense"),
        }
        for name, train in stages.items():
            if name not in seconds:
                start = time.perf_counter()
                train()
                seconds[name] = time.perf_counter() - start
                write_json(folder / "seconds.json", seconds)
        return Models(
            anchor=load_anchor(folder / "anchor.safetensors"),
            bank=InProcessMemory.load(folder / "bank.safetensors"),
            dense=load_anchor(folder / "dense.safetensors"),
            seconds={name: float(str(value)) for name, value in seconds.items()},
        )

    def _anchor(self, folder: Path, sequences: PackedSequences, title: str) -> None:
        torch.manual_seed(self._seed)
        anchor = Anchor(self._run_config.anchor)
        self._train_all_weights(
            anchor, sequences, self._config.anchor_passes, folder / "anchor.safetensors", title
        )

    def _bank(self, folder: Path, sequences: PackedSequences, title: str) -> None:
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
                load_anchor(folder / "anchor.safetensors"),
                memory,
                sequences,
                stage,
                checkpoint=InProcessCheckpoint(folder / "bank.safetensors", memory),
                on_progress=on_progress,
            )

    def _dense(self, folder: Path, sequences: PackedSequences, title: str) -> None:
        torch.manual_seed(self._seed)
        dense = widened(
            load_anchor(folder / "anchor.safetensors"), sum(self._config.run.block_widths)
        )
        self._train_all_weights(
            dense, sequences, self._config.memory_passes, folder / "dense.safetensors", title
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

    def _passed(
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
