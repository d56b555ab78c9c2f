"""Commands that compute content and apply files of steps, against a service in this process."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from command_line import membank
from fake_bank import SPEC, FakeBank
from fake_service import FakeService
from membank.wire.records import AuditRecord
from membank.wire.spec import BlockRef, BlockState

# Under A and B lie two leaves each.
A, B = BlockRef(1, 0), BlockRef(1, 1)
LEAF = BlockRef(2, 1)


@pytest.fixture
def bank() -> FakeBank:
    return FakeBank()


@pytest.fixture
def service(bank: FakeBank) -> Iterator[FakeService]:
    service = FakeService(bank)
    yield service
    service.close()


def test_a_topic_is_copied_with_everything_under_it(bank: FakeBank, service: FakeService) -> None:
    at = ("--bank", service.endpoint)
    dry = json.loads(membank("copy", "1/0", "1/1", "--dry-run", *at, "--json").out)
    assert [change["block"] for change in dry["changes"]] == ["1/1", "2/2", "2/3"]
    assert bank.revision == 0
    ended = membank("copy", "topic 1/0", "1/1", *at)
    assert (ended.code, bank.revision) == (0, 1)
    assert "copy: changed 3 blocks" in ended.out
    for source, target in zip(SPEC.subtree(A), SPEC.subtree(B), strict=True):
        np.testing.assert_array_equal(bank.held(target).weight, bank.held(source).weight)


def test_a_block_is_blended_scaled_and_zeroed(bank: FakeBank, service: FakeService) -> None:
    own, other = (bank.held(ref).weight.astype(np.float32) for ref in (A, B))
    leaf = bank.held(LEAF).weight.copy()
    alone = ("--only-block", "--bank", service.endpoint)
    assert membank("blend", "1/0", "--with", "1/1", "--share", "0.25", *alone).code == 0
    np.testing.assert_array_equal(bank.held(A).weight, 0.75 * own + 0.25 * other)
    assert membank("scale", "1/0", "--by", "-2", "--expect-version", "1", *alone).code == 0
    np.testing.assert_array_equal(bank.held(A).weight, -2 * (0.75 * own + 0.25 * other))
    assert membank("zero", "1/0", *alone).code == 0
    assert not bank.held(A).weight.any()
    np.testing.assert_array_equal(bank.held(LEAF).weight, leaf)
    ended = membank("zero", "1/0", "--expect-version", "9", *alone)
    assert (ended.code, "VERSION_MISMATCH" in ended.err) == (5, True)


def test_a_deletion_names_the_stored_packs_that_go(
    bank: FakeBank, service: FakeService, monkeypatch: pytest.MonkeyPatch
) -> None:
    at = ("--bank", service.endpoint)
    bank.store_pack(A, "iron")
    bank.store_pack(LEAF, "steel")
    bank.store_pack(B, "another")
    dry = membank("delete", "1/0", "--dry-run", *at)
    assert "stored packs would be destroyed: iron, steel" in dry.out
    document = json.loads(membank("delete", "1/0", "--dry-run", *at, "--json").out)
    assert document["packs_destroyed"] == ["iron", "steel"]
    assert len(bank.list_packs()) == 3
    monkeypatch.setattr(sys, "stdin", io.StringIO("n\n"))
    ended = membank("delete", "1/0", *at)
    assert (ended.code, bank.revision) == (1, 0)
    assert "the stored packs iron, steel for good?" in " ".join(ended.err.split())
    ended = membank("delete", "1/0", "--yes", *at)
    assert "stored packs destroyed: iron, steel" in ended.out
    assert [pack.name for pack in bank.list_packs()] == ["another"]


def test_deleted_blocks_are_left_out_and_said(bank: FakeBank, service: FakeService) -> None:
    bank.held(LEAF).state = BlockState.DELETED
    ended = membank("zero", "1/0", "--bank", service.endpoint)
    assert ended.code == 0
    assert "left out: 2/1" in " ".join(ended.err.split())
    assert bank.held(LEAF).version == 0
    ended = membank("scale", "2/1", "--by", "2", "--bank", service.endpoint)
    assert (ended.code, "BLOCK_DELETED" in ended.err) == (4, True)
    # A copy creates a deleted target anew, and has nothing to take from a deleted source.
    ended = membank("copy", "2/0", "2/1", "--bank", service.endpoint)
    assert (ended.code, bank.held(LEAF).version) == (0, 1)


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (("copy", "1/0", "2/1"), 2, "--only-block"),
        (("copy", "1/9", "1/1"), 3, "no cluster 9"),
        (("zero", "1/0", "--expect-version", "0"), 2, "changes 3"),
        (("scale", "2/0", "--by", "nan"), 2, "finite"),
        (("blend", "2/0", "--with", "2/1", "--share", "1e39"), 2, "finite"),
        (("apply", "nowhere.jsonl"), 2, "nowhere.jsonl"),
    ],
)
def test_what_cannot_be_is_said(
    bank: FakeBank, service: FakeService, args: tuple[str, ...], code: int, words: str
) -> None:
    ended = membank(*args, "--bank", service.endpoint)
    assert (ended.code, bank.revision) == (code, 0)
    assert words in " ".join(ended.err.split())
    assert "Traceback" not in ended.err


STEPS = """
{"step": "swap", "block": "1/2", "weights": "iron.npy", "expect_version": 0}
{"step": "copy", "from": "2/0", "to": "2/1", "expect_from_version": 0}

