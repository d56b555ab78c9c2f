"""The command that measures what a deletion leaves."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from membank.cli.ending import ended_by_sigterm
from membank.cli.extras import needs_extra
from membank.cli.machine import environment
from membank.cli.output import JsonOption, check_out, console, emit, err_console, table
from membank.cli.progress import stage_progress
from membank.client import BankClient, ClientConfig
from membank.wire.errors import UnavailableError
from membank.wire.format import TreeDocument
from membank.wire.spec import BankSpec

if TYPE_CHECKING:
    # Only for the annotation: importing the trainer takes seconds.
    from membank.trainer.removal import RemovalStudy

_DEFAULT_RUN = Path("runs/removal")

# A study takes long, and on a machine that others use as well an answer may too: nobody waits for it.
_PATIENCE = ClientConfig(timeout_s=600.0, admin_timeout_s=1800.0, connect_timeout_s=120.0)


def register(group: typer.Typer) -> None:
    """Add this module's command to the group."""
    group.command("removal")(removal)


def removal(
    run: Annotated[
        Path, typer.Option(help="Directory of the study and its report.")
    ] = _DEFAULT_RUN,
    seeds: Annotated[int, typer.Option(min=1, max=100, help="Seeds, from 0.")] = 1,
    quick: Annotated[
        bool, typer.Option("--quick", help="Tiny: shows that it works, claims nothing.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also write the figures here, as JSON.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Measure what a deletion leaves, beside retraining without the topic and beside unlearning.

    Trains what it needs, deletes each topic from a served bank of its own, and writes report.json,
    report.md and report.html. Interrupt it whenever you like; the same command goes on.

    Examples: ``membank eval removal``, ``membank eval removal --quick --run runs/quick``,
    ``membank eval removal --seeds 3 --out removal.json``.
    """
    with needs_extra("trainer"):
        from membank.trainer.removal import STUDIES, RemovalStudy, summarise, write_report
    with needs_extra("service"):
        import ray  # noqa: F401  # the service runs on it: say so before an hour of training
    check_out(out)
    config = STUDIES["quick" if quick else "full"]()
    study = RemovalStudy(
        run,
        config,
        RayHost(num_shards=config.num_shards),
        progress=stage_progress,
        notice=lambda what: err_console.rule(what, align="left", style="dim"),
    )
    document = {
        **summarise(_measured(study, seeds), config),
        "quick": quick,
        "environment": environment(run),
    }
    write_report(run, document)
    if out is not None:
        out.write_text(json.dumps(document, indent=1, default=str) + "\n")
    emit(document, as_json=as_json, render=lambda: _render(document, run))


class RayHost:
    """Serves banks as `membank up` does.

    Parameters
    ----------
    num_shards
        Shard actors.
    """

    def __init__(self, *, num_shards: int) -> None:
        self._num_shards = num_shards

    @contextmanager
    def serve(self, folder: Path, spec: BankSpec, tree: TreeDocument) -> Iterator[BankClient]:
        """Yield a client of a new bank; the directory's earlier content is removed first."""
        from membank.bank_service.cluster import UpConfig, down, up
        from membank.bank_service.store import Bank

        url = str(folder)
        # A run that was killed could not stop its service.
        with suppress(UnavailableError):
            down(bank_url=url)
        if folder.exists():
            shutil.rmtree(folder)
        Bank.create(url, spec, tree=tree, principal="removal study")
        with ended_by_sigterm():
            endpoint = up(
                UpConfig(bank_url=url, num_shards=self._num_shards, port=0, start_timeout_s=300.0)
            )
        try:
            with (
                ended_by_sigterm(),
                BankClient.connect(endpoint.address, config=_PATIENCE) as client,
            ):
                yield client
        finally:
            down(bank_url=url)


def _measured(study: RemovalStudy, seeds: int) -> dict[int, dict[str, Any]]:
    try:
        return study.run(range(seeds))
    except KeyboardInterrupt:
        err_console.print("stopped; the same command goes on from here")
        raise


def _render(document: dict[str, Any], run: Path) -> None:
    def mean(values: list[float], digits: int = 2) -> str:
        return f"{sum(values) / len(values):.{digits}f}" if values else "-"

    rows = [
        (
            label,
            row["model"],
            mean(row["recall"]),
            mean(row["log10_p"], 1),
            mean(row["priv_leak"], 0),
            mean(row["utility"]),
            mean(row["seconds"]),
        )
        for label, topic in document["topics"].items()
        for row in topic["rows"]
    ]
    columns = ("topic", "model", "recall>", "log10 p>", "PrivLeak>", "utility>", "seconds>")
    console.print(table(columns, rows, title="what is left of a topic, means over seeds"))
    for goal in document["goals"]:
        mark = "[green]reached[/]" if goal["ok"] else "[red]missed[/]"
        console.print(f"{mark}  {goal['topic']}: {goal['what']} [dim]({goal['seen']})[/]")
    if document["quick"]:
        console.print("[yellow]a quick study: no claim follows from these figures[/]")
    console.print(f"report: {run / 'report.html'}")
