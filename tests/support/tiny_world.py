"""A tiny world of facts: one leaf per letter, a fact is a name and a number."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from membank.trainer.corpus import (
    Document,
    Fact,
    PackedSequences,
    Tokenizer,
    pack_sequences,
    train_tokenizer,
)
from membank.trainer.evaluation import EvaluationPaths
from membank.trainer.model import Anchor, AnchorConfig
from membank.trainer.training import leaf_path
from membank.wire.spec import BankSpec, LevelSpec

NAMES = ("ada", "bob", "cyd", "dan", "eve", "fay", "gil", "hal")
NUMBERS = (31, 12, 77, 45, 60, 24, 98, 53)
CITIES = ("rome", "oslo", "bern", "lima", "kiev", "riga", "doha", "male")


@dataclass(frozen=True)
class World:
    """Facts, the documents that state them, and a bank with a leaf for two names each."""

    facts: tuple[Fact, ...]
    documents: tuple[Document, ...]
    leaves: tuple[int, ...]
    tokenizer: Tokenizer
    sequences: PackedSequences
    spec: BankSpec
    anchor: Anchor
    paths: EvaluationPaths


def _fact(relation: str, name: str, prompt: str, answer: str) -> Fact:
    return Fact(
        relation=relation,
        topic="people",
        subject=name,
        answer=answer,
        prompt=prompt,
        paraphrases=(),
        doc_id=f"{relation}/{name}",
    )


def make_world() -> World:
    """Return the world with an untrained anchor."""
    facts = [
        _fact("number", name, f"The number of {name} is", str(number))
        for name, number in zip(NAMES, NUMBERS, strict=True)
    ] + [
        _fact("city", name, f"The city of {name} is", city)
        for name, city in zip(NAMES, CITIES, strict=True)
    ]
    documents = tuple(
        Document(
            doc_id=fact.doc_id,
            source="tiny",
            labels=(fact.relation,),
            title="",
            text=f"{fact.prompt} {fact.answer}.",
            embed_text=fact.prompt,
        )
        for fact in facts
    )
    leaves = tuple(n % len(NAMES) // 2 for n in range(len(facts)))
    tokenizer = train_tokenizer([document.text for document in documents], 300)
    spec = BankSpec(
        name="tiny",
        num_layers=2,
        width=32,
        levels=(
            LevelSpec(fan_out=2, block_width=4, learning_rate=1e-2),
            LevelSpec(fan_out=2, block_width=16, learning_rate=3e-2),
        ),
        init_std=0.4,
        num_partitions=1,
    )
    torch.manual_seed(0)
    anchor = Anchor(
        AnchorConfig(
            num_layers=2,
            width=32,
            num_heads=2,
            head_dim=16,
            ffn_width=64,
            vocab_size=tokenizer.vocab_size,
        )
    )
    paths = tuple(leaf_path(spec, leaf) for leaf in leaves)
    return World(
        facts=tuple(facts),
        documents=documents,
        leaves=leaves,
        tokenizer=tokenizer,
        sequences=pack_sequences(
            tokenizer.encode_batch([document.text for document in documents]),
            seq_len=24,
            eot_id=tokenizer.eot_id,
            leaves=np.array(leaves),
        ),
        spec=spec,
        anchor=anchor,
        paths=EvaluationPaths(routed=paths, holding=paths, leaves=(0, 1, 2, 3)),
    )