{"step": "blend", "block": "1/0", "with": "topic 1/1", "share": 0.5}
{"step": "scale", "block": "1/1", "by": 2}
{"step": "zero", "block": "2/3"}
{"step": "withhold", "topic": "1/3", "only_block": true}
{"step": "delete", "topic": "2/2"}
{"step": "place", "topic": "1/2", "label": "iron", "documents": 12, "centroid": "row.npy"}
{"step": "place", "topic": "2/2", "centroid": null}
"""


@pytest.fixture
def steps(tmp_path: Path) -> Path:
    np.save(tmp_path / "iron.npy", np.full(SPEC.block_shape(1), 3.0, np.float32))
    np.save(tmp_path / "row.npy", np.array([0.5, 1.0], np.float32))
    path = tmp_path / "steps.jsonl"
    path.write_text(STEPS)
    return path


def test_a_file_of_steps_is_one_transaction(
    bank: FakeBank, service: FakeService, steps: Path
) -> None:
    at = ("--bank", service.endpoint, "--json")
    own, other = (bank.held(ref).weight.astype(np.float32) for ref in (A, B))
    dry = json.loads(membank("apply", str(steps), "--dry-run", *at).out)
    assert (dry["dry_run"], len(dry["changes"]), bank.revision) == (True, 7, 0)
    done = json.loads(membank("apply", str(steps), "--yes", *at).out)
    assert (done["revision"], bank.revision) == (1, 1)
    assert done["tree_changes"] == [
        {"topic": "1/2", "label": True, "documents": True, "centroid": "set"},
        {"topic": "2/2", "label": False, "documents": False, "centroid": "removed"},
    ]
    np.testing.assert_array_equal(bank.held(BlockRef(1, 2)).weight, 3.0)
    np.testing.assert_array_equal(bank.held(A).weight, 0.5 * own + 0.5 * other)
    np.testing.assert_array_equal(bank.held(B).weight, 2 * other)
    assert bank.held(BlockRef(2, 2)).state is BlockState.DELETED
    assert bank.held(BlockRef(1, 3)).state is BlockState.WITHHELD
    steps.write_text(
        STEPS.replace(', "expect_version": 0', "").replace(
            '_from_version": 0', '_from_version": null'
        )
    )
    told = membank("apply", str(steps), "--dry-run", "--bank", service.endpoint).out
    assert "1/2 (label, documents, centroid set)" in " ".join(told.split())


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "no JSON"),
        ("[]", "no JSON object"),
        ('{"block": "1/0"}', "'step'"),
        ('{"step": "burn", "block": "1/0"}', "no step 'burn'"),
        ('{"step": "zero"}', "'block'"),
        ('{"step": "zero", "block": "2/0", "by": 2}', "no field 'by'"),
        ('{"step": "scale", "block": "1/0", "by": true}', "a number"),
        ('{"step": "zero", "block": "1/0", "expect_version": "1"}', "a version"),
        ('{"step": "swap", "block": "1/0", "weights": "gone.npy"}', "gone.npy"),
        ('{"step": "place", "topic": "1/0"}', "nothing is to be changed"),
        ('{"step": "delete", "topic": "1/2"}', "already"),
    ],
)
def test_a_wrong_line_is_named(
    bank: FakeBank, service: FakeService, steps: Path, line: str, words: str
) -> None:
    steps.write_text(STEPS + line)
    ended = membank("apply", str(steps), "--yes", "--bank", service.endpoint)
    assert (ended.code, bank.revision) == (2, 0)
    told = " ".join(ended.err.split())
    assert words in told
    assert f":{len(STEPS.splitlines()) + 1}:" in told


def test_deleting_by_a_file_asks_first(
    bank: FakeBank, service: FakeService, steps: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("n\n"))
    ended = membank("apply", str(steps), "--bank", service.endpoint)
    assert (ended.code, bank.revision) == (1, 0)
    assert "Delete 1 blocks" in ended.err


def test_the_audit_log_names_what_steps_were_applied_to(
    bank: FakeBank, service: FakeService
) -> None:
    combined: dict[str, object] = {
        "step": "combine",
        "block": "2/3",
        "keep": 0.5,
        "other": "2/4",
        "add": 0.5,
    }
    deleted: dict[str, object] = {"step": "delete", "topic": "1/2"}
    bank.audit = [
        _record("transaction", [combined, deleted]),
        _record("combine", [combined]),
    ]
    told = membank("audit", "--bank", service.endpoint).out
    mixed, alone = (" ".join(line.split()) for line in told.splitlines()[-3:-1])
    assert mixed.endswith("transaction combine 2/3 with 2/4, delete 1/2")
    assert alone.endswith("combine 2/3 with 2/4")
    assert "combine combine" not in alone


def _record(operation: str, steps: list[dict[str, object]]) -> AuditRecord:
    return AuditRecord(
        revision=1,
        time_s=0.0,
        principal="alice",
        operation=operation,
        request_id="r",
        detail={"steps": steps},
    )
