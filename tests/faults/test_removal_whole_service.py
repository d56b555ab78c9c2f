"""A whole service on Ray: after the acknowledgement of a delete, no process that served it has a trace.

What Ray itself keeps, outside of those processes, is out of reach, and docs/deletion.md says so.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from membank.bank_service.cluster import Endpoint, UpConfig, down, up
from membank.client import BankClient
from raw_scan import scan_files
from removal_on_ray import DOOMED, TOPIC, scan_service, train
from removal_service import SPEC

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(400)]


@pytest.fixture
def service(tmp_path: Path) -> Iterator[tuple[UpConfig, Endpoint]]:
    config = UpConfig(bank_url=str(tmp_path / "bank"), port=0, runtime_dir=tmp_path / "run")
    endpoint = up(config)
    try:
        with BankClient.connect(endpoint.address) as client:
            client.create_bank(SPEC)
        yield config, endpoint
    finally:
        down(runtime_dir=config.runtime_dir)


def test_no_process_of_the_service_has_a_trace(
    service: tuple[UpConfig, Endpoint], tmp_path: Path
) -> None:
    config, endpoint = service
    wanted = train(endpoint.address)
    before = scan_service(config, wanted)
    assert {finding.name for finding in before} == set(wanted)
    stored = {finding.name for finding in scan_files(tmp_path, wanted)}
    assert {name for name in wanted if "gradient" in name} <= stored
    with BankClient.connect(endpoint.address) as client:
        others = [ref for ref in SPEC.blocks() if ref not in DOOMED]
        kept = {r: w.tobytes() for r, w in client.fetch_blocks(others).weights.items()}
        client.delete(TOPIC)
        assert scan_files(tmp_path, wanted) == []
        assert scan_service(config, wanted) == []
        blocks = client.fetch_blocks(list(SPEC.blocks()))
        assert {r: w.tobytes() for r, w in blocks.weights.items()} == kept
