"""Commands that change what a bank knows: swap, withhold, delete."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from membank.cli.audit import save_receipt
from membank.cli.connection import (
    DEFAULT_ENDPOINT,
    BankOption,
    CaOption,
    DryRunOption,
    TokenOption,
    TopicArgument,
    connect,
    resolve_topic,
)
from membank.cli.delete_documents import (
    DeletionRunOption,
    DocumentsOption,
    OptionalTopicArgument,
    ScopeOption,
    ThresholdOption,
    delete_documents,
)
from membank.cli.output import JsonOption, console, emit, format_bytes, table
from membank.cli.step_file import load_array
from membank.wire.format.layout import receipt_key
from membank.wire.records import CentroidChange, TransactionReport, TreeChange
from membank.wire.spec import BlockState
from membank.wire.steps import Delete


def register(app: typer.Typer) -> None:
    """Add this module's commands to `app`."""
    app.command("swap")(swap)
    app.command("withhold")(withhold)
    app.command("restore")(restore)
    app.command("delete")(delete)


def swap(
    topic: TopicArgument,
    weights: Annotated[
        Path, typer.Argument(help="A .npy file with the block's new weights, shape (L, 3, r, d).")
    ],
    expect_version: Annotated[
        int | None, typer.Option(min=0, help="Refuse unless the block has this version.")
    ] = None,
    dry_run: DryRunOption = False,
    bank: BankOption = DEFAULT_ENDPOINT,
    token_file: TokenOption = None,
    ca_file: CaOption = None,
    as_json: JsonOption = False,
) -> None:
    """Replace the content of one block; its optimizer state starts afresh.

    Example: ``membank swap 2/17 iron.npy --expect-version 40``.
    """
    array = load_array(weights)
    with connect(bank, token_file, ca_file) as client:
        ref = resolve_topic(client, topic)
        expected = {} if expect_version is None else {ref: expect_version}
        report = client.swap({ref: array}, expected=expected, dry_run=dry_run)
    show_report("swap", report, as_json=as_json)


def withhold(
    topic: TopicArgument,
    dry_run: DryRunOption = False,
    bank: BankOption = DEFAULT_ENDPOINT,
    token_file: TokenOption = None,
    ca_file: CaOption = None,
    as_json: JsonOption = False,
) -> None:
    """Hide a topic and everything under it from fetches and updates, reversibly.

    Example: ``membank withhold 1/3``, and later ``membank restore 1/3``.
    """
    with connect(bank, token_file, ca_file) as client:
        report = client.withhold(resolve_topic(client, topic), dry_run=dry_run)
    show_report("withhold", report, as_json=as_json)


def restore(
    topic: TopicArgument,
    dry_run: DryRunOption = False,
    bank: BankOption = DEFAULT_ENDPOINT,
    token_file: TokenOption = None,
    ca_file: CaOption = None,
    as_json: JsonOption = False,
) -> None:
    """End the withholding of a topic.

    Example: ``membank restore 1/3``.
    """
    with connect(bank, token_file, ca_file) as client:
        report = client.restore(resolve_topic(client, topic), dry_run=dry_run)
    show_report("restore", report, as_json=as_json)


def delete(
    topic: OptionalTopicArgument = None,
    documents: DocumentsOption = None,
    run: DeletionRunOption = None,
    threshold: ThresholdOption = 0.5,
    scope: ScopeOption = "paths",
    dry_run: DryRunOption = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    receipt: Annotated[
        Path | None, typer.Option(help="File to write the signed receipt to as well.")
    ] = None,
    bank: BankOption = DEFAULT_ENDPOINT,
    token_file: TokenOption = None,
    ca_file: CaOption = None,
    as_json: JsonOption = False,
) -> None:
    """Delete a topic and everything under it: weights, optimizer state, history, labels.

    Returns once nothing of it is left, neither stored nor in the memory of a shard, and a receipt is
    signed (docs/deletion.md).

    With --documents: what some documents put into the bank. Leaves that they dominate go; blocks
    that they share are trained anew without them.

    Examples: ``membank delete chemistry --dry-run``, then ``membank delete chemistry``;
    ``membank delete --documents takedown.jsonl --run runs/demo --dry-run``.
    """
    if documents is not None or topic is None:
        delete_documents(
            topic, documents, run, threshold, scope, bank, token_file, ca_file,
            dry_run=dry_run, yes=yes, as_json=as_json,
        )  # fmt: skip
        return
    with connect(bank, token_file, ca_file) as client:
        ref = resolve_topic(client, topic)
        if not (dry_run or yes):
            confirm_deletion(client.delete(ref, dry_run=True))
        applied = client.apply([Delete(topic=ref)], dry_run=dry_run)
    if receipt is not None and applied.receipt:
        save_receipt(receipt, applied.receipt)
    show_report("delete", applied.report, as_json=as_json, has_receipt=bool(applied.receipt))


