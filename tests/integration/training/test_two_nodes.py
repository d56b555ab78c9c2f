"""Stage 2 on a Ray of two nodes, with a shard on each."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster

from membank.bank_service.cluster import UpConfig, down, status, up
from membank.client import BankClient
from membank.trainer.training import MemoryStageConfig, save_anchor, save_sequences
from membank.trainer.training.ray_train import ServedTraining, train_served
from tiny_training import expected_versions, tiny_anchor, tiny_sequences, tiny_spec

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.timeout(400),
    # Ray warns of its own deprecated names when it copies its own settings.
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray"),
]
HEAD = {"num_cpus": 2, "object_store_memory": 100 << 20, "include_dashboard": False}
CONFIG = MemoryStageConfig(num_tokens=60 * 6 * 12, batch_size=6, run_length=2)


def test_workers_train_the_shards_of_both_nodes(tmp_path: Path) -> None:
    spec = replace(tiny_spec(), max_staleness=10_000)
    save_anchor(tmp_path / "anchor.safetensors", tiny_anchor(spec))
    save_sequences(tmp_path / "sequences.safetensors", tiny_sequences(spec))
    cluster = Cluster(initialize_head=True, head_node_args=HEAD)
    runtime_dir = tmp_path / "runtime"
    try:
        cluster.add_node(num_cpus=2, object_store_memory=100 << 20)
        endpoint = up(
            UpConfig(
                bank_url=str(tmp_path / "bank"),
                port=0,
                ray_address=cluster.address,
                min_nodes=2,
                runtime_dir=runtime_dir,
            )
        )
        with BankClient.connect(endpoint.address) as client:
            client.create_bank(spec)
            shards = status(runtime_dir=runtime_dir).shards
            assert len({shard.node_id for shard in shards}) == 2
            job = ServedTraining(
                endpoint=endpoint.address,
                anchor=tmp_path / "anchor.safetensors",
                sequences=tmp_path / "sequences.safetensors",
                config=CONFIG,
                run_dir=tmp_path / "run",
                num_workers=2,
                ray_address=cluster.address,
            )
            result = train_served(job)
            versions = client.fetch_blocks(list(spec.blocks())).versions
            applied = [shard.num_updates_applied for shard in client.stats().shards]
        assert result.num_refused == 0
        assert versions == expected_versions(spec, CONFIG, 2)
        assert all(number > 0 for number in applied)
        assert sum(applied) == sum(versions.values())
    finally:
        down(runtime_dir=runtime_dir)
        ray.shutdown()
        cluster.shutdown()
