"""``python -m benchmarks.questions``: measure, write the document, draw, fill in the answers."""

from __future__ import annotations

import argparse
import json
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.questions import batching, block_sizes, hierarchy, latency, layers, overlap
from benchmarks.questions.latency import Say
from benchmarks.questions.plots import draw
from benchmarks.questions.rendering import fill_in
from benchmarks.questions.scale import FULL, QUICK, Scale
from membank.cli.machine import environment
from membank.cli.output import err_console

Measure = Callable[[Path, Scale, Say, bool], dict[str, Any]]

QUESTIONS: dict[str, Measure] = {
    "latency": lambda folder, scale, say, quick: latency.measure(folder, scale, say, quick=quick),
    "block_sizes": lambda folder, scale, say, quick: block_sizes.measure(
        folder, scale, say, quick=quick
    ),
    "hierarchy": lambda folder, scale, say, quick: hierarchy.measure(scale, say),
    "overlap": lambda folder, scale, say, quick: overlap.measure(folder, scale, say),
    "layers": lambda folder, scale, say, quick: layers.measure(folder, scale, say),
    "batching": lambda folder, scale, say, quick: batching.measure(scale, say),
}
"""What is measured, by the name that ``--only`` takes."""


def main() -> None:
    """Run, and write what was asked for."""
    parser = _parser()
    options = parser.parse_args()
    names = options.only.split(",") if options.only else list(QUESTIONS)
    if unknown := sorted(set(names) - set(QUESTIONS)):
        parser.error(f"--only {','.join(unknown)}: there are {', '.join(QUESTIONS)}")
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    document = _read(options.out) if options.only or options.redraw else {}
    if not options.redraw:
        document = _measured(names, document, quick=options.quick, where=options.dir)
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    if options.plots is not None:
        draw(document, options.plots)
    if options.answers is not None:
        fill_in(options.answers, document)


def _measured(
    names: list[str], earlier: dict[str, Any], *, quick: bool, where: Path | None
) -> dict[str, Any]:
    """Measure some questions; answers of an earlier run to others stay, with their own commit."""
    scale = QUICK if quick else FULL
    began = time.monotonic()

    def say(line: str) -> None:
        err_console.print(f"{time.monotonic() - began:6.1f} s  {line}", markup=False)

    questions = dict(earlier.get("questions", {}))
    for name in names:
        start = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="membank-questions-", dir=where) as folder:
            figures = QUESTIONS[name](Path(folder), scale, say, quick)
            made = environment(Path(folder))
        questions[name] = {
            **made, "config": asdict(scale), "quick": quick,
            "seconds": time.monotonic() - start, "figures": figures,
        }  # fmt: skip
    return {
        "format": 1,
        "command": "python -m benchmarks.questions",
        "questions": {name: questions[name] for name in QUESTIONS if name in questions},
    }


def _read(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return document


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.questions", description=__doc__)
    parser.add_argument(
        "--out", type=Path, required=True,
        help="the document (JSON); with --only, what it says of other questions stays",
    )  # fmt: skip
    parser.add_argument("--plots", type=Path, help="folder to draw into")
    parser.add_argument(
        "--answers", type=Path, help="Markdown file whose marked figures are replaced"
    )
    parser.add_argument("--only", help=f"some of {','.join(QUESTIONS)}, with commas between")
    parser.add_argument("--dir", type=Path, help="where banks are made; default: temporary files")
    parser.add_argument(
        "--quick", action="store_true", help="tiny: shows that it works, claims nothing"
    )
    parser.add_argument(
        "--redraw", action="store_true", help="measure nothing: plots and answers from --out"
    )
    return parser


if __name__ == "__main__":
    main()
