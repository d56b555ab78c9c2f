"""A bank in S3 and nodes that share nothing else: each has a disk of its own for its journals."""

from __future__ import annotations

from pathlib import Path

import pytest
from ray.cluster_utils import Cluster

from membank.bank_service.cluster import ShardStatus, UpConfig, down, status, up
from membank.bank_service.store import Bank
from membank.bank_service.store.journal import ObjectJournal
from membank.client import BankClient
from membank.wire.spec import BankSpec, LevelSpec
from nodes import HEAD, WORKER, nodes_of, push_to_all, push_until_on
from s3_server import S3Place

pytestmark = [pytest.mark.ray, pytest.mark.s3, pytest.mark.slow, pytest.mark.timeout(300)]

SPEC = BankSpec(
    name="two",
    num_layers=2,
    width=8,
    levels=(LevelSpec(fan_out=4, block_width=4), LevelSpec(fan_out=2, block_width=4)),
)
NUM_PUSHES = 3


@pytest.fixture
def url(s3_place: S3Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Where the bank will be; what is started from here has one disk, `OTHER` another."""
    monkeypatch.setenv("MEMBANK_RUNTIME_DIR", str(tmp_path / "disk-1"))
    return f"{s3_place.url}/bank"


def other_disk(tmp_path: Path) -> dict[str, str]:
    return {"MEMBANK_RUNTIME_DIR": str(tmp_path / "disk-2")}


def test_an_orderly_move_loses_nothing_although_the_journal_stays_behind(
    url: str, tmp_path: Path
) -> None:
    cluster = Cluster(initialize_head=True, head_node_args=HEAD)
    try:
        endpoint = up(UpConfig(bank_url=url, port=0, num_shards=2, ray_address=cluster.address))
        with BankClient.connect(endpoint.address) as client:
            client.create_bank(SPEC)
            assert nodes_of() == 1
            cluster.add_node(env_vars=other_disk(tmp_path), **WORKER)
            pushed = push_until_on(client, num_nodes=2)
            assert pushed > 0
            assert set(client.fetch_blocks(list(SPEC.blocks())).versions.values()) == {pushed}
    finally:
        down()
        cluster.shutdown()
    for disk in ("disk-1", "disk-2"):
        assert list((tmp_path / disk).rglob("*.log")), "each node wrote to its own disk"


def is_shipped(url: str, shard: ShardStatus) -> bool:
    """Say whether all pushes to a shard are in the bank's storage."""
    bank = Bank.open(url)
    journals = [
        ObjectJournal.open(bank.objects, number, f"{bank.spec.bank_id}/{number}")
        for number in shard.partitions
    ]
    return all(journal.last_lsn == NUM_PUSHES for journal in journals)


@pytest.mark.parametrize(
    ("settings", "survives"),
    [({}, False), ({"durability": "store"}, True), ({"ship_every_s": 0.2}, True)],
    ids=["process", "store", "shipped"],
)
def test_what_survives_the_loss_of_a_machine(
    url: str, tmp_path: Path, settings: dict[str, object], survives: bool
) -> None:
    cluster = Cluster(initialize_head=True, head_node_args=HEAD)
    doomed = cluster.add_node(env_vars=other_disk(tmp_path), **WORKER)
    config = UpConfig(
        bank_url=url,
        port=0,
        num_shards=2,
        ray_address=cluster.address,
        min_nodes=2,
        lease_s=3.0,
        **settings,  # type: ignore[arg-type]  # of the table above
    )
    try:
        endpoint = up(config)
        with BankClient.connect(endpoint.address) as client:
            client.create_bank(SPEC)
            versions = dict.fromkeys(SPEC.blocks(), 0)
            for _ in range(NUM_PUSHES):
                versions = push_to_all(client, versions)
            (lost,) = [s for s in status().shards if s.node_id == doomed.node_id]
            while settings.get("ship_every_s") and not is_shipped(url, lost):
                pass
            cluster.remove_node(doomed, allow_graceful=False)
            while nodes_of() != 1:
                pass
            after = client.fetch_blocks(list(SPEC.blocks())).versions
            for ref, version in after.items():
                is_lost = SPEC.partition_of(ref) in lost.partitions and not survives
                # Nothing was consolidated yet: as `process` says, its machine took it along.
                assert version == (0 if is_lost else NUM_PUSHES), ref
            push_to_all(client, after)
    finally:
        down()
        cluster.shutdown()
