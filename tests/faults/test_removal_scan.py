"""After a delete, nothing of the content is found: in no file, in no memory, in no client's cache.

A topic is planted with content that no other block has: by a swap, by updates that are in slots, in a
snapshot and in the journal, and by one that is on its way while the topic is deleted. What it must look
like in every store, optimizer state included, is computed here by the same kernels.
"""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from membank.bank_service.shard.optimizer import BlockOptimizer
from membank.client import BankClient, ClientConfig
from membank.wire.errors import Reason
from membank.wire.spec import Array, BlockRef, BlockState, Role
from raw_scan import Finding, marked, needles, scan_files, scan_process, stopped
from removal_service import SPEC, RemovalService

# Processes are started, and all of their memory is read, which takes a while on a busy machine.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

TOPIC, KEPT = BlockRef(1, 0), BlockRef(1, 1)
DOOMED = list(SPEC.subtree(TOPIC))
OTHERS = [ref for ref in SPEC.blocks() if ref not in DOOMED]
WAYS = {"shared memory": ClientConfig(), "network": ClientConfig(same_host=None)}

ways = pytest.mark.parametrize("way", WAYS)


@dataclass
class Planted:
    """What was planted, and how it looks wherever it is."""

    wanted: dict[str, bytes] = field(default_factory=dict)
    """What to look for."""
    state: dict[BlockRef, dict[Role, Array]] = field(default_factory=dict)
    """The blocks as they are by now."""

    def add(self, what: str, contents: Mapping[BlockRef, Array]) -> None:
        """Look for these from now on."""
        for ref, content in contents.items():
            self.wanted |= needles(f"{what} of {ref}", content)


def plant(service: RemovalService, client: BankClient) -> Planted:
    """Swap the topic's content, train it, and leave it in slots, a snapshot and the journal."""
    planted = Planted()
    for number, ref in enumerate(DOOMED):
        weight = marked(SPEC.block_shape(ref.level), 100 + number)
        service.swap(ref, weight)
        planted.add("the swapped weight", {ref: weight})
        state = {role: np.zeros_like(weight) for role in SPEC.optimizer.state_roles}
        planted.state[ref] = {Role.WEIGHT: weight, **state}
    base: Mapping[BlockRef, int] = dict(client.fetch_blocks(DOOMED).versions)
    for step in range(2):
        gradients = gradients_of(step)
        base = client.push(gradients, base=base).versions
        planted.add(f"gradient {step}", gradients)
        for ref in DOOMED:
            after = BlockOptimizer(SPEC).apply(
                ref.level, planted.state[ref], step, gradients[ref], 1.0
            )
            assert after is not None
            planted.state[ref] = after
            for role, array in after.items():
                planted.add(f"{role} after step {step}", {ref: array})
        if step == 0:
            service.consolidate()
            service.snapshot("before")
    for ref, block in client.fetch_blocks(DOOMED).items():
        assert block.weight is not None
        assert block.weight.tobytes() == planted.state[ref][Role.WEIGHT].tobytes()
    return planted


def gradients_of(step: int) -> dict[BlockRef, Array]:
    return {
        ref: marked(SPEC.block_shape(ref.level), 200 + 10 * step + number, scale=0.01)
        for number, ref in enumerate(DOOMED)
    }


def contents_of(client: BankClient) -> dict[BlockRef, bytes]:
    """Return the weights of all blocks that are not deleted."""
    weights = client.fetch_blocks(list(SPEC.blocks())).weights
    return {ref: weight.tobytes() for ref, weight in weights.items()}


def in_pools(found: list[Finding]) -> list[Finding]:
    """Return what lies in memory that the service keeps for blocks and for callers on the machine."""
    return [finding for finding in found if "memfd" in finding.place]


@ways
def test_a_deleted_topic_is_found_nowhere(tmp_path: Path, way: str) -> None:
    with RemovalService(tmp_path) as service, service.client(WAYS[way]) as client:
        planted = plant(service, client)
        others = {ref: content for ref, content in contents_of(client).items() if ref in OTHERS}
        # The scan would find it: what the blocks are now in memory, and what is stored in files.
        present = {finding.name for finding in service.scan_memory(planted.wanted)}
        assert present >= {name for name in planted.wanted if "after step 1" in name}
        stored = {finding.name for finding in service.scan_files(planted.wanted)}
        assert stored >= {n for n in planted.wanted if "after step 0" in n or "gradient 1" in n}
        service.delete(TOPIC)
        assert service.scan_files(planted.wanted) == []
        assert in_pools(service.scan_memory(planted.wanted)) == [] or way == "shared memory"
        assert contents_of(client) == others
        # The client hears of it by that answer, and has wiped what the shard has mapped of it.
        assert in_pools(service.scan_memory(planted.wanted)) == []
        # What the allocator and gRPC still hold goes with the process.
        service.recycle()
        assert service.scan(planted.wanted) == []
        with service.client(WAYS[way]) as later:
            assert contents_of(later) == others
            assert service.scan(planted.wanted) == []


