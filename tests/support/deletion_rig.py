"""A run, a bank in memory that was trained by it, and what deletes documents from it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from types import TracebackType
from typing import Self

import numpy as np

from dying_exchange import DyingExchange
from fake_bank import FakeBank
from fake_service import FakeService
from membank.client import BankClient
from membank.trainer.corpus import NO_LEAF, pack_sequences
from membank.trainer.deletion import (
    DeletionConfig,
    DeletionForecast,
    DeletionReport,
    DocumentDeletion,
    ServedExchange,
    forecast_deletion,
)
from membank.trainer.finding import NamedDocument
from membank.trainer.run import RunDirectory, RunMaterial, load_config
from membank.trainer.training import (
    InProcessMemory,
    MemoryStageConfig,
    Progress,
    train_memories,
)
from membank.wire.format import encode_tree, initial_weight
from membank.wire.spec import BankSpec, BlockRef
from tiny_run import SEQ_LEN, bank_spec, tiny_tree
from tiny_world import World

ONE_THREAD = DeletionConfig(num_threads=1)
"""The defaults, on one thread: several would wait for each other at these sizes."""


def trained_on(
    world: World,
    spec: BankSpec,
    config: MemoryStageConfig,
    *,
    without: Collection[int] = (),
    leaves: Collection[int] = (0, 1, 2, 3),
) -> InProcessMemory:
    """Return a new bank that stage 2 trained on some leaves, and never on some documents."""
    kept = [
        leaf if leaf in leaves and row not in without else NO_LEAF
        for row, leaf in enumerate(world.leaves)
    ]
    sequences = pack_sequences(
        world.tokenizer.encode_batch([document.text for document in world.documents]),
        seq_len=SEQ_LEN,
        eot_id=world.tokenizer.eot_id,
        leaves=np.array(kept),
    )
    memory = InProcessMemory(spec)
    train_memories(world.anchor, memory, sequences, config)
    return memory


class DeletionRig:
    """Serves a bank that holds what `trained` does.

    Parameters
    ----------
    world, run
        The world and its run.
    trained
        The content.
    """

    def __init__(self, world: World, run: RunDirectory, trained: InProcessMemory) -> None:
        self.world = world
        self.run = run
        self.spec = bank_spec(run, load_config(run))
        self.bank = FakeBank(spec=self.spec, tree=encode_tree(tiny_tree(world)))
        for ref, weight in trained.fetch(list(self.spec.blocks())).weights.items():
            self.bank.held(ref).weight = weight.numpy().copy()
        self._service = FakeService(self.bank)
        self.client = BankClient.connect(self._service.endpoint)
        self.exchange = DyingExchange(ServedExchange(self.client))

    @property
    def endpoint(self) -> str:
        """Address of the service."""
        return self._service.endpoint

    def forget_content(self, refs: Collection[BlockRef]) -> None:
        """Let blocks be as if they had never been trained."""
        for ref in refs:
            self.bank.held(ref).weight = np.array(initial_weight(self.spec, ref))

    def forecast(
        self, rows: Sequence[int], config: DeletionConfig | None = None
    ) -> DeletionForecast:
        """Say what deleting documents takes."""
        named = [NamedDocument(line=0, doc_id=self.world.documents[row].doc_id) for row in rows]
        return forecast_deletion(self.client, self._material(), named, config or ONE_THREAD)

    def delete(
        self,
        rows: Sequence[int],
        config: DeletionConfig | None = None,
        *,
        on_progress: Callable[[Progress], None] | None = None,
    ) -> DeletionReport:
        """Delete documents, or go on with it, as a new process would."""
        config = config or ONE_THREAD
        forecast = self.forecast(rows, config)
        job = DocumentDeletion(self.client, self.exchange, self._material(), config)
        return job.run(forecast, on_progress=on_progress)

    def contents(self) -> dict[BlockRef, bytes]:
        """Return the bytes of every block."""
        return {ref: self.bank.held(ref).weight.tobytes() for ref in self.spec.blocks()}

    def _material(self) -> RunMaterial:
        return RunMaterial(self.run, self.spec.bank_id)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.client.close()
        self._service.close()
