"""Every story of two machines that own a bank in turn, as far as chance tells them."""

from __future__ import annotations

import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from journal_rigs import (
    MachineRig,
    append,
    frame_starts,
    payloads_of,
)
from membank.bank_service.store.journal import ShippedJournal
from membank.wire.errors import MembankError, Reason, UnavailableError
from storage_faults import Crash, FaultPlan, StorageFault


def _epoch_first(path: Path) -> list[str]:
    return path.stem.split("-")[::-1]


class _World:
    """Two machines, one bank; what must be in the log, and what may be lost with a machine."""

    def __init__(self, folder: Path) -> None:
        content: dict[str, bytes] = {}
        self.machines = [MachineRig(folder / name, content) for name in ("a", "b")]
        self.home = 0
        self.history: list[bytes] = []
        self.num_shipped = 0
        self.trimmed = 0
        self.count = 0
        self.journal: ShippedJournal | None = None
        self.owners: dict[int, ShippedJournal] = {}
        """Owners that were overtaken, by machine."""
        self.start(0)

    def start(self, machine: int, *, plan: FaultPlan | None = None, intact: bool = True) -> None:
        """Let the next owner start on `machine`, and check what it finds."""
        rig = self.machines[machine]
        rig.manifest, rig.nonce = self.machines[self.home].manifest, self.machines[self.home].nonce
        if self.journal is not None:
            self.owners[self.home] = self.journal
        self.journal = None
        self.owners.pop(machine, None)  # on one machine, the owner before must have died
        journal = rig.start(self.trimmed, plan)
        found = payloads_of(journal, self.trimmed)
        sure = len(self.history) if intact and machine == self.home else self.num_shipped
        assert found == self.history[self.trimmed :][: len(found)]
        assert self.trimmed + len(found) >= sure
        self.history = self.history[: self.trimmed + len(found)]
        assert journal.last_lsn == len(self.history)
        self.home, self.journal = machine, journal

    def append(self) -> None:
        if self.journal is not None:
            self.count += 1
            payloads = [f"update {self.count}.{part}".encode() for part in range(self.count % 3)]
            try:
                append(self.journal, *payloads)
            except UnavailableError:
                self.start(self.home)
            else:
                self.history += payloads

    def ship(self) -> None:
        if self.journal is not None:
            try:
                self.journal.ship()
            except UnavailableError:
                self.start(self.home)  # after another, which died before it published
            else:
                self.num_shipped = len(self.history)

    def fail_to_ship(self, delivers: bool) -> None:
        """Ship while the storage does not answer."""
        outage = self.machines[self.home].outage
        outage.is_down, outage.delivers = True, delivers
        if self.journal is not None:
            with suppress(UnavailableError):  # where there is something to ship
                self.journal.ship()
        outage.is_down = False

    def lose_power(self, part: float) -> None:
        """Cut the newest segment at the owner's machine, as nothing is synced there."""
        *_, path = sorted(self.machines[self.home].local.folder.glob("*.log"), key=_epoch_first)
        ends = [frame for frame in frame_starts(path) if frame] or [path.stat().st_size]
        first = ends[0]
        os.truncate(path, first + int((path.stat().st_size - first) * part))
        self.start(self.home, intact=False)

    def trim(self, keep: int) -> None:
        if self.journal is not None:
            self.trimmed = max(self.trimmed, len(self.history) - keep)
            self.journal.trim(self.trimmed)

    def wake(self) -> None:
        """Let older owners try to go on."""
        for sleeper in self.owners.values():
            with suppress(UnavailableError):  # the second time it knows
                append(sleeper, b"never acknowledged, as its lease has run out")
            with pytest.raises(UnavailableError) as caught:
                sleeper.ship()
            assert caught.value.reason is Reason.FENCED

    def lose(self, machine: int) -> None:
        """Take the disk of `machine` away; if it is that of the owner, another starts there."""
        shutil.rmtree(self.machines[machine].local.folder, ignore_errors=True)
        self.owners.pop(machine, None)
        if machine == self.home:
            self.start(machine, intact=False)

    def die_in_begin(self, machine: int, fault: StorageFault, at: int) -> None:
        """Let an owner start on `machine` and die at one of its calls, or succeed."""
        self.owners.pop(machine, None)
        home, rig = self.home, self.machines[machine]
        rig.manifest, rig.nonce = self.machines[home].manifest, self.machines[home].nonce
        with suppress(Crash, MembankError):
            journal = rig.open(FaultPlan(fault, at))
            journal.begin(rig.next_owner(), self.trimmed)
        if machine == home:
            self.start(home)


_EVENTS = st.one_of(
    st.just(("wake",)),
    st.tuples(st.just("trim"), st.integers(0, 4)),
    st.tuples(st.just("fail_to_ship"), st.booleans()),
    st.tuples(st.just("lose_power"), st.floats(0, 1)),
    st.tuples(st.just("start"), st.integers(0, 1)),
    st.tuples(st.just("lose"), st.integers(0, 1)),
    st.tuples(
        st.just("die_in_begin"),
        st.integers(0, 1),
        st.sampled_from(StorageFault),
        st.integers(1, 10),
    ),
)


# Something to lose before each of them: frames that were shipped, and frames that were not.
_STEPS = st.tuples(st.integers(0, 2), st.booleans(), st.integers(0, 2), _EVENTS)


@pytest.mark.slow
@pytest.mark.timeout(600)
@given(steps=st.lists(_STEPS, max_size=12))
def test_every_story_of_two_machines(
    steps: list[tuple[int, bool, int, tuple[str, ...]]],
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        world = _World(Path(folder))
        for num_before, ships, num_after, (event, *arguments) in steps:
            for _ in range(num_before):
                world.append()
            if ships:
                world.ship()
            for _ in range(num_after):
                world.append()
            getattr(world, event)(*arguments)
        world.start(world.home)
