"""Measuring processes: each holds one client of one contestant and times its calls.

They are processes of their own so that no contestant's library decides over the memory, threads and
lock of another's. Messages are lines of JSON, on the standard streams.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from benchmarks.peers.blocks import Array, Blocks
from benchmarks.peers.contestant import Access, Client, Contestant, NotRunError, Work
from benchmarks.peers.lineup import STAGES, Stage
from benchmarks.peers.rules import after_first_step
from benchmarks.peers.tasks import Scale

_ANSWER_S = 120.0
_WARM_UP_CALLS = 2


class MeasuringProcess:
    """The side of the one who conducts.

    Parameters
    ----------
    stage, scale
        Name and size of the stage, from which the process knows its task.
    contestant
        Whom it measures.
    address
        What the server's `start` returned.
    number
        Number among the processes that connect to this server, from 0.
    log
        File for what libraries print.
    environment
        Variables to set, beside those that the contestant asks for.
    """

    def __init__(
        self,
        stage: str,
        scale: Scale,
        contestant: Contestant,
        address: str,
        number: int,
        log: Path,
        environment: Mapping[str, str],
    ) -> None:
        setting = {
            "stage": stage,
            "scale": scale.to_json(),
            "contestant": contestant.name,
            "address": address,
            "number": number,
        }
        self._log = log
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.peers.measuring", json.dumps(setting)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
                env={**os.environ, **contestant.environment, **environment},
            )
        self._received = b""
        self._broken = ""

    def send(self, **message: object) -> None:
        """Ask for something; errors as `receive`."""
        assert self._process.stdin is not None
        if self._broken:
            # What it answers now may be the answer to an older question.
            raise NotRunError(self._broken)
        try:
            self._process.stdin.write(json.dumps(message).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise NotRunError(self._last_words()) from None

    def receive(self) -> Any:  # noqa: ANN401  (whatever was asked for)
        """Return the answer to the oldest question; the first answer says that it is connected.

        Raises
        ------
        NotRunError
            If it could not do it, ended, or does not answer.
        """
        assert self._process.stdout is not None
        descriptor, deadline = self._process.stdout.fileno(), time.monotonic() + _ANSWER_S
        while b"\n" not in self._received:
            left = max(0.0, deadline - time.monotonic())
            if not select.select([descriptor], [], [], left)[0]:
                self._broken = f"it did not answer within {_ANSWER_S:.0f} s"
                raise NotRunError(self._broken)
            piece = os.read(descriptor, 1 << 20)
            if not piece:
                raise NotRunError(f"its measuring process ended: {self._last_words()}")
            self._received += piece
        line, _, self._received = self._received.partition(b"\n")
        answer = json.loads(line)
        if "not_run" in answer:
            raise NotRunError(answer["not_run"])
        return answer["answer"]

    def ask(self, **message: object) -> Any:  # noqa: ANN401  (whatever was asked for)
        """Ask and return the answer; errors as `receive`."""
        self.send(**message)
        return self.receive()

    @property
    def pid(self) -> int:
        """Its id."""
        return self._process.pid

    def stop(self) -> None:
        """End the process."""
        self._process.terminate()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _last_words(self) -> str:
        lines = self._log.read_text(errors="replace").splitlines()
        return " | ".join(lines[-2:]) or "it said nothing"


class _Worker:
    """What happens in the measuring process."""

    def __init__(self, contestant: Contestant, stage: Stage, access: Access) -> None:
        self._contestant = contestant
        self._tasks = stage.tasks[contestant.name]
        self._blocks = stage.blocks
        self._number = access.number
        self.client: Client = contestant.connect(access)

    def load(self) -> None:
        """Store all blocks."""
        assert self._blocks is not None
        for batch in self._blocks.batches():
            self.client.load(batch)

    def verify(self) -> None:
        """Fetch every block once and compare it, and check the first step of the optimizer."""
        assert self._blocks is not None
        for size in self._blocks.sizes:
            keys = self._blocks.keys(size.label)
            if Work.FETCH in self._contestant.works:
                for key in keys if len(keys) < 100 else keys[:10]:
                    _compare(key, self.client.fetch([key])[0], self._blocks.content(key))
        for task in self._tasks.values():
            if task.keys_per_call > 1:
                keys = list(task.keys[: task.keys_per_call])
                for key, array in zip(keys, self.client.fetch(keys), strict=True):
                    _compare(key, array, self._blocks.content(key))

    def verify_push(self, key: str) -> None:
        """Push to a block that was never pushed to and compare what became of it."""
        assert self._blocks is not None
        content = self._blocks.content(key)
        gradient = self._gradient(key)
        wanted = after_first_step(self._contestant.push_rule, content, gradient)
        self.client.push(key, gradient)
        got = np.asarray(self.client.fetch([key])[0]).reshape(content.shape)
        if not np.allclose(got, wanted, rtol=1e-5, atol=1e-6):
            raise RuntimeError(f"a push of {key} did not do what {self._contestant.push_rule} does")
        self.client.load({key: content})

    def warm_up(self, task: str, round_number: int) -> None:
        """Make the first calls of a round, untimed: it was halted, and what it knew may be old."""
        calls = self._tasks[task].draw(round_number, self._number)[:_WARM_UP_CALLS]
        call = self._call(self._tasks[task].work, calls[0][0])
        for keys in calls:
            call(keys)

    def measure(self, task: str, round_number: int, begin: float) -> dict[str, object]:
        """Make the calls of a round from the time `begin` on and return their seconds."""
        calls = self._tasks[task].draw(round_number, self._number)
        call = self._call(self._tasks[task].work, calls[0][0])
        seconds = []
        time.sleep(max(0.0, begin - time.monotonic()))
        for keys in calls:
            before = time.perf_counter()
            got = call(keys)
            seconds.append(time.perf_counter() - before)
            # Given back outside the time, and before the next call.
            del got
        return {"seconds": seconds, "end": time.monotonic()}

    def _call(self, work: Work, first_key: str) -> Callable[[list[str]], object]:
        match work:
            case Work.FETCH:
                return self.client.fetch
            case Work.CONDITIONAL:
                return self.client.fetch_unchanged
            case Work.PUSH:
                gradient = self._gradient(first_key)
                return lambda keys: self.client.push(keys[0], gradient)

    def _gradient(self, key: str) -> Array:
        assert self._blocks is not None
        return self._blocks.content(key)[::-1].copy()


def _compare(key: str, got: Array, content: Array) -> None:
    if not np.array_equal(np.asarray(got).reshape(-1), content.reshape(-1)):
        raise RuntimeError(f"block {key} came back with another content")


def _answer(worker: _Worker, message: dict[str, Any]) -> object:
    match message["do"]:
        case "load":
            worker.load()
        case "verify":
            worker.verify()
        case "verify_push":
            worker.verify_push(message["key"])
        case "warm_up":
            worker.warm_up(message["task"], message["round"])
        case "measure":
            return worker.measure(message["task"], message["round"], message["begin"])
        case unknown:
            raise ValueError(f"there is no command {unknown!r}")
    return None


def _connect(setting: dict[str, Any]) -> _Worker:
    stage = STAGES[setting["stage"]](Scale(**setting["scale"]))
    contestant = next(c for c in stage.contestants if c.name == setting["contestant"])
    blocks = stage.blocks or Blocks(())
    access = Access(address=setting["address"], blocks=blocks, number=setting["number"])
    return _Worker(contestant, stage, access)


def _main(setting: dict[str, Any], answers: TextIO) -> None:
    def reply(make: Callable[[], object]) -> None:
        try:
            answer = {"answer": make()}
        except Exception as err:  # whatever a peer's library raises becomes a reason in the report
            traceback.print_exc()
            answer = {"not_run": f"{type(err).__name__}: {err}".removeprefix("NotRunError: ")}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()

    workers: list[_Worker] = []
    reply(lambda: workers.append(_connect(setting)))
    for line in sys.stdin:
        message = json.loads(line)
        reply(lambda: _answer(workers[0], message))  # noqa: B023  (called at once)
    if workers:
        workers[0].client.close()


if __name__ == "__main__":
    # Libraries print to the standard output as they please; the answers have a way of their own.
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    _main(json.loads(sys.argv[1]), channel)
    # Some peers' libraries wait for others at exit, who may be gone.
    os._exit(0)
