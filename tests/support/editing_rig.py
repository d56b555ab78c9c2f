"""A bank in memory of the tiny world, and an editor of it: a leaf is taught in a second."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from fake_bank import FakeBank
from in_process import InProcessNetwork
from membank.client import BankClient
from membank.trainer.corpus import Corpus
from membank.trainer.editing import (
    Answers,
    EditConfig,
    EditLog,
    Editor,
    FactEdit,
    ReplaySequences,
    Statement,
)
from membank.trainer.model import Anchor, AnchorConfig
from membank.trainer.tree import TreeConfig, build_tree
from membank.wire.format import encode_tree
from membank.wire.spec import BlockRef
from tiny_world import World, make_world

CONFIG = EditConfig(learning_rate=3e-2, max_steps=80, target_probability=0.6)
"""Enough for the tiny world: its anchor is not trained, so every answer is the blocks' own."""


class EditingRig:
    """The bank, its client and what an editor needs.

    Parameters
    ----------
    folder
        Where edits are logged.
    dtype
        What the bank keeps weights in.
    """

    def __init__(self, folder: Path, dtype: str = "float32") -> None:
        self.world = make_world()
        corpus = Corpus(name="tiny", documents=self.world.documents, facts=self.world.facts)
        tree = build_tree(corpus, TreeConfig(fan_outs=(2, 2))).document()
        self.bank = FakeBank(
            spec=replace(self.world.spec, num_partitions=4, bank_id="tiny-1", dtype=dtype),
            tree=encode_tree(tree),
        )
        rng = np.random.default_rng(0)
        for ref in self.bank.spec.blocks():
            held = self.bank.held(ref)
            held.weight = rng.normal(0, 0.3, held.weight.shape).astype(self.bank.spec.numpy_dtype)
        self.network = InProcessNetwork(self.bank)
        self.client = BankClient.connect(InProcessNetwork.GATEWAY, connector=self.network)
        self.answers = Answers(_anchor(self.world), self.world.tokenizer, ending=".")
        self.log = EditLog(folder)

    def editor(
        self, config: EditConfig = CONFIG, notice: Callable[[str], None] = lambda _: None
    ) -> Editor:
        """Return an editor, as a new command makes it."""
        return Editor(
            self.client,
            self.answers,
            self.log,
            config=config,
            replay=ReplaySequences(self.world.sequences),
            notice=notice,
        )

    def weights(self) -> dict[BlockRef, NDArray[np.float32]]:
        """Return a copy of every block, as the bank holds it."""
        return {
            ref: np.array(self.bank.held(ref).weight, np.float32) for ref in self.bank.spec.blocks()
        }

    def changed(self, before: dict[BlockRef, NDArray[np.float32]]) -> set[BlockRef]:
        """Return the blocks that are not as they were."""
        return {ref for ref, now in self.weights().items() if not np.array_equal(now, before[ref])}

    def prompts_of_one_leaf(self, count: int) -> list[str]:
        """Return prompts that are routed to one leaf, which holds at least so many facts."""
        by_leaf: dict[BlockRef, list[str]] = {}
        for fact in self.world.facts:
            by_leaf.setdefault(self.client.route(fact.prompt)[-1], []).append(fact.prompt)
        return next(prompts for prompts in by_leaf.values() if len(prompts) >= count)[:count]

    def answer(self, prompt: str) -> str:
        """Return what the bank answers now."""
        path = self.client.route(prompt)
        fetched = self.client.fetch(path, dtype="float32")
        weights = {
            ref: torch.from_numpy(np.array(weight)) for ref, weight in fetched.weights.items()
        }
        (answer,) = self.answers.complete(path, weights, [prompt])
        return answer


def fact(edit_id: str, prompt: str, target: str, *neighbours: str) -> FactEdit:
    """Return a fact to be changed, with neighbours to be kept."""
    return FactEdit(
        edit_id=edit_id,
        prompt=prompt,
        target=target,
        neighbours=tuple(Statement(prompt=text, target="anything") for text in neighbours),
    )


def _anchor(world: World) -> Anchor:
    """Return an untrained anchor whose tied head can be sure of a token."""
    torch.manual_seed(0)
    return Anchor(
        AnchorConfig(
            num_layers=world.spec.num_layers,
            width=world.spec.width,
            num_heads=2,
            head_dim=16,
            ffn_width=32,
            vocab_size=world.tokenizer.vocab_size,
            init_std=0.5,
        )
    )
