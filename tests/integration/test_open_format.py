"""A bank's directory is readable by a zarr reader that knows nothing of membank."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tensorstore

from membank.bank_service.store import Bank
from membank.client import BankClient
from membank.wire.format.layout import array_prefix
from membank.wire.spec import BankSpec, BlockRef, LevelSpec, Role
from served_bank import ServedBank

SPEC = BankSpec(
    name="open",
    num_layers=2,
    width=8,
    levels=(LevelSpec(fan_out=4, block_width=4), LevelSpec(fan_out=2, block_width=2)),
)


@pytest.mark.slow
def test_tensorstore_reads_what_grpc_serves(tmp_path: Path) -> None:
    folder = tmp_path / "bank"
    rng = np.random.default_rng(0)
    with ServedBank(folder, SPEC) as served, BankClient.connect(served.endpoint) as client:
        gradients = {
            ref: rng.normal(size=SPEC.block_shape(ref.level)).astype(np.float32)
            for ref in (BlockRef(1, 1), BlockRef(1, 2), BlockRef(2, 3), BlockRef(2, 4))
        }
        answer = client.push(gradients, base=dict.fromkeys(gradients, 0))
        assert not answer.refused
        fetched = client.fetch_blocks(gradients).weights
        # A shard that stops folds its journal into slots.
    bank = Bank.open(str(folder))
    for ref, weight in fetched.items():
        partition = SPEC.partition_of(ref)
        number = bank.manifest_numbers(partition)[-1]
        entry = bank.read_manifest(partition, number).entries[ref]
        array = tensorstore.open(
            {
                "driver": "zarr3",
                "kvstore": f"file://{folder}/{array_prefix(partition, ref.level, Role.WEIGHT)}/",
            }
        ).result()
        np.testing.assert_array_equal(array[entry.slot].read().result(), weight)
        assert entry.version == 1
