"""The part of `membank delete` that removes what documents put into a bank."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from membank.cli.connection import connect
from membank.cli.extras import needs_extra
from membank.cli.output import console, emit, err_console, format_share, table
from membank.cli.progress import stage_progress
from membank.wire.errors import InvalidArgumentError
from membank.wire.spec import BlockRef

if TYPE_CHECKING:
    # Only for the annotation: importing the trainer takes seconds.
    from membank.trainer.deletion import BlockPart, DeletionForecast, DeletionReport, Scope

OptionalTopicArgument = Annotated[
    str | None,
    typer.Argument(help="A topic: LEVEL/CLUSTER such as 1/3, or (part of) its label."),
]
DocumentsOption = Annotated[
    Path | None,
    typer.Option(
        help='Delete documents instead of a topic: JSON lines, {"text": ...} or {"id": ...}.'
    ),
]
DeletionRunOption = Annotated[
    Path | None, typer.Option("--run", help="With --documents: directory of the bank's run.")
]
ThresholdOption = Annotated[
    float,
    typer.Option(
        min=0.0, max=1.0,
        help="With --documents: share of a leaf's tokens from which on the whole leaf goes.",
    ),
]  # fmt: skip
ScopeOption = Annotated[
    str,
    typer.Option(
        help="With --documents: train anew the blocks on their paths, or all of their level-1 topics."
    ),
]


def delete_documents(
    topic: str | None,
    documents: Path | None,
    run: Path | None,
    threshold: float,
    scope: str,
    bank: str,
    token_file: Path | None,
    ca_file: Path | None,
    *,
    dry_run: bool,
    yes: bool,
    as_json: bool,
) -> None:
    """Delete what documents put into a bank; interrupted, the same command goes on.

    Parameters
    ----------
    topic
        None: a topic and documents are not deleted together.
    documents
        Documents file.
    run
        Directory of the bank's run.
    threshold
        Share of a leaf's tokens from which on the leaf goes.
    scope
        ``paths`` or ``topics``.
    bank, token_file, ca_file
        How to reach the bank.
    dry_run
        True only says what would be done.
    yes
        True does not ask.
    as_json
        True prints JSON.
    """
    if documents is None or topic is not None:
        raise InvalidArgumentError("give either a topic or --documents FILE")
    if run is None:
        raise InvalidArgumentError(
            "deleting documents needs --run RUN: it knows where they were trained"
        )
    with needs_extra("trainer"):
        from membank.trainer.deletion import (
            DeletionConfig,
            DocumentDeletion,
            ServedExchange,
            forecast_deletion,
            seconds_of,
        )
        from membank.trainer.finding import read_documents
        from membank.trainer.run import RunDirectory, RunMaterial
    config = DeletionConfig(threshold=threshold, scope=_scope(scope))
    named = read_documents(documents)
    with connect(bank, token_file, ca_file) as client:
        material = RunMaterial(RunDirectory(run), client.info().spec.bank_id)
        forecast = forecast_deletion(client, material, named, config)
        labels = client.tree().labels
        if forecast.is_done:
            err_console.print("deleted already; this is the account of it")
        else:
            seconds = seconds_of(forecast, material, client.spec, config)
            payload = {"dry_run": True, **forecast.to_json(), "estimated_s": seconds}
            if dry_run or not as_json:
                emit(
                    payload,
                    as_json=as_json,
                    render=lambda: _show_forecast(forecast, labels, seconds),
                )
            if dry_run:
                return
            if forecast.state is None and not yes:
                typer.confirm("Delete these documents for good?", abort=True, err=True)
        deletion = DocumentDeletion(client, ServedExchange(client), material, config)
        with stage_progress("training anew") as on_progress:
            report = deletion.run(forecast, on_progress=on_progress)
    emit(report.to_json(), as_json=as_json, render=lambda: _show_report(report))


def _scope(text: str) -> Scope:
    from membank.trainer.deletion import Scope

    try:
        return Scope(text)
    except ValueError:
        raise InvalidArgumentError(
            f"unknown scope {text!r}; use {' or '.join(scope.value for scope in Scope)}"
        ) from None


def _show_forecast(
    forecast: DeletionForecast, labels: Mapping[BlockRef, str], seconds: float
) -> None:
    plan = forecast.plan
    console.print(
        f"{len(plan.removed)} documents are in the bank; {len(forecast.untrained)} others of the "
        f"corpus are not, {len(forecast.unknown)} were named in vain"
    )
    for said in forecast.unknown:
        console.print(f"not found: {said}", markup=False)
    columns = (
        "label", "documents>", "tokens>", "to delete>", "their tokens>", "share>",
    )  # fmt: skip
    if plan.deleted:
        rows = [_part_cells(part, labels) for part in plan.deleted]
        console.print(table(("goes", *columns), rows))
        if plan.collateral_documents:
            console.print(f"{plan.collateral_documents} other documents lose their leaf with it")
    if plan.retrained:
        rows = [_part_cells(part, labels) for part in plan.retrained]
        console.print(table(("trained anew", *columns), rows))
    if forecast.retraining is not None:
        training = forecast.retraining
        console.print(
            f"training: {training.num_steps} steps on {len(training.sequences)} sequences of "
            f"{len(plan.remaining)} documents, about {_minutes(seconds)} here"
        )
    if forecast.state is not None:
        console.print(f"begun already, in phase {forecast.state.phase}; the same command goes on")


def _part_cells(part: BlockPart, labels: Mapping[BlockRef, str]) -> tuple[object, ...]:
    return (
        part.ref,
        labels.get(part.ref, ""),
        part.num_documents,
        part.num_tokens,
        part.removed_documents,
        part.removed_tokens,
        format_share(part.share),
    )


def _show_report(report: DeletionReport) -> None:
    told = report.to_json()
    console.print(
        f"{told['removed_documents']} documents deleted: "
        f"{len(report.forecast.plan.topics)} topics gone, "
        f"{len(report.forecast.plan.retrained)} blocks trained anew"
    )
    for name, words in (("destroyed", "old versions destroyed"), ("installed", "put in place")):
        step = told.get(name)
        if isinstance(step, dict):
            slots = f", {step['slots_destroyed']} stored versions" if name == "destroyed" else ""
            console.print(f"{words} at revision {step['revision']}{slots}")
    if "short_paths_s" in told:
        console.print(f"paths were short in between for {told['short_paths_s']:.2f} s at most")
    rows = [
        (words, *(_nats(loss.get(key)) for key in _LOSSES))
        for words, loss in (("before", told["loss_before"]), ("after", told["loss_after"]))
        if isinstance(loss, dict)
    ]
    console.print(table(("nats per token of them", "anchor alone>", "with memory>"), rows))
    if told.get("receipt"):
        console.print(f"receipt: {told['receipt']}")
    console.print("what still holds something of them:")
    for words in report.residue:
        console.print(f"- {words}", markup=False)


_LOSSES = ("anchor_nats_per_token", "memory_nats_per_token")


def _nats(value: object) -> str:
    return f"{value:.3f}" if isinstance(value, float) else "-"


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
