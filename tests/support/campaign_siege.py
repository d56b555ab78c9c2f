"""One bank that is killed again and again, and looked at after every restart."""

from __future__ import annotations

import random
import shutil
import signal
import time
import traceback
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from enum import StrEnum
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerContext
from threading import Event, Timer

from campaign_bank import SPEC, TREE, ArmKill, Surveyed
from campaign_calls import Caller, ServiceGone, ServiceHangs
from campaign_clients import TRANSIENT, Client, Line, Numbers, Operator, Pusher, Reader
from campaign_model import History, Wrong
from campaign_remains import ANY_FAULT, DAMAGE, Remains
from campaign_service import Process, phases_of
from campaign_setting import SHARDS, Promise, Seat, Setting
from campaign_tally import Tally
from membank.bank_service.shard import Durability
from membank.bank_service.store import Bank
from membank.wire.spec import BlockRef

_NUM_PUSHERS = 3
_CALLS_AT_START = 20
_COPIED_S = 3.0
"""Seconds after which even a slow machine has copied a journal that it copies all the time."""
_CHANGE = 0.3
_MOVE = 0.6


class Trigger(StrEnum):
    """How a kill comes about."""

    CLOCK = "at a random moment"
    CALL = "at a random call of the storage"
    CLOCK_AT_START = "at a random moment of the start"
    CALL_AT_START = "at a random call of the start"


TRIGGERS = {
    Trigger.CLOCK: 11,
    Trigger.CALL: 5,
    Trigger.CLOCK_AT_START: 2,
    Trigger.CALL_AT_START: 2,
}
"""How often each is meant to come about."""


class Victims(StrEnum):
    """Who is killed."""

    ALL = "all processes"
    SHARD = "one shard"
    COORDINATOR = "the coordinator"


@dataclass(frozen=True, kw_only=True)
class Pace:
    """How long a service lives."""

    shortest_s: float = 0.005
    """Shortest life, from the moment at which the bank was found in order."""
    mean_s: float = 0.07
    """Mean of the exponential distribution of lives."""
    longest_s: float = 0.15
    """Longest of them."""
    long_share: float = 0.2
    """Share of lives that are much longer, so that there is more to be lost."""
    long_s: float = 1.0
    """Longest of those."""
    start_s: float = 0.15
    """Longest life of a service that is to die while it starts."""
    max_calls: int = 150
    """Mutating calls of the storage by a shard before a kill at one of them, at most."""
    max_coordinator_calls: int = 10
    """The same for the coordinator, which leaves most of them to the shards."""

    def calls_of(self, seat: Seat) -> int:
        """Return how many calls a process may make before a kill at one of them."""
        return self.max_coordinator_calls if seat is Seat.COORDINATOR else self.max_calls


LOCAL_PACE = Pace()
"""For a bank on the local disk."""
LOCAL_PROMISES = (
    Promise(Durability.PROCESS),
    Promise(Durability.PROCESS),
    Promise(Durability.HOST),
    Promise(Durability.PROCESS, ship_every_s=0.05),
    Promise(Durability.STORE),
)
"""What such a bank can promise."""
S3_PACE = Pace(shortest_s=0.02, mean_s=0.4, longest_s=1.5, long_s=4.0, start_s=0.5)
"""For a bank in a bucket, where a transaction takes a tenth of a second and more."""
S3_PROMISES = (
    Promise(Durability.PROCESS),
    Promise(Durability.HOST),
    Promise(Durability.PROCESS, ship_every_s=0.05),
    Promise(Durability.STORE),
    Promise(Durability.STORE),
)
"""What such a bank can promise."""


