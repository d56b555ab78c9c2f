"""``python -m benchmarks.peers``: membank beside its peers, in one run."""

from __future__ import annotations

import argparse
import json
import signal
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.peers.conduct import conduct
from benchmarks.peers.membank_service import path_contestant
from benchmarks.peers.plot import draw
from benchmarks.peers.ratios import rules
from benchmarks.peers.report import (
    document,
    print_changes,
    print_document,
    ratios_of,
    reaches,
)
from benchmarks.peers.tasks import FULL, QUICK
from membank.cli.output import err_console


def main() -> None:
    """Run, print, and write what was asked for."""
    options = _parser().parse_args()
    scale = QUICK if options.quick else FULL
    signal.signal(signal.SIGTERM, _end)
    began = time.monotonic()

    def say(line: str) -> None:
        err_console.print(f"{time.monotonic() - began:6.1f} s  {line}", markup=False)

    with tempfile.TemporaryDirectory(prefix="membank-peers-", dir=options.dir) as folder:
        outcome = conduct(scale, options.only, Path(folder), say)
        banks = [path_contestant(n).name for n in (scale.num_leaves, scale.num_leaves_small)]
        merged = [ratio for path in options.merge for ratio in ratios_of(path)]
        all_rules = rules(reaches(outcome), *banks)
        found = document(outcome, all_rules, scale, Path(folder), merged)
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(found, indent=2) + "\n")
    if options.plot is not None:
        draw(found, options.plot)
    print_document(found)
    if options.compare is not None:
        print_changes(found, options.compare)


def _end(number: int, frame: object) -> None:
    """End by an exception, so that no server is left behind; once, so that all are ended."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.exit(128 + number)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=__doc__)
    parser.add_argument("--out", type=Path, help="write the result here (JSON)")
    parser.add_argument("--plot", type=Path, help="draw the result here (needs matplotlib)")
    parser.add_argument("--compare", type=Path, help="an earlier result to print changes against")
    parser.add_argument(
        "--merge", type=Path, action="append", default=[], metavar="FILE",
        help="take over the ratios of another benchmark's result (its key `ratios`); repeat",
    )  # fmt: skip
    parser.add_argument(
        "--only", action="append", default=[], metavar="NAME",
        help="contestants and tasks whose names begin so; repeat",
    )  # fmt: skip
    parser.add_argument("--dir", type=Path, help="where servers write; default: temporary files")
    parser.add_argument(
        "--quick", action="store_true", help="few rounds: shows that it works, claims little"
    )
    return parser


if __name__ == "__main__":
    main()
