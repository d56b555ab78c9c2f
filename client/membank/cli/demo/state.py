"""What a demo has done so far, so that a rerun continues where it stopped."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from membank.trainer.training.files import write_atomically
from membank.wire.errors import FailedPreconditionError, Reason

Result = TypeVar("Result")


class DemoState:
    """Results and times of finished steps, in one JSON file that is replaced as a whole.

    Parameters
    ----------
    file
        The file.
    config
        Everything that decides the results; a state made with another one is refused.
    clock
        Seconds from some fixed moment.
    """

    def __init__(
        self,
        file: Path,
        config: dict[str, object],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._file = file
        self._clock = clock
        text = json.dumps(config, sort_keys=True, default=str)
        digest = hashlib.sha256(text.encode()).hexdigest()
        self._body: dict[str, dict[str, object]] = {
            "config": {"sha256": digest}, "results": {}, "seconds": {}
        }  # fmt: skip
        if file.exists():
            saved = json.loads(file.read_text())
            if saved["config"]["sha256"] != digest:
                raise FailedPreconditionError(
                    f"{file.parent} holds a run of another configuration; remove it or use --out",
                    reason=Reason.BAD_CONFIG,
                    metadata={"directory": str(file.parent)},
                )
            self._body = saved

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds of each step, those of interrupted attempts included."""
        return {name: float(str(value)) for name, value in self._body["seconds"].items()}

    def has(self, step: str) -> bool:
        """Return whether `step` was finished."""
        return step in self._body["results"]

    def result(self, step: str) -> object:
        """Return the result of a finished step."""
        return self._body["results"][step]

    def finish(self, step: str, result: object) -> None:
        """Keep the JSON-able result of a step, after which it is not done again."""
        # As a rerun reads it: results of steps before and after a stop are compared.
        self._body["results"][step] = json.loads(json.dumps(result, default=str))
        self._save()

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Add the time of the block to `name`, also where it is left by an error."""
        start = self._clock()
        try:
            yield
        finally:
            spent = self._clock() - start
            self._body["seconds"][name] = self.seconds.get(name, 0.0) + spent
            self._save()

    def _save(self) -> None:
        write_atomically(self._file, json.dumps(self._body, indent=1, default=str).encode())
