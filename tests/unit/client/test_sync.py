"""The sync client: the same calls from any thread, and nothing that hangs after a fork."""

import inspect
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from fake_bank import SPEC, FakeBank
from fake_service import FakeService
from faults import Fault
from membank.client import AsyncBankClient, BankClient, Changes, ClientConfig
from membank.client.loop_thread import loop_thread
from membank.wire.errors import (
    ConflictError,
    DeadlineError,
    FailedPreconditionError,
    NotFoundError,
)
from membank.wire.spec import BlockRef, BlockState

PATH = (BlockRef(1, 0), BlockRef(2, 1))


@pytest.fixture
def bank() -> FakeBank:
    return FakeBank()


@pytest.fixture
def service(bank: FakeBank) -> Iterator[FakeService]:
    service = FakeService(bank)
    yield service
    service.close()


@pytest.fixture
def client(service: FakeService) -> Iterator[BankClient]:
    with BankClient.connect(service.endpoint) as client:
        yield client


def ones(ref: BlockRef) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    return np.ones(SPEC.block_shape(ref.level), np.float32)


def test_the_whole_round(bank: FakeBank, client: BankClient) -> None:
    assert client.info() == bank.info()
    assert client.spec == bank.spec
    memory = client.fetch(PATH, dtype="bfloat16")
    answer = client.push({PATH[0]: ones(PATH[0])}, base=memory.versions, step=3)
    assert answer.versions == {PATH[0]: 1}
    report = client.swap({PATH[1]: ones(PATH[1])}, expected={PATH[1]: 0})
    assert report.revision == 1
    assert client.withhold(PATH[1]).revision == 2
    assert client.fetch(PATH).ended_at == PATH[1]
    assert client.fetch_blocks(PATH).states[PATH[1]] is BlockState.WITHHELD
    pack = client.export(PATH[0])
    assert client.import_pack(pack, dry_run=True).topic == PATH[0]
    assert [snapshot.name for snapshot in (client.snapshot("one"), *client.snapshots())]
    assert client.audit(limit=1)[0].operation == "withhold"


def test_errors_keep_their_type(client: BankClient) -> None:
    with pytest.raises(NotFoundError):
        client.fetch([BlockRef(1, 99)])
    with pytest.raises(ConflictError):
        client.swap({PATH[0]: ones(PATH[0])}, expected={PATH[0]: 3})


def test_transaction(bank: FakeBank, client: BankClient) -> None:
    with client.transaction() as transaction:
        transaction.swap(PATH[0], ones(PATH[0]), expected_version=0)
        assert bank.revision == 0
    assert transaction.report is not None
    assert (transaction.report.revision, bank.revision) == (1, 1)


def test_watch(bank: FakeBank, client: BankClient) -> None:
    changes = client.watch([PATH[0]])
    assert next(changes) == Changes()
    client.withhold(PATH[0])
    assert [event.ref for event in next(changes).events] == [PATH[0]]
    changes.close()  # type: ignore[attr-defined]  # a generator


def test_from_many_threads(bank: FakeBank, client: BankClient) -> None:
    refs = [ref for ref in SPEC.blocks() if ref.level == 2]

    def work(ref: BlockRef) -> int:
        for step in range(5):
            memory = client.fetch([ref])
            client.push({ref: ones(ref)}, base=memory.versions, step=step)
        return client.fetch([ref]).versions[ref]

    with ThreadPoolExecutor(max_workers=8) as pool:
        assert list(pool.map(work, refs)) == [5] * len(refs)
    assert threading.active_count() < 60


def test_all_clients_share_one_loop(service: FakeService, client: BankClient) -> None:
    with BankClient.connect(service.endpoint) as other:
        assert other.fetch(PATH).versions == client.fetch(PATH).versions
    names = [thread.name for thread in threading.enumerate()]
    assert names.count("membank-client") == 1


def test_a_call_keeps_its_deadline(service: FakeService, client: BankClient) -> None:
    service.scripts["shard-0"].plan("FetchBlocks", Fault.SLOW)
    with pytest.raises(DeadlineError):
        client.fetch(PATH, timeout_s=0.05)
    # On a busy machine the call may have ended before it arrived.
    service.scripts["shard-0"].plan("FetchBlocks")
    assert list(client.fetch(PATH)) == list(PATH)


