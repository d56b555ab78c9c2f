"""`membank delete --documents`, against a service in this process."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from command_line import membank
from deletion_rig import DeletionRig, trained_on
from membank.trainer.run import RunDirectory, load_config
from membank.trainer.training import InProcessMemory
from membank.wire.spec import BlockRef, BlockState
from tiny_run import bank_spec, make_tiny_run
from tiny_world import World, make_world


@pytest.fixture(scope="module")
def world() -> World:
    return make_world()


@pytest.fixture(scope="module")
def trained(world: World, tmp_path_factory: pytest.TempPathFactory) -> InProcessMemory:
    torch.set_num_threads(1)
    run = make_tiny_run(tmp_path_factory.mktemp("trained") / "run", world)
    return trained_on(world, bank_spec(run, load_config(run)), load_config(run).stage2)


@pytest.fixture
def rig(
    world: World, trained: InProcessMemory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[DeletionRig]:
    # Several threads would wait for each other at these sizes.
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    run = make_tiny_run(tmp_path / "run", world)
    with DeletionRig(world, run, trained) as rig:
        yield rig


@pytest.fixture
def documents(tmp_path: Path) -> Path:
    path = tmp_path / "documents.jsonl"
    path.write_text('{"text": "The number of ada is 31."}\n{"text": "Nobody wrote this."}\n')
    return path


def _args(rig: DeletionRig, documents: Path, *more: str) -> tuple[str, ...]:
    at = ("--run", str(rig.run.path), "--bank", rig.endpoint)
    return ("delete", "--documents", str(documents), *at, *more)


def test_a_dry_run_lists_all_and_changes_nothing(rig: DeletionRig, documents: Path) -> None:
    ended = membank(*_args(rig, documents, "--dry-run", "--json"))
    assert ended.code == 0, ended.err
    told = json.loads(ended.out)
    assert [part["ref"] for part in told["retrained"]] == ["1/0", "2/0"]
    assert [part["removed_documents"] for part in told["retrained"]] == [1, 1]
    assert told["estimated_s"] > 0
    assert "Nobody wrote this" in told["unknown"][0]
    shown = membank(*_args(rig, documents, "--dry-run"))
    assert all(words in shown.out for words in ("trained anew", "2/0", "Nobody", "steps"))
    assert rig.bank.revision == 0
    assert not rig.run.deletion_dir.exists()


@pytest.mark.slow
def test_documents_are_deleted_and_what_stays_is_said(rig: DeletionRig, documents: Path) -> None:
    ended = membank(*_args(rig, documents, "--yes", "--json"))
    assert ended.code == 0, ended.err
    told = json.loads(ended.out)
    assert (told["phase"], told["destroyed"]["revision"], told["installed"]["revision"]) == (
        "done",
        1,
        2,
    )
    assert told["installed"]["blocks"] == {"1/0": 2, "2/0": 2}
    assert any("anchor" in words for words in told["residue"])
    assert Path(told["receipt"]).is_file()
    again = membank(*_args(rig, documents, "--yes"))
    assert again.code == 0
    assert "deleted already" in again.err
    assert "with memory" in again.out
    assert rig.bank.revision == 2


def test_nothing_is_deleted_without_a_yes(
    rig: DeletionRig, documents: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("n\n"))
    ended = membank(*_args(rig, documents))
    assert ended.code != 0
    assert rig.bank.revision == 0


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (("delete",), 2, "--documents"),
        (("delete", "1/0", "--documents", "DOCUMENTS"), 2, "either"),
        (("delete", "--documents", "DOCUMENTS"), 2, "--run"),
        (("delete", "--documents", "DOCUMENTS", "--run", "RUN", "--scope", "all"), 2, "topics"),
        (
            ("delete", "--documents", "DOCUMENTS", "--run", "RUN", "--threshold", "0"),
            2,
            "threshold",
        ),
        (
            ("delete", "--documents", "DOCUMENTS", "--run", "RUN", "--threshold", "2"),
            2,
            "threshold",
        ),
        (("delete", "--documents", "absent.jsonl", "--run", "RUN"), 2, "absent.jsonl"),
        (("delete", "--documents", "DOCUMENTS", "--run", "no-run"), 3, "no-run"),
        (("delete", "--documents", "STRANGE", "--run", "RUN"), 2, "none of the documents"),
    ],
)
def test_bad_input_is_one_line(
    rig: DeletionRig, documents: Path, tmp_path: Path, args: tuple[str, ...], code: int, words: str
) -> None:
    strange = tmp_path / "strange.jsonl"
    strange.write_text('{"text": "Nobody wrote this."}\n')
    named = {"DOCUMENTS": str(documents), "RUN": str(rig.run.path), "STRANGE": str(strange)}
    ended = membank(*(named.get(arg, arg) for arg in args), "--bank", rig.endpoint, "--yes")
    assert ended.code == code, ended.err
    assert words in ended.err
    assert "Traceback" not in ended.err
    assert rig.bank.revision == 0


def test_a_withheld_block_is_to_be_restored_first(rig: DeletionRig, documents: Path) -> None:
    rig.client.withhold(BlockRef(2, 0))
    ended = membank(*_args(rig, documents, "--yes"))
    assert ended.code == 4
    assert "membank restore 2/0" in ended.err
    assert rig.bank.held(BlockRef(2, 0)).state is BlockState.WITHHELD


def test_another_run_is_refused(rig: DeletionRig, documents: Path, world: World) -> None:
    run = RunDirectory(rig.run.path)
    run.tokenizer_file.write_text(run.tokenizer_file.read_text() + "\n")
    (rig.run.path / "anchor.safetensors").unlink()
    ended = membank(*_args(rig, documents, "--yes"))
    assert ended.code == 3
    assert "anchor.safetensors" in ended.err