def show_report(
    operation: str, report: TransactionReport, *, as_json: bool, has_receipt: bool = False
) -> None:
    """Print what a transaction did, or would do; `has_receipt` = the bank has a receipt of it."""
    receipt = receipt_key(report.revision) if has_receipt else None

    def render() -> None:
        show_report_lines(operation, report)
        if receipt is not None:
            console.print(
                f"receipt: {receipt} in the bank, `membank audit receipt {report.revision}`"
            )

    emit(
        {"operation": operation, **report_json(report), "receipt": receipt},
        as_json=as_json,
        render=render,
    )


def show_report_lines(operation: str, report: TransactionReport) -> None:
    """Print what a transaction did, or would do, for people."""
    verb = "would change" if report.dry_run else "changed"
    console.print(
        f"{operation}: {verb} {len(report.changes)} blocks ({_bytes_of(report)}); "
        f"revision {report.revision}"
    )
    if report.num_slots_destroyed:
        would = "would be " if report.dry_run else ""
        console.print(f"stored versions {would}destroyed: {report.num_slots_destroyed}")
    if report.packs:
        would = "would be " if report.dry_run else ""
        console.print(f"stored packs {would}destroyed: {', '.join(report.packs)}")
    rows = [
        (
            change.ref,
            f"{change.state_before.name.lower()} v{change.version_before}",
            f"{change.state_after.name.lower()} v{change.version_after}",
            format_bytes(change.num_bytes),
        )
        for change in report.changes[:20]
    ]
    if rows:
        console.print(table(("block", "before", "after", "bytes>"), rows))
    if len(report.changes) > len(rows):
        console.print(f"... and {len(report.changes) - len(rows)} more (--json lists them)")
    if report.tree_changes:
        would = "would change" if report.dry_run else "changed"
        topics = [f"{c.topic} ({_tree_change(c)})" for c in report.tree_changes[:20]]
        more = " ..." if len(report.tree_changes) > len(topics) else ""
        console.print(f"the tree {would} at {', '.join(topics)}{more}")


def confirm_deletion(plan: TransactionReport) -> None:
    """Ask whether what `plan` deletes is to be deleted, and end the command unless it is."""
    deleted = [c.num_bytes for c in plan.changes if c.state_after is BlockState.DELETED]
    packs = f", and the stored packs {', '.join(plan.packs)}" if plan.packs else ""
    question = f"Delete {len(deleted)} blocks ({format_bytes(sum(deleted))}){packs} for good?"
    typer.confirm(question, abort=True, err=True)


def report_json(report: TransactionReport) -> dict[str, object]:
    """Return a transaction report as JSON-able values."""
    return {
        "revision": report.revision,
        "dry_run": report.dry_run,
        "slots_destroyed": report.num_slots_destroyed,
        "packs_destroyed": list(report.packs),
        "changes": [
            {
                "block": str(change.ref),
                "version_before": change.version_before,
                "version_after": change.version_after,
                "state_before": change.state_before.name.lower(),
                "state_after": change.state_after.name.lower(),
                "bytes": change.num_bytes,
            }
            for change in report.changes
        ],
        "tree_changes": [
            {
                "topic": str(change.topic),
                "label": change.changes_label,
                "documents": change.changes_num_documents,
                "centroid": change.centroid_change.name.lower(),
            }
            for change in report.tree_changes
        ],
    }


def _tree_change(change: TreeChange) -> str:
    parts = [
        "label" if change.changes_label else "",
        "documents" if change.changes_num_documents else "",
        ""
        if change.centroid_change is CentroidChange.KEPT
        else f"centroid {change.centroid_change.name.lower()}",
    ]
    return ", ".join(filter(None, parts))


def _bytes_of(report: TransactionReport) -> str:
    return format_bytes(sum(change.num_bytes for change in report.changes))
