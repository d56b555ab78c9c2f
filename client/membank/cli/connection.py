"""How commands reach a served bank, and how they name a topic."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from membank.client import BankClient, ClientConfig, TlsConfig
from membank.wire.errors import NotFoundError, Reason, UnavailableError
from membank.wire.records import Topic
from membank.wire.spec import BlockRef

if TYPE_CHECKING:
    # Only for the annotation: a client-only install lacks the service.
    from membank.bank_service.cluster import Endpoint

DEFAULT_ENDPOINT = "localhost:7600"

_LOOPBACK = ("localhost", "127.0.0.1")

BankOption = Annotated[
    str,
    typer.Option(
        "--bank",
        envvar="MEMBANK_BANK",
        help="Endpoint of the service, HOST:PORT (any shard or the gateway).",
    ),
]
TokenOption = Annotated[
    Path | None,
    typer.Option(envvar="MEMBANK_TOKEN_FILE", help="File that holds the bearer token."),
]
CaOption = Annotated[
    Path | None,
    typer.Option(
        envvar="MEMBANK_CA_FILE", help="Root certificate (PEM) of the service; turns TLS on."
    ),
]
TopicArgument = Annotated[
    str, typer.Argument(help="A topic: LEVEL/CLUSTER such as 1/3, or (part of) its label.")
]
DryRunOption = Annotated[
    bool, typer.Option("--dry-run", help="Only say what would change; change nothing.")
]


def client_config(
    token_file: Path | None = None, ca_file: Path | None = None, *, snapshot: str = ""
) -> ClientConfig:
    """Return the client's configuration that the command line asks for."""
    tls = TlsConfig(root_certificates=ca_file) if ca_file is not None else None
    return ClientConfig(tls=tls, token_file=token_file, snapshot=snapshot)


def connect(
    endpoint: str,
    token_file: Path | None = None,
    ca_file: Path | None = None,
    *,
    snapshot: str = "",
) -> BankClient:
    """Connect to a service with what the command line says; fetches read `snapshot`, if given.

    Raises
    ------
    UnavailableError
        If nothing answers. On this machine that is said at once, unless the service was started
        here and may be coming back.
    """
    host, _, port = endpoint.rpartition(":")
    if host in _LOOPBACK and port.isdecimal() and _is_refused(host, int(port)):
        running = [service.address for service in _running_here()]
        if not any(address.rpartition(":")[2] == port for address in running):
            others = f"; running here: {', '.join(running)}" if running else ""
            raise UnavailableError(
                f"no service answers at {endpoint}; start one with `membank up`, "
                f"or name it with --bank HOST:PORT{others}",
                reason=Reason.CONNECT_FAILED,
                metadata={"endpoint": endpoint},
            )
    config = client_config(token_file, ca_file, snapshot=snapshot)
    return BankClient.connect(endpoint, config=config)


def _is_refused(host: str, port: int) -> bool:
    try:
        with socket.create_connection((host, port), timeout=1.0):
            return False
    except ConnectionRefusedError:
        return True
    except (OSError, OverflowError):
        return False  # the client has the words for it


def _running_here() -> tuple[Endpoint, ...]:
    try:
        from membank.bank_service.cluster import list_running
    except ImportError:
        return ()
    return list_running()


def resolve_topic(bank: BankClient, text: str) -> BlockRef:
    """Return the topic that `text` names.

    Parameters
    ----------
    bank
        The bank.
    text
        ``LEVEL/CLUSTER``, a label, or a part of exactly one label.

    Returns
    -------
    BlockRef
        The topic.

    Raises
    ------
    NotFoundError
        If no label, or more than one, fits.
    """
    if text.replace("/", "").isdigit() and "/" in text:
        return BlockRef.parse(text)
    wanted = text.casefold().strip()
    topics = [topic for topic in bank.topics() if topic.label]
    exact = [topic for topic in topics if topic.label.casefold() == wanted]
    found = exact or [topic for topic in topics if wanted in topic.label.casefold()]
    if len(found) == 1:
        return found[0].ref
    if not found:
        raise NotFoundError(
            f"no topic is called {text!r}; `membank topics` lists them",
            reason=Reason.UNKNOWN_TOPIC,
            metadata={"topic": text},
        )
    raise NotFoundError(
        f"{text!r} fits {len(found)} topics: {_name_some(found)}; say which, as LEVEL/CLUSTER",
        reason=Reason.UNKNOWN_TOPIC,
        metadata={"topic": text},
    )


def _name_some(topics: list[Topic], limit: int = 6) -> str:
    names = [f"{topic.ref} ({topic.label})" for topic in topics[:limit]]
    return ", ".join(names) + (" ..." if len(topics) > limit else "")
