"""What a shard does beside answering: of each partition by itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import SupportsIndex, overload

import pytest

from membank.bank_service.shard import Shard, ShardConfig
from membank.bank_service.shard.maintenance import InlineMaintenance
from membank.bank_service.store import Bank, Data
from membank.wire.errors import FailedPreconditionError, Reason
from membank.wire.spec import BlockRef
from tiny_bank import UnsyncedObjects, create_bank, make_update

# In partition 0 and 1.
A, B = BlockRef(1, 0), BlockRef(1, 1)


class _ByHand(InlineMaintenance):
    """Does what is periodic when told to."""

    def __init__(self) -> None:
        self._duties: list[Callable[[], object]] = []

    def every(self, interval_s: float, action: Callable[[], object]) -> None:
        self._duties.append(action)

    def turn(self) -> None:
        for duty in self._duties:
            duty()


class _Denying(UnsyncedObjects):
    """Refuses what has to do with partition 0, once told to."""

    denies = False

    def list(self, prefix: str) -> list[str]:
        self._check(prefix)
        return super().list(prefix)

    def put_if_absent(self, key: str, data: Data, *, durable: bool = False) -> None:
        self._check(key)
        super().put_if_absent(key, data, durable=durable)

    def _check(self, key: str) -> None:
        if self.denies and key.startswith("partitions/0000/"):
            raise FailedPreconditionError(f"{key}: denied", reason=Reason.STORE_DENIED)


@pytest.fixture
def objects(tmp_path: Path) -> _Denying:
    create_bank(tmp_path / "bank")
    return _Denying(tmp_path / "bank")


def test_a_partition_that_cannot_be_shipped_does_not_stop_the_others(objects: _Denying) -> None:
    by_hand = _ByHand()
    shard = Shard.open(
        Bank.open(objects), config=ShardConfig(ship_every_s=1, lease_s=0), maintenance=by_hand
    )
    shard.push(make_update(shard, [A, B], "u0"))
    objects.denies = True
    by_hand.turn()
    assert len(objects.list("partitions/0001/log")) > 1
    objects.denies = False
    shipped = objects.list("partitions/0000/log")
    by_hand.turn()
    assert len(objects.list("partitions/0000/log")) > len(shipped)
    assert shard.stats().unshipped_s == 0
    shard.close()


def test_a_lease_that_cannot_be_renewed_does_not_end_the_others(
    objects: _Denying, tmp_path: Path
) -> None:
    by_hand, now = _ByHand(), [0.0]
    config = ShardConfig(lease_s=9, journal_dir=str(tmp_path / "journals"))
    shard = Shard.open(Bank.open(objects), config=config, maintenance=by_hand, clock=lambda: now[0])
    objects.denies = True
    for _ in range(4):
        now[0] += 3
        by_hand.turn()
    # The one is asked for, and refused; of the other it is known that it is this shard's.
    shard.fetch([B])
    with pytest.raises(FailedPreconditionError):
        shard.fetch([A])
    objects.denies = False
    shard.close()


class _Interrupted(list[BlockRef]):
    """Lets a reader in whenever a part of it is taken."""

    def __init__(self, refs: list[BlockRef], shard: Shard) -> None:
        super().__init__(refs)
        self._shard = shard
        self.num_let_in = 0

    @overload
    def __getitem__(self, place: SupportsIndex) -> BlockRef: ...

    @overload
    def __getitem__(self, place: slice) -> list[BlockRef]: ...

    def __getitem__(self, place: SupportsIndex | slice) -> BlockRef | list[BlockRef]:
        self._shard.fetch([A])
        self.num_let_in += 1
        return super().__getitem__(place)


def test_readers_get_their_turn_while_a_large_bank_is_described(objects: _Denying) -> None:
    shard = Shard.open(Bank.open(objects))
    refs = _Interrupted([A, B] * 1000, shard)
    assert [status.ref for status in shard.describe(refs)] == list(refs)
    assert refs.num_let_in > 2
    shard.close()
