"""Banks made by earlier versions, and by this one, are read to the byte: here, and by a foreign reader."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import sys
import tarfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from foreign_reader import ForeignBlock, read_bank
from membank.bank_service.fsck import check_bank
from membank.bank_service.fsck.report import FindingKind
from membank.bank_service.shard import Shard
from membank.bank_service.store import Bank, LocalObjects
from membank.wire.format.layout import tree_key
from membank.wire.spec import Array, BlockRef, BlockState

REPOSITORY = Path(__file__).resolve().parents[2]
KEPT = sorted((REPOSITORY / "tests/fixtures").glob("bank-v*.tar.gz"))
"""Made once for each format, and never again."""
MADE = ("float32", "bfloat16")
"""What `scripts/make_fixture_bank.py` makes."""


def _script() -> ModuleType:
    path = REPOSITORY / "scripts/make_fixture_bank.py"
    spec = importlib.util.spec_from_file_location("make_fixture_bank", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Its dataclasses look their module up.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the fixtures as this version makes them."""
    folder = tmp_path_factory.mktemp("fixtures")
    script = _script()
    for fixture in script.FIXTURES:
        script.make_fixture(fixture, folder)
    return folder


@pytest.fixture(
    params=[*KEPT, *MADE], ids=lambda item: item if isinstance(item, str) else item.name
)
def archive(request: pytest.FixtureRequest, fresh: Path) -> Path:
    """One of the fixtures."""
    item: Path | str = request.param
    return item if isinstance(item, Path) else fresh / f"bank-v1-{item}.tar.gz"


@pytest.fixture
def root(archive: Path, tmp_path: Path) -> Path:
    """A copy of the bank in it."""
    with tarfile.open(archive) as file:
        file.extractall(tmp_path, filter="data")
    return tmp_path / archive.name.removesuffix(".tar.gz")


@pytest.fixture
def expected(archive: Path) -> dict[str, Any]:
    """What a reader must find."""
    text = archive.with_name(archive.name.replace(".tar.gz", ".json")).read_text()
    document: dict[str, Any] = json.loads(text)
    return document


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def test_fsck_finds_it_clean(root: Path) -> None:
    report = check_bank(LocalObjects(root))
    # Whoever made it had no key to sign with: it has a deletion and no receipt.
    assert [finding.kind for finding in report.findings] == [FindingKind.RECEIPT_NEVER_MADE]
    assert report.is_clean
    # Something of everything is in it, or the test shows nothing.
    assert report.checked.num_slots > 20
    assert report.checked.num_replayed == 9
    assert report.revision == 4


def test_a_shard_reads_it_to_the_byte(root: Path, expected: dict[str, Any]) -> None:
    bank = Bank.open(LocalObjects(root))
    shard = Shard.open(bank)
    refs = list(bank.spec.blocks())
    found: dict[str, object] = {
        str(status.ref): {
            "version": status.version,
            "state": BlockState(status.state).name.lower(),
            "step": status.step,
            "sha256": {},
        }
        for status in shard.describe(refs)
    }
    for content in shard.read(refs):
        arrays: dict[str, Array] = {"weight": content.weight}
        arrays |= {role.value: array for role, array in content.optimizer_state.items()}
        block = found[str(content.ref)]
        assert isinstance(block, dict)
        block["sha256"] = {role: _sha256(array.tobytes()) for role, array in arrays.items()}
    assert found == expected["blocks"]
    shard.close()


def test_a_shard_reads_its_snapshots_and_its_tree(root: Path, expected: dict[str, Any]) -> None:
    bank = Bank.open(LocalObjects(root))
    shard = Shard.open(bank)
    for name, blocks in expected["snapshots"].items():
        assert bank.snapshot(name).revision == expected["snapshot_revisions"][name]
        refs = [BlockRef.parse(ref) for ref in blocks]
        now = expected["blocks"]
        for block in shard.fetch(refs, snapshot=name).blocks:
            # What is withheld now is withheld in every snapshot.
            if now[str(block.ref)]["state"] == "active":
                assert block.weight is not None
                wanted = blocks[str(block.ref)]
                assert block.version == wanted["version"]
                assert _sha256(block.weight.tobytes()) == wanted["sha256"]["weight"]
    revision = expected["tree"]["revision"]
    tree = bank.read_tree(revision)
    assert tree is not None
    assert tree.labels[BlockRef(1, 0)] == "topic 1/0, \N{GREEK SMALL LETTER ALPHA}"
    assert BlockRef(1, 3) not in tree.labels
    assert _sha256((root / tree_key(revision)).read_bytes()) == expected["tree"]["sha256"]
    shard.close()


def test_a_foreign_reader_reads_it_to_the_byte(root: Path, expected: dict[str, Any]) -> None:
    states = {state.value: state.name.lower() for state in BlockState}

    def as_expected(block: ForeignBlock) -> dict[str, object]:
        return {
            "version": block.version,
            "state": states[block.state],
            "step": block.step,
            "sha256": {role: _sha256(data) for role, data in block.arrays.items()},
        }

    found = {
        f"{level}/{cluster}": as_expected(b) for (level, cluster), b in read_bank(root).items()
    }
    assert found == expected["blocks"]
    for name, blocks in expected["snapshots"].items():
        then = read_bank(root, revision=expected["snapshot_revisions"][name])
        named = {f"{level}/{cluster}": b for (level, cluster), b in then.items()}
        assert {ref: as_expected(named[ref]) for ref in blocks} == blocks


@pytest.mark.slow
def test_making_it_again_gives_the_same_bytes(fresh: Path, tmp_path: Path) -> None:
    script = _script()
    for fixture in script.FIXTURES:
        again = script.make_fixture(fixture, tmp_path)
        assert again.read_bytes() == (fresh / again.name).read_bytes()
