"""Commands that start, watch and stop a service."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from membank.cli.connection import DEFAULT_ENDPOINT, CaOption, TokenOption, connect
from membank.cli.ending import ended_by_sigterm
from membank.cli.extras import needs_extra
from membank.cli.fsck_command import KeyringOption
from membank.cli.output import JsonOption, console, emit, err_console, format_bytes, table
from membank.wire.errors import MembankError
from membank.wire.records import BankInfo, BankStats
from membank.wire.spec import Durability

if TYPE_CHECKING:
    # Only for the annotation: a client-only install lacks the service.
    from membank.bank_service.cluster import Endpoint


def register(app: typer.Typer) -> None:
    """Add this module's commands to `app`."""
    app.command("up")(up)
    app.command("status")(status)
    app.command("down")(down)


def up(
    bank: Annotated[
        str, typer.Option("--bank", help="The bank: a directory or URL, such as s3://team/bank.")
    ],
    keyring: KeyringOption = "",
    shards: Annotated[int, typer.Option(min=1, help="Shard actors.")] = 2,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 = any free one.")] = 7600,
    ray_address: Annotated[
        str | None, typer.Option(help="Ray to join, auto or HOST:PORT; without it, one is started.")
    ] = None,
    min_nodes: Annotated[
        int, typer.Option(min=1, help="Ray nodes to wait for before shards are placed.")
    ] = 1,
    start_timeout: Annotated[
        float, typer.Option(min=1, help="Seconds to wait for nodes and shards.")
    ] = 90.0,
    tls_cert: Annotated[Path | None, typer.Option(help="Server certificate (PEM).")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="Private key of it (PEM).")] = None,
    token_file: Annotated[
        Path | None, typer.Option(help="Tokens that may call: lines `TOKEN PRINCIPAL ROLE`.")
    ] = None,
    trusted_keys: Annotated[
        Path | None,
        typer.Option(
            help="Only import packs that one of these keys signed: lines `KEY NAME` (see pack keygen)."
        ),
    ] = None,
    durability: Annotated[
        str | None,
        typer.Option(
            help="What an acknowledged update survives: process (kill -9; the default), host (loss of "
            "power), store (loss of the machine; the only one of a sealed bank)."
        ),
    ] = None,
    ship_every: Annotated[
        float,
        typer.Option(
            min=0,
            help="Seconds between copies of the journals to the bank's storage, for a bank behind "
            "a URL; 0 = none.",
        ),
    ] = 0.0,
    journal_dir: Annotated[
        Path | None,
        typer.Option(help="Local directory of the journals; default: in a bank's directory."),
    ] = None,
    resident: Annotated[
        float, typer.Option(min=0, help="GiB of blocks that each shard keeps in memory.")
    ] = 1.0,
    keep_revisions: Annotated[
        int, typer.Option(min=1, help="Newest revisions that can be rolled back to.")
    ] = 8,
    keep_hours: Annotated[
        float, typer.Option(min=0, help="And those that ended less than so many hours ago.")
    ] = 0.0,
    signing_key: Annotated[
        Path | None,
        typer.Option(
            help="Ed25519 key (PEM) that receipts of deletions are signed with; default: one of this "
            "user, made once."
        ),
    ] = None,
    recycle: Annotated[
        bool,
        typer.Option(help="End the processes that held what was deleted before saying that it is."),
    ] = True,
    as_json: JsonOption = False,
) -> None:
    """Serve a bank: a controller and shard actors on Ray, each with its own gRPC server.

    Off loopback it needs a certificate, its key and a token file.

    Example: ``membank up --bank ./bank --shards 4``.
    """
    with needs_extra("service"):
        from membank.bank_service.cluster import UpConfig
        from membank.bank_service.cluster import up as start
    config = UpConfig(
        bank_url=bank,
        keyring_url=keyring,
        num_shards=shards,
        host=host,
        port=port,
        ray_address=ray_address,
        min_nodes=min_nodes,
        start_timeout_s=start_timeout,
        tls_cert=tls_cert,
        tls_key=tls_key,
        token_file=token_file,
        trusted_keys=trusted_keys,
        durability=durability,
        ship_every_s=ship_every,
        journal_dir=journal_dir,
        resident_bytes=int(resident * (1 << 30)),
        retained_revisions=keep_revisions,
        retained_s=3600 * keep_hours,
        signing_key=signing_key,
        recycle=recycle,
    )
    with err_console.status(f"starting {shards} shards on {bank}"), ended_by_sigterm():
        endpoint = start(config)
    payload = {
        "endpoint": endpoint.address,
        "bank": endpoint.bank_url,
        "ray_address": endpoint.ray_address,
        "is_bank": endpoint.had_bank,
    }

    def render() -> None:
        console.print(f"serving {endpoint.bank_url} at [bold]{endpoint.address}[/]")
        if endpoint.had_bank:
            console.print(f"try: membank topics --bank {endpoint.address}; stop: membank down")
        else:
            console.print(
                "[yellow]there is no bank there yet[/]: if that is no slip, stop this service "
                f"(membank down), run membank create --bank {bank}, and start it again"
            )

    emit(payload, as_json=as_json, render=render)


