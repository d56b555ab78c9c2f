"""What a stage says while it runs, and what it leaves behind: progress, losses, a result."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from types import TracebackType
from typing import Self

from membank.trainer.training.files import write_atomically
from membank.wire.errors import CorruptionError, Reason

Clock = Callable[[], float]
"""Seconds from some fixed moment, never going back."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """How far a stage is."""

    stage: str
    """``anchor``, ``memories`` or the caller's own word."""
    step: int
    """Steps done, those before a resume included."""
    num_steps: int
    """Steps of the whole stage."""
    loss: float
    """Nats per token, mean over about the last 50 steps."""
    tokens_per_s: float
    """Positions trained per second since the stage began or went on."""
    elapsed_s: float
    """Seconds since the stage began or went on."""
    left_s: float
    """Seconds until the end at the present pace."""
    num_refused: int = 0
    """Gradients refused so far in this process."""

    @property
    def fraction(self) -> float:
        """Part of the stage that is done, 0 to 1."""
        return self.step / self.num_steps if self.num_steps else 1.0


ProgressCallback = Callable[[Progress], None]
"""Told now and then, from the thread that trains; an error in it ends the stage."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StageResult:
    """What a stage did in this process."""

    stage: str
    """``anchor`` or ``memories``."""
    num_steps: int
    """Steps of the whole stage."""
    first_step: int
    """Step at which this process began; above 0 after a resume."""
    num_tokens: int
    """Positions trained in this process, filling included."""
    seconds: float
    """Seconds spent in this process."""
    tokens_per_s: float
    """``num_tokens`` per second."""
    final_loss: float
    """Nats per token, mean over the last 100 steps; NaN where no step was done."""
    num_refused: int = 0
    """Gradients that were refused (too old, or their block withheld or deleted)."""
    refused: tuple[tuple[str, int], ...] = ()
    """Refused gradients by reason."""
    phase_seconds: tuple[tuple[str, float], ...] = ()
    """Seconds that the training thread spent in each `Phase` of its steps; none for stage 1."""

    def to_json(self) -> dict[str, object]:
        """Return the fields as JSON-able values; a NaN loss is None."""
        finite = self.final_loss == self.final_loss
        return {
            **asdict(self),
            "final_loss": self.final_loss if finite else None,
            "refused": dict(self.refused),
            "phase_seconds": dict(self.phase_seconds),
        }


class Phase(StrEnum):
    """What the thread that trains is busy with, or waits for, in a step of stage 2.

    On a GPU, whose work is only handed over in most of them, the phase that needs a result waits
    for all before it.
    """

    LOAD = "load"
    """Tokens and paths of the batch."""
    FETCH = "fetch"
    """Waiting for the batch's blocks; with prefetch, for what is not there yet."""
    JOIN = "join"
    """Copying the blocks to where the anchor takes them from."""
    FORWARD = "forward"
    """The loss."""
    BACKWARD = "backward"
    """The gradients, summed over the sequences that share a block."""
    PUSH = "push"
    """Waiting for the push; with prefetch, for the one before it."""


class PhaseTimes:
    """Adds up how long each phase takes.

    Parameters
    ----------
    clock
        Time.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._seconds = dict.fromkeys(Phase, 0.0)

    @contextmanager
    def spent_in(self, phase: Phase) -> Iterator[None]:
        """Count the time until the block ends, however it ends."""
        began = self._clock()
        try:
            yield
        finally:
            self._seconds[phase] += self._clock() - began

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds of each phase so far."""
        return {phase.value: seconds for phase, seconds in self._seconds.items()}


