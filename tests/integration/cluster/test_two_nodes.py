"""A Ray of two nodes, as Ray's own cluster utility makes it: shards on both."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import ray
from ray.cluster_utils import Cluster

from membank.bank_service.cluster import UpConfig, down, list_running, status, up
from membank.client import BankClient
from membank.wire.errors import FailedPreconditionError, Reason
from membank.wire.spec import BankSpec, BlockRef, LevelSpec
from nodes import HEAD, WORKER, nodes_of, push_until_on

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(180)]

SPEC = BankSpec(
    name="two",
    num_layers=2,
    width=8,
    levels=(LevelSpec(fan_out=4, block_width=4), LevelSpec(fan_out=2, block_width=4)),
)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    cluster = Cluster(initialize_head=True, head_node_args=HEAD)
    try:
        cluster.add_node(**WORKER)
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()


def test_a_shard_moves_to_a_node_that_joins_while_it_is_pushed_to(tmp_path: Path) -> None:
    cluster = Cluster(initialize_head=True, head_node_args=HEAD)
    config = UpConfig(
        bank_url=str(tmp_path / "bank"),
        port=0,
        num_shards=2,
        ray_address=cluster.address,
        runtime_dir=tmp_path / "run",
        rebalance=True,
    )
    try:
        endpoint = up(config)
        with BankClient.connect(endpoint.address) as client:
            client.create_bank(SPEC)
            assert nodes_of(config.runtime_dir) == 1
            cluster.add_node(**WORKER)
            pushed = push_until_on(client, num_nodes=2, runtime_dir=config.runtime_dir)
            assert set(client.fetch_blocks(list(SPEC.blocks())).versions.values()) == {pushed}
    finally:
        down(runtime_dir=config.runtime_dir)
        cluster.shutdown()


def test_a_shard_goes_on_elsewhere_when_its_node_is_lost(tmp_path: Path) -> None:
    cluster = Cluster(initialize_head=True, head_node_args=HEAD)
    lost = cluster.add_node(**WORKER)
    config = UpConfig(
        bank_url=str(tmp_path / "bank"),
        port=0,
        num_shards=2,
        ray_address=cluster.address,
        min_nodes=2,
        runtime_dir=tmp_path / "run",
    )
    try:
        endpoint = up(config)
        with BankClient.connect(endpoint.address) as client:
            client.create_bank(SPEC)
            cluster.remove_node(lost, allow_graceful=False)
            pushed = push_until_on(client, num_nodes=1, runtime_dir=config.runtime_dir)
            assert set(client.fetch_blocks(list(SPEC.blocks())).versions.values()) == {pushed}
    finally:
        down(runtime_dir=config.runtime_dir)
        cluster.shutdown()


def test_shards_spread_over_the_nodes_and_come_back(cluster: Cluster, tmp_path: Path) -> None:
    config = UpConfig(
        bank_url=str(tmp_path / "bank"),
        port=0,
        num_shards=2,
        ray_address=cluster.address,
        min_nodes=2,
        runtime_dir=tmp_path / "run",
    )
    endpoint = up(config)
    try:
        assert endpoint.ray_address == cluster.address
        with BankClient.connect(endpoint.address) as client:
            client.create_bank(SPEC)
            before = status(runtime_dir=config.runtime_dir)
            assert len({shard.node_id for shard in before.shards}) == 2
            refs = list(SPEC.blocks())
            ones = {ref: np.ones(SPEC.block_shape(ref.level), np.float32) for ref in refs}
            versions = client.push(ones, base=dict.fromkeys(refs, 0)).versions
            for shard in before.shards:
                os.kill(shard.pid, signal.SIGKILL)
            versions = client.push(ones, base=versions).versions
            assert set(versions.values()) == {2}
            assert client.delete(BlockRef(1, 0)).revision == 1
        # Another service of the same bank, in the same Ray.
        with pytest.raises(FailedPreconditionError) as caught:
            up(config)
        assert caught.value.reason is Reason.BANK_IN_USE
    finally:
        down(runtime_dir=config.runtime_dir)
    check_no_trace(cluster)


def test_a_process_in_another_ray_stops_no_service_and_forgets_none(
    cluster: Cluster, tmp_path: Path
) -> None:
    config = UpConfig(bank_url=str(tmp_path / "bank"), port=0, runtime_dir=tmp_path / "run")
    endpoint = up(config)
    try:
        ray.init(address=cluster.address, namespace="membank", log_to_driver=False)
        try:
            with pytest.raises(FailedPreconditionError, match="connected to the Ray"):
                down(runtime_dir=config.runtime_dir)
        finally:
            ray.shutdown()
        assert list_running(config.runtime_dir) == (endpoint,)
        with BankClient.connect(endpoint.address) as client:
            client.create_bank(SPEC)
    finally:
        assert down(runtime_dir=config.runtime_dir).unfolded == ()


def check_no_trace(cluster: Cluster) -> None:
    """Assert that the Ray of others runs on, without a trace of a service in it."""
    ray.init(address=cluster.address, namespace="membank", log_to_driver=False)
    try:
        assert len([node for node in ray.nodes() if node["Alive"]]) == 2
        assert ray.util.list_named_actors() == []
    finally:
        ray.shutdown()


def test_a_service_that_cannot_be_noted_is_not_left_running(
    cluster: Cluster, tmp_path: Path
) -> None:
    notes = tmp_path / "run"
    notes.write_text("in the way")
    config = UpConfig(
        bank_url=str(tmp_path / "bank"),
        port=0,
        num_shards=2,
        ray_address=cluster.address,
        runtime_dir=notes,
    )
    with pytest.raises(FailedPreconditionError, match="cannot note the service"):
        up(config)
    check_no_trace(cluster)