class Siege:
    """The kills of one bank.

    Parameters
    ----------
    context
        Starts processes.
    setting
        The bank, which is created.
    tally
        Gets what comes out.
    seed
        Decides what is asked and when the kills come, as far as timing allows.
    pace
        How long the service lives.
    promises
        What it promises, now this, now that.
    """

    def __init__(
        self,
        context: ForkServerContext,
        setting: Setting,
        tally: Tally,
        *,
        seed: str,
        pace: Pace,
        promises: Sequence[Promise],
    ) -> None:
        self._setting = setting
        self._tally = tally
        self._seed = seed
        self._pace = pace
        self._promises = promises
        self._rng = random.Random(seed)
        # Whether all that was acknowledged lies in the bank's storage.
        self._can_move = False
        setting.folder.mkdir(parents=True)
        Bank.create(setting.objects(), SPEC, tree=TREE)
        self._processes = {seat: Process(context, setting, seat) for seat in Seat}
        self.history = History()
        """What clients asked and were told."""
        self._remains = Remains(setting, self.history, tally)
        self._line = self._new_line()
        self._numbers = numbers = Numbers()
        self._clients: list[Client] = [
            Operator("op", self._new_line(), self.history, self._child_rng(), numbers),
            Reader("reader", self._new_line(), self.history, self._child_rng()),
        ]
        for index in range(_NUM_PUSHERS):
            name, rng = f"pusher-{index}", self._child_rng()
            self._clients.append(Pusher(name, self._new_line(), self.history, rng, numbers))

    def run(self, num_kills: int) -> bool:
        """Kill the service so often, and stop it once; False where something went wrong.

        Notes
        -----
        The files of a bank that went wrong stay where they are.
        """
        began = time.monotonic()
        target = self._tally.kills + num_kills
        try:
            with self._judged():
                self._start(list(Seat))
                while not self.history.violations and self._tally.kills < target:
                    self._live()
                    self._check()
                    self._tally.restarts += 1
                self._stop()
                self._lose_machine()
        finally:
            for process in self._processes.values():
                process.end()
            self._tally.seconds += time.monotonic() - began
            self._tally.banks += 1
            for client in self._clients:
                self._tally.requests.update(client.counts)
        return self._report()

    # ---- one life of the service

    def _live(self) -> None:
        """Let clients ask, kill processes and start them again, and let clients come to an end."""
        stop = Event()
        with ThreadPoolExecutor(len(self._clients)) as pool:
            lives = [pool.submit(client.live, stop) for client in self._clients]
            try:
                self._strike()
                if self._wait_for_death(list(Seat), self._life_s()):
                    raise RuntimeError("nobody was to be killed now")
            except BaseException:
                self._let_clients_go()
                raise
            finally:
                stop.set()
        for life in lives:
            life.result()

    def _let_clients_go(self) -> None:
        for client in self._clients:
            client.line.end()
        for process in self._processes.values():
            # Whoever waits for it finds out that it is not, and that the line has ended.
            process.up.set()

    def _strike(self) -> None:
        """Kill some processes, and start them again, which may take several attempts."""
        victims = self._rng.choices(list(Victims), [2, 2, 1])[0]
        seats = self._seats_of(victims)
        trigger = self._rng.choices(list(TRIGGERS), list(TRIGGERS.values()))[0]
        if trigger is Trigger.CALL:
            shot = self._rng.choice(seats)
            self._line.insist(shot, "arm", *self._shot(self._pace.calls_of(shot)))
            self._wait_for_death(seats, self._pace.long_s)
        else:
            self._wait_for_death(seats, self._life_s())
        self._kill(seats, victims)
        if trigger in (Trigger.CLOCK_AT_START, Trigger.CALL_AT_START):
            self._start_in_vain(seats, trigger)
            self._kill(seats, victims)
        self._start(seats)

    def _seats_of(self, victims: Victims) -> list[Seat]:
        match victims:
            case Victims.ALL:
                return list(Seat)
            case Victims.SHARD:
                return [self._rng.choice(SHARDS)]
            case Victims.COORDINATOR:
                return [Seat.COORDINATOR]

    def _start(self, seats: Sequence[Seat]) -> None:
        """Start processes, and wait until the bank is served."""
        for seat in seats:
            self._processes[seat].start(self._setting)
        self._open(seats)
        if Seat.COORDINATOR in seats:
            self._line.insist(Seat.COORDINATOR, "recover")

    def _start_in_vain(self, seats: Sequence[Seat], trigger: Trigger) -> None:
        """Start processes that will be killed before they are open, or soon after."""
        shot = self._rng.choice(seats)
        timer = Timer(self._rng.uniform(0, self._pace.start_s), self._kill_now, [seats])
        for seat in seats:
            is_armed = seat is shot and trigger is Trigger.CALL_AT_START
            kill = ArmKill(*self._shot(_CALLS_AT_START)) if is_armed else None
            self._processes[seat].start(self._setting, kill)
        if trigger is Trigger.CLOCK_AT_START:
            timer.start()
        with suppress(ServiceGone, *TRANSIENT):
            self._open(seats)
            if Seat.COORDINATOR in seats:
                # Once: whoever it takes may be dead, and nobody starts it before this returns.
                Caller(self._setting.address(Seat.COORDINATOR))("recover")
        self._wait_for_death(seats, self._pace.long_s)
        timer.cancel()
        if timer.is_alive():
            timer.join()

    def _open(self, seats: Sequence[Seat]) -> None:
        for seat in seats:
            self._processes[seat].wait_until_open()
        if set(SHARDS) <= set(seats):
            self._can_move = self._setting.promise.durability is Durability.STORE

    def _wait_for_death(self, seats: Sequence[Seat], longest_s: float) -> bool:
        """Return once somebody is dead, or after so long: whether somebody is."""
        return bool(wait([self._processes[seat].running.sentinel for seat in seats], longest_s))

    def _kill_now(self, seats: Sequence[Seat]) -> None:
        for seat in seats:
            self._processes[seat].kill()

    def _kill(self, seats: Sequence[Seat], victims: Victims) -> None:
        """Kill processes that may be dead already, count that, and look at what they left."""
        self._kill_now(seats)
        tally, processes = self._tally, self._processes
        # What a shard does in a transaction says little of which one it is.
        tally.phases.update(
            phase.name.lower()
            for phase in phases_of({processes[s] for s in (*seats, Seat.COORDINATOR)})
        )
        self._bury(seats)
        tally.kills += 1
        tally.victims[victims.value] += 1
        tally.triggers[self._trigger_of(seats).value] += 1
        tally.durability[str(self._setting.promise)] += 1
        if victims is Victims.ALL:
            self._remains.check("killed", DAMAGE)
            self._change_setting()
            self._remains.copy()

    def _bury(self, seats: Sequence[Seat]) -> None:
        for seat in seats:
            process = self._processes[seat]
            code = process.end()
            if code != -signal.SIGKILL or process.died_by_itself:
                self.history.blame(Wrong.FAILED, f"{seat} died by itself, with {code}")
            if word := process.board.last_word():
                self._tally.calls[_call_name(word)] += 1

    def _trigger_of(self, seats: Sequence[Seat]) -> Trigger:
        """Return how a kill came about, which need not be how it was meant to."""
        dead = [self._processes[seat] for seat in seats]
        shot = [process for process in dead if process.board.last_word()]
        is_at_start = any(process.is_at_start for process in shot or dead)
        if shot:
            return Trigger.CALL_AT_START if is_at_start else Trigger.CALL
        return Trigger.CLOCK_AT_START if is_at_start else Trigger.CLOCK

    def _stop(self) -> None:
        """Stop as told, start elsewhere, and stop again: what a clean stop leaves is whole too."""
        for _ in range(2):
            if self.history.violations:
                return
            self._shut_down()
            # Nothing that was acknowledged is left in a journal.
            self._move()
            self._start(list(Seat))
            self._check()
            self._tally.stops += 1

    def _shut_down(self) -> None:
        for process in self._processes.values():
            process.stop()
        codes = {seat: process.end() for seat, process in self._processes.items()}
        if any(codes.values()):
            self.history.blame(Wrong.FAILED, f"a stop ended with {codes}")
        self._remains.check("stopped", ANY_FAULT)
        # What was deleted long ago may be back: a journal of a former owner, a late write.
        self._remains.look_for_deleted(since_ever=True)

    def _lose_machine(self) -> None:
        """Lose a machine whose journals are copied: what is older than the last copy is there."""
        shipped = [promise for promise in self._promises if promise.ship_every_s]
        if self.history.violations or not shipped:
            return
        self._shut_down()
        self._setting = replace(self._setting, promise=shipped[0], is_restless=False)
        self._start(list(Seat))
        least = self._push_until_copied()
        self._kill_now(list(Seat))
        self._bury(list(Seat))
        shutil.rmtree(self._setting.journal_dir)
        self._move()
        self._start(list(Seat))
        found = self._survey()
        self.history.check(found, least)
        self._remains.check("restarted without its journals", ANY_FAULT)
        told = self.history.newest(SPEC.blocks())
        self._tally.machines_lost += 1
        self._tally.gradients_gone += sum(told[ref] - found.versions[ref] for ref in told)

    def _push_until_copied(self) -> dict[BlockRef, int]:
        """Push for a while, and return the versions of which there must be a copy at the end."""
        stop, least = Event(), dict[BlockRef, int]()
        old_s = self._rng.uniform(0.2, 1.0)
        timers = [
            Timer(old_s, lambda: least.update(self.history.newest(SPEC.blocks()))),
            Timer(old_s + _COPIED_S, stop.set),
        ]
        for timer in timers:
            timer.start()
        # Not one of the clients: what is acknowledged here was not there to be killed.
        pusher = Pusher("last", self._new_line(), self.history, self._child_rng(), self._numbers)
        pusher.live(stop)
        self._tally.shipped += pusher.counts["gradient acknowledged"]
        return least

    @contextmanager
    def _judged(self) -> Iterator[None]:
        """Blame the bank for whatever is not foreseen, and go on with another one."""
        try:
            yield
        except ServiceHangs as err:
            for process in self._processes.values():
                process.show_stacks()
            self.history.blame(Wrong.FAILED, str(err))
        except Exception:
            self.history.blame(Wrong.FAILED, traceback.format_exc())
            for seat, process in self._processes.items():
                if process.died_by_itself:
                    self.history.blame(Wrong.FAILED, f"{seat} died by itself")

    # ---- what is looked at

    def _check(self) -> None:
        """With every request answered: repeat some, compare every block, check every file."""
        # Also before: what was lost may be as it was once it is asked again.
        self.history.check(self._survey())
        for client in self._clients:
            client.ask_again()
        self.history.check(self._survey())
        self._remains.look_for_deleted()
        self._remains.check("restarted", ANY_FAULT)

    def _survey(self) -> Surveyed:
        parts: list[Surveyed] = [self._line.insist(seat, "survey") for seat in SHARDS]
        return Surveyed(
            versions={ref: v for part in parts for ref, v in part.versions.items()},
            images={ref: image for part in parts for ref, image in part.images.items()},
            served={ref: data for part in parts for ref, data in part.served.items()},
        )

    # ---- chance

    def _change_setting(self) -> None:
        """Promise something else now and then; move to another machine where that is no loss."""
        if self._rng.random() < _CHANGE:
            promise = self._rng.choice(self._promises)
            self._setting = replace(self._setting, promise=promise)
        is_in_store = self._setting.promise.durability is Durability.STORE
        if self._can_move and is_in_store and self._rng.random() < _MOVE:
            self._move()
        self._can_move = self._can_move and is_in_store

    def _move(self) -> None:
        self._tally.machines += 1
        folders = self._remains.journal_dirs
        folders.append(self._setting.folder / f"machine-{len(folders)}")
        self._setting = replace(self._setting, journal_dir=folders[-1])

    def _shot(self, max_calls: int) -> tuple[int, bool]:
        return self._rng.randrange(max_calls), self._rng.random() < 0.5

    def _life_s(self) -> float:
        pace = self._pace
        if self._rng.random() < pace.long_share:
            return self._rng.uniform(pace.longest_s, pace.long_s)
        drawn = self._rng.expovariate(1 / pace.mean_s)
        return min(max(drawn, pace.shortest_s), pace.longest_s)

    def _new_line(self) -> Line:
        return Line(self._setting, {seat: p.up for seat, p in self._processes.items()})

    def _child_rng(self) -> random.Random:
        return random.Random(self._rng.random())

    # ---- the end

    def _report(self) -> bool:
        violations = self.history.violations
        if not violations:
            return True
        self._remains.keep()
        self._tally.wrong.update(violation.kind for violation in violations)
        self._tally.failures.append(
            {
                "seed": self._seed,
                "kills": self._tally.kills,
                "durability": str(self._setting.promise),
                "bank": self._setting.url,
                "folder": str(self._setting.folder),
                "wrong": [f"{found.kind.value}: {found.text}" for found in violations[:20]],
            }
        )
        return False


def _call_name(word: str) -> str:
    """Return a call without what is different every time, so that alike ones count together."""
    words = []
    for part in word.split():
        if part.endswith(".log"):
            words.append("journal")
        elif part.startswith(".probe-"):
            words.append(".probe")
        else:
            words.append("/".join(n for n in part.split("/") if not any(c.isdigit() for c in n)))
    return " ".join(name for name in words if name)
