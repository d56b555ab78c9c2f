"""The command that measures what editing does: to the facts, to their neighbours, to all else."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from membank.cli.build import RunOption
from membank.cli.ending import ended_by_sigterm
from membank.cli.extras import needs_extra
from membank.cli.machine import environment
from membank.cli.output import (
    JsonOption,
    check_out,
    console,
    emit,
    err_console,
    format_share,
    table,
)
from membank.client import BankClient
from membank.wire.errors import NotFoundError, Reason, UnavailableError

_DEFAULT_RUN = Path("runs/demo")
_QUICK_EDITS = 12


def register(group: typer.Typer) -> None:
    """Add this module's command to the group."""
    group.command("edit")(edit)


def edit(
    run: RunOption = _DEFAULT_RUN,
    folder: Annotated[
        Path, typer.Option("--dir", help="Directory of the study and its report.")
    ] = Path("runs/editing"),
    edits: Annotated[int, typer.Option(min=2, help="Facts to change, one after another.")] = 100,
    quick: Annotated[
        bool, typer.Option("--quick", help=f"{_QUICK_EDITS} edits: shows that it works.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also write the figures here, as JSON.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Change facts of a trained run one after another, and measure each right after and at the end.

    Serves a copy of the run's bank; the run stays as it is. Interrupt it whenever you like; the same
    command goes on.

    Examples: ``membank eval edit``, ``membank eval edit --quick --dir runs/editing-quick``.
    """
    with needs_extra("trainer"):
        import torch

        from membank.trainer.editing import Answers, EditConfig, ReplaySequences
        from membank.trainer.editing.study import EditingStudy, StudyConfig, write_editing_report
        from membank.trainer.run import RunDirectory
        from membank.trainer.training import load_sequences
    check_out(out)
    # Equal bits are claimed: a rerun must add numbers up in the same order.
    torch.set_num_threads(1)
    directory = RunDirectory(run)
    config = StudyConfig(num_edits=_QUICK_EDITS if quick else edits, edit=EditConfig())
    with _served_copy(directory.bank_dir, folder) as address, BankClient.connect(address) as client:
        directory.check_fingerprint(client.info().spec.fingerprint)
        study = EditingStudy(
            client,
            Answers(directory.anchor(), directory.tokenizer(), ending=config.edit.ending),
            directory.corpus(),
            folder,
            config=config,
            replay=ReplaySequences(load_sequences(directory.memory_sequences_file)),
            on_progress=_Lines(),
        )
        figures = study.run()
    document = write_editing_report(folder, figures, environment=environment(folder))
    if out is not None:
        shutil.copyfile(folder / "editing.json", out)
    emit(document, as_json=as_json, render=lambda: _render(document, folder))


@contextmanager
def _served_copy(bank: Path, folder: Path) -> Iterator[str]:
    """Serve a copy of a bank, made the first time; yields the address."""
    with needs_extra("service"):
        from membank.bank_service.cluster import UpConfig, down, up
    copy = folder / "bank"
    if not copy.is_dir():
        if not bank.is_dir():
            raise NotFoundError(
                f"{bank} does not exist; train a run with its bank first, such as `membank demo`",
                reason=Reason.NOT_A_BANK,
                metadata={"bank": str(bank)},
            )
        folder.mkdir(parents=True, exist_ok=True)
        # Whole or not at all: a copy that was cut off must not be taken for a bank.
        partial = folder / "bank.partial"
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(bank, partial)
        partial.rename(copy)
    # A study that was killed could not stop its service.
    with suppress(UnavailableError):
        down(bank_url=str(copy))
    with err_console.status("starting the service"), ended_by_sigterm():
        endpoint = up(UpConfig(bank_url=str(copy), num_shards=2, port=0))
    try:
        with ended_by_sigterm():
            yield endpoint.address
    finally:
        with err_console.status("stopping the service"):
            down(bank_url=str(copy))


class _Lines:
    """Prints what is being done, a line for each tenth of it."""

    def __init__(self) -> None:
        self._said = ("", -1)

    def __call__(self, what: str, done: int, total: int) -> None:
        tenth = 10 * done // max(1, total)
        if (what, tenth) != self._said:
            self._said = (what, tenth)
            err_console.print(f"{what}: {done}/{total}")


def _render(document: dict[str, Any], folder: Path) -> None:
    rows = [
        (
            goal["figure"].replace("_", " "),
            format_share(goal["right_after"]),
            format_share(goal["after_all"]),
            format_share(goal["goal"]),
            Text("reached", "green") if goal["reached"] else Text("missed", "red"),
        )
        for goal in document["goals"]
    ]
    title = f"{document['num_edits']} edits in {document['num_blocks']} blocks"
    columns = ("figure", "right after>", "after all>", "goal>", "")
    console.print(table(columns, rows, title=title))
    console.print(f"report: {folder / 'editing.html'}")
