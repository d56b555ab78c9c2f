"""`membank find`, against a service in this process."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from command_line import membank
from fake_bank import FakeBank
from fake_service import FakeService
from membank.trainer.run import RunDirectory, load_config
from membank.wire.format import encode_tree
from membank.wire.steps import Withhold
from tiny_run import bank_spec, make_tiny_run, tiny_tree
from tiny_world import World, make_world

TEXT = "The number of ada is 31."


@pytest.fixture(scope="module")
def world() -> World:
    return make_world()


@pytest.fixture(scope="module")
def run(world: World, tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    return make_tiny_run(tmp_path_factory.mktemp("find") / "run", world)


@pytest.fixture
def bank(world: World, run: RunDirectory) -> FakeBank:
    bank = FakeBank(spec=bank_spec(run, load_config(run)), tree=encode_tree(tiny_tree(world)))
    rng = np.random.default_rng(0)
    for ref in bank.spec.blocks():
        # As they are made they would add nothing.
        held = bank.held(ref)
        held.weight = 0.1 * rng.standard_normal(held.weight.shape, np.float32)
    return bank


@pytest.fixture
def endpoint(bank: FakeBank) -> Iterator[str]:
    service = FakeService(bank)
    yield service.endpoint
    service.close()


@pytest.fixture
def documents(tmp_path: Path, world: World) -> Path:
    path = tmp_path / "documents.jsonl"
    lines = [{"text": TEXT}, {"id": "city/bob"}, {"text": "Wholly unknown words."}]
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def test_a_text_is_routed_without_a_run(endpoint: str) -> None:
    ended = membank("find", TEXT, "--bank", endpoint, "--json")
    assert ended.code == 0, ended.err
    found = json.loads(ended.out)
    routed = json.loads(membank("route", TEXT, "--bank", endpoint, "--json").out)
    assert found["paths"] == [[block["topic"] for block in routed["paths"][0]]]
    assert [block["share"] for block in found["blocks"]] == [1.0, 1.0]
    assert [block["version"] for block in found["blocks"]] == [0, 0]
    assert found["revision"] == 0
    told = membank("find", TEXT, "--bank", endpoint)
    assert all(block["block"] in told.out for block in found["blocks"])


def test_shares_of_documents_add_up_per_level(endpoint: str, world: World, tmp_path: Path) -> None:
    path = tmp_path / "all.jsonl"
    path.write_text("\n".join(json.dumps({"text": d.text}) for d in world.documents))
    ended = membank("find", "--documents", str(path), "--bank", endpoint, "--json")
    found = json.loads(ended.out)
    for level in "12":
        shares = [b["share"] for b in found["blocks"] if b["block"].startswith(level)]
        assert sum(shares) == pytest.approx(1.0)


def test_with_a_run_what_blocks_do_is_measured_and_named_with_versions(
    endpoint: str, bank: FakeBank, run: RunDirectory, world: World, documents: Path
) -> None:
    leaf = world.paths.holding[0][-1]
    bank.swap({leaf: bank.held(leaf).weight}, {}, request_id="swap", dry_run=False)
    args = ("find", "--documents", str(documents), "--run", str(run.path), "--bank", endpoint)
    ended = membank(*args, "--json")
    assert ended.code == 0, ended.err
    found = json.loads(ended.out)
    assert (found["num_documents"], found["revision"]) == (3, 1)
    blocks = {block["ref"]: block for block in found["influence"]["blocks"]}
    assert blocks[str(leaf)]["version"] == 1
    assert isinstance(blocks[str(leaf)]["nats_per_token"], float)
    trained = {str(ref) for row in (0, 9) for ref in world.paths.holding[row]}
    assert set(found["trained"]) == trained <= set(blocks)
    told = membank(*args)
    assert "anchor alone" in told.out
    assert str(leaf) in told.out


def test_a_withheld_block_is_shown_without_influence(
    endpoint: str, bank: FakeBank, run: RunDirectory, world: World
) -> None:
    top = world.paths.holding[0][0]
    bank.apply([Withhold(topic=top)], request_id="w", dry_run=False)
    ended = membank("find", TEXT, "--run", str(run.path), "--bank", endpoint, "--json")
    blocks = {block["ref"]: block for block in json.loads(ended.out)["influence"]["blocks"]}
    assert (blocks[str(top)]["state"], blocks[str(top)]["nats_per_token"]) == ("withheld", None)


def test_square_brackets_of_texts_and_labels_are_printed_as_they_are(
    endpoint: str, bank: FakeBank, run: RunDirectory, world: World, tmp_path: Path
) -> None:
    top = world.paths.holding[0][0]
    tree = tiny_tree(world)
    labels = dict.fromkeys(tree.labels, "[/b] hello")
    bank.tree_bytes = encode_tree(replace(tree, labels=labels))
    bank.labels = labels
    path = tmp_path / "d.jsonl"
    path.write_text(json.dumps({"id": "[/nobody]"}) + "\n" + json.dumps({"text": TEXT}))
    args = ("find", "--documents", str(path), "--run", str(run.path), "--bank", endpoint)
    ended = membank(*args)
    assert ended.code == 0, ended.err
    assert "[/nobody]" in ended.err
    assert "[/b] hello" in ended.out
    for command in (("topics",), ("show", str(top)), ("route", TEXT), ("find", TEXT)):
        assert "[/b] hello" in membank(*command, "--bank", endpoint).out


def test_an_id_that_the_corpus_lacks_is_said_and_left_out(
    endpoint: str, run: RunDirectory, tmp_path: Path
) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text('{"id": "city/zoe"}\n{"id": "city/bob"}\n')
    ended = membank("find", "--documents", str(path), "--run", str(run.path), "--bank", endpoint)
    assert ended.code == 0
    assert "city/zoe" in ended.err
    assert "1 documents" in ended.out


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        ((), 2, "--documents"),
        ((TEXT, "--documents", "x.jsonl"), 2, "either"),
        (("  ",), 2, "empty"),
        (("--documents", "missing.jsonl"), 2, "missing.jsonl"),
        (("--documents", "ids.jsonl"), 2, "--run"),
        ((TEXT, "--run", "no-such-run"), 3, "no-such-run"),
        (("--documents", "nobody.jsonl", "--run", "RUN"), 2, "nobody"),
    ],
)
def test_bad_input_is_one_line(
    endpoint: str,
    run: RunDirectory,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    args: tuple[str, ...],
    code: int,
    words: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("ids.jsonl").write_text('{"id": "city/bob"}\n')
    Path("nobody.jsonl").write_text('{"id": "nobody"}\n')
    given = [str(run.path) if arg == "RUN" else arg for arg in args]
    ended = membank("find", *given, "--bank", endpoint)
    assert ended.code == code, ended.err
    assert words in ended.err
    assert "Traceback" not in ended.err
