"""Operations that travel in pieces arrive whole or not at all."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

from membank.bank_service.cluster.staging import (
    StagedOperations,
    batches,
    carried_content,
    carried_operation,
    operation_bytes,
    own_content,
    own_operation,
)
from membank.bank_service.shard.contract import BlockContent, Combine, Erase, SetContent
from membank.wire.errors import UnavailableError
from membank.wire.spec import BlockRef, Role, dtype_of


def content(cluster: int) -> SetContent:
    return SetContent(
        ref=BlockRef(1, cluster),
        weight=np.full(4, cluster, np.float32),
        optimizer_state={Role.EXP_AVG: np.zeros(4, np.float32)},
    )


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ([], []),
        ([1, 2, 3], [(1, 2, 3)]),
        ([6, 4, 1], [(6, 4), (1,)]),
        ([11, 1, 12], [(11,), (1,), (12,)]),
        ([0, 0, 0], [(0, 0, 0)]),
        ([0, 20, 0], [(0, 20), (0,)]),
    ],
)
def test_batches_keep_the_order_and_the_bound(
    sizes: list[int], expected: list[tuple[int, ...]]
) -> None:
    assert batches(sizes, lambda size: size, max_bytes=10) == expected


def test_bytes_of_an_operation_are_those_of_its_arrays() -> None:
    assert operation_bytes(content(0)) == 32
    assert operation_bytes(Erase(ref=BlockRef(1, 0))) == 0
    combine = Combine(ref=BlockRef(1, 0), keep=0.5, other=np.ones(4, np.float32), add=0.5)
    assert operation_bytes(combine) == 16
    assert operation_bytes(Combine(ref=BlockRef(1, 0), keep=0.5)) == 0


def test_what_is_combined_is_copied_out_of_the_piece() -> None:
    other = np.ones(4, np.float32)
    owned = own_operation(Combine(ref=BlockRef(1, 0), keep=0.5, other=other, add=0.5))
    other[:] = 2
    assert isinstance(owned, Combine)
    assert owned.other is not None
    np.testing.assert_array_equal(owned.other, np.ones(4, np.float32))


def test_pieces_of_one_attempt_come_together() -> None:
    staged = StagedOperations()
    staged.add("a", [content(0), content(1)])
    operations = staged.take("a", [content(2)], num_operations=3)
    assert [operation.ref.cluster for operation in operations] == [0, 1, 2]


def test_a_missing_piece_is_an_error_and_not_a_smaller_transaction() -> None:
    # The shard that took the first piece was killed; this is the next one.
    staged = StagedOperations()
    with pytest.raises(UnavailableError):
        staged.take("a", [content(2)], num_operations=3)
    # A repetition starts afresh.
    assert len(staged.take("b", [content(2)], num_operations=1)) == 1


def test_pieces_of_another_attempt_never_mix_in() -> None:
    staged = StagedOperations()
    staged.add("a", [content(0), content(1)])
    staged.add("b", [content(2)])
    (operation,) = staged.take("b", [], num_operations=1)
    assert operation.ref.cluster == 2


def test_what_arrives_is_copied_out_of_shared_memory() -> None:
    arrived = content(1)
    shared = arrived.weight
    owned = own_operation(arrived)
    assert isinstance(owned, SetContent)
    shared[:] = 9
    np.testing.assert_array_equal(owned.weight, np.ones(4, np.float32))
    block = BlockContent(
        ref=BlockRef(1, 0),
        version=1,
        step=1,
        weight=shared,
        optimizer_state={Role.EXP_AVG: shared},
    )
    read = own_content(block)
    shared[:] = 7
    assert (read.weight == 9).all()
    assert not read.weight.flags.writeable
    assert not read.optimizer_state[Role.EXP_AVG].flags.writeable


def test_bfloat16_travels_beside_the_pickle_and_arrives_as_it_was() -> None:
    # In the pickle it would be copied in and out under the interpreter's lock.
    weight = np.linspace(-1, 1, 1 << 16, dtype=np.float32).astype(dtype_of("bfloat16"))
    swap = SetContent(ref=BlockRef(1, 0), weight=weight, expected_version=3)
    block = BlockContent(ref=BlockRef(1, 0), version=1, step=1, weight=weight, optimizer_state={})
    for sent in (carried_operation(swap), carried_content(block)):
        beside: list[pickle.PickleBuffer] = []
        data = pickle.dumps(sent, protocol=5, buffer_callback=beside.append)
        assert len(data) < 1000
        arrived = pickle.loads(data, buffers=beside)
        if isinstance(arrived, BlockContent):
            owned = own_content(arrived).weight
        else:
            operation = own_operation(arrived)
            assert isinstance(operation, SetContent)
            assert operation.expected_version == 3
            owned = operation.weight
        assert owned.dtype == weight.dtype
        assert owned.tobytes() == weight.tobytes()
        assert not np.shares_memory(owned.view(np.uint16), weight.view(np.uint16))
