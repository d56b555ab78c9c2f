"""Bad input at a whole service: a clear error, an exit code, and the bank as it was."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from command_line import membank
from membank.bank_service.cluster import UpConfig, down, up
from membank.bank_service.store import Bank
from membank.client import BankClient, ClientConfig
from membank.wire.errors import (
    InvalidArgumentError,
    MembankError,
    NotFoundError,
    Reason,
)
from membank.wire.spec import BankSpec, BlockRef, LevelSpec

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(180)]

SPEC = BankSpec(
    name="strict",
    num_layers=2,
    width=16,
    levels=(LevelSpec(fan_out=4, block_width=4), LevelSpec(fan_out=4, block_width=4)),
    max_staleness=2,
)
REF = BlockRef(1, 1)


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("strict")
    Bank.create(str(folder / "bank"), SPEC)
    config = UpConfig(bank_url=str(folder / "bank"), port=0, runtime_dir=folder / "run")
    address = up(config).address
    try:
        with BankClient.connect(address) as client:
            values = np.ones(SPEC.block_shape(1), np.float32)
            version = 0
            for _ in range(4):
                version = client.push({REF: values}, base={REF: version}).versions[REF]
        yield address
    finally:
        down(runtime_dir=config.runtime_dir)


@pytest.fixture
def client(endpoint: str) -> Iterator[BankClient]:
    """A client; whatever the test does, the bank must be bit for bit as it was."""
    with BankClient.connect(endpoint) as client:
        before = _state(client)
        yield client
        assert _state(client) == before


def _state(client: BankClient) -> dict[BlockRef, tuple[int, int]]:
    blocks = client.fetch_blocks(list(SPEC.blocks()))
    return {ref: (block.version, block.header.crc32c) for ref, block in blocks.items()}


def _content(bank: Path) -> dict[Path, bytes]:
    """Return every file of a bank but those of writers that are, or were, under way."""
    files = (path for path in bank.rglob("*") if path.is_file() and ".tmp" not in path.parts)
    return {path: path.read_bytes() for path in files}


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (("show", "9/0"), 3, "levels are 1..2"),
        (("show", "1/99"), 3, "0..3"),
        (("show", "alchemy"), 3, "alchemy"),
        (("withhold", "3/0"), 3, "levels are 1..2"),
        (("delete", "1/4", "--yes"), 3, "0..3"),
        (("swap", "1/1", "shape.npy"), 2, "(2, 3, 4, 16)"),
        (("swap", "1/1", "integers.npy"), 2, "int64"),
        (("swap", "1/1", "garbage.npy"), 2, "garbage.npy"),
        (("swap", "1/1", "good.npy", "--expect-version", "77"), 5, "77"),
        (("import", "garbage.npy"), 2, "pack"),
        (("import", "nowhere.pack"), 2, "nowhere.pack"),
        (("export", "1/9", "never.pack"), 3, "0..3"),
        (("rollback", "--to", "nothing"), 3, "nothing"),
        (("snapshot", "Not A Name"), 2, "lower case"),
        (("route", "anything"), 3, "retriever"),
    ],
)
def test_commands(
    args: tuple[str, ...],
    code: int,
    words: str,
    endpoint: str,
    client: BankClient,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    np.save("good.npy", np.zeros(SPEC.block_shape(1), np.float32))
    np.save("shape.npy", np.zeros((2, 3, 5, 16), np.float32))
    np.save("integers.npy", np.zeros(SPEC.block_shape(1), np.int64))
    Path("garbage.npy").write_bytes(b"not an array")
    files = sorted(tmp_path.iterdir())
    ended = membank(*args, "--bank", endpoint)
    assert ended.code == code, ended.err
    assert words in ended.err
    assert "Traceback" not in ended.err
    assert sorted(tmp_path.iterdir()) == files


def test_a_truncated_pack_is_refused_whole(
    endpoint: str, client: BankClient, tmp_path: Path
) -> None:
    pack = tmp_path / "topic.pack"
    pack.write_bytes(client.export(REF)[:-100])
    ended = membank("import", str(pack), "--bank", endpoint)
    assert ended.code in (2, 9)
    assert "Traceback" not in ended.err


def test_pushes(endpoint: str, client: BankClient) -> None:
    good = np.ones(SPEC.block_shape(1), np.float32)
    stale = client.push({REF: good}, base={REF: 0})
    assert [result.reason for result in stale.results] == [Reason.STALE_VERSION]
    ahead = client.push({REF: good}, base={REF: 10_000})
    assert [result.accepted for result in ahead.results] == [False]
    for values, reason in (
        (np.ones((1, 3, 4, 16), np.float32), Reason.BAD_SHAPE),
        (np.ones(SPEC.block_shape(1), np.int32), Reason.BAD_DTYPE),
    ):
        with pytest.raises(InvalidArgumentError) as caught:
            client.push({REF: values}, base={REF: 4})
        assert caught.value.reason is reason
    nan = client.push({REF: good * np.nan}, base={REF: 4})
    assert [result.reason for result in nan.results] == [Reason.NOT_FINITE]


def test_another_bank_is_not_served(endpoint: str, client: BankClient) -> None:
    with (
        pytest.raises(NotFoundError) as caught,
        BankClient.connect(endpoint, config=ClientConfig(bank="other")) as stranger,
    ):
        stranger.fetch([REF])
    assert caught.value.reason is Reason.UNKNOWN_BANK


def test_too_much_at_once_is_said_before_it_travels(endpoint: str, client: BankClient) -> None:
    config = ClientConfig(max_answer_bytes=1000, max_push_bytes=1000)
    with BankClient.connect(endpoint, config=config) as small:
        with pytest.raises(MembankError) as caught:
            small.fetch([REF])
        assert caught.value.reason is Reason.MESSAGE_TOO_LARGE
        with pytest.raises(MembankError) as caught:
            small.push({REF: np.ones(SPEC.block_shape(1), np.float32)}, base={REF: 4})
        assert caught.value.reason is Reason.MESSAGE_TOO_LARGE


def test_a_damaged_bank_does_not_start_and_stays_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEMBANK_RUNTIME_DIR", str(tmp_path / "run"))
    bank = tmp_path / "bank"
    Bank.create(str(bank), SPEC)
    spec = bank / "bank.json"
    spec.write_text(spec.read_text()[:-20])
    files = _content(bank)
    ended = membank("up", "--bank", str(bank), "--port", "0")
    assert ended.code == 9, ended.err
    assert "bank.json" in ended.err
    assert _content(bank) == files


def test_an_occupied_port_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEMBANK_RUNTIME_DIR", str(tmp_path / "run"))
    Bank.create(str(tmp_path / "bank"), SPEC)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        ended = membank("up", "--bank", str(tmp_path / "bank"), "--port", port)
    assert ended.code == 4, ended.err
    assert port in ended.err
