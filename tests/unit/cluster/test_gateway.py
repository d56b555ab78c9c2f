"""The gateway over shards in this process: creation once, and nothing left of a failed start."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest

from membank.bank_service.cluster.gateway import Gateway
from membank.bank_service.knowledge import ShardMember
from membank.bank_service.knowledge.shards import ShardHandle
from membank.bank_service.shard import Shard
from membank.bank_service.store import Bank
from membank.wire.errors import (
    AlreadyExistsError,
    InvalidArgumentError,
    Reason,
    UnavailableError,
)
from membank.wire.format import TreeDocument, encode_tree
from membank.wire.records import Placement
from membank.wire.signing import Signer
from membank.wire.spec import BankSpec, BlockRef
from shard_rig import RIG_SPEC, asked

TREE = encode_tree(TreeDocument(labels={BlockRef(1, 0): "iron"}))
OTHER_TREE = encode_tree(TreeDocument(labels={BlockRef(1, 0): "steel"}))


class OneShard:
    """A fleet of one shard that lives in this process.

    Parameters
    ----------
    url
        Where the bank is.
    """

    def __init__(self, url: str) -> None:
        self._url = url
        self._owned = ExitStack()
        self._shard: Shard | None = None
        self.abort_fails = False

    def start(self, spec: BankSpec, *, insist: bool) -> OneShard:
        if self._shard is None:
            self._shard = Shard.open(self._url)
            self._owned.callback(self._shard.close)
        return self

    def members(self) -> tuple[ShardMember, ...]:
        assert self._shard is not None
        handle = _Handle(self._shard, self._check_abort)
        partitions = tuple(range(RIG_SPEC.num_partitions))
        member = ShardMember(
            shard_id="shard-0", partitions=partitions, handle=cast("ShardHandle", handle)
        )
        return (member,)

    def _check_abort(self) -> None:
        if self.abort_fails:
            raise UnavailableError("shard-0 is away")

    def placement(self) -> Placement:
        raise NotImplementedError

    def all_serve(self) -> bool:
        return True

    def recycle(self, shard_ids: Sequence[str]) -> None:
        raise NotImplementedError

    def close(self) -> None:
        self._owned.close()


class _Handle:
    """The shard itself, but for `abort`, which may fail."""

    def __init__(self, shard: Shard, check_abort: Callable[[], None]) -> None:
        self._shard = shard
        self._check_abort = check_abort

    def __getattr__(self, name: str) -> object:
        return getattr(self._shard, name)

    def abort(self, revision: int) -> None:
        self._check_abort()
        self._shard.abort(revision)


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[OneShard]:
    fleet = OneShard(str(tmp_path / "bank"))
    yield fleet
    fleet.close()


@pytest.fixture
def gateway(tmp_path: Path, fleet: OneShard) -> Gateway:
    return Gateway(str(tmp_path / "bank"), fleet.start, load_signer=Signer.generate)


def threads_of_groups() -> set[threading.Thread]:
    return {t for t in threading.enumerate() if t.name.startswith("membank-shards")}


def test_a_bank_is_created_once(gateway: Gateway) -> None:
    spec = gateway.create_bank(asked("r1"), RIG_SPEC, TREE)
    assert gateway.create_bank(asked("r1"), RIG_SPEC, TREE) == spec
    with pytest.raises(AlreadyExistsError) as caught:
        gateway.create_bank(asked("r2"), RIG_SPEC, TREE)
    assert caught.value.reason is Reason.BANK_EXISTS


@pytest.mark.parametrize(
    ("spec", "tree"),
    [(replace(RIG_SPEC, init_seed=7), TREE), (RIG_SPEC, OTHER_TREE), (RIG_SPEC, b"")],
    ids=["another spec", "another tree", "no tree"],
)
def test_a_request_id_that_created_another_bank_is_refused(
    gateway: Gateway, spec: BankSpec, tree: bytes
) -> None:
    gateway.create_bank(asked("r1"), RIG_SPEC, TREE)
    with pytest.raises(InvalidArgumentError, match="id of its own") as caught:
        gateway.create_bank(asked("r1"), spec, tree)
    assert caught.value.reason is Reason.REQUEST_ID_REUSED


def test_a_bank_whose_creation_was_cut_off_is_served_to_the_same_request_only(
    tmp_path: Path, gateway: Gateway, fleet: OneShard
) -> None:
    fleet.abort_fails = True
    with pytest.raises(UnavailableError):
        gateway.create_bank(asked("r1"), RIG_SPEC, TREE)
    fleet.abort_fails = False
    with pytest.raises(InvalidArgumentError):
        gateway.create_bank(asked("r1"), RIG_SPEC, OTHER_TREE)
    created = gateway.create_bank(asked("r1"), RIG_SPEC, TREE)
    assert created == Bank.open(str(tmp_path / "bank")).spec


def test_a_start_that_fails_leaves_no_threads(gateway: Gateway, fleet: OneShard) -> None:
    before = threads_of_groups()
    fleet.abort_fails = True
    for _ in range(3):
        with pytest.raises(UnavailableError):
            gateway.create_bank(asked("r1"), RIG_SPEC, TREE)
    for thread in threads_of_groups() - before:
        # Told to end, and nobody has waited for it.
        thread.join(timeout=10.0)
    assert threads_of_groups() <= before
