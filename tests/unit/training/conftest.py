"""One thread, and the tiny model, bank and sequences."""

from __future__ import annotations

import pytest
import torch

from membank.trainer.corpus import PackedSequences
from membank.trainer.model import Anchor
from membank.wire.spec import BankSpec
from tiny_training import tiny_anchor, tiny_sequences, tiny_spec


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def spec() -> BankSpec:
    return tiny_spec()


@pytest.fixture
def anchor(spec: BankSpec) -> Anchor:
    return tiny_anchor(spec)


@pytest.fixture
def sequences(spec: BankSpec) -> PackedSequences:
    return tiny_sequences(spec)
