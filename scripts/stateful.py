"""Run random programs on whole banks and say how many, what they did, and what went wrong.

Programs come from the machines of `tests/support/bank_machine.py`, in batches of which each has a seed of
its own, so that a failure can be run again: ``--seed S --programs N`` as printed.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import os
import re
import secrets
import sys
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from pathlib import Path

from membank.cli.machine import environment

MACHINES = ("BankMachine", "ObjectBankMachine")
STEPS = 50
BATCH = 25
_CHECK = re.compile(r"state\.(every|nothing|what)_\w+\(\)$")


@dataclass(frozen=True)
class Batch:
    """Programs of one machine."""

    machine: str
    """Name of the machine."""
    seed: int
    """What they are made from."""
    programs: int
    """How many."""


@dataclass
class Outcome:
    """What became of programs."""

    programs: int = 0
    """How many were run."""
    steps: int = 0
    """Their steps."""
    hits: Counter[str] = field(default_factory=Counter)
    """Steps by rule, and by what became of them."""
    failures: list[dict[str, str]] = field(default_factory=list)
    """Machine, seed and falsifying program of each batch that failed."""

    def add(self, other: Outcome) -> None:
        """Add what became of other programs."""
        self.programs += other.programs
        self.steps += other.steps
        self.hits += other.hits
        self.failures += other.failures


def run_batch(batch: Batch) -> Outcome:
    """Run one batch in this process."""
    from hypothesis import HealthCheck, Phase, seed, settings
    from hypothesis.stateful import run_state_machine_as_test

    import bank_machine

    machine: type[bank_machine.BankMachine] = getattr(bank_machine, batch.machine)
    machine.hits.clear()
    failures = []
    try:
        run_state_machine_as_test(
            seed(batch.seed)(machine),
            settings=settings(
                max_examples=batch.programs,
                stateful_step_count=STEPS,
                deadline=None,
                database=None,
                # One failure, shrunk: to explain it, or to look for a second, takes as long again.
                phases=[Phase.generate, Phase.shrink],
                report_multiple_bugs=False,
                suppress_health_check=list(HealthCheck),
            ),
        )
    except Exception as err:
        # Whatever it is, the other batches are run too, and all failures are told together.
        failures.append({"machine": batch.machine, "seed": str(batch.seed), "told": _told(err)})
    hits = Counter(machine.hits)
    return Outcome(hits.pop("programs"), hits.pop("steps"), hits, failures)


def _told(err: Exception) -> str:
    lines = "".join(traceback.format_exception(err)).splitlines()
    # Hypothesis tells of each check after each step; all of them are made after every step.
    return "\n".join(line for line in lines if not _CHECK.match(line))


def batches(programs: int, seed: int) -> Iterator[Batch]:
    """Yield batches that amount to `programs`, of each machine in turn."""
    for number in range(-(-programs // BATCH)):
        count = min(BATCH, programs - number * BATCH)
        yield Batch(MACHINES[number % len(MACHINES)], seed + number, count)


def run(programs: int, jobs: int, seed: int) -> Outcome:
    """Run programs in `jobs` processes."""
    total = Outcome()
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=spawn, initializer=_quiet) as pool:
        running = [pool.submit(run_batch, batch) for batch in batches(programs, seed)]
        for done in as_completed(running):
            total.add(done.result())
            print(
                f"\r{total.programs} programs, {len(total.failures)} failures", end="", flush=True
            )
    print()
    return total


def _quiet() -> None:
    # What a shard warns of is what the programs do to it.
    logging.disable(logging.CRITICAL)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the command line asks for; return 1 if anything failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--programs", type=int, default=1000)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--seed", type=int, default=secrets.randbelow(1 << 32))
    parser.add_argument("--out", type=Path, default=Path("runs/stateful.json"))
    asked = parser.parse_args(arguments)
    # Before numpy or torch load in a child: one thread for each process.
    for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(variable, "1")
    print(f"seed {asked.seed}")
    began = time.monotonic()
    outcome = run(asked.programs, asked.jobs, asked.seed)
    seconds = time.monotonic() - began
    for failure in outcome.failures:
        print(f"\n{failure['machine']}, seed {failure['seed']}\n{failure['told']}")
    for what, count in sorted(outcome.hits.items()):
        print(f"{count:8d}  {what}")
    print(
        f"{outcome.programs} programs, {outcome.steps} steps, {seconds:.0f} s in {asked.jobs} "
        f"processes, {len(outcome.failures)} failures"
    )
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    document = {
        "format": 1,
        **environment(asked.out.parent),
        "seed": asked.seed,
        "jobs": asked.jobs,
        "seconds": round(seconds, 1),
        **asdict(outcome),
        "hits": dict(sorted(outcome.hits.items())),
    }
    asked.out.write_text(json.dumps(document, indent=1) + "\n")
    return 1 if outcome.failures else 0


if __name__ == "__main__":
    sys.exit(main())