def test_cannot_be_called_on_its_own_loop(client: BankClient) -> None:
    async def call() -> None:
        client.info()

    with pytest.raises(FailedPreconditionError, match="own event loop"):
        loop_thread().run(call())


def test_does_not_pickle(client: BankClient) -> None:
    with pytest.raises(TypeError, match="connect there"):
        pickle.dumps(client)


def test_has_every_call_of_the_async_client() -> None:
    def calls(kind: type) -> dict[str, inspect.Signature | None]:
        return {
            name: inspect.signature(member) if callable(member) else None
            for name, member in inspect.getmembers(kind)
            if not name.startswith("_") and name != "connect"
        }

    sync, core = calls(BankClient), calls(AsyncBankClient)
    assert sync.keys() == core.keys()
    # What they return is of two kinds.
    for name in core.keys() - {"watch", "transaction", "borrow", "stream", "close", "open"}:
        assert sync[name] == core[name], name
        assert getattr(BankClient, name).__doc__, name


FORKED = """
import os, sys
from membank.client import BankClient
from membank.wire.errors import FailedPreconditionError

endpoint = sys.argv[1]
client = BankClient.connect(endpoint) if sys.argv[2] == "used" else None
pid = os.fork()
if pid == 0:
    try:
        if client is not None:
            try:
                client.info()
            except FailedPreconditionError as err:
                assert "fork" in str(err)
            else:
                os._exit(2)
            client.close()
            try:
                BankClient.connect(endpoint)
            except FailedPreconditionError:
                os._exit(0)
            os._exit(3)
        with BankClient.connect(endpoint) as bank:
            bank.info()
        os._exit(0)
    except BaseException:
        import traceback

        traceback.print_exc()
        os._exit(1)
code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
if client is not None:
    client.info()
    client.close()
sys.exit(code)
"""


@pytest.mark.slow
@pytest.mark.parametrize("state", ["used", "unused"])
def test_after_a_fork(service: FakeService, state: str) -> None:
    result = subprocess.run(
        [sys.executable, "-c", FORKED, service.endpoint, state],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
        env={**os.environ, "GRPC_VERBOSITY": "NONE"},
    )
    assert result.returncode == 0, result.stderr


FORKED_WHILE_BORROWING = """
import os, sys
from membank.client import BankClient
from membank.wire.same_host import MessageSocket
from membank.wire.spec import BlockRef

send = MessageSocket.send
num_returned = 0

def noted(socket, message, *descriptors):
    global num_returned
    num_returned += message.HasField("release")
    send(socket, message, *descriptors)

MessageSocket.send = noted
with BankClient.connect(sys.argv[1]) as client:
    client.fetch_blocks([BlockRef(1, 0)])
    num_returned = 0
    for _ in range(2):  # the first one connects, on the loop
        with client.borrow([BlockRef(1, 0)]):
            pid = os.fork()
        if pid == 0:
            os._exit(num_returned)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        assert (code, num_returned) == (0, 1), (code, num_returned)
        num_returned = 0
"""


@pytest.mark.slow
def test_a_fork_does_not_return_what_its_parent_borrowed() -> None:
    service = FakeService(FakeBank(), same_host=True)
    result = subprocess.run(
        [sys.executable, "-c", FORKED_WHILE_BORROWING, service.endpoint],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
        env={**os.environ, "GRPC_VERBOSITY": "NONE"},
    )
    service.close()
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
def test_a_process_ends_with_a_client_that_was_never_closed(service: FakeService) -> None:
    program = (
        "import sys; from membank.client import BankClient; "
        "bank = BankClient.connect(sys.argv[1]); changes = bank.watch(); next(changes); "
        "print(bank.info().spec.name)"
    )
    result = subprocess.run(
        [sys.executable, "-c", program, service.endpoint],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "fake\n", "")


def test_config_is_what_was_given(service: FakeService) -> None:
    config = ClientConfig(timeout_s=7.0)
    with BankClient.connect(service.endpoint, config=config) as client:
        assert client.config is config
        assert client.endpoint == service.endpoint
