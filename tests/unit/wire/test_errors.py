"""Every leaf of the error tree pickles and survives the wire."""

from __future__ import annotations

import pickle

import grpc
import pytest

from membank.wire.errors import LEAVES, MembankError, Reason, from_rpc_error, to_status

Metadata = tuple[tuple[str, str | bytes], ...]


class _Call(grpc.RpcError):
    """What grpcio raises at a caller, made from what a server sent."""

    def __init__(self, status: grpc.Status, metadata: Metadata | None = None) -> None:
        self._status = status
        self._metadata = status.trailing_metadata if metadata is None else metadata

    def code(self) -> grpc.StatusCode:
        return self._status.code

    def details(self) -> str:
        return self._status.details

    def trailing_metadata(self) -> Metadata:  # type: ignore[override]  # the stub's own type is private
        return self._metadata


def test_every_leaf_is_listed_and_has_its_own_code() -> None:
    assert set(LEAVES) == set(MembankError.__subclasses__())
    assert len({leaf.code for leaf in LEAVES}) == len(LEAVES)


@pytest.mark.parametrize("leaf", LEAVES)
def test_leaf_pickles(leaf: type[MembankError]) -> None:
    error = leaf("what, where", reason=Reason.NO_SPACE, metadata={"a": "b"})
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is leaf
    assert (str(copy), copy.reason, copy.metadata) == ("what, where", Reason.NO_SPACE, {"a": "b"})


@pytest.mark.parametrize("leaf", LEAVES)
def test_leaf_survives_the_wire(leaf: type[MembankError]) -> None:
    error = leaf("what, where", reason=Reason.STALE_VERSION, metadata={"block": "2/3"})
    copy = from_rpc_error(_Call(to_status(error)), where="localhost:1")
    assert type(copy) is leaf
    assert str(copy) == "what, where"
    assert copy.reason is Reason.STALE_VERSION
    assert copy.metadata == {"block": "2/3"}


def test_unknown_reason_of_a_newer_server_is_kept_apart() -> None:
    status = to_status(LEAVES[0]("x", reason=Reason.UNKNOWN_BANK))
    newer = tuple(
        (
            key,
            value.replace(b"UNKNOWN_BANK", b"FUTURE_CAUSE") if isinstance(value, bytes) else value,
        )
        for key, value in status.trailing_metadata
    )
    assert newer != status.trailing_metadata
    call = _Call(status, newer)
    assert from_rpc_error(call, where="h:1").reason is Reason.UNEXPECTED
