"""A deleted topic stays deleted for late updates and old clients, until it is created anew and after."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from local_actors import LocalActors
from membank.bank_service.cluster.config import UpConfig
from membank.bank_service.cluster.service import Service
from membank.bank_service.store import Bank
from membank.client import BankClient, ClientConfig
from membank.wire.errors import Reason
from membank.wire.format.receipt import Recycling, decode_receipt
from membank.wire.spec import Array, BlockRef, BlockState
from membank.wire.steps import Delete, Swap
from tiny_bank import tiny_spec

A = BlockRef(1, 0)
SPEC = tiny_spec()
WAYS_IN = {
    "shared memory": ClientConfig(),
    "port for data": ClientConfig(same_host=None),
    "port for all calls": ClientConfig(same_host=None, max_data_connections=0),
}


class Host:
    """A service whose shards and controller live in this process."""

    def __init__(self, url: str, folder: Path) -> None:
        self.config = UpConfig(
            bank_url=url,
            port=0,
            rebalance=False,
            journal_dir=folder / "journals",
            service_id="this",
            start_timeout_s=10.0,
        )
        self.actors = LocalActors()
        self.service = Service(self.config, self.actors, is_restart=False)
        self.service.start()

    @property
    def address(self) -> str:
        return self.service.status().address

    def restart_shards(self) -> None:
        for shard_id in ("shard-0", "shard-1"):
            self.actors.restart(self.actors.find(shard_id))
        self.service.supervise()

    def end(self) -> None:
        self.service.stop(1.0)
        self.actors.end()


@pytest.fixture(params=["directory", "URL"])
def host(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Host]:
    is_directory = request.param == "directory"
    url = str(tmp_path / "bank") if is_directory else f"memory://{uuid.uuid4().hex}"
    Bank.create(url, SPEC)
    host = Host(url, tmp_path)
    yield host
    host.end()


def ones() -> dict[BlockRef, Array]:
    return {A: np.ones(SPEC.block_shape(1), np.float32)}


def refusal(client: BankClient, base: int) -> Reason | None:
    answer = client.push(ones(), base={A: base}, request_id=uuid.uuid4().hex)
    return answer.refused[0].reason if answer.refused else None


@pytest.mark.parametrize("way", WAYS_IN)
def test_late_updates_never_reach_what_was_deleted(host: Host, way: str) -> None:
    with (
        BankClient.connect(host.address, config=WAYS_IN[way]) as trainer,
        BankClient.connect(host.address) as operator,
    ):
        for base in range(3):
            assert refusal(trainer, base) is None
        retried = uuid.uuid4().hex
        trainer.push(ones(), base={A: 3}, request_id=retried)
        applied = operator.apply([Delete(topic=A)])
        receipt = decode_receipt(applied.receipt, what="it").receipt
        # The shards ended; the controller is this very process.
        (acknowledged,) = receipt.acknowledgements
        assert acknowledged.now != acknowledged.confirmed_by
        assert receipt.recycling is Recycling.NONE
        assert refusal(trainer, 4) is Reason.BLOCK_DELETED
        assert trainer.fetch_blocks([A])[A].header.state is BlockState.DELETED
        weight = np.full(SPEC.block_shape(1), 2.0, np.float32).astype(SPEC.numpy_dtype)
        operator.apply([Swap(ref=A, weight=weight)])
        assert SPEC.max_staleness >= 6, "the lag alone refuses none of these"
        for restarted in (False, True):
            if restarted:
                host.restart_shards()
            for base in (0, 3, 4, 5):
                assert refusal(trainer, base) is Reason.STALE_VERSION
            # The answer of old, and nothing applied.
            trainer.push(ones(), base={A: 3}, request_id=retried)
            block = trainer.fetch_blocks([A])[A]
            assert block.version == 6
            np.testing.assert_array_equal(np.asarray(block.weight), weight)
        # Not even with what a new update makes room for.
        assert refusal(trainer, 6) is None
        for base in (4, 5):
            assert refusal(trainer, base) is Reason.STALE_VERSION


def test_no_rollback_crosses_a_deletion(host: Host) -> None:
    with BankClient.connect(host.address) as client:
        assert refusal(client, 0) is None
        client.snapshot("before")
        client.apply([Delete(topic=A)])
        for target in ("before", client.info().revision - 1):
            client.rollback(target)
            assert client.fetch_blocks([A])[A].header.state is BlockState.DELETED
        weight = np.full(SPEC.block_shape(1), 2.0, np.float32).astype(SPEC.numpy_dtype)
        client.apply([Swap(ref=A, weight=weight)])
        client.rollback("before")
        np.testing.assert_array_equal(
            np.asarray(client.fetch_blocks([A])[A].weight), weight, "what came since stays"
        )