def status(
    bank: Annotated[
        str | None,
        typer.Option("--bank", envvar="MEMBANK_BANK", help="Endpoint; without it, this machine's."),
    ] = None,
    token_file: TokenOption = None,
    ca_file: CaOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show a running service: shards, partitions, traffic, memory, journal.

    Of a service that was started on this machine and does not answer, it shows what is known of its
    shards.

    Example: ``membank status --bank localhost:7600``.
    """
    if bank is None:
        bank = _local_endpoint()
    try:
        with connect(bank, token_file, ca_file) as client:
            info, stats = client.info(), client.stats()
    except MembankError:
        if not as_json:
            _show_what_is_known(bank)
        raise
    payload = {
        "endpoint": bank,
        "bank": info.spec.name,
        "durability": info.durability,
        "ship_every_s": info.ship_every_s,
        **asdict(stats),
    }

    def render() -> None:
        console.print(
            f"bank [bold]{info.spec.name}[/] at {bank}: revision {stats.revision}, "
            f"{stats.num_blocks_written} of {stats.num_blocks} blocks written"
        )
        console.print(_promise(info))
        console.print(_shard_table(stats))

    emit(payload, as_json=as_json, render=render)


def down(
    bank: Annotated[
        str | None, typer.Option("--bank", help="Directory or URL; without it, the only one.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Stop a service that was started on this machine; what was acknowledged is in the bank then.

    Example: ``membank down``.
    """
    with needs_extra("service"):
        from membank.bank_service.cluster import down as stop
    stopped = stop(bank_url=bank)
    endpoint = stopped.endpoint
    # Beside a bank in a directory, a journal is found by whoever serves it next.
    unfolded = list(stopped.unfolded) if "://" in endpoint.bank_url else []
    payload = {
        "endpoint": endpoint.address,
        "bank": endpoint.bank_url,
        "unfolded": unfolded,
    }

    def render() -> None:
        console.print(f"stopped {endpoint.bank_url} at {endpoint.address}")
        if unfolded:
            console.print(
                f"[yellow]{', '.join(unfolded)} did not stop in order[/] and may have left updates "
                "in journals on local disks: start the service here again before any other machine "
                "serves the bank"
            )

    emit(payload, as_json=as_json, render=render)


def _local_endpoint() -> str:
    running = _running_here()
    return running[-1].address if running else DEFAULT_ENDPOINT


def _running_here() -> tuple[Endpoint, ...]:
    try:
        from membank.bank_service.cluster import list_running
    except ImportError:
        return ()
    return list_running()


def _show_what_is_known(address: str) -> None:
    """Print what the controller of a service knows that does not answer, if it is one of here."""
    noted = next((found for found in _running_here() if found.address == address), None)
    if noted is None:
        return
    from membank.bank_service.cluster import status as ask_controller

    try:
        known = ask_controller(bank_url=noted.bank_url)
    except MembankError:
        return  # the caller has an error of its own to tell
    rows = [
        (shard.shard_id, shard.endpoint, shard.pid, "" if shard.alive else shard.problem)
        for shard in known.shards
    ]
    err_console.print(table(("shard", "endpoint", "pid>", "does not answer because"), rows))
    if known.problem:
        err_console.print(known.problem)


def _promise(info: BankInfo) -> str:
    survives = {
        Durability.PROCESS: "the death of its shard",
        Durability.HOST: "the loss of power of its machine",
        Durability.STORE: "the loss of its machine",
    }[info.durability]
    text = f"an acknowledged update survives {survives}"
    if info.ship_every_s:
        text += f"; journals are copied to the bank's storage every {info.ship_every_s:g} s"
    return text


def _shard_table(stats: BankStats) -> object:
    columns = (
        "shard", "endpoint", "pid>", "partitions>", "fetched>", "sent>", "updates>", "refused>",
        "received>", "resident>", "journal>", "unshipped s>", "restarts>",
    )  # fmt: skip
    rows = [
        (
            shard.shard_id,
            shard.endpoint,
            shard.pid,
            len(shard.partitions),
            shard.num_blocks_fetched,
            format_bytes(shard.num_bytes_fetched),
            shard.num_updates_applied,
            shard.num_updates_refused,
            format_bytes(shard.num_bytes_pushed),
            format_bytes(shard.resident_bytes),
            format_bytes(shard.journal_bytes),
            f"{shard.unshipped_s:.1f}",
            shard.num_restarts,
        )
        for shard in stats.shards
    ]
    return table(columns, rows)
