"""Commands that take topics out of a bank and bring them in: export, import, packs, pack."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

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
from membank.cli.operate import report_json, show_report_lines
from membank.cli.output import JsonOption, console, emit, err_console, format_bytes, table
from membank.cli.pack_files import mapped, mapped_pack, read_pack, written_pack
from membank.cli.pack_report import PackReport, describe_pack, show_pack
from membank.client import BankClient
from membank.wire.errors import InvalidArgumentError, MembankError, NotFoundError
from membank.wire.format import TreeDocument
from membank.wire.format.pack import check_fits, check_signatures, decode_pack, sign_pack
from membank.wire.signing import Signer, TrustedKeys

PackArgument = Annotated[str, typer.Argument(help="A pack: a path, or a URL that fsspec serves.")]
StoredName = Annotated[str, typer.Argument(help="Name of the pack in the bank's own store.")]
TrustedOption = Annotated[
    Path | None,
    typer.Option(
        "--trusted",
        help="File of public keys that count, one `KEY NAME` per line (`membank pack keygen` prints "
        "such a line).",
    ),
]

pack_app = typer.Typer(help="Look into packs, verify and sign them.", no_args_is_help=True)


def register(app: typer.Typer) -> None:
    """Add this module's commands to `app`."""
    app.command("export")(export)
    app.command("import")(import_)
    app.command("packs")(packs)
    app.add_typer(pack_app, name="pack")