@ways
def test_updates_on_their_way_leave_nothing_either(tmp_path: Path, way: str) -> None:
    with RemovalService(tmp_path) as service, service.client(WAYS[way]) as client:
        gradients = gradients_of(0)
        wanted = {
            name: needle
            for ref, gradient in gradients.items()
            for name, needle in needles(f"gradient of {ref}", gradient).items()
        }
        pushed, refused = threading.Event(), threading.Event()

        def push_until_refused() -> None:
            versions: Mapping[BlockRef, int] = dict.fromkeys(DOOMED, 0)
            while True:
                results = client.push(gradients, base=versions).results
                versions = {result.ref: result.version for result in results}
                if all(result.reason is Reason.BLOCK_DELETED for result in results):
                    refused.set()
                    return
                pushed.set()

        pusher = threading.Thread(target=push_until_refused)
        pusher.start()
        assert pushed.wait(30)
        service.delete(TOPIC)
        assert refused.wait(30)
        pusher.join()
        # Also what came after the delete, and was refused.
        late = client.push(gradients, base=dict.fromkeys(DOOMED, 0))
        assert {result.reason for result in late.results} == {Reason.BLOCK_DELETED}
        assert service.scan_files(wanted) == []
        found = service.scan_memory(wanted)
        # Shared memory of the client's is the client's to wipe, when it next hears of a removal.
        assert [each for each in in_pools(found) if "r--s" not in each.place] == [] or (
            way == "shared memory"
        )
        service.recycle()
        assert service.scan(wanted) == []


_CACHING_CLIENT = """
import sys
import threading
from pathlib import Path
from membank.client import BankClient, CacheConfig, ClientConfig, DiskTierConfig
from membank.wire.spec import BlockRef

endpoint, directory, is_local = sys.argv[1:]
cache = CacheConfig(
    max_bytes=200_000,  # less than the blocks have, so that some are in files
    disk=DiskTierConfig(directory=Path(directory), max_bytes=1 << 24),
)
ways = {} if is_local == "True" else {"same_host": None}
with BankClient.connect(endpoint, config=ClientConfig(cache=cache, **ways)) as bank:
    for _ in range(3):
        bank.fetch_blocks([BlockRef(1, 0), BlockRef(1, 1), BlockRef(2, 0), BlockRef(2, 1)])
    print("fetched", flush=True)
    sys.stdin.readline()
    # One block is left, in memory, in a file or in both.
    while max((stats := bank.cache_stats).num_blocks, stats.disk.num_blocks) > 1:
        threading.Event().wait(0.01)
    # All that was decided until now has been done to the files.
    bank.fetch_blocks([BlockRef(2, 2)])
    print("let go", flush=True)
    sys.stdin.readline()
"""


@contextmanager
def caching_client(
    service: RemovalService, directory: Path, *, is_local: bool
) -> Iterator[subprocess.Popen[str]]:
    """Run a client in a process of its own, which caches the topic and one block more."""
    process = subprocess.Popen(
        [sys.executable, "-c", _CACHING_CLIENT, service.endpoint, str(directory), str(is_local)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "fetched\n"
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()


def say_when_let_go(process: subprocess.Popen[str]) -> None:
    """Return once the client holds nothing of the topic any more."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write("\n")
    process.stdin.flush()
    assert process.stdout.readline() == "let go\n"


@ways
def test_a_client_that_cached_it_holds_nothing_once_it_has_heard(tmp_path: Path, way: str) -> None:
    directory, folder = tmp_path / "cache", tmp_path / "service"
    folder.mkdir()
    with RemovalService(folder) as service:
        wanted: dict[str, bytes] = {}
        for number, ref in enumerate(DOOMED):
            weight = marked(SPEC.block_shape(ref.level), 100 + number)
            service.swap(ref, weight)
            wanted |= needles(f"weight of {ref}", weight)
        with caching_client(service, directory, is_local=way == "shared memory") as process:

            def scan() -> list[Finding]:
                with stopped(process.pid):
                    return scan_process(process.pid, wanted) + scan_files(directory, wanted)

            found = scan()
            assert {finding.name for finding in found} == set(wanted)
            assert any(finding.place.endswith(".block") for finding in found)
            service.delete(TOPIC)
            say_when_let_go(process)
            assert scan() == []


def test_blocks_stay_deleted_and_others_as_they_are_in_the_next_process(tmp_path: Path) -> None:
    with RemovalService(tmp_path) as service:
        with service.client() as client:
            planted = plant(service, client)
            others = {r: c for r, c in contents_of(client).items() if r in OTHERS}
            service.delete(TOPIC)
        service.kill()
        with service.client() as client:
            blocks = client.fetch_blocks(list(SPEC.blocks()))
            assert {ref for ref, block in blocks.items() if block.weight is None} == set(DOOMED)
            assert {blocks[ref].header.state for ref in DOOMED} == {BlockState.DELETED}
            assert contents_of(client) == others
        assert service.scan(planted.wanted) == []
