"""Commands for the past of a bank: snapshots, rollback, and what may go."""

from __future__ import annotations

from typing import Annotated

import typer

from membank.cli.connection import (
    DEFAULT_ENDPOINT,
    BankOption,
    CaOption,
    DryRunOption,
    TokenOption,
    connect,
    resolve_topic,
)
from membank.cli.operate import show_report
from membank.cli.output import JsonOption, console, emit, format_bytes, table
from membank.wire.records import GarbageKind, GarbageReport
from membank.wire.spec import BlockRef

_GC_TIMEOUT_S = 3600.0
"""A bucket takes some 10 ms to remove an object, and there may be a hundred thousand."""

_WHAT = {
    GarbageKind.UNKNOWN: "of a kind that this client does not know",
    GarbageKind.RETIRED_MANIFEST: "manifests that no retained revision needs",
    GarbageKind.ABANDONED_MANIFEST: "manifests of transactions that were given up",
    GarbageKind.RETIRED_SLOT: "versions of blocks that no retained revision needs",
    GarbageKind.UNNAMED_SLOT: "what writers that failed have left",
    GarbageKind.SNAPSHOT: "names of snapshots that were never committed",
    GarbageKind.TREE: "tree documents that are not in force",
    GarbageKind.PROBE: "what tests of the storage have left",
}


def register(app: typer.Typer) -> None:
    """Add this module's commands to `app`."""
    app.command("snapshot")(snapshot)
    app.command("rollback")(rollback)
    app.command("gc")(gc)


def snapshot(
    name: Annotated[
        str | None, typer.Argument(help="Name of the new snapshot; without one, list them.")
    ] = None,
    delete: Annotated[
        bool, typer.Option("--delete", help="Give the snapshot of this name up.")
    ] = False,
    bank: BankOption = DEFAULT_ENDPOINT,
    token_file: TokenOption = None,
    ca_file: CaOption = None,
    as_json: JsonOption = False,
) -> None:
    """Pin the present state of the bank under a name, list what is pinned, or give a name up.

    Examples: ``membank snapshot before-import``, ``membank snapshot``,
    ``membank snapshot before-import --delete``.
    """
    if delete and name is None:
        raise typer.BadParameter("say which snapshot to give up")
    with connect(bank, token_file, ca_file) as client:
        if name is None:
            found = client.snapshots()
        else:
            found = (client.delete_snapshot(name) if delete else client.snapshot(name),)

    def render() -> None:
        if delete:
            console.print(f"snapshot {name} is given up; `membank gc` removes what only it kept")
            return
        console.print(table(("snapshot", "revision>"), [(s.name, s.revision) for s in found]))

    payload = [
        {"snapshot": s.name, "revision": s.revision, "create_time_s": s.create_time_s}
        for s in found
    ]
    emit(payload, as_json=as_json, render=render)


def rollback(
    to: Annotated[str | None, typer.Option("--to", help="Snapshot to return to.")] = None,
    to_revision: Annotated[
        int | None,
        typer.Option(
            min=0, help="Revision to whose end to return; `membank audit --retained` lists them."
        ),
    ] = None,
    topic: Annotated[str | None, typer.Option(help="Only this topic; without it, all.")] = None,
    block: Annotated[
        str | None, typer.Option(help="Only this block, LEVEL/CLUSTER, not what lies under it.")
    ] = None,
    dry_run: DryRunOption = False,
    bank: BankOption = DEFAULT_ENDPOINT,
    token_file: TokenOption = None,
    ca_file: CaOption = None,
    as_json: JsonOption = False,
) -> None:
    """Bring the bank, one topic or one block back; deleted topics stay deleted.

    Examples: ``membank rollback --to before-import --topic chemistry``,
    ``membank rollback --to-revision 7 --block 2/17 --dry-run``.
    """
    if topic is not None and block is not None:
        raise typer.BadParameter("give --topic or --block, not both")
    with connect(bank, token_file, ca_file) as client:
        ref: BlockRef | None = None
        if topic is not None:
            ref = resolve_topic(client, topic)
        elif block is not None:
            ref = BlockRef.parse(block)
        report = client.rollback(
            _target(to, to_revision), topic=ref, only_block=block is not None, dry_run=dry_run
        )
    show_report("rollback", report, as_json=as_json)


def gc(
    keep_revisions: Annotated[
        int | None,
        typer.Option(
            min=1, help="Keep the history of so many revisions only, whatever the settings say."
        ),
    ] = None,
    dry_run: DryRunOption = False,
    bank: BankOption = DEFAULT_ENDPOINT,
    token_file: TokenOption = None,
    ca_file: CaOption = None,
    as_json: JsonOption = False,
) -> None:
    """Remove what no retained revision, no snapshot and nothing under way needs.

    Serving and training go on meanwhile; cut off, it can simply be repeated. With
    --keep-revisions, older revisions cannot be rolled back to any more, unless a snapshot pins
    them; that is written to the audit log.

    Examples: ``membank gc --dry-run``, ``membank gc --keep-revisions 2``.
    """
    with connect(bank, token_file, ca_file) as client:
        report = client.collect_garbage(
            keep_revisions=keep_revisions, dry_run=dry_run, timeout_s=_GC_TIMEOUT_S
        )
    emit(garbage_json(report), as_json=as_json, render=lambda: _show_garbage(report))


def garbage_json(report: GarbageReport) -> dict[str, object]:
    """Return what a collection removed as JSON-able values."""
    return {
        "dry_run": report.dry_run,
        "bytes": report.num_bytes,
        "history_from": report.history_from,
        "garbage": [
            {
                "kind": garbage.kind.name.lower(),
                "objects": garbage.num_objects,
                "bytes": garbage.num_bytes,
                "keys": list(garbage.keys),
            }
            for garbage in report.garbage
        ],
    }


def _show_garbage(report: GarbageReport) -> None:
    rows = [(_WHAT[g.kind], g.num_objects, format_bytes(g.num_bytes)) for g in report.garbage]
    verb = "would be removed" if report.dry_run else "removed"
    if rows:
        console.print(table((verb, "objects>", "bytes>"), rows))
    console.print(f"{format_bytes(report.num_bytes)} {verb}")
    console.print(f"history is kept from revision {report.history_from} on, and in snapshots")


def _target(snapshot: str | None, revision: int | None) -> str | int:
    if snapshot is not None and revision is None:
        return snapshot
    if revision is not None and snapshot is None:
        return revision
    raise typer.BadParameter("say where to return to: --to SNAPSHOT or --to-revision N")
