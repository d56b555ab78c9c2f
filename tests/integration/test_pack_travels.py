"""A topic that is trained in one bank, signed, and carried to another of the same anchor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from command_line import membank
from membank.trainer.model import LevelBlocks, MemoryBatch
from membank.wire.format import TreeDocument
from membank.wire.records import Gradient, Update
from membank.wire.spec import Array, BlockRef
from rpc_rig import RpcRig
from shard_rig import ShardRig
from tiny_training import VOCAB, tiny_anchor, tiny_spec

TOPIC, LEAF, ELSEWHERE = BlockRef(1, 1), BlockRef(2, 4), BlockRef(1, 0)
PATH = (TOPIC, LEAF)


def train(bank: ShardRig, number: int) -> None:
    """Push the anchor's gradients of a few tokens to the path, and something to the topic beside it."""
    generator = torch.Generator().manual_seed(number)
    tokens = torch.randint(0, VOCAB, (2, 8), generator=generator)
    blocks = {ref: torch.tensor(_weight(bank, ref)).requires_grad_() for ref in PATH}
    logits = _forward(bank, [blocks[ref] for ref in PATH], tokens)
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten()).backward()
    gradients = []
    for ref, block in blocks.items():
        assert block.grad is not None
        version = bank.status(ref).version
        gradients.append(Gradient(ref=ref, base_version=version, values=block.grad.numpy()))
    update = Update(request_id=f"u{number}", step=number, gradients=tuple(gradients))
    assert all(result.accepted for result in bank.owner(TOPIC).push(update).results)
    bank.push(ELSEWHERE, f"e{number}", value=0.1)


def answers(bank: ShardRig) -> Array:
    """Return what the anchor says with the path's memory, (2, 8, VOCAB)."""
    tokens = torch.arange(16).reshape(2, 8)
    with torch.no_grad():
        blocks = [torch.tensor(_weight(bank, ref)) for ref in PATH]
        found: Array = _forward(bank, blocks, tokens).numpy()
    return found


def _forward(bank: ShardRig, blocks: Sequence[torch.Tensor], tokens: torch.Tensor) -> torch.Tensor:
    index = torch.zeros(len(tokens), dtype=torch.long)
    memory = MemoryBatch([LevelBlocks(blocks_KLPRD=b[None], index_B=index) for b in blocks])
    logits: torch.Tensor = tiny_anchor(bank.spec)(tokens, None, memory)
    return logits


def _weight(bank: ShardRig, ref: BlockRef) -> Array:
    weight = bank.weight(ref)
    assert weight is not None
    return weight.copy()


def contents(bank: ShardRig) -> list[tuple[BlockRef, int, list[bytes]]]:
    return [
        (
            block.ref,
            block.step,
            [a.tobytes() for a in (block.weight, *block.optimizer_state.values())],
        )
        for ref in bank.spec.subtree(TOPIC)
        for block in bank.owner(ref).read([ref])
    ]


@pytest.mark.slow
def test_a_trained_topic_answers_alike_in_another_bank(tmp_path: Path) -> None:
    spec = replace(tiny_spec(), fingerprint="tiny anchor")
    # Another identity, another initial content, other partitions: only the anchor is the same.
    twin = replace(spec, name="twin", init_seed=99, num_partitions=1)
    key, keys, pack = (str(tmp_path / name) for name in ("me.pem", "keys", "topic.pack"))
    Path(keys).write_text(membank("pack", "keygen", key, "--name", "the teacher").out)
    tree = TreeDocument(labels={TOPIC: "metals"})
    with (
        RpcRig(tmp_path / "bank", spec=spec, tree=tree) as here,
        RpcRig(tmp_path / "twin", spec=twin, tree=TreeDocument()) as there,
    ):
        for number in range(3):
            train(here.bank, number)
        ended = membank("export", "metals", pack, "--sign", key, "--bank", here.address)
        assert ended.code == 0, ended.err
        assert not np.array_equal(answers(there.bank), answers(here.bank))
        ended = membank("import", pack, "--trusted", keys, "--bank", there.address)
        assert ended.code == 0, ended.err
        assert contents(there.bank) == contents(here.bank)
        np.testing.assert_array_equal(answers(there.bank), answers(here.bank))
        # Training goes on there as it would here, optimizer state and all.
        train(here.bank, 3)
        train(there.bank, 3)
        np.testing.assert_array_equal(answers(there.bank), answers(here.bank))
