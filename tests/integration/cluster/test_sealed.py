"""A sealed bank served by a Ray of its own: shards find the keyring, and a deletion destroys keys."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from command_line import membank
from membank.bank_service.cluster import Endpoint, UpConfig, down, up
from membank.bank_service.store import Bank, open_objects
from membank.client import BankClient
from membank.wire.errors import CorruptionError, FailedPreconditionError, Reason
from membank.wire.signing import Signer
from membank.wire.spec import BankSpec, BlockRef, LevelSpec
from membank.wire.steps import Delete

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(240)]

SPEC = BankSpec(
    name="sealed",
    num_layers=2,
    width=16,
    levels=(LevelSpec(fan_out=4, block_width=4), LevelSpec(fan_out=4, block_width=4)),
)
TOPIC, OTHER = BlockRef(1, 1), BlockRef(1, 0)


@pytest.fixture
def service(tmp_path: Path) -> Iterator[tuple[UpConfig, Endpoint]]:
    Signer.load_or_create(tmp_path / "key.pem")
    config = UpConfig(
        bank_url=str(tmp_path / "bank"),
        keyring_url=str(tmp_path / "keyring"),
        port=0,
        runtime_dir=tmp_path / "run",
        signing_key=tmp_path / "key.pem",
    )
    endpoint = up(config)
    try:
        yield config, endpoint
    finally:
        down(runtime_dir=config.runtime_dir)


def push(client: BankClient, ref: BlockRef) -> None:
    gradient = np.ones(SPEC.block_shape(ref.level), np.float32)
    base = client.fetch_blocks([ref]).versions
    assert not client.push({ref: gradient}, base=base).refused


def test_push_delete_and_verify(
    service: tuple[UpConfig, Endpoint], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, endpoint = service
    bank, keyring, copy = Path(config.bank_url), Path(config.keyring_url), tmp_path / "copy"
    with BankClient.connect(endpoint.address) as client:
        client.create_bank(SPEC)
        assert client.info().durability == "store"
        push(client, TOPIC)
        push(client, OTHER)
        # Folds what was pushed: a pinned state is in slots.
        client.snapshot("pinned")
        pushed = client.fetch_blocks([OTHER]).weights[OTHER]
        shutil.copytree(bank, copy)
        client.apply([Delete(topic=TOPIC)])
        push(client, OTHER)
    assert not list(bank.rglob("*.log"))
    needle = pushed.tobytes()[:16]
    assert not [
        path for path in tmp_path.rglob("*") if path.is_file() and needle in path.read_bytes()
    ]
    read = BankClient.open(copy, keyring=keyring, snapshot="pinned")
    np.testing.assert_array_equal(read.fetch_blocks([OTHER]).weights[OTHER], pushed)
    with pytest.raises(CorruptionError):
        read.fetch_blocks([TOPIC])

    # By the endpoint the keyring is known; by the directory it has to be named.
    monkeypatch.setenv("MEMBANK_RUNTIME_DIR", str(config.runtime_dir))
    assert membank("audit", "verify", endpoint.address, "--json").code == 0
    refused = membank("audit", "verify", str(bank), "--json")
    assert (refused.code, "--keyring" in refused.err) == (2, True)
    named = membank("audit", "verify", str(bank), "--keyring", str(keyring), "--json")
    assert named.code == 0
    monkeypatch.setenv("MEMBANK_KEYRING", str(keyring))
    assert membank("fsck", str(bank), "--json").code == 0
    assert membank("gc", "--bank", endpoint.address, "--json").code == 0
    assert membank("fsck", str(bank), "--json").code == 0


def test_a_service_without_the_keyring_does_not_start(tmp_path: Path) -> None:
    bank, keyring = str(tmp_path / "bank"), str(tmp_path / "keyring")
    Bank.create(bank, SPEC, keyring=keyring)
    with pytest.raises(FailedPreconditionError) as caught:
        up(UpConfig(bank_url=bank, port=0, runtime_dir=tmp_path / "run"))
    assert caught.value.reason is Reason.KEYRING_NEEDED
    assert open_objects(keyring).list("") == ["keyring.json"]
