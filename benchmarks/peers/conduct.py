"""One run: servers up, clients connected, blocks loaded and verified, tasks measured in turn.

Whoever is not on turn is halted, with all its processes, so that the machine is the contestant's alone.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from types import TracebackType
from typing import Any, Self

from benchmarks.peers.contestant import Contestant, NotRunError, Server, Work
from benchmarks.peers.family import Family
from benchmarks.peers.lineup import STAGES, Stage
from benchmarks.peers.measuring import MeasuringProcess
from benchmarks.peers.rounds import Round, Samples, interleave
from benchmarks.peers.tasks import Scale

Say = Callable[[str], None]
"""Takes a line about what goes on."""

TURNS = (
    "contestants take turns within each round of each task; whoever is not on turn is halted (SIGSTOP), "
    "server and clients, as are clients that a task does not need; a turn begins with two untimed calls per client, and with a wait until the "
    "processes are about as idle as they are by themselves"
)
"""How it is done, for the result."""

_LOOK_S = 0.1
_NUM_LOOKS = 5
_AHEAD_S = 0.05
"""Seconds between telling several clients to begin and the time at which they do."""


@dataclass
class Outcome:
    """What a run found."""

    about: dict[str, dict[str, object]] = field(default_factory=dict)
    """What each contestant is."""
    not_run: dict[str, str] = field(default_factory=dict)
    """Contestants that did not take part, with the reason."""
    results: dict[str, dict[str, Samples]] = field(default_factory=dict)
    """Samples by task, then by contestant."""
    failed: dict[str, dict[str, str]] = field(default_factory=dict)
    """Contestants that failed at a task, with the reason, by task."""
    tasks: dict[str, dict[str, object]] = field(default_factory=dict)
    """What each task is."""


class _Party:
    """A stage's servers and clients, as far as they came up."""

    def __init__(self, stage: Stage, name: str, folder: Path, outcome: Outcome, say: Say) -> None:
        self._stage = stage
        self._name = name
        self._folder = folder
        self._outcome = outcome
        self._say = say
        self._endings: list[ExitStack] = []
        self._families: dict[str, Family] = {}
        self.clients: dict[str, list[MeasuringProcess]] = {}

    def __enter__(self) -> Self:
        try:
            self._come_up()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._end()

    def _end(self) -> None:
        """End all families side by side: to end is mostly to wait."""
        with ThreadPoolExecutor(max(1, len(self._endings))) as pool:
            list(pool.map(ExitStack.close, self._endings))

    @contextmanager
    def turn(self, name: str, task: str, number: int) -> Iterator[Sequence[MeasuringProcess]]:
        """Let a contestant run alone, rested and warm for a round of a task; give its clients."""
        num_clients = self._stage.tasks[name][task].num_clients
        clients, others = self.clients[name][:num_clients], self.clients[name][num_clients:]
        family = self._families[name]
        # TensorPipe's clients would take turns on the cores with the one that is measured.
        family.resume(but=[client.pid for client in others])
        try:
            for client in clients:
                client.send(do="warm_up", task=task, round=number)
            _receive_all(clients)
            family.come_to_rest()
            yield clients
        finally:
            family.halt()

    def _come_up(self) -> None:
        servers = {c.server.name: c.server for c in self._stage.contestants}
        families = {name: Family(f"{os.getpid()}-{self._name}-{name}") for name in servers}
        endings = {name: ExitStack() for name in servers}
        for name, server in servers.items():
            endings[name].callback(self._stop, server)
        self._endings.extend(endings.values())
        self._say(f"starting {', '.join(servers)}")
        with ThreadPoolExecutor(len(servers)) as pool:
            starts = [
                pool.submit(self._start, server, families[name]) for name, server in servers.items()
            ]
            for (name, server), start in zip(servers.items(), starts, strict=True):
                self._bring_up(server, start, families[name], endings[name])

    def _bring_up(
        self, server: Server, start: Future[str], family: Family, ending: ExitStack
    ) -> None:
        """Connect a server's clients, load, verify, and see how idle they are; then halt them."""
        sharing = self._sharing(server)
        try:
            address = start.result()
        except Exception as err:
            for contestant in sharing:
                self._leave_out(contestant, str(err) if isinstance(err, NotRunError) else repr(err))
            return
        for contestant in sharing:
            self._families[contestant.name] = family
            self._begin_clients(contestant, address, ending)
        # First of all at the end: who is halted does not hear that it shall end.
        ending.callback(family.resume)
        for contestant in sharing:
            self._guard(contestant, _receive_all)
        self._say(f"loading and verifying {', '.join(c.name for c in sharing)}")
        self._load_and_verify(sharing)
        # Of several looks: some begin with housekeeping that does not go on.
        family.idle_cores = median(family.cores(_LOOK_S) for _ in range(_NUM_LOOKS))
        for contestant in sharing:
            self._outcome.about[contestant.name]["idle_cores"] = family.idle_cores
        family.halt()

    def _sharing(self, server: Server) -> list[Contestant]:
        return [c for c in self._stage.contestants if c.server is server]

    def _start(self, server: Server, family: Family) -> str:
        sharing = self._sharing(server)
        folder = self._folder / server.name.replace(" ", "-")
        folder.mkdir()
        about = {**asdict(server.about()), "server": server.name}
        for contestant in sharing:
            said = {"reach": contestant.reach.value, "note": contestant.note}
            self._outcome.about[contestant.name] = {**about, **said}
        num_clients = max(map(self._stage.num_clients, sharing))
        return server.start(folder, num_clients, family.environment)

    def _stop(self, server: Server) -> None:
        try:
            server.stop()
        except Exception as err:
            # The others still have to be ended.
            self._say(f"{server.name} did not stop in order: {err}")

    def _begin_clients(self, contestant: Contestant, address: str, ending: ExitStack) -> None:
        processes = self.clients[contestant.name] = []
        for number in range(self._stage.num_clients(contestant)):
            log = self._folder / f"{contestant.name.replace(' ', '-')}-{number}.log"
            process = MeasuringProcess(
                self._name, self._stage.scale, contestant, address, number, log,
                self._families[contestant.name].environment,
            )  # fmt: skip
            ending.callback(process.stop)
            processes.append(process)

    def _load_and_verify(self, sharing: Sequence[Contestant]) -> None:
        if self._stage.blocks is None:
            return
        there = [contestant for contestant in sharing if contestant.name in self.clients]
        for turn, contestant in enumerate(there):

            def prepare(
                clients: Sequence[MeasuringProcess],
                contestant: Contestant = contestant,
                turn: int = turn,
            ) -> None:
                if turn == 0:
                    clients[0].ask(do="load")
                clients[0].ask(do="verify")
                if Work.PUSH in contestant.works:
                    clients[0].ask(do="verify_push", key=f"8mb/{turn}")

            self._guard(contestant, prepare)

    def _guard(
        self, contestant: Contestant, use: Callable[[Sequence[MeasuringProcess]], object]
    ) -> None:
        """Use the clients of a contestant; one that fails takes part no longer."""
        clients = self.clients.get(contestant.name)
        if clients is None:
            return
        try:
            use(clients)
        except NotRunError as err:
            self._leave_out(contestant, str(err))

    def _leave_out(self, contestant: Contestant, reason: str) -> None:
        self._say(f"{contestant.name} is not run: {reason}")
        self._outcome.not_run[contestant.name] = reason
        self.clients.pop(contestant.name, None)