class Meter:
    """Turns steps into `Progress`, at most once per `every_s`.

    Parameters
    ----------
    stage
        Name of the stage.
    first_step, num_steps
        Step that comes first and steps of the whole stage.
    callback
        Whom to tell; None tells nobody.
    every_s
        Seconds between two calls; the last step is always told.
    clock
        Time.
    """

    def __init__(
        self,
        stage: str,
        *,
        first_step: int,
        num_steps: int,
        callback: ProgressCallback | None,
        every_s: float = 0.5,
        clock: Clock = time.monotonic,
    ) -> None:
        self._stage = stage
        self._first_step = first_step
        self._num_steps = num_steps
        self._callback = callback
        self._every_s = every_s
        self._clock = clock
        self._began = clock()
        self._told: float | None = None
        self._losses: list[float] = []
        self._num_tokens = 0

    @property
    def elapsed_s(self) -> float:
        """Seconds since the meter was made."""
        return self._clock() - self._began

    def add(self, step: int, loss: float, num_tokens: int, *, num_refused: int = 0) -> None:
        """Count step number `step`, which has just been done."""
        self._losses = [*self._losses[-99:], loss]
        self._num_tokens += num_tokens
        if self._callback is None:
            return
        now = self._clock()
        last = step + 1 == self._num_steps
        if self._told is not None and now - self._told < self._every_s and not last:
            return
        self._told = now
        elapsed = max(now - self._began, 1e-9)
        done = step + 1 - self._first_step
        recent = self._losses[-50:]
        self._callback(
            Progress(
                stage=self._stage,
                step=step + 1,
                num_steps=self._num_steps,
                loss=sum(recent) / len(recent),
                tokens_per_s=self._num_tokens / elapsed,
                elapsed_s=elapsed,
                left_s=elapsed / done * (self._num_steps - step - 1),
                num_refused=num_refused,
            )
        )

    def result(
        self,
        refused: Mapping[str, int] | None = None,
        phase_seconds: Mapping[str, float] | None = None,
    ) -> StageResult:
        """Return what was done since the meter was made."""
        seconds = self.elapsed_s
        counts = tuple(sorted((refused or {}).items()))
        return StageResult(
            stage=self._stage,
            num_steps=self._num_steps,
            first_step=self._first_step,
            num_tokens=self._num_tokens,
            seconds=seconds,
            tokens_per_s=self._num_tokens / max(seconds, 1e-9),
            final_loss=sum(self._losses) / len(self._losses) if self._losses else float("nan"),
            num_refused=sum(count for _, count in counts),
            refused=counts,
            phase_seconds=tuple((phase_seconds or {}).items()),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class LossRecord:
    """The loss of one step."""

    step: int
    """Number of the step, from 0."""
    loss: float
    """Nats per scored token."""
    num_tokens: int
    """Tokens scored."""
    time_s: float
    """Seconds since the stage began in the process that did the step."""


class LossLog:
    """Appends the loss of every step to a file of JSON lines, each step once.

    Parameters
    ----------
    path
        The file; None keeps no record.
    first_step
        Step that comes first. 0 begins the file anew. Otherwise records of steps that are done
        again are kept: the first time is the one whose gradients count, or it gave the same.
    """

    def __init__(self, path: Path | None, *, first_step: int = 0) -> None:
        self._file = None
        self._next_step = 0
        if path is None:
            return
        kept = read_losses(path) if first_step and path.exists() else []
        write_atomically(path, "".join(_line(record) for record in kept).encode(), sync=False)
        self._next_step = kept[-1].step + 1 if kept else 0
        self._file = path.open("a", encoding="utf-8", buffering=1)

    def add(self, record: LossRecord) -> None:
        """Write one record, unless there is one of its step."""
        if self._file is not None and record.step >= self._next_step:
            self._file.write(_line(record))
            self._next_step = record.step + 1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._file is not None:
            self._file.close()


def _line(record: LossRecord) -> str:
    return json.dumps(asdict(record)) + "\n"


def read_losses(path: Path) -> list[LossRecord]:
    """Read a file of `LossLog`; a torn last line is left out.

    Raises
    ------
    CorruptionError
        Another line is not a record.
    """
    lines = path.read_text(encoding="utf-8").splitlines()
    records: list[LossRecord] = []
    for number, line in enumerate(lines, start=1):
        try:
            records.append(LossRecord(**json.loads(line)))
        except (ValueError, TypeError) as err:
            if number == len(lines):
                break  # the process died while it wrote this one
            raise CorruptionError(
                f"{path}: line {number} is damaged; delete the file to go on without it",
                reason=Reason.CHECKSUM_MISMATCH,
            ) from err
    return records
