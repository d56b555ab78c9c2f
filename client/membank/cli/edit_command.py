"""The command that edits what a bank knows, and undoes edits."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from membank.cli.build import DEFAULT_RUN, RunOption
from membank.cli.connection import (
    DEFAULT_ENDPOINT,
    BankOption,
    CaOption,
    DryRunOption,
    TokenOption,
    connect,
)
from membank.cli.extras import needs_extra
from membank.cli.output import JsonOption, console, emit, err_console, format_share, table
from membank.wire.errors import FailedPreconditionError, Reason

if TYPE_CHECKING:
    # Only for the annotation: importing the trainer takes seconds.
    from membank.trainer.editing import EditHistory, EditReport, PromptChange


def register(app: typer.Typer) -> None:
    """Add this module's commands to `app`."""
    app.command("edit")(edit)


def edit(
    facts: Annotated[
        Path | None,
        typer.Argument(help="JSON lines: prompt, target, perhaps paraphrases, neighbours, id."),
    ] = None,
    undo: Annotated[
        str | None, typer.Option(metavar="ID", help="Take this edit back; later ones stay.")
    ] = None,
    list_edits: Annotated[
        bool, typer.Option("--list", help="List the edits of this bank.")
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Swap also where prompts or neighbours fell short.")
    ] = False,
    dry_run: DryRunOption = False,
    run: RunOption = DEFAULT_RUN,
    bank: BankOption = DEFAULT_ENDPOINT,
    token_file: TokenOption = None,
    ca_file: CaOption = None,
    as_json: JsonOption = False,
) -> None:
    """Change facts: train only the blocks that they route to, and swap these in as one transaction.

    Trained here, on a copy, until each fact is answered and neighbours and earlier edits stay as they
    are; every prompt is shown before and after. The log of edits lies in the run's directory.

    Examples: ``membank edit facts.jsonl --run runs/demo --dry-run``, then without ``--dry-run``;
    ``membank edit --list``, ``membank edit --undo hafnium-1``.
    """
    if sum((facts is not None, undo is not None, list_edits)) != 1:
        raise typer.BadParameter("give a file of facts, or --undo ID, or --list")
    with needs_extra("trainer"):
        from membank.trainer.editing import read_facts
        from membank.trainer.run.edit import run_editor
    # Before anything is loaded or asked: a slip in the file is the likeliest failure.
    parsed = () if facts is None else read_facts(facts)
    with (
        connect(bank, token_file, ca_file) as client,
        err_console.status("reading the run") as spinner,
    ):
        editor = run_editor(run, client, notice=spinner.update)
        if list_edits:
            history = editor.history()
            report = None
        elif undo is not None:
            report = editor.undo(undo, dry_run=dry_run, force=force)
        else:
            report = editor.edit(parsed, dry_run=dry_run, force=force)
    if report is None:
        _show_history(history, as_json=as_json)
        return
    emit(report.to_json(), as_json=as_json, render=lambda: _show(report))
    if report.refused:
        raise FailedPreconditionError(
            f"nothing was changed: {report.refused}; add paraphrases or fewer facts at a time, or "
            "accept it with --force",
            reason=Reason.EDIT_FELL_SHORT,
        )


def _show(report: EditReport) -> None:
    columns = ("edit", "block", "prompt", "before", "after", "target", "p before>", "p after>")
    if report.prompts:
        rows = [_prompt_row(prompt) for prompt in report.prompts]
        console.print(table(columns, rows, title="facts"))
    if report.undone:
        rows = [_prompt_row(prompt) for prompt in report.undone]
        console.print(table(columns, rows, title="undone"))
    if report.neighbours:
        rows = [
            (n.edit_id, n.block, n.prompt, n.before, n.after, "kept" if n.kept else "changed")
            for n in report.neighbours
        ]
        console.print(
            table(("edit", "block", "prompt", "before", "after", ""), rows, title="neighbours")
        )
    for block in report.blocks:
        console.print(
            f"[dim]block {block.ref}: {block.num_facts} prompts, {block.num_guards} guarded, "
            f"{block.steps} steps, {block.seconds:.1f} s, kept {format_share(block.kept_share)}[/]"
        )
    if report.reapplied:
        console.print(f"made anew: {', '.join(report.reapplied)}", markup=False)
    _show_outcome(report)


def _show_outcome(report: EditReport) -> None:
    ids = escape(", ".join(report.edit_ids))
    if report.dry_run:
        console.print(f"[yellow]dry run: nothing was changed[/] ({report.operation} of {ids})")
    elif not report.refused:
        changed = ", ".join(f"{ref} v{old} > v{new}" for ref, (old, new) in report.changed.items())
        done = "undone" if report.operation == "undo" else "edited"
        console.print(
            f"[green]{done}[/] {ids}: {changed}, revision {report.revision}"
            + (f", at attempt {report.attempts}" if report.attempts > 1 else "")
        )


def _prompt_row(prompt: PromptChange) -> tuple[object, ...]:
    return (
        prompt.edit_id,
        prompt.block,
        prompt.prompt,
        prompt.before,
        prompt.after,
        prompt.target,
        f"{prompt.probability_before:.3f}",
        f"{prompt.probability_after:.3f}",
    )


def _show_history(history: EditHistory, *, as_json: bool) -> None:
    rows = [
        _EditRow(
            edit_id=edit_id,
            state="undone" if edit_id in history.undone else "standing",
            time_s=transaction.time_s,
            revision=transaction.revision,
            prompts=tuple(
                (block.ref, prompt.prompt, prompt.target)
                for block in transaction.blocks
                for prompt in block.prompts
                if prompt.edit_id == edit_id
            ),
        )
        for transaction in history.transactions
        if transaction.operation == "edit"
        for edit_id in transaction.edit_ids
    ]

    def render() -> None:
        columns = ("edit", "state", "time (UTC)", "revision>", "blocks", "first prompt", "target")
        shown = [row.cells() for row in rows]
        console.print(table(columns, shown) if shown else "no edits of this bank are in the log")

    emit([asdict(row) for row in rows], as_json=as_json, render=render)


@dataclass(frozen=True, kw_only=True, slots=True)
class _EditRow:
    edit_id: str
    state: str
    time_s: float
    revision: int | None
    prompts: tuple[tuple[str, str, str], ...]

    def cells(self) -> tuple[object, ...]:
        made = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(self.time_s))
        blocks = " ".join(sorted({ref for ref, _, _ in self.prompts}))
        _, prompt, target = self.prompts[0]
        return self.edit_id, self.state, made, self.revision, blocks, prompt, target
