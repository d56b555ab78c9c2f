"""A topic of a bank in S3: deleted, it is in no object, in no version of one, and in no journal.

Packs go through the same store: into the bank's own, where a deletion finds them, and out to a bucket,
from where they come back.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from command_line import membank
from membank.bank_service.cluster import UpConfig, down, up
from membank.client import BankClient
from raw_scan import Finding, scan_files, scan_objects
from removal_on_ray import DOOMED, TOPIC, scan_service, train
from removal_service import SPEC
from s3_server import S3Place

pytestmark = [pytest.mark.ray, pytest.mark.s3, pytest.mark.slow, pytest.mark.timeout(400)]


@contextmanager
def served(config: UpConfig) -> Iterator[str]:
    """Serve a bank as long as the block lasts; gives its address."""
    endpoint = up(config)
    try:
        yield endpoint.address
    finally:
        down(runtime_dir=config.runtime_dir)


def names(findings: list[Finding]) -> set[str]:
    """Return what was found, wherever that was."""
    return {finding.name for finding in findings}


@pytest.mark.parametrize("durability", ["process", "store"])
def test_a_deleted_topic_is_in_no_object(
    s3_place: S3Place, tmp_path: Path, durability: str
) -> None:
    bucket, client_of_s3 = s3_place.bucket, s3_place.server.client
    prefix = f"{s3_place.prefix}bank/"
    config = UpConfig(
        bank_url=f"{s3_place.url}/bank",
        port=0,
        runtime_dir=tmp_path / "run",
        journal_dir=tmp_path / "journals",
        durability=durability,
    )
    outside = f"{s3_place.url}/carried/topic.pack"
    with served(config) as address:
        with BankClient.connect(address) as client:
            client.create_bank(SPEC)
        wanted = train(address)
        with BankClient.connect(address) as client:
            client.store_pack(TOPIC, "kept")
            # What training made of it: the swapped content before is in the snapshot alone.
            lasting = {name for name in wanted if not name.startswith("gradient")}
            found = scan_objects(client_of_s3, bucket, prefix, wanted)
            assert names(found) >= lasting
            assert any("packs/" in finding.place for finding in found)
            others = [ref for ref in SPEC.blocks() if ref not in DOOMED]
            kept = {r: w.tobytes() for r, w in client.fetch_blocks(others).weights.items()}

            exported = membank("export", str(TOPIC), outside, "--bank", address)
            assert exported.code == 0, exported.err
            client.delete(TOPIC)

            assert scan_objects(client_of_s3, bucket, prefix, wanted) == []
            assert scan_files(tmp_path, wanted) == []
            assert scan_service(config, wanted) == []
            assert client.packs() == ()
            again = client.fetch_blocks(list(SPEC.blocks())).weights
            assert {r: w.tobytes() for r, w in again.items()} == kept
        verified = membank("audit", "verify", config.bank_url)
        assert verified.code == 0, verified.out + verified.err

        imported = membank("import", outside, "--bank", address)
        assert imported.code == 0, imported.err
        with BankClient.connect(address) as client:
            assert set(client.fetch_blocks(DOOMED).weights) == set(DOOMED)
    carried = scan_objects(client_of_s3, bucket, f"{s3_place.prefix}carried/", wanted)
    assert names(carried), "it was carried away"
