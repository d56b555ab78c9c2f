"""Reading many objects: in order, few at a time, and nothing that they hold raises."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from membank.bank_service.fsck.reading import Fault, FaultKind, examine_each
from membank.bank_service.store import FsspecObjects, LocalObjects, ObjectStore


def _decode(data: bytes) -> int:
    if data == b"bad":
        raise RecursionError
    return int(data)


@pytest.mark.parametrize(
    ("make", "ahead"),
    [(LocalObjects, 1), (lambda path: FsspecObjects(f"memory://{path.name}"), 8)],
    ids=["local", "url"],
)
def test_a_few_at_a_time(tmp_path: Path, make: Callable[[Path], ObjectStore], ahead: int) -> None:
    objects = make(tmp_path)
    num_asked = 0
    for number in range(30):
        objects.put(str(number), b"bad" if number == 3 else str(number).encode())

    def jobs() -> Iterator[tuple[int, str, Callable[[bytes], int]]]:
        nonlocal num_asked
        for number in range(31):
            num_asked += 1
            yield number, str(number), _decode

    found: list[int | Fault] = []
    for number, key, answer in examine_each(objects, jobs()):
        assert (number, key) == (len(found), str(len(found)))
        found.append(answer)
        # What was asked for and not handed over yet is in memory.
        assert num_asked - len(found) < ahead
    assert found[:3] == [0, 1, 2]
    assert found[4:30] == list(range(4, 30))
    damaged, missing = found[3], found[30]
    assert isinstance(damaged, Fault)
    assert isinstance(missing, Fault)
    assert (damaged.kind, missing.kind) == (FaultKind.DAMAGED, FaultKind.MISSING)
    assert "RecursionError" in damaged.problem
