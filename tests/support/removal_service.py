"""A bank served by a process of its own, whose memory and files a test looks through from outside.

Content comes in by pushes over the network, and by swaps out of a file that the process maps: so what is
found in its memory afterwards is what the service left there, and not what a test handed to it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from membank.bank_service.cluster.identity import ShardSettings
from membank.bank_service.cluster.shard_server import ShardServer
from membank.bank_service.knowledge import (
    AdminRequest,
    BankOperations,
    Coordinator,
    RevisionLog,
    ShardGroup,
    ShardMember,
    TreeStore,
)
from membank.bank_service.rpc.server import ServerConfig
from membank.bank_service.shard import ShardConfig
from membank.bank_service.store import Bank
from membank.client import BankClient, ClientConfig
from membank.wire.records import PartitionOwner, Placement
from membank.wire.spec import Array, BankSpec, BlockRef, LevelSpec
from membank.wire.steps import Delete, Swap
from raw_scan import Finding, Needles, scan_files, scan_process, stopped

SPEC = BankSpec(
    name="removal",
    num_layers=2,
    width=64,
    levels=(
        # 96 KiB per role, in pooled memory, and 12 KiB, out of the allocator.
        LevelSpec(fan_out=2, block_width=64, learning_rate=0.1),
        LevelSpec(fan_out=2, block_width=8, learning_rate=0.05),
    ),
    num_partitions=2,
)
"""Topics 1/0 and 1/1 of one large block and two small ones each, in a partition each."""

_STOP_S = 30.0


class RemovalService:
    """One shard with its coordinator, in a process that is started anew as often as asked.

    Parameters
    ----------
    folder
        Where the bank is made, and what the test hands over.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.bank_folder = folder / "bank"
        Bank.create(str(self.bank_folder), SPEC)
        self._hand = folder / "hand"
        self._hand.mkdir()
        self._num_requests = 0
        self._start()

    @property
    def pid(self) -> int:
        """The present process."""
        return self._process.pid

    def client(self, config: ClientConfig | None = None) -> BankClient:
        """Connect to it."""
        return BankClient.connect(self.endpoint, config=config)

    def swap(self, ref: BlockRef, weight: Array) -> None:
        """Replace the weight of a block; its optimizer state begins anew."""
        path = self._hand / "weight"
        path.write_bytes(weight.tobytes())
        self._ask("swap", *ref, path)
        path.unlink()

    def delete(self, topic: BlockRef) -> None:
        """Delete a topic; returns with the acknowledgement."""
        self._ask("delete", *topic)

    def snapshot(self, name: str) -> None:
        """Pin the present state."""
        self._ask("snapshot", name)

    def consolidate(self) -> None:
        """Fold the journals."""
        self._ask("consolidate")

    def recycle(self) -> None:
        """End the process in order, and go on in another one."""
        self._ask("stop")
        self._process.wait(_STOP_S)
        self._close_pipes()
        self._start()

    def kill(self) -> None:
        """Kill it, and go on in another one."""
        self._process.kill()
        self._process.wait()
        self._close_pipes()
        self._start()

    def scan(self, wanted: Needles) -> list[Finding]:
        """Look through its files, and through its memory."""
        return self.scan_files(wanted) + self.scan_memory(wanted)

    def scan_files(self, wanted: Needles) -> list[Finding]:
        """Look through its files."""
        return scan_files(self.folder, wanted)

    def scan_memory(self, wanted: Needles) -> list[Finding]:
        """Look through the memory of the process."""
        with stopped(self.pid):
            return scan_process(self.pid, wanted)

    def _start(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__, str(self.bank_folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        self.endpoint = self._answer()

    def _ask(self, *words: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(" ".join(map(str, words)) + "\n")
        self._process.stdin.flush()
        assert self._answer() == "done"

    def _answer(self) -> str:
        assert self._process.stdout is not None
        answer = self._process.stdout.readline().strip()
        if not answer:
            raise ChildProcessError(f"the service ended: {self._process.wait(_STOP_S)}")
        return answer

    def _close_pipes(self) -> None:
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with suppress(OSError):
                    pipe.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._process.kill()
        self._process.wait()
        self._close_pipes()


# ---- the process


class _Served:
    """What runs in the process."""

    def __init__(self, url: str) -> None:
        self.server = ShardServer(
            ShardSettings(
                shard_id="shard-0",
                bank_url=url,
                partitions=tuple(range(SPEC.num_partitions)),
                server=ServerConfig(host="127.0.0.1", port=0),
                shard=ShardConfig(),
                max_in_flight_bytes=64 << 20,
            )
        )
        identity = self.server.identity
        self.server.set_placement(
            Placement(
                generation=1,
                owners=tuple(
                    PartitionOwner(
                        partition=n, shard_id=identity.shard_id, endpoint=identity.endpoint
                    )
                    for n in range(SPEC.num_partitions)
                ),
            )
        )
        bank = Bank.open(url)
        log, trees, group = RevisionLog(bank), TreeStore(bank), ShardGroup(bank.spec, self)
        coordinator = Coordinator(bank, group, log=log, trees=trees)
        coordinator.recover()
        self._operations = BankOperations(bank, group, coordinator, log=log, trees=trees)
        self._log = log

    def members(self) -> tuple[ShardMember, ...]:
        """Return the one shard."""
        shard = self.server.shard
        return (ShardMember(shard_id="shard-0", partitions=shard.partitions, handle=shard),)

    def do(self, command: str, *words: str) -> None:
        """Do what the test asks."""
        asked = AdminRequest(request_id=f"r{self._log.last + 1}", principal="test")
        match command, words:
            case "swap", (level, cluster, path):
                ref = BlockRef(int(level), int(cluster))
                weight = np.memmap(path, np.float32, "r", shape=SPEC.block_shape(ref.level))
                self._operations.apply(asked, [Swap(ref=ref, weight=weight)])
            case "delete", (level, cluster):
                topic = BlockRef(int(level), int(cluster))
                self._operations.apply(asked, [Delete(topic=topic)])
            case "snapshot", (name,):
                self._operations.create_snapshot(asked, name)
            case "consolidate", ():
                self.server.shard.consolidate()
            case "stop", ():
                self.server.stop()


def main(url: str) -> None:
    """Serve, and do what the lines of standard input ask."""
    served = _Served(url)
    print(served.server.identity.endpoint, flush=True)
    for line in sys.stdin:
        command, *words = line.split()
        served.do(command, *words)
        print("done", flush=True)
        if command == "stop":
            return


if __name__ == "__main__":
    main(sys.argv[1])