def export(
    topic: TopicArgument,
    pack: Annotated[
        str | None, typer.Argument(help="Where to write it: a path, or a URL that fsspec serves.")
    ] = None,
    store: Annotated[
        str | None, typer.Option(help="Keep it in the bank's own store instead, under this name.")
    ] = None,
    since: Annotated[
        str | None,
        typer.Option(
            help="A diff: only blocks that differ from the end of this revision (a number), or from "
            "this snapshot."
        ),
    ] = None,
    weights_only: Annotated[
        bool, typer.Option("--weights-only", help="Leave the optimizer state out.")
    ] = False,
    sign: Annotated[
        Path | None, typer.Option(help="Private key (PEM) to sign it with; see pack keygen.")
    ] = None,
    bank: BankOption = DEFAULT_ENDPOINT,
    token_file: TokenOption = None,
    ca_file: CaOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write a topic with everything under it to a pack (a safetensors file).

    Examples: ``membank export chemistry chemistry.pack``,
    ``membank export 1/3 s3://team/packs/chemistry.pack --sign me.pem``,
    ``membank export 1/3 changes.pack --since before``, ``membank export 1/3 --store chemistry``.
    """
    if (pack is None) == (store is None):
        raise InvalidArgumentError("say where the pack goes: a path or URL, or --store NAME")
    if store is not None and sign is not None:
        raise InvalidArgumentError(
            "a stored pack is signed by the service's key; to sign it with yours, export it to a file"
        )
    signer = None if sign is None else Signer.load(sign)
    state = int(since) if since is not None and since.isdecimal() else since
    with connect(bank, token_file, ca_file) as client:
        ref = resolve_topic(client, topic)
        if store is not None:
            info = client.store_pack(ref, store, weights_only=weights_only, since=state)
        else:
            assert pack is not None
            with written_pack(pack) as file:
                info = client.export_to(
                    ref, file, weights_only=weights_only, since=state, signer=signer
                )
    place = f"the bank's store as {store}" if store is not None else pack
    payload = {
        "topic": str(ref),
        "pack": pack,
        "stored": store,
        "bytes": info.num_bytes,
        "revision": info.revision,
        "since": since,
        "signed_by": None if signer is None else signer.public_key.key_id,
    }

    def render() -> None:
        kind = "topic" if since is None else f"what changed since {since} in topic"
        signed = "" if signer is None else f", signed by {signer.public_key.key_id}"
        console.print(f"{kind} {ref} written to {place} ({format_bytes(info.num_bytes)}{signed})")

    emit(payload, as_json=as_json, render=render)


def import_(
    pack: Annotated[
        str | None, typer.Argument(help="A pack: a path, or a URL that fsspec serves.")
    ] = None,
    stored: Annotated[
        str | None, typer.Option(help="Name of a pack in the bank's own store instead.")
    ] = None,
    under: Annotated[
        str | None,
        typer.Option(
            "--as", help="Topic to install it under, of the same level; default: where it was."
        ),
    ] = None,
    trusted: TrustedOption = None,
    force: Annotated[
        bool,
        typer.Option(
            "--force", help="Install a diff also where the bank does not hold what it starts from."
        ),
    ] = False,
    dry_run: DryRunOption = False,
    bank: BankOption = DEFAULT_ENDPOINT,
    token_file: TokenOption = None,
    ca_file: CaOption = None,
    as_json: JsonOption = False,
) -> None:
    """Install a pack, under the topic it was exported from or another; deleted ones are made anew.

    Examples: ``membank import chemistry.pack --dry-run``,
    ``membank import https://example.org/chemistry.pack --as 1/5 --trusted keys``,
    ``membank import --stored chemistry``.
    """
    if (pack is None) == (stored is None):
        raise InvalidArgumentError("say which pack: a path or URL, or --stored NAME")
    if stored is not None and trusted is not None:
        raise InvalidArgumentError(
            "--trusted checks what is read here; a stored pack is checked by the service, with the "
            "keys of its own (membank up --trusted-keys)"
        )
    with connect(bank, token_file, ca_file) as client:
        topic = None if under is None else resolve_topic(client, under)
        if stored is not None:
            answer = client.import_stored(stored, topic=topic, force=force, dry_run=dry_run)
        else:
            assert pack is not None
            keys = None if trusted is None else TrustedKeys.load(trusted)
            with read_pack(pack) as file:
                if keys is not None:
                    # Of this copy: another one may be another pack.
                    check_signatures(decode_pack(mapped(file), what=pack), keys, what=pack)
                    file.seek(0)
                answer = client.import_pack(file, topic=topic, force=force, dry_run=dry_run)
    payload = {"operation": "import", "topic": str(answer.topic), **report_json(answer.report)}

    def render() -> None:
        console.print(f"topic {answer.topic}")
        show_report_lines("import", answer.report)

    emit(payload, as_json=as_json, render=render)


def packs(
    bank: BankOption = DEFAULT_ENDPOINT,
    token_file: TokenOption = None,
    ca_file: CaOption = None,
    as_json: JsonOption = False,
) -> None:
    """List the packs in the bank's own store.

    Example: ``membank packs``.
    """
    with connect(bank, token_file, ca_file) as client:
        found = client.packs()
    payload = [
        {
            "name": pack.name,
            "topic": str(pack.topic),
            "revision": pack.revision,
            "bytes": pack.num_bytes,
            "create_time_s": pack.create_time_s,
        }
        for pack in found
    ]

    def render() -> None:
        if not found:
            console.print("the bank keeps no packs; membank export TOPIC --store NAME makes one")
            return
        rows = [
            (pack.name, pack.topic, pack.revision, format_bytes(pack.num_bytes)) for pack in found
        ]
        console.print(table(("pack", "topic", "revision>", "bytes>"), rows))

    emit(payload, as_json=as_json, render=render)


@pack_app.command("delete")
def delete(
    name: StoredName,
    bank: BankOption = DEFAULT_ENDPOINT,
    token_file: TokenOption = None,
    ca_file: CaOption = None,
    as_json: JsonOption = False,
) -> None:
    """Destroy a pack in the bank's own store.

    Example: ``membank pack delete chemistry``.
    """
    with connect(bank, token_file, ca_file) as client:
        gone = client.delete_pack(name)
    emit(
        {"deleted": gone.name, "bytes": gone.num_bytes},
        as_json=as_json,
        render=lambda: console.print(
            f"pack {gone.name} destroyed ({format_bytes(gone.num_bytes)})"
        ),
    )


@pack_app.command("inspect")
def inspect(
    pack: PackArgument,
    trusted: TrustedOption = None,
    bank: Annotated[
        str | None, typer.Option("--bank", help="Endpoint of a service: does it fit its bank?")
    ] = None,
    token_file: TokenOption = None,
    ca_file: CaOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show what a pack holds, whether it is whole, who signed it and whether a bank takes it.

    Needs no service, but for --bank. Its bytes are checked first: what is damaged is refused.

    Examples: ``membank pack inspect chemistry.pack``,
    ``membank pack inspect s3://team/chemistry.pack --trusted keys --bank localhost:7600``.
    """
    keys = None if trusted is None else TrustedKeys.load(trusted)
    with mapped_pack(pack) as data:
        report = describe_pack(decode_pack(data, what=pack), len(data), keys)
        if bank is not None:
            with connect(bank, token_file, ca_file) as client:
                report = report.fitting(_reason_against(report, client))
        emit(report.to_json(), as_json=as_json, render=lambda: show_pack(pack, report))


@pack_app.command("verify")
def verify(
    pack: PackArgument,
    trusted: TrustedOption = None,
    as_json: JsonOption = False,
) -> None:
    """Check that a pack is whole and that its signatures are of it; fails where they are not.

    With --trusted, one signature must be of a key in that file.

    Example: ``membank pack verify chemistry.pack --trusted keys``.
    """
    keys = None if trusted is None else TrustedKeys.load(trusted)
    with mapped_pack(pack) as data:
        decoded = decode_pack(data, what=pack)
        signers = check_signatures(decoded, keys, what=pack)
        payload = {"pack": pack, "sha256": decoded.sha256, "signed_by": list(signers)}
        whose = f"signed by {', '.join(signers)}" if signers else "not signed"
        emit(payload, as_json=as_json, render=lambda: console.print(f"{pack} is whole, {whose}"))


@pack_app.command("sign")
def sign(
    pack: Annotated[str, typer.Argument(help="The pack; it is replaced by the signed one.")],
    key: Annotated[Path, typer.Option(help="Private key (PEM).")],
    out: Annotated[
        str | None, typer.Option(help="Write the signed pack here, and leave the other as it is.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Sign a pack; signatures that it has are kept.

    Example: ``membank pack sign chemistry.pack --key me.pem``.
    """
    signer = Signer.load(key)
    target = out or pack
    with mapped_pack(pack) as data, written_pack(target) as file:
        signature = sign_pack(data, file, signer, what=pack)
    key_id = signature.public_key.key_id
    emit(
        {"pack": target, "signed_by": key_id},
        as_json=as_json,
        render=lambda: console.print(f"{target} is signed by {key_id}"),
    )


@pack_app.command("keygen")
def keygen(
    file: Annotated[Path, typer.Argument(help="Where the private key goes (PEM).")],
    name: Annotated[str, typer.Option(help="Whose key it is, for those who trust it.")] = "",
    as_json: JsonOption = False,
) -> None:
    """Make a key to sign with, and print the line by which others trust it.

    A key that is there is kept, and its line is printed.

    Example: ``membank pack keygen me.pem --name "Jo, chemistry" >> keys``.
    """
    is_new = not file.exists()
    key = Signer.load_or_create(file).public_key
    if is_new:
        err_console.print(f"made {file}: keep it secret, and keep a copy of it")
    line = f"{key.text} {name}".rstrip()
    # Without rich: a line that is wrapped is no line of a file of keys.
    emit(
        {"file": str(file), "public_key": key.text, "key_id": key.key_id},
        as_json=as_json,
        render=lambda: typer.echo(line),
    )


def _reason_against(report: PackReport, client: BankClient) -> MembankError | None:
    spec = client.info().spec
    try:
        tree = client.tree()
    except NotFoundError:
        tree = TreeDocument()  # a bank without one takes any pack
    try:
        check_fits(report.pack, spec, tree)
    except MembankError as err:
        return err
    return None