def conduct(scale: Scale, only: Sequence[str], folder: Path, say: Say) -> Outcome:
    """Run all stages.

    Parameters
    ----------
    scale
        How much is measured.
    only
        Contestants and tasks to run, by the beginnings of their names; empty = all.
    folder
        Empty directory for what servers write.
    say
        Told what goes on.
    """
    outcome = Outcome()
    for name, make in STAGES.items():
        stage = _selected(make(scale), only)
        if not stage.contestants:
            continue
        place = folder / name
        place.mkdir()
        with _Party(stage, name, place, outcome, say) as party:
            for task in stage.task_names:
                say(f"measuring {task}")
                _measure(task, stage, party, outcome)
    return outcome


def _measure(task: str, stage: Stage, party: _Party, outcome: Outcome) -> None:
    doing = {name: tasks[task] for name, tasks in stage.tasks.items() if task in tasks}
    some = next(iter(doing.values()))
    outcome.tasks[task] = {
        "what": some.what,
        "unit": some.unit,
        "amount": some.amount,
        "num_clients": some.num_clients,
        "calls_per_round": some.num_calls,
    }
    names = [name for name in doing if name in party.clients]

    def measure(name: str, number: int) -> Round:
        with party.turn(name, task, number) as clients:
            return _round(clients, task, number)

    outcome.results[task], failed = interleave(names, stage.scale.num_rounds, measure)
    if failed:
        outcome.failed[task] = failed


def _round(clients: Sequence[MeasuringProcess], task: str, number: int) -> Round:
    begin = time.monotonic() + (_AHEAD_S if len(clients) > 1 else 0.0)
    for client in clients:
        client.send(do="measure", task=task, round=number, begin=begin)
    answers = _receive_all(clients)
    calls = tuple(second for answer in answers for second in answer["seconds"])
    if len(clients) == 1:
        return Round(calls)
    return Round(calls, wall_s=max(answer["end"] for answer in answers) - begin)


def _receive_all(clients: Sequence[MeasuringProcess]) -> list[Any]:
    answers: list[Any] = []
    errors: list[NotRunError] = []
    for client in clients:
        try:
            answers.append(client.receive())
        except NotRunError as err:
            errors.append(err)
    # Not before all have answered: the next question would get what is left.
    if errors:
        raise errors[0]
    return answers


def _selected(stage: Stage, only: Sequence[str]) -> Stage:
    """Leave out whom and what was not asked for."""
    who = [c for c in stage.contestants if any(c.name.startswith(name) for name in only)]
    if who or not only:
        stage.contestants = who or stage.contestants
    what = {t for t in stage.task_names if any(t.startswith(name) for name in only)}
    names = {c.name for c in stage.contestants}
    stage.tasks = {
        name: {t: task for t, task in tasks.items() if t in what or not what}
        for name, tasks in stage.tasks.items()
        if name in names
    }
    stage.contestants = [c for c in stage.contestants if stage.tasks[c.name]]
    if only and not who and not what:
        stage.contestants = []
    return stage
