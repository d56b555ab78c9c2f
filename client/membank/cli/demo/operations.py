"""What an operator does with a served bank: ask, swap, withhold, export, delete, import; timed."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np

from membank.client import BankClient
from membank.trainer.run.answer import Answerer
from membank.wire.errors import AlreadyExistsError, NotFoundError
from membank.wire.records import TransactionReport
from membank.wire.spec import Array, BlockRef, BlockState

Result = TypeVar("Result")

_BLOCKS_PER_FETCH = 128


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """One operation, as the report shows it."""

    operation: str
    """Name of the command that does it."""
    on: str
    """What it was applied to."""
    ms: float
    """Time, in ms."""
    outcome: str
    """What was seen."""


class Operator:
    """Runs operations against one bank and writes down what it saw.

    Parameters
    ----------
    client
        The served bank.
    answerer
        Asks it questions.
    """

    def __init__(self, client: BankClient, answerer: Answerer) -> None:
        self._client = client
        self._answerer = answerer
        self.steps: list[Step] = []

    def pin_or_return(self, name: str) -> None:
        """Pin the bank as it is; or, where an attempt before did, bring it back to that."""
        try:
            self._client.snapshot(name)
        except AlreadyExistsError:
            self._client.rollback(name)

    def swap_and_back(self, question: str) -> bool:
        """Swap the leaf that answers `question` for zeros and back again.

        Returns
        -------
        bool
            True where the answer was different in between and the same afterwards.
        """
        before = self._ask(question)
        leaf = BlockRef.parse(before.blocks[-1])
        block = self._client.fetch([leaf])[leaf]
        assert block.weight is not None  # an active block was just used
        original = np.array(block.weight)
        self._timed("swap", f"{leaf} by zeros", lambda: self._swap(leaf, np.zeros_like(original)))
        during = self._ask(question)
        self._timed("swap", f"{leaf} back", lambda: self._swap(leaf, original))
        after = self._ask(question)
        return before.text != during.text and before.text == after.text

    def withhold_and_restore(self, topics: Sequence[BlockRef], question: str) -> bool:
        """Withhold the topics that answer `question`, ask, and restore them.

        Returns
        -------
        bool
            True where the path ended at the topic in between and the answer is the same afterwards.
        """
        before = self._ask(question)
        for topic in topics:
            self._timed("withhold", str(topic), partial(self._client.withhold, topic))
        during = self._ask(question)
        for topic in topics:
            self._timed("restore", str(topic), partial(self._client.restore, topic))
        after = self._ask(question)
        return during.ended_at is not None and before.text == after.text

    def export(self, topic: BlockRef, file: Path) -> None:
        """Export a topic to a file, which appears whole or not at all."""
        unfinished = file.with_name(file.name + ".partial")

        def write() -> str:
            with unfinished.open("wb") as target:
                info = self._client.export_to(topic, target)
            unfinished.replace(file)
            return f"{info.num_bytes} bytes, CRC-32C {info.crc32c:08x}"

        self._timed("export", f"{topic} to {file.name}", write)

    def delete(self, topic: BlockRef) -> None:
        """Delete a topic, after a dry run of the same."""
        plan = self._client.delete(topic, dry_run=True)

        def go() -> str:
            report = self._client.delete(topic)
            return (
                f"{len(report.changes)} blocks, {report.num_slots_destroyed} stored versions "
                f"destroyed, revision {report.revision}"
            )

        self._timed("delete", f"{topic} ({len(plan.changes)} blocks)", go)

    def import_pack(self, file: Path) -> None:
        """Import a pack."""

        def go() -> str:
            with file.open("rb") as source:
                answer = self._client.import_pack(source)
            return f"{len(answer.report.changes)} blocks, revision {answer.report.revision}"

        self._timed("import", file.name, go)

    def ask(self, question: str) -> str:
        """Ask, and return the completion."""
        return self._ask(question).text

    def fingerprints(self) -> dict[str, tuple[str, int]]:
        """Fetch every block of the bank and return its state and the CRC-32C of its weight."""
        refs = list(self._client.info().spec.blocks())
        found: dict[str, tuple[str, int]] = {}
        for start in range(0, len(refs), _BLOCKS_PER_FETCH):
            blocks = self._client.fetch_blocks(refs[start : start + _BLOCKS_PER_FETCH])
            for ref, block in blocks.items():
                found[str(ref)] = (block.header.state.name, block.header.crc32c)
        return found

    def is_deleted(self, topic: BlockRef) -> bool:
        """Return whether every block under a topic is deleted."""
        found = self._client.topics(parent=topic)
        return all(entry.state is BlockState.DELETED for entry in found)

    def steps_json(self) -> list[dict[str, object]]:
        """Return the steps as JSON-able values."""
        return [asdict(step) for step in self.steps]

    def _swap(self, ref: BlockRef, weight: Array) -> str:
        report = self._client.swap({ref: weight})
        return f"version {report.changes[0].version_after}, revision {report.revision}"

    def _ask(self, question: str) -> _Asked:
        start = time.perf_counter()
        answer = self._answerer.ask(self._client, question, max_new_tokens=12)
        path = " ".join(f"{block.ref}@{block.version}" for block in answer.blocks) or "no memory"
        self.steps.append(
            Step(
                operation="ask",
                on=question,
                ms=1e3 * (time.perf_counter() - start),
                outcome=f'"{answer.text.strip()}" from {path}'
                + (f", path ends at {answer.ended_at}" if answer.ended_at else ""),
            )
        )
        return _Asked(answer.text, tuple(block.ref for block in answer.blocks), answer.ended_at)

    def _timed(self, operation: str, on: str, call: Callable[[], Result]) -> Result:
        start = time.perf_counter()
        result = call()
        ms = 1e3 * (time.perf_counter() - start)
        match result:
            case TransactionReport():
                outcome = f"{len(result.changes)} blocks, revision {result.revision}"
            case _:
                outcome = str(result)
        self.steps.append(Step(operation=operation, on=on, ms=ms, outcome=outcome))
        return result


@dataclass(frozen=True, slots=True)
class _Asked:
    text: str
    blocks: tuple[str, ...]
    ended_at: str | None


def fetch_latencies(
    client: BankClient, paths: Sequence[Sequence[BlockRef]], *, count: int, seed: int = 0
) -> tuple[list[float], int]:
    """Fetch paths one after another.

    Returns
    -------
    latencies_ms
        Time of each fetch, in ms.
    num_bytes
        Bytes of weights of the last one.

    Raises
    ------
    NotFoundError
        If there is no path.
    """
    if not paths:
        raise NotFoundError("there is no path to fetch")
    rng = np.random.default_rng(seed)
    latencies, num_bytes = [], 0
    for index in rng.integers(len(paths), size=count):
        start = time.perf_counter()
        memory = client.fetch(paths[int(index)])
        latencies.append(1e3 * (time.perf_counter() - start))
        num_bytes = sum(weight.nbytes for weight in memory.weights.values())
    return latencies, num_bytes
