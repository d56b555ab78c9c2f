"""`membank bench fetch`, `push`, `mixed` and `train`: what they do, refuse and leave behind."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from child_targets import die, refuse, wait
from command_line import membank
from membank.cli.bench.child_process import Child
from membank.cli.bench.client_process import MAX_ERRORS_IN_A_ROW, Caller, ClientTask
from membank.cli.bench.workload import Operation, Traffic
from membank.client import BankClient, ClientConfig
from membank.wire.errors import DeadlineError, InternalError, NotFoundError
from membank.wire.spec import BankSpec, BlockRef, LevelSpec
from served_bank import ServedBank

LEAF = BlockRef(2, 0)

# Processes that import torch take long to start on a machine that does other things too.
PATIENT = pytest.mark.timeout(240)


def served_spec(name: str) -> BankSpec:
    """Return a bank of 4 + 16 blocks of 6 KB."""
    levels = (LevelSpec(fan_out=4, block_width=4),) * 2
    return BankSpec(name=name, num_layers=2, width=64, levels=levels)


@pytest.fixture
def served(tmp_path: Path) -> Iterator[ServedBank]:
    """A bank that somebody uses."""
    with ServedBank(tmp_path / "bank", served_spec("precious")) as bank:
        yield bank


def versions(endpoint: str) -> set[int]:
    """Return the versions of all blocks."""
    with BankClient.connect(endpoint) as bank:
        return set(bank.fetch_blocks(list(bank.spec.blocks())).versions.values())


def rows_of(path: Path) -> dict[str, dict[str, Any]]:
    """Return the rows of a file of results by name."""
    return {row["name"]: row for row in json.loads(path.read_text())["rows"]}


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (("fetch", "--preset", "3tb"), 2, "paper_1_4b"),
        (("fetch", "--dtype", "float64", "--quick"), 2, "bfloat16"),
        (("fetch", "--create"), 2, "--bank"),
        (("push", "--yes-change-this-bank"), 2, "--bank"),
        (("fetch", "--bank", "localhost:1", "--preset", "1mb"), 2, "--create"),
        (("fetch", "--bank", "localhost:1", "--scale"), 2, "--scale"),
        (("fetch", "--bank", "localhost:1"), 7, "membank up"),
        (("fetch", "--baseline", "no-such.json"), 2, "no-such.json"),
        (("fetch", "--plot", "figure.docx"), 2, "figure.docx"),
        (("fetch", "--clients", "0"), 2, "--clients"),
        (("mixed", "--push-share", "1"), 2, "--push-share"),
        (("train", "--model", "gpt"), 2, "demo-10x"),
    ],
)
def test_bad_input_is_said_before_anything_is_measured(
    args: tuple[str, ...],
    code: int,
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    ended = membank("bench", *args)
    assert ended.code == code, ended.err
    assert words in ended.err
    assert "Traceback" not in ended.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["push", "mixed"])
def test_pushes_leave_a_bank_alone_that_was_not_made_for_them(
    command: str, served: ServedBank
) -> None:
    ended = membank("bench", command, "--quick", "--bank", served.endpoint)
    assert ended.code == 4
    assert "precious" in ended.err
    assert "--yes-change-this-bank" in ended.err
    assert versions(served.endpoint) == {0}


@pytest.mark.slow
def test_a_bank_is_changed_where_that_is_asked_for(served: ServedBank, tmp_path: Path) -> None:
    out = tmp_path / "now.json"
    ended = membank(
        "bench", "push", "--bank", served.endpoint, "--yes-change-this-bank",
        "--requests", "40", "--json", str(out),
    )  # fmt: skip
    assert ended.code == 0, ended.err
    row = rows_of(out)["push-precious-1-client"]
    assert row["requests"] == 40
    assert row["gradients"] == 80
    assert row["gradients_refused"] == 0
    assert max(versions(served.endpoint)) > 0


@pytest.mark.slow
def test_a_scratch_bank_may_be_pushed_to_unasked(tmp_path: Path) -> None:
    with ServedBank(tmp_path / "bank", served_spec("membank-bench")) as bank:
        ended = membank("bench", "push", "--bank", bank.endpoint, "--requests", "10")
        assert ended.code == 0, ended.err


@pytest.mark.slow
def test_fetches_of_several_clients_are_measured_and_change_nothing(
    served: ServedBank, tmp_path: Path
) -> None:
    out = tmp_path / "now.json"
    ended = membank(
        "bench", "fetch", "--bank", served.endpoint, "--clients", "1", "--clients", "2",
        "--requests", "60", "--dtype", "bfloat16", "--json", str(out),
    )  # fmt: skip
    assert ended.code == 0, ended.err
    rows = rows_of(out)
    assert set(rows) == {"fetch-precious-1-client", "fetch-precious-2-clients"}
    for row in rows.values():
        assert row["requests"] == 60
        # Two blocks of 2 * 3 * 4 * 64 parameters.
        assert row["bytes"] == 60 * 2 * 1536 * 2
        figures = row["figures"]
        assert 0 < figures["p50_ms"] <= figures["p95_ms"] <= figures["p99_ms"]
    assert versions(served.endpoint) == {0}
    document = json.loads(out.read_text())
    assert {"commit", "versions", "machine", "config", "time_utc"} <= document.keys()
    assert document["config"]["seed"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("command", ["fetch", "push"])
def test_what_travels_may_be_encoded_and_is_counted_as_it_travels(
    command: str, tmp_path: Path
) -> None:
    out = tmp_path / "now.json"
    with ServedBank(tmp_path / "bank", served_spec("membank-bench")) as bank:
        ended = membank(
            "bench", command, "--bank", bank.endpoint, "--requests", "20", "--dtype", "int8",
            "--json", str(out),
        )  # fmt: skip
    assert ended.code == 0, ended.err
    row = rows_of(out)[f"{command}-membank-bench-1-client"]
    assert not row["errors"]
    # Two blocks of 1,536 integers with a scale of 4 bytes for each 64 of them.
    assert row["bytes"] == 20 * 2 * (1536 + 1536 // 64 * 4)
    assert "as int8" in row["what"]


@pytest.mark.slow
def test_a_service_that_does_not_answer_is_said(served: ServedBank) -> None:
    # Half of the topics have no shard any more.
    served.shards[1].stop()
    ended = membank(
        "bench", "fetch", "--bank", served.endpoint, "--requests", "60", "--timeout", "0.3"
    )
    assert ended.code == 7
    assert "Traceback" not in ended.err


@pytest.mark.slow
def test_a_client_counts_errors_and_gives_up(served: ServedBank) -> None:
    config = ClientConfig(timeout_s=0.05)
    with BankClient.connect(served.endpoint, config=config) as bank:
        task = ClientTask(
            endpoint=served.endpoint,
            config=config,
            traffic=Traffic(num_requests=1000),
            client=0,
            num_clients=1,
            leaves=(LEAF,),
            versions={},
        )
        bank.fetch(bank.spec.path_to(LEAF))
        for shard in served.shards:
            shard.stop()
        report = Caller(bank, task).run(lambda done: None)
    assert report.gave_up
    assert report.errors.total() == MAX_ERRORS_IN_A_ROW
    assert report.last_error
    assert not report.calls[Operation.FETCH].seconds


@pytest.mark.slow
def test_a_run_is_set_beside_an_earlier_one(served: ServedBank, tmp_path: Path) -> None:
    first, second = tmp_path / "then.json", tmp_path / "now.json"
    args = ("bench", "fetch", "--bank", served.endpoint, "--requests", "20")
    ended = membank(*args, "--json", str(first))
    assert ended.code == 0, ended.err
    ended = membank(*args, "--json", str(second), "--baseline", str(first))
    assert ended.code == 0, ended.err
    assert "beside the earlier run" in ended.out
    compared = json.loads(second.read_text())["baseline"]["compared"]
    assert {figure["row"] for figure in compared} == {"fetch-precious-1-client"}
    assert {"p50_ms", "p99_ms", "mb_per_s"} <= {figure["figure"] for figure in compared}


@PATIENT
@pytest.mark.slow
def test_without_a_service_one_is_made_and_goes_again(tmp_path: Path) -> None:
    out, scratch = tmp_path / "now.json", tmp_path / "scratch"
    ended = membank(
        "bench", "mixed", "--quick", "--requests", "60", "--shards", "2", "--dir", str(scratch),
        "--json", str(out),
    )  # fmt: skip
    assert ended.code == 0, ended.err
    rows = rows_of(out)
    assert set(rows) == {"mixed-100kb-1-client-fetch", "mixed-100kb-1-client-push"}
    assert sum(row["requests"] for row in rows.values()) == 60
    assert all(row["server"]["processes"] == 2 for row in rows.values())
    assert all(row["gradients_refused"] == 0 and not row["errors"] for row in rows.values())
    assert list(scratch.iterdir()) == []


@PATIENT
@pytest.mark.slow
def test_a_large_bank_is_set_beside_a_small_one(tmp_path: Path) -> None:
    out = tmp_path / "scale.json"
    ended = membank("bench", "fetch", "--scale", "--quick", "--json", str(out))
    assert ended.code == 0, ended.err
    (row,) = rows_of(out).values()
    assert row["ratio"] > 0
    assert row["target"] == "ratio <= 1.1"


@PATIENT
@pytest.mark.slow
def test_training_through_a_service_is_set_beside_training_without(tmp_path: Path) -> None:
    out = tmp_path / "train.json"
    ended = membank(
        "bench", "train", "--quick", "--model", "demo", "--shards", "2", "--json", str(out)
    )
    assert ended.code == 0, ended.err
    (row,) = rows_of(out).values()
    assert row["name"] == "train-demo-2-shards"
    assert row["unit"] == "tokens/s"
    assert row["ours"] > 0
    assert row["raw"] > 0


@pytest.mark.slow
def test_what_a_child_fails_with_is_raised_here() -> None:
    child = Child("child", refuse, "gone")
    with pytest.raises(NotFoundError, match="gone"):
        child.receive(30)
    child.end(30)


@pytest.mark.slow
def test_a_child_that_dies_is_noticed() -> None:
    child = Child("child", die, "3")
    with pytest.raises(InternalError, match="exit code 3"):
        child.receive(30)
    child.end(30)


@pytest.mark.slow
def test_a_child_ends_when_it_is_let_go() -> None:
    child = Child("child", wait, "")
    with pytest.raises(DeadlineError, match="said nothing"):
        child.receive(0.0)
    process = child._process
    child.let_go()
    process.join(30)
    assert process.exitcode == 0
    child.end(30)
