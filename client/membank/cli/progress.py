"""Progress bars for the stages of a run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from membank.cli.output import err_console, progress_bars

if TYPE_CHECKING:
    # Only for the annotation: importing the trainer takes seconds.
    from membank.trainer.training import Progress


@contextmanager
def stage_progress(title: str) -> Iterator[Callable[[Progress], None]]:
    """Show a bar with loss, speed and time left; yields what a stage reports to.

    Where standard error is no terminal, a line at each tenth takes the bar's place.
    """
    if not err_console.is_terminal:
        yield _LineReporter(title)
        return
    with progress_bars() as bars:
        task = bars.add_task(title, total=None, note="")

        def report(progress: Progress) -> None:
            note = f"loss {progress.loss:.2f}, {progress.tokens_per_s:.0f} tokens/s"
            bars.update(task, total=progress.num_steps, completed=progress.step, note=note)

        yield report


@contextmanager
def counted_progress(title: str) -> Iterator[Callable[[int, int], None]]:
    """Show a bar with time left; yields what is told how many of how many are done.

    Where standard error is no terminal, nothing is shown.
    """
    if not err_console.is_terminal:
        yield lambda done, total: None
        return
    with progress_bars() as bars:
        task = bars.add_task(title, total=None, note="")
        yield lambda done, total: bars.update(task, total=total, completed=done)


class _LineReporter:
    def __init__(self, title: str) -> None:
        self._title = title
        self._next_tenth = 0

    def __call__(self, progress: Progress) -> None:
        tenth = int(10 * progress.fraction)
        if tenth < self._next_tenth:
            return
        self._next_tenth = tenth + 1
        err_console.print(
            f"{self._title}: {progress.step}/{progress.num_steps}, loss {progress.loss:.2f}, "
            f"{progress.tokens_per_s:.0f} tokens/s, {progress.left_s:.0f} s left"
        )
