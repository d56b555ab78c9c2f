"""Make the fixture banks: small banks of the present format, and what a reader must find in them.

    python scripts/make_fixture_bank.py tests/fixtures

Each is a reproducible ``bank-vFORMAT-NAME.tar.gz`` with a ``.json`` beside it: versions, states and
steps of every block, the SHA-256 of every array and of the tree, now and in the snapshot. A fixture
is made once for each format and kept: later versions must go on reading it.

Nothing in a bank may depend on the machine that makes it. Names that are random in life are drawn
from a fixed seed here, the clock stands still, and updates that are to be computed again (they are
in the journal of one of the banks) round once per element at most: rates and momentum are powers of
two, gradients short binary fractions, so that every machine computes the same bits.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import io
import json
import random
import tarfile
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar
from unittest import mock

import numpy as np

from membank.bank_service.knowledge import (
    AdminRequest,
    BankOperations,
    Coordinator,
    RevisionLog,
    ShardGroup,
    ShardMember,
    TreeStore,
)
from membank.bank_service.shard import Durability, Shard, ShardConfig
from membank.bank_service.store import Bank
from membank.wire.format import FORMAT_VERSION, TreeDocument
from membank.wire.format.layout import tree_key
from membank.wire.records import Gradient, Update
from membank.wire.spec import (
    Array,
    BankSpec,
    BlockRef,
    BlockState,
    LevelSpec,
    OptimizerKind,
    OptimizerSpec,
)
from membank.wire.steps import Delete, Swap, Withhold

T = TypeVar("T")

SWAPPED, HIDDEN, DELETED = BlockRef(1, 1), BlockRef(1, 2), BlockRef(1, 3)
TRAINED = (BlockRef(1, 0), BlockRef(1, 1), BlockRef(2, 0), BlockRef(2, 3))
SNAPSHOT = "before"
CLOCK_S = 1_700_000_000.0


@dataclass(frozen=True)
class Fixture:
    """One bank to be made."""

    name: str
    """Name of the bank."""
    dtype: str
    """Element type of its weights."""
    optimizer: OptimizerSpec
    """Its optimizer."""
    config: ShardConfig
    """How its shard is set; decides where the journal is, and what is in it."""

    @property
    def spec(self) -> BankSpec:
        """Four topics of one block and two leaves, spread over two partitions."""
        return BankSpec(
            name=self.name,
            bank_id=hashlib.sha256(self.name.encode()).hexdigest()[:32],
            num_layers=2,
            width=8,
            levels=(
                LevelSpec(fan_out=4, block_width=2, learning_rate=0.5),
                LevelSpec(fan_out=2, block_width=1, learning_rate=0.25),
            ),
            dtype=self.dtype,
            optimizer=self.optimizer,
            num_partitions=2,
            init_seed=20_240_229,
            fingerprint="anchor of the fixture",
        )


FIXTURES = (
    # Its journal holds gradients, which a reader applies again.
    Fixture(
        name="float32",
        dtype="float32",
        optimizer=OptimizerSpec(kind=OptimizerKind.SGD, beta1=0.5, weight_decay=0.0),
        config=ShardConfig(segment_bytes=1024),
    ),
    # Its journal is in the bank's storage and holds what updates made, whatever computed that.
    Fixture(
        name="bfloat16",
        dtype="bfloat16",
        optimizer=OptimizerSpec(kind=OptimizerKind.ADAMW),
        config=ShardConfig(durability=Durability.STORE),
    ),
)


class _OneShard:
    """A directory of shards that has one."""

    def __init__(self, shard: Shard) -> None:
        self._shard = shard

    def members(self) -> tuple[ShardMember, ...]:
        # docstring inherited
        partitions = self._shard.partitions
        return (ShardMember(shard_id="shard-0", partitions=partitions, handle=self._shard),)


def make_bank(fixture: Fixture, root: Path) -> dict[str, object]:
    """Make a bank in `root`; return what a reader must find in it."""
    bank = Bank.create(str(root), fixture.spec, tree=_tree(fixture.spec), principal="fixture")
    shard = Shard.open(bank, config=fixture.config)
    group = ShardGroup(bank.spec, _OneShard(shard))
    log, trees = RevisionLog(bank, clock=_clock), TreeStore(bank)
    coordinator = Coordinator(bank, group, log=log, trees=trees)
    operations = BankOperations(bank, group, coordinator, log=log, trees=trees, clock=_clock)

    _push(shard, [*TRAINED, HIDDEN, DELETED, BlockRef(2, 6)], "first")
    operations.create_snapshot(_asked("snapshot"), SNAPSHOT)
    pinned = _blocks(shard)
    weight = _numbers(bank.spec, SWAPPED, "swap").astype(bank.spec.numpy_dtype)
    operations.apply(_asked("swap"), [Swap(ref=SWAPPED, weight=weight)])
    _push(shard, [*TRAINED, HIDDEN], "second")
    operations.apply(_asked("withhold"), [Withhold(topic=HIDDEN)])
    operations.apply(_asked("delete"), [Delete(topic=DELETED)])
    _push(shard, TRAINED, "third")
    group.close()
    shard.close()

    # What follows stays in the journal: the shard ends as if it had been killed.
    shard = Shard.open(bank, config=fixture.config)
    for number in range(3):
        _push(shard, TRAINED[number:], f"journalled {number}")
    present = _blocks(shard)
    shard.close(consolidate=False)

    gone = {str(ref) for ref in bank.spec.subtree(DELETED)}
    revision = bank.latest_commit().revision
    tree_revision = bank.latest_commit().tree_revision
    return {
        "format": FORMAT_VERSION,
        "revision": revision,
        "blocks": present,
        "snapshots": {
            # What was deleted since is gone from every snapshot.
            SNAPSHOT: {ref: block for ref, block in pinned.items() if ref not in gone}
        },
        "snapshot_revisions": {SNAPSHOT: bank.snapshot(SNAPSHOT).revision},
        "tree": {"revision": tree_revision, "sha256": _sha256_file(root / tree_key(tree_revision))},
    }


def make_fixture(fixture: Fixture, folder: Path) -> Path:
    """Write ``bank-vFORMAT-NAME.tar.gz`` and ``.json`` into `folder`; return the former."""
    stem = f"bank-v{FORMAT_VERSION}-{fixture.name}"
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch, _repeatable():
        root = Path(scratch) / stem
        expected = make_bank(fixture, root)
        archive = folder / f"{stem}.tar.gz"
        archive.write_bytes(_packed(root))
    (folder / f"{stem}.json").write_text(json.dumps(expected, indent=1, sort_keys=True) + "\n")
    return archive


@contextmanager
def _repeatable() -> Iterator[None]:
    """Draw names from a fixed seed and stop the clock."""
    rng = random.Random(0)

    def draw() -> uuid.UUID:
        return uuid.UUID(int=rng.getrandbits(128), version=4)

    with (
        mock.patch.object(uuid, "uuid4", draw),
        mock.patch.object(time, "time", _clock),
        # What runs side by side would draw names and take slots in another order each time.
        mock.patch.object(ThreadPoolExecutor, "submit", _run_at_once),
    ):
        yield


def _run_at_once(
    pool: ThreadPoolExecutor, function: Callable[..., T], /, *args: object, **kwargs: object
) -> Future[T]:
    del pool
    future: Future[T] = Future()
    try:
        future.set_result(function(*args, **kwargs))
    except BaseException as err:
        future.set_exception(err)
    return future


def _clock() -> float:
    return CLOCK_S


def _asked(request_id: str) -> AdminRequest:
    return AdminRequest(request_id=request_id, principal="fixture", dry_run=False)


def _tree(spec: BankSpec) -> TreeDocument:
    centroids: list[Array] = []
    for level in range(1, spec.num_levels + 1):
        rows = np.eye(spec.num_clusters(level), 8, dtype=np.float32)
        centroids.append(rows)
    return TreeDocument(
        labels={ref: f"topic {ref}, \N{GREEK SMALL LETTER ALPHA}" for ref in spec.blocks()},
        num_documents={ref: 10 * ref.level + ref.cluster for ref in spec.blocks()},
        centroids=tuple(centroids),
        embedder={"kind": "fixture", "dims": 8},
        arrays={"projection": np.arange(8, dtype=np.float32)},
    )


def _numbers(spec: BankSpec, ref: BlockRef, what: str) -> Array:
    """Return a block of sixteenths between -1 and 1, a function of the arguments."""
    seed = int.from_bytes(hashlib.sha256(f"{what} {ref}".encode()).digest()[:8], "little")
    rng = random.Random(seed)
    shape = spec.block_shape(ref.level)
    values = [rng.randint(-16, 16) / 16 for _ in range(spec.block_params(ref.level))]
    return np.array(values, np.float32).reshape(shape)


def _push(shard: Shard, refs: Sequence[BlockRef], request_id: str) -> None:
    statuses = shard.describe(refs)
    gradients = tuple(
        Gradient(
            ref=status.ref,
            base_version=status.version,
            values=_numbers(shard.spec, status.ref, request_id),
        )
        for status in statuses
    )
    answer = shard.push(Update(request_id=request_id, step=1, gradients=gradients))
    assert all(result.accepted for result in answer.results)


def _blocks(shard: Shard) -> dict[str, object]:
    refs = list(shard.spec.blocks())
    sums = {
        content.ref: {
            "weight": _sha256(content.weight),
            **{role.value: _sha256(array) for role, array in content.optimizer_state.items()},
        }
        for content in shard.read(refs)
    }
    return {
        str(status.ref): {
            "version": status.version,
            "state": BlockState(status.state).name.lower(),
            "step": status.step,
            "sha256": sums.get(status.ref, {}),
        }
        for status in shard.describe(refs)
    }


def _sha256(array: Array) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


def _sha256_file(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _packed(root: Path) -> bytes:
    """Return the files of a bank as a tar.gz that says nothing of who made it, and when."""
    buffer = io.BytesIO()
    with (
        gzip.GzipFile(fileobj=buffer, mode="wb", filename="", mtime=0) as stream,
        tarfile.open(fileobj=stream, mode="w", format=tarfile.USTAR_FORMAT) as archive,
    ):
        for path in sorted(root.rglob("*")):
            name = path.relative_to(root).as_posix()
            # Locks and scratch files are no part of a bank.
            if not path.is_file() or name.startswith(".tmp/") or path.name == "lock":
                continue
            info = tarfile.TarInfo(f"{root.name}/{name}")
            data = path.read_bytes()
            info.size, info.mode = len(data), 0o644
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def main() -> None:
    """Make every fixture in the folder that the command line names."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("folder", type=Path, help="where to write, such as tests/fixtures")
    folder = parser.parse_args().folder
    for fixture in FIXTURES:
        archive = make_fixture(fixture, folder)
        print(f"{archive}: {archive.stat().st_size} bytes")


if __name__ == "__main__":
    main()
