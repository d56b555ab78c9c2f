"""One run: servers up, clients connected, blocks loaded and verified, tasks measured in turn."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from benchmarks.peers.contestant import Contestant, NotRunError, Server, Work
from benchmarks.peers.lineup import STAGES, Stage
from benchmarks.peers.measuring import MeasuringProcess
from benchmarks.peers.rounds import Round, Samples, interleave
from benchmarks.peers.tasks import Scale

Say = Callable[[str], None]
"""Takes a line about what goes on."""

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
        self._stack = ExitStack()
        self.clients: dict[str, list[MeasuringProcess]] = {}

    def __enter__(self) -> Self:
        try:
            self._come_up()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()

    def _come_up(self) -> None:
        servers = {c.server.name: c.server for c in self._stage.contestants}
        for server in servers.values():
            self._stack.callback(self._stop, server)
        self._say(f"starting {', '.join(servers)}")
        # Side by side: to come up is mostly to wait for others.
        with ThreadPoolExecutor(len(servers)) as pool:
            addresses = dict(zip(servers, pool.map(self._start, servers.values()), strict=True))
        for contestant in self._stage.contestants:
            match addresses[contestant.server.name]:
                case NotRunError() as err:
                    self._leave_out(contestant, str(err))
                case address:
                    self._begin_clients(contestant, str(address))
        for contestant in self._stage.contestants:
            self._guard(contestant, lambda clients: [client.receive() for client in clients])
        self._load_and_verify()

    def _start(self, server: Server) -> str | NotRunError:
        sharing = [c for c in self._stage.contestants if c.server is server]
        folder = self._folder / server.name.replace(" ", "-")
        folder.mkdir()
        try:
            about = {**asdict(server.about()), "server": server.name}
            for c in sharing:
                said = {"reach": c.reach.value, "note": c.note}
                self._outcome.about[c.name] = {**about, **said}
            return server.start(folder, max(map(self._stage.num_clients, sharing)))
        except Exception as err:
            return err if isinstance(err, NotRunError) else NotRunError(repr(err))

    def _stop(self, server: Server) -> None:
        try:
            server.stop()
        except Exception as err:
            # The others still have to be ended.
            self._say(f"{server.name} did not stop in order: {err}")

    def _begin_clients(self, contestant: Contestant, address: str) -> None:
        processes = self.clients[contestant.name] = []
        for number in range(self._stage.num_clients(contestant)):
            log = self._folder / f"{contestant.name.replace(' ', '-')}-{number}.log"
            process = MeasuringProcess(
                self._name, self._stage.scale, contestant, address, number, log
            )
            self._stack.callback(process.stop)
            processes.append(process)

    def _load_and_verify(self) -> None:
        if self._stage.blocks is None:
            return
        loaded: dict[str, int] = {}
        for contestant in self._stage.contestants:
            if contestant.name not in self.clients:
                continue
            turn = loaded.setdefault(contestant.server.name, 0)
            loaded[contestant.server.name] += 1
            self._say(f"loading and verifying {contestant.name}")

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
        clients = party.clients[name][: some.num_clients]
        return _round(clients, task, number)

    outcome.results[task], failed = interleave(names, stage.scale.num_rounds, measure)
    if failed:
        outcome.failed[task] = failed


def _round(clients: Sequence[MeasuringProcess], task: str, number: int) -> Round:
    begin = time.monotonic() + (_AHEAD_S if len(clients) > 1 else 0.0)
    for client in clients:
        client.send(do="measure", task=task, round=number, begin=begin)
    answers: list[dict[str, Any]] = []
    errors: list[NotRunError] = []
    for client in clients:
        try:
            answers.append(client.receive())
        except NotRunError as err:
            errors.append(err)
    # Not before all have answered: the next question would get what is left.
    if errors:
        raise errors[0]
    calls = tuple(second for answer in answers for second in answer["seconds"])
    if len(clients) == 1:
        return Round(calls)
    return Round(calls, wall_s=max(answer["end"] for answer in answers) - begin)


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
