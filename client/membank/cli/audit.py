"""Commands for the audit log: list it, check it, show the receipts of what was deleted."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from membank.cli.connection import DEFAULT_ENDPOINT, BankOption, CaOption, TokenOption, connect
from membank.cli.exits import report as report_error
from membank.cli.extras import needs_extra
from membank.cli.fsck_command import (
    EXIT_DAMAGED,
    EXIT_UNREADABLE,
    KeyringOption,
    show_findings,
)
from membank.cli.output import JsonOption, console, emit, table
from membank.cli.progress import counted_progress
from membank.wire.errors import (
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
    Reason,
    UnavailableError,
)
from membank.wire.format.receipt import (
    Acknowledgement,
    Receipt,
    Recycling,
    SignedReceipt,
    decode_receipt,
)
from membank.wire.records import AuditRecord
from membank.wire.signing import TrustedKeys

if TYPE_CHECKING:
    # Only for the annotation: a client-only install lacks the service.
    from membank.bank_service.fsck import AuditReport

audit = typer.Typer(invoke_without_command=True)

PlaceArgument = Annotated[
    str,
    typer.Argument(
        metavar="BANK",
        help="The bank: a directory, a URL, or the endpoint of its service on this machine.",
    ),
]
TrustedOption = Annotated[
    Path | None,
    typer.Option(
        "--trusted", help="File of keys that may sign, lines `KEY NAME`; default: the log's own."
    ),
]


def register(app: typer.Typer) -> None:
    """Add this module's commands to `app`."""
    app.add_typer(audit, name="audit")


@audit.callback()
def list_records(
    context: typer.Context,
    limit: Annotated[int, typer.Option(min=1, help="Records, newest first.")] = 20,
    retained: Annotated[
        bool,
        typer.Option("--retained", help="Only revisions that the bank can be rolled back to."),
    ] = False,
    bank: BankOption = DEFAULT_ENDPOINT,
    token_file: TokenOption = None,
    ca_file: CaOption = None,
    as_json: JsonOption = False,
) -> None:
    """List who changed what, newest first; with a command, check that or prove it.

    Examples: ``membank audit --limit 5``, ``membank audit --retained``,
    ``membank audit verify ./bank``.
    """
    if context.invoked_subcommand is not None:
        return
    with connect(bank, token_file, ca_file) as client:
        records = client.audit(limit=limit, retained_only=retained)

    def render() -> None:
        rows = [
            (
                record.revision,
                _utc(record.time_s),
                record.principal,
                record.operation,
                _audited(record),
            )
            for record in records
        ]
        console.print(table(("revision>", "time (UTC)", "who", "what", "on"), rows))

    emit([asdict(record) for record in records], as_json=as_json, render=render)


@audit.command("verify")
def verify(
    bank: PlaceArgument,
    trusted: TrustedOption = None,
    head: Annotated[
        list[str] | None,
        typer.Option(help="Head that was kept elsewhere, NUMBER:DIGEST; may be given repeatedly."),
    ] = None,
    journal_dir: Annotated[
        Path | None,
        typer.Option(help="Directory of the journals, where the service keeps them elsewhere."),
    ] = None,
    keyring: KeyringOption = "",
    as_json: JsonOption = False,
) -> None:
    """Check the log, every receipt, and that nothing deleted is stored any more; change nothing.

    Exit code: 0 all holds, 1 something does not, 2 not a readable bank. What a receipt proves, and
    why heads should be kept, is in docs/deletion.md.

    Examples: ``membank audit verify ./bank``,
    ``membank audit verify s3://team/bank --trusted keys.txt --head 41:9c1f...``.
    """
    with needs_extra("service"):
        from membank.bank_service.fsck import Head, verify_audit
        from membank.bank_service.store import open_objects
    keys = None if trusted is None else TrustedKeys.load(trusted)
    heads = [Head.parse(text) for text in head or ()]
    place = _place_of(bank, keyring)
    try:
        with counted_progress(f"checking {place.bank_url}") as on_progress:
            found = verify_audit(
                open_objects(place.bank_url, keyring=place.keyring_url),
                trusted=keys,
                heads=heads,
                journal_dir=journal_dir,
                on_progress=on_progress,
            )
    except (NotFoundError, FailedPreconditionError, UnavailableError) as err:
        report_error(err)
        raise typer.Exit(EXIT_UNREADABLE) from None
    emit(found.to_json(), as_json=as_json, render=lambda: _render_verified(found))
    if not found.found.is_clean:
        raise typer.Exit(EXIT_DAMAGED)


@audit.command("head")
def show_head(
    bank: PlaceArgument, keyring: KeyringOption = "", as_json: JsonOption = False
) -> None:
    """Print number and digest of the newest record, to be kept where the bank is not.

    A log that lost its newest records looks whole; `membank audit verify --head` tells.

    Example: ``membank audit head ./bank >> heads.txt``.
    """
    with needs_extra("service"):
        from membank.bank_service.fsck import head_of
        from membank.bank_service.store import open_objects
    place = _place_of(bank, keyring)
    found = head_of(open_objects(place.bank_url, keyring=place.keyring_url))
    payload = {"revision": found.revision, "sha256": found.sha256, "head": str(found)}
    emit(payload, as_json=as_json, render=lambda: console.print(str(found), soft_wrap=True))


