"""`membank edit` against a service in this process: what it prints, and how it ends."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch

from command_line import membank
from fake_bank import FakeBank
from fake_service import FakeService
from membank.trainer.editing import EditConfig
from membank.trainer.run import RunDirectory, load_config
from membank.wire.format import encode_tree
from tiny_run import bank_spec, make_tiny_run, tiny_tree
from tiny_world import World, make_world


@pytest.fixture(scope="module")
def world() -> World:
    torch.set_num_threads(1)
    return make_world()


@pytest.fixture
def run(world: World, tmp_path: Path) -> RunDirectory:
    return make_tiny_run(tmp_path / "run", world)


@pytest.fixture
def bank(world: World, run: RunDirectory) -> FakeBank:
    return FakeBank(spec=bank_spec(run, load_config(run)), tree=encode_tree(tiny_tree(world)))


@pytest.fixture
def endpoint(bank: FakeBank) -> Iterator[str]:
    service = FakeService(bank)
    yield service.endpoint
    service.close()


def _facts(folder: Path, world: World, **fields: str) -> str:
    file = folder / "facts.jsonl"
    fact = {"id": "one", "prompt": world.facts[0].prompt, "target": "55", **fields}
    file.write_text(json.dumps(fact))
    return str(file)


@pytest.mark.slow
def test_square_brackets_of_facts_are_printed_as_they_are(
    endpoint: str,
    bank: FakeBank,
    run: RunDirectory,
    world: World,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("membank.trainer.run.edit.EditConfig", partial(EditConfig, max_steps=1))
    at = ("--run", str(run.path), "--bank", endpoint)
    facts = _facts(tmp_path, world, id="[/one]", target="[bold]55[/i]")
    made = membank("edit", facts, "--force", *at)
    assert (made.code, bank.revision) == (0, 1), made.err
    assert "edited [/one]" in made.out
    assert "[bold]55[/i]" in made.out
    listed = membank("edit", "--list", *at)
    assert "[/one]" in listed.out
    undone = membank("edit", "--undo", "[/one]", *at)
    assert "undone [/one]" in undone.out


def test_a_run_that_cannot_be_written_is_one_line(
    endpoint: str, bank: FakeBank, run: RunDirectory, world: World, tmp_path: Path
) -> None:
    # A file where the folder of the log should be: fails for root too.
    (run.path / "edits").write_text("")
    ended = membank("edit", _facts(tmp_path, world), "--run", str(run.path), "--bank", endpoint)
    assert (ended.code, bank.revision) == (4, 0)
    assert str(run.path / "edits") in ended.err.replace("\n", "")
    assert "Traceback" not in ended.err
