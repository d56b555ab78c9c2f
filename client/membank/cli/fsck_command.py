"""The command that checks a bank at rest."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from membank.cli.exits import report as report_error
from membank.cli.extras import needs_extra
from membank.cli.output import JsonOption, console, emit, format_bytes, table
from membank.cli.progress import counted_progress
from membank.wire.errors import FailedPreconditionError, NotFoundError, UnavailableError

if TYPE_CHECKING:
    # Only for the annotation: a client-only install lacks the service.
    from membank.bank_service.fsck import Finding, FsckReport

KeyringOption = Annotated[
    str,
    typer.Option(
        "--keyring",
        envvar="MEMBANK_KEYRING",
        help="Directory or URL of the keyring, for a sealed bank (docs/deletion.md).",
    ),
]

EXIT_DAMAGED = 1
"""Exit code where there is more than notes."""
EXIT_UNREADABLE = 2
"""Exit code where there is no bank, or none that can be read; also click's for bad usage."""

_STYLES = {"damage": "bold red", "repairable": "yellow", "note": "dim"}


def register(app: typer.Typer) -> None:
    """Add this module's command to `app`."""
    app.command("fsck")(fsck)


def fsck(
    bank: Annotated[str, typer.Argument(help="The bank: a directory or URL, such as s3://a/bank.")],
    journal_dir: Annotated[
        Path | None,
        typer.Option(help="Directory of the journals, where the service keeps them elsewhere."),
    ] = None,
    keyring: KeyringOption = "",
    quick: Annotated[
        bool, typer.Option("--quick", help="Only look whether slots exist; do not read them.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Check every reference, checksum and journal frame of a bank; change nothing.

    Needs no service, and may run beside one. Exit code: 0 clean, 1 damage found, 2 not a readable
    bank. What each finding means, and what to do, is in docs/fsck.md.

    Examples: ``membank fsck ./bank``, ``membank fsck s3://team/bank --quick --json``.
    """
    with needs_extra("service"):
        from membank.bank_service.fsck import check_bank
        from membank.bank_service.store import open_objects
    try:
        with counted_progress(f"checking {bank}") as on_progress:
            report = check_bank(
                open_objects(bank, keyring=keyring),
                journal_dir=journal_dir,
                deep=not quick,
                on_progress=on_progress,
            )
    except (NotFoundError, FailedPreconditionError, UnavailableError) as err:
        report_error(err)
        raise typer.Exit(EXIT_UNREADABLE) from None
    emit(report.to_json(), as_json=as_json, render=lambda: _render(report))
    if not report.is_clean:
        raise typer.Exit(EXIT_DAMAGED)


def show_findings(report: FsckReport) -> None:
    """Print the findings of a check."""
    if report.findings:
        built = table(("finding", "where, and what to do"), map(_row, report.findings))
        # Never an ellipsis: keys are there to be copied.
        built.columns[1].overflow = "fold"
        console.print(built)
    for kind, count in report.counts.items():
        if (hidden := count - len(report.of(kind))) > 0:
            console.print(f"... and {hidden} more of {kind.value}")


def _render(report: FsckReport) -> None:
    show_findings(report)
    console.print(_summary(report))


def _row(finding: Finding) -> tuple[str, str]:
    # Whole lines below each other: a column for each would cut the key, which has to be copied.
    at = "" if finding.offset is None else f", byte {finding.offset}"
    lines = [f"[bold]{_escape(finding.key)}[/]{at}", _escape(finding.problem)]
    if finding.affects:
        lines.append(f"[dim]concerns:[/] {_escape(finding.affects)}")
    lines.append(f"[dim]to do:[/] {_escape(finding.remedy)}")
    style = _STYLES[finding.severity]
    return f"[{style}]{finding.severity}[/]\n{finding.kind}", "\n".join(lines)


def _summary(report: FsckReport) -> str:
    checked, counts = report.checked, []
    for severity, style in _STYLES.items():
        number = sum(n for kind, n in report.counts.items() if kind.severity == severity)
        if number:
            counts.append(f"[{style}]{number} {severity}[/]")
    verdict = "[green]clean[/]" if report.is_clean else "[bold red]not clean[/]"
    found = f" ({', '.join(counts)})" if counts else ""
    read = f", {format_bytes(checked.num_bytes)} read" if report.deep else ", content not read"
    return (
        f"{report.url}: {verdict}{found}; revision {report.revision}, "
        f"{checked.num_revisions} records, {checked.num_manifests} manifests, "
        f"{checked.num_slots} objects of slots{read}, "
        f"{checked.num_frames} journalled updates, {checked.num_replayed} computed again"
    )


def _escape(text: str) -> str:
    # Square brackets in a message are text, not markup.
    return text.replace("[", "\\[")
