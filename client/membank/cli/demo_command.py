"""The command that shows everything on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from membank.cli.extras import needs_extra
from membank.cli.fsck_command import KeyringOption
from membank.cli.output import JsonOption, console, emit, err_console, format_share, table

_DEFAULT_OUT = Path("runs/demo")


def register(app: typer.Typer) -> None:
    """Add this module's commands to `app`."""
    app.command("demo")(demo)


def demo(
    out: Annotated[Path, typer.Option(help="Directory of the run and its report.")] = _DEFAULT_OUT,
    fast: Annotated[
        bool, typer.Option("--fast", help="Smaller: shows that it works, claims nothing.")
    ] = False,
    study: Annotated[
        bool, typer.Option("--study", help="Also train the anchor on for both stages' tokens.")
    ] = False,
    bank: Annotated[
        str,
        typer.Option(
            "--bank",
            help="Where the bank is kept, a directory or URL; default: in the run's directory.",
        ),
    ] = "",
    keyring: KeyringOption = "",
    shards: Annotated[int, typer.Option(min=1, help="Shard actors.")] = 2,
    workers: Annotated[int, typer.Option(min=1, help="Ray workers of stage 2.")] = 2,
    as_json: JsonOption = False,
) -> None:
    """Tell the whole story: corpus, topic tree, bank, service, training, questions, removal, return.

    Interrupt it whenever you like; the same command goes on where it stopped.

    Examples: ``membank demo``, ``membank demo --fast --out runs/fast``,
    ``membank demo --fast --bank s3://team/demo``.
    """
    with needs_extra("trainer"):
        from membank.trainer.run import named_run
    with needs_extra("service"):
        from membank.cli.demo.story import Demo, DemoConfig
    config = DemoConfig(
        out=out,
        run=named_run("fast" if fast else "demo"),
        bank_url=bank,
        keyring_url=keyring,
        num_shards=shards,
        num_workers=workers,
        claims=not fast,
        study=study,
    )
    try:
        document = Demo(config).tell()
    except KeyboardInterrupt:
        err_console.print("stopped; the same command goes on from here")
        raise
    emit(document, as_json=as_json, render=lambda: _render(document, out))
    if not all(check["ok"] for check in document["checks"] if check["must"]):
        # A goal of learning may be missed and is reported; a property of the service may not.
        raise typer.Exit(1)


def _render(document: dict[str, Any], out: Path) -> None:
    moments = {
        "trained": document["recall"],
        "after delete": document["after_delete"]["recall"],
        "after import": document["after_import"]["recall"],
    }
    conditions = ("anchor", "generic", "random", "withheld", "fetched", "oracle")
    rows = [
        (moment, relation, *(format_share(by[condition]) for condition in conditions))
        for moment, relations in moments.items()
        for relation, by in relations.items()
    ]
    columns = ("", "facts recalled", *(f"{condition}>" for condition in conditions))
    console.print(table(columns, rows))
    for relation, share in document.get("recall_longer_anchor", {}).items():
        console.print(
            f"anchor trained on for both stages' tokens: {format_share(share)} of {relation}"
        )
    for check in document["checks"]:
        mark = "[green]holds[/]" if check["ok"] else "[red]fails[/]"
        console.print(f"{mark}  {check['what']} [dim]({check['seen']})[/]")
    seconds = ", ".join(f"{name} {value:.0f} s" for name, value in document["seconds"].items())
    console.print(f"[dim]{seconds}[/]")
    console.print(f"report: {out / 'report.html'}")
