"""The command line: what it prints, how it exits, and that no traceback reaches a user."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest

from command_line import membank
from membank.cli.app import app
from membank.cli.exits import EXIT_CODES
from membank.wire.errors import LEAVES


@pytest.fixture
def free_port() -> int:
    """A port on which nothing listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# Fetch and bank of the paper's three recipes and three post-hoc ones, tables 1 to 3.
PAPER = {
    "paper_160m": (163_510_016, 18.1e6, 4.62e9),
    "paper_410m": (411_665_408, 49.5e6, 12.68e9),
    "paper_1_4b": (1_439_893_504, 153.4e6, 21.14e9),
    "gemma3_270m": (None, 23.2e6, 5.95e9),
    "qwen2_5_0_5b": (None, 43.4e6, 11.1e9),
    "llama3_2_1b": (None, 102.2e6, 14.1e9),
}


@pytest.mark.parametrize("name", [*PAPER, "demo"])
def test_plan_prints_the_sizes_of_a_recipe(name: str) -> None:
    ended = membank("plan", "--recipe", name, "--json")
    sizes = json.loads(ended.out)
    assert ended.code == 0
    assert {"anchor_params", "fetch_params", "bank_params", "bank_bytes", "optimizer_bytes"} <= (
        sizes.keys()
    )
    assert sizes["optimizer_bytes"] == 8 * sizes["bank_params"]
    if name in PAPER:
        anchor, fetch, bank = PAPER[name]
        assert anchor in (None, sizes["anchor_params"])
        assert sizes["fetch_params"] == pytest.approx(fetch, rel=0.005)
        assert sizes["bank_params"] == pytest.approx(bank, rel=0.005)
        assert sizes["bank_bytes"] == 2 * sizes["bank_params"]


def test_plan_lists_every_recipe() -> None:
    ended = membank("plan")
    assert ended.code == 0
    assert all(name in ended.out for name in PAPER)


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (("plan", "--recipe", "paper_9000b"), 2, "paper_160m"),
        (("plan", "--optimizer", "lion"), 2, "adamw"),
        (("tree", "--recipe", "huge"), 2, "demo"),
        (("tree", "--fan-out", "16,x"), 2, "16,16"),
        (("corpus", "nowhere.jsonl"), None, "nowhere.jsonl"),
        (("swap", "1/0", "missing.npy"), 2, "missing.npy"),
        (("frobnicate",), 2, "frobnicate"),
        (("create", "--bank", "b", "--run", "no-such-run"), 3, "no-such-run"),
    ],
)
def test_bad_input_is_one_line_that_says_what_to_do(
    args: tuple[str, ...],
    code: int | None,
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    ended = membank(*args)
    assert ended.code == code if code is not None else ended.code != 0
    assert words in ended.err
    assert "Traceback" not in ended.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_no_service_is_said_with_its_address(free_port: int) -> None:
    address = f"127.0.0.1:{free_port}"
    ended = membank("topics", "--bank", address, "--json")
    assert (
        ended.code
        == EXIT_CODES[next(leaf for leaf in LEAVES if leaf.__name__ == "UnavailableError")]
    )
    document = json.loads(ended.err.strip().splitlines()[-1])
    assert address in document["error"]


def test_every_error_has_an_exit_code_and_none_is_success() -> None:
    assert set(EXIT_CODES) == set(LEAVES)
    assert all(code > 0 for code in EXIT_CODES.values())


def test_every_command_has_help_with_an_example() -> None:
    for command in app.registered_commands:
        assert command.name is not None
        ended = membank(command.name, "--help")
        assert ended.code == 0
        assert "Example" in ended.out, command.name
