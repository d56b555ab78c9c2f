"""One bank that is killed again and again, and looked at after every restart."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
import traceback
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from enum import StrEnum
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerContext
from threading import Timer

from campaign_bank import SPEC, TREE, ArmKill, Stop, Survey, Surveyed
from campaign_board import Board
from campaign_clients import (
    PATIENCE_S,
    AnyClient,
    Numbers,
    Operator,
    Pusher,
    Reader,
    ServiceGone,
    ServiceHangs,
    ask,
)
from campaign_model import History, Wrong
from campaign_service import Service
from campaign_tally import Tally
from campaign_worker import Promise, Setting
from membank.bank_service.fsck import Severity, check_bank
from membank.bank_service.shard import Durability
from membank.bank_service.store import Bank
from membank.wire.errors import MembankError, NotFoundError

_NUM_PUSHERS = 3
_LONGEST_LIFE_S = 5.0
_CHANGE = 0.3
_MOVE = 0.6

_DAMAGE = (Severity.DAMAGE,)
"""What a service may never leave, however it dies."""
_ANY_FAULT = (Severity.DAMAGE, Severity.REPAIRABLE)
"""What it may not leave once it has started again, and settled what it was at."""


class Trigger(StrEnum):
    """How a kill comes about."""

    CLOCK = "at a random moment"
    CALL = "at a random call of the storage"
    CLOCK_AT_START = "at a random moment of the start"
    CALL_AT_START = "at a random call of the start"


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
    """Mutating calls of the storage before a kill at one of them, at most."""


LOCAL_PACE = Pace()
"""For a bank on the local disk."""
LOCAL_PROMISES = (
    Promise(Durability.PROCESS),
    Promise(Durability.PROCESS),
    Promise(Durability.HOST),
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
        self._context = context
        self._setting = setting
        self._tally = tally
        self._seed = seed
        self._pace = pace
        self._promises = promises
        self._rng = random.Random(seed)
        # Whether all that was acknowledged lies in the bank's storage.
        self._can_move = False
        self._journal_dirs = [setting.journal_dir]
        setting.folder.mkdir(parents=True)
        Bank.create(setting.objects(), SPEC, tree=TREE)
        self._objects = setting.objects()
        self._board = Board(setting.folder / "board")
        self._history = History()
        numbers = Numbers()
        self._clients: tuple[AnyClient, ...] = (
            Operator("op", self._history, self._child_rng(), numbers),
            Reader("reader", self._history, self._child_rng()),
            *(
                Pusher(f"pusher-{i}", self._history, self._child_rng(), numbers)
                for i in range(_NUM_PUSHERS)
            ),
        )
        self._num_forbidden = 0

    def run(self, num_kills: int) -> bool:
        """Kill the service so often, and stop it once; False where something went wrong.

        Notes
        -----
        The files of a bank that went wrong stay where they are.
        """
        began = time.monotonic()
        target = self._tally.kills + num_kills
        try:
            while not self._history.violations and self._tally.kills < target:
                self._round(self._rng.choices(list(Trigger), [11, 5, 2, 2])[0])
            if not self._history.violations:
                self._stop()
        except Exception:
            # Nobody watches a long campaign: it says what happened, and goes on with another bank.
            self._history.blame(Wrong.FAILED, traceback.format_exc())
        finally:
            self._tally.seconds += time.monotonic() - began
            self._tally.banks += 1
            for client in self._clients:
                self._tally.requests.update(client.counts)
        return self._report()

    # ---- one life of the service

    def _round(self, trigger: Trigger) -> None:
        self._change_setting()
        self._copy_files()
        self._board.clear()
        kill = self._armed(30) if trigger is Trigger.CALL_AT_START else None
        service = Service(self._context, self._setting, len(self._clients), kill)
        timer = Timer(self._rng.uniform(0, self._pace.start_s), service.process.kill)
        if trigger is Trigger.CLOCK_AT_START:
            timer.start()
        with self._judged(service):
            self._come_back(service)
            if trigger is Trigger.CALL:
                ask(service.control, self._armed(self._pace.max_calls))
            if not self._history.violations:
                self._live(service, None if trigger is Trigger.CALL else self._life_s())
        timer.cancel()
        self._count(service.end(), trigger)

    def _come_back(self, service: Service) -> None:
        """Wait for the service, settle what was open, and compare every block."""
        service.wait_until_open()
        self._can_move = self._setting.promise.durability is Durability.STORE
        with ThreadPoolExecutor(len(self._clients)) as pool:
            list(
                pool.map(
                    lambda pair: pair[0].settle(pair[1]),
                    zip(self._clients, service.connections, strict=True),
                )
            )
        surveyed = ask(service.control, Survey())
        assert isinstance(surveyed, Surveyed)
        self._history.check(surveyed)
        self._look_for_deleted()
        self._check_files("restarted", _ANY_FAULT)
        self._tally.restarts += 1

    def _live(self, service: Service, life_s: float | None) -> None:
        """Let clients ask until the service dies, by our hand or its own."""
        with ThreadPoolExecutor(len(self._clients)) as pool:
            lives = [
                pool.submit(client.live, connection)
                for client, connection in zip(self._clients, service.connections, strict=True)
            ]
            wait([service.process.sentinel], _LONGEST_LIFE_S if life_s is None else life_s)
            service.process.kill()
        for life in lives:
            life.result()

    def _count(self, code: int, trigger: Trigger) -> None:
        """Count a kill, and look at what it left."""
        if code != -signal.SIGKILL:
            self._history.blame(Wrong.FAILED, f"the service ended by itself, with {code}")
            return
        tally = self._tally
        tally.kills += 1
        tally.triggers[trigger.value] += 1
        tally.durability[str(self._setting.promise)] += 1
        tally.phases.update(phase.name.lower() for phase in self._board.phases())
        if word := self._board.last_word():
            tally.calls[_call_name(word)] += 1
        if not self._history.violations:
            self._check_files("killed", _DAMAGE)

    def _stop(self) -> None:
        """Start once more, stop as told, start again: what a clean stop leaves is whole too."""
        for _ in range(2):
            service = Service(self._context, self._setting, len(self._clients))
            with self._judged(service):
                self._come_back(service)
                ask(service.control, Stop())
                service.process.join(PATIENCE_S)
            code = service.end()
            if code:
                self._history.blame(Wrong.FAILED, f"a stop ended with {code}")
            self._check_files("stopped", _ANY_FAULT)

    @contextmanager
    def _judged(self, service: Service) -> Iterator[None]:
        """Bear with a service that dies, and with nothing else."""
        try:
            yield
        except ServiceGone:
            pass
        except ServiceHangs as err:
            service.show_stacks()
            self._history.blame(Wrong.FAILED, str(err))
        except MembankError as err:
            self._history.blame(Wrong.FAILED, f"the service says {err!r}")
        except BaseException:
            service.end()
            raise

    # ---- what is looked at

    def _check_files(self, when: str, wrong: Collection[Severity]) -> None:
        """Let the check of a bank judge what lies in the storage."""
        report = check_bank(self._objects, journal_dir=self._setting.journal_dir, deep=True)
        self._tally.checks += 1
        for finding in report.findings:
            if finding.severity in wrong:
                self._history.blame(
                    Wrong.FSCK, f"{when}: {finding.kind.value}: {finding.key}: {finding.problem}"
                )

    def _look_for_deleted(self) -> None:
        """Look into every object and journal for what was deleted."""
        forbidden = self._history.forbidden[self._num_forbidden :]
        if not forbidden:
            return
        self._num_forbidden = len(self._history.forbidden)
        for where, data in self._contents():
            found = [pattern.hex() for pattern in forbidden if pattern in data]
            if found:
                self._history.blame(
                    Wrong.RESURRECTED, f"{where} holds deleted content that begins with {found[0]}"
                )

    def _contents(self) -> Iterator[tuple[str, bytes]]:
        for key in self._objects.list(""):
            with suppress(NotFoundError):
                yield key, self._objects.get(key)
        for folder in self._journal_dirs:
            for path in sorted(folder.rglob("*")):
                with suppress(FileNotFoundError):
                    if path.is_file():
                        yield str(path), path.read_bytes()

    def _copy_files(self) -> None:
        """Keep what the last kill left, in case that the next start goes wrong."""
        copy = self._setting.folder / "before"
        shutil.rmtree(copy, ignore_errors=True)
        if self._setting.journal_dir.exists():
            shutil.copytree(self._setting.journal_dir, copy / "journals")
        if self._setting.is_directory:
            # Objects are replaced, never written into, so that a link is a copy.
            shutil.copytree(self._setting.url, copy / "bank", copy_function=os.link)

    def _copy_objects(self) -> None:
        """Keep the objects of a bucket, which ends with its server."""
        for key in self._objects.list(""):
            path = self._setting.folder / "objects" / key
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(self._objects.get(key))

    # ---- chance

    def _change_setting(self) -> None:
        """Promise something else now and then; move to another machine where that is no loss."""
        if self._rng.random() < _CHANGE:
            promise = self._rng.choice(self._promises)
            self._setting = replace(self._setting, promise=promise)
        is_in_store = self._setting.promise.durability is Durability.STORE
        if self._can_move and is_in_store and self._rng.random() < _MOVE:
            self._tally.machines += 1
            machine = self._setting.folder / f"machine-{len(self._journal_dirs)}"
            self._setting = replace(self._setting, journal_dir=machine)
            self._journal_dirs.append(machine)
        self._can_move = self._can_move and is_in_store

    def _armed(self, max_calls: int) -> ArmKill:
        return ArmKill(calls=self._rng.randrange(max_calls), after=self._rng.random() < 0.5)

    def _life_s(self) -> float:
        pace = self._pace
        if self._rng.random() < pace.long_share:
            return self._rng.uniform(pace.longest_s, pace.long_s)
        drawn = self._rng.expovariate(1 / pace.mean_s)
        return min(max(drawn, pace.shortest_s), pace.longest_s)

    def _child_rng(self) -> random.Random:
        return random.Random(self._rng.random())

    # ---- the end

    def _report(self) -> bool:
        violations = self._history.violations
        if not violations:
            return True
        if not self._setting.is_directory:
            self._copy_objects()
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