@audit.command("receipt")
def receipt(
    revision: Annotated[int, typer.Argument(min=0, help="Revision of the deletion.")],
    out: Annotated[Path | None, typer.Option(help="File to write it to, as it was signed.")] = None,
    trusted: TrustedOption = None,
    bank: BankOption = DEFAULT_ENDPOINT,
    token_file: TokenOption = None,
    ca_file: CaOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show the signed receipt of what a revision deleted, and check its signature.

    Example: ``membank audit receipt 7 --out receipt-7.json``.
    """
    with connect(bank, token_file, ca_file) as client:
        data = client.receipt(revision)
    signed = decode_receipt(data, what=f"the receipt of revision {revision}")
    if trusted is not None:
        TrustedKeys.load(trusted).require(signed.signature, what="the receipt")
    if out is not None:
        save_receipt(out, data)
    emit(json.loads(data), as_json=as_json, render=lambda: _render_receipt(signed))


def save_receipt(file: Path, data: bytes) -> None:
    """Write a receipt to a file as it was signed."""
    try:
        file.write_bytes(data)
    except OSError as err:
        raise InvalidArgumentError(
            f"{file} cannot be written: {err.strerror}; the bank keeps the receipt, and `membank "
            "audit receipt` writes it elsewhere"
        ) from err


class _Place(NamedTuple):
    """Where a bank is."""

    bank_url: str
    """Its directory or URL."""
    keyring_url: str
    """Those of its keyring; empty = it is not sealed, or nobody said."""


def _place_of(place: str, keyring: str) -> _Place:
    """Return where the bank is: `place`, or what is served at that endpoint on this machine."""
    host, _, port = place.rpartition(":")
    if not host or not port.isdecimal() or "/" in place:
        return _Place(place, keyring)
    from membank.bank_service.cluster import list_running

    for running in list_running():
        if running.address.rpartition(":")[2] == port:
            return _Place(running.bank_url, keyring or running.keyring_url)
    raise UnavailableError(
        f"no service at {place} was started on this machine, so nobody here knows where its bank "
        "is; give the bank's directory or URL",
        reason=Reason.NOT_RUNNING,
        metadata={"endpoint": place},
    )


def _render_verified(report: AuditReport) -> None:
    found = report.found
    show_findings(found)
    words = "[green]all holds[/]" if found.is_clean else "[bold red]it does not hold[/]"
    console.print(
        f"{found.url}: {words}; {found.checked.num_revisions} records in one chain, "
        f"{report.num_deletions} deletions of {report.num_blocks} blocks, "
        f"{report.num_receipts} receipts in order"
    )


def _render_receipt(signed: SignedReceipt) -> None:
    receipt = signed.receipt
    deletion = receipt.deletion
    slots = sum(block.num_slots for block in deletion.blocks)
    console.print(
        f"[bold]revision {receipt.revision}[/]: {receipt.operation} of "
        f"{', '.join(map(str, deletion.topics))} by {receipt.principal}, {_utc(receipt.time_s)} UTC"
    )
    console.print(f"destroyed    {len(deletion.blocks)} blocks, {slots} stored versions")
    for acknowledged in receipt.acknowledgements:
        console.print(
            f"acknowledged {acknowledged.shard_id}, partitions "
            f"{', '.join(map(str, acknowledged.partitions))}: {_processes(receipt, acknowledged)}"
        )
    committed, issuer = deletion.coordinator, receipt.issuer
    fate = "lives on" if committed == issuer else f"ended, {issuer.pid} took its place"
    console.print(f"controller   process {committed.pid} on {committed.host} {fate}")
    key = signed.signature.public_key
    console.print(f"signed       {_utc(receipt.issue_time_s)} UTC with {key.text} ({key.key_id})")


def _processes(receipt: Receipt, acknowledged: Acknowledgement) -> str:
    before, now = acknowledged.confirmed_by, acknowledged.now
    if receipt.recycling is Recycling.DONE:
        return (
            f"process {before.pid} on {before.host} ended, {now.pid} on {now.host} took its place"
        )
    return f"process {now.pid} on {now.host} lives on"


def _utc(time_s: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(time_s))


def _audited(record: AuditRecord) -> str:
    detail = record.detail
    found = detail.get("steps")
    steps = [_step(step, record.operation) for step in found] if isinstance(found, list) else []
    named = ", ".join(steps[:4]) + (" ..." if len(steps) > 4 else "")
    snapshot = str(detail.get("snapshot", ""))
    revision = str(detail.get("to_revision", detail.get("history_from", "")))
    # A snapshot's name says more than the revision that it pins.
    back_to = snapshot or (f"revision {revision}" if revision else "")
    return " ".join(part for part in (str(detail.get("topic", "")) or named, back_to) if part)


def _step(step: dict[str, object], operation: str) -> str:
    kind = str(step["step"])
    on = str(step.get("topic", step.get("block", "")))
    other = f" with {step['other']}" if "other" in step else ""
    # Where all steps are of one kind, the operation is called so.
    return f"{on}{other}" if kind == operation else f"{kind} {on}{other}"
