"""Commands that read a served bank: topics, show, route, status of blocks, history."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Annotated

import typer

from membank.cli.connection import (
    DEFAULT_ENDPOINT,
    BankOption,
    CaOption,
    TokenOption,
    TopicArgument,
    connect,
    resolve_topic,
)
from membank.cli.output import JsonOption, console, emit, format_bytes, table
from membank.wire.records import AuditRecord, Topic
from membank.wire.spec import BlockState


def register(app: typer.Typer) -> None:
    """Add this module's commands to `app`."""
    app.command("topics")(topics)
    app.command("show")(show)
    app.command("route")(route)
    app.command("audit")(audit)


def topics(
    parent: Annotated[
        str | None, typer.Argument(help="Only this topic and those under it.")
    ] = None,
    depth: Annotated[int, typer.Option(min=0, help="Levels below the start; 0 = all.")] = 0,
    bank: BankOption = DEFAULT_ENDPOINT,
    token_file: TokenOption = None,
    ca_file: CaOption = None,
    as_json: JsonOption = False,
) -> None:
    """List topics with label, state, version and size.

    Examples: ``membank topics``, ``membank topics chemistry --depth 1``.
    """
    with connect(bank, token_file, ca_file) as client:
        start = None if parent is None else resolve_topic(client, parent)
        spec = client.info().spec
        # Each topic stands above what lies under it, as the indentation says.
        found = sorted(
            client.topics(parent=start, depth=depth),
            key=lambda topic: [ref.cluster for ref in spec.path_to(topic.ref)],
        )

    def render() -> None:
        columns = ("topic", "label", "state", "version>", "steps>", "documents>", "bytes>")
        console.print(table(columns, [_topic_row(topic) for topic in found]))

    emit([topic_json(topic) for topic in found], as_json=as_json, render=render)


def show(
    topic: TopicArgument,
    bank: BankOption = DEFAULT_ENDPOINT,
    token_file: TokenOption = None,
    ca_file: CaOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show one topic: its path, its block, what lies under it.

    Example: ``membank show 1/3``.
    """
    with connect(bank, token_file, ca_file) as client:
        ref = resolve_topic(client, topic)
        path = client.info().spec.path_to(ref)
        blocks = client.describe(path)
        under = client.topics(parent=ref, depth=1)[1:]
    block = blocks[-1]
    payload = {
        **topic_json(block.topic),
        "shape": list(block.shape),
        "crc32c": f"{block.crc32c:08x}",
        "optimizer_bytes": block.optimizer_bytes,
        "shard": block.shard_id,
        "path": [topic_json(parent.topic) for parent in blocks],
        "children": [topic_json(child) for child in under],
    }

    def render() -> None:
        console.print(f"[bold]{block.topic.ref}[/] {block.topic.label or '(no label)'}")
        console.print("path      " + " > ".join(f"{b.topic.ref} {b.topic.label}" for b in blocks))
        console.print(f"state     {block.topic.state.name.lower()}, version {block.topic.version}")
        console.print(f"weights   {block.shape}, {format_bytes(block.topic.num_bytes)}")
        console.print(f"optimizer {format_bytes(block.optimizer_bytes)}, {block.topic.step} steps")
        console.print(f"shard     {block.shard_id}, partition {block.topic.partition}")
        if under:
            columns = ("under it", "label", "state", "version>", "steps>", "documents>", "bytes>")
            console.print(table(columns, [_topic_row(child) for child in under]))

    emit(payload, as_json=as_json, render=render)


def route(
    text: Annotated[str, typer.Argument(help="The text to route.")],
    beams: Annotated[int, typer.Option(min=1, help="Paths to return, best first.")] = 1,
    bank: BankOption = DEFAULT_ENDPOINT,
    token_file: TokenOption = None,
    ca_file: CaOption = None,
    as_json: JsonOption = False,
) -> None:
    """Say which topics a text is routed to; one cluster per level.

    Example: ``membank route "The atomic number of hafnium is"``.
    """
    with connect(bank, token_file, ca_file) as client:
        start = time.perf_counter()
        paths = [scored.path for scored in client.route_beam(text, beams)]
        route_ms = 1e3 * (time.perf_counter() - start)
        labels = client.tree().labels

    def render() -> None:
        for path in paths:
            console.print(" > ".join(f"{ref} {labels.get(ref, '')}".rstrip() for ref in path))
        console.print(f"[dim]{route_ms:.1f} ms, the retriever's first use included[/]")

    payload = {
        "paths": [[{"topic": str(ref), "label": labels.get(ref, "")} for ref in p] for p in paths],
        "route_ms": route_ms,
    }
    emit(payload, as_json=as_json, render=render)


def audit(
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
    """List who changed what, newest first.

    Examples: ``membank audit --limit 5``, ``membank audit --retained``.
    """
    with connect(bank, token_file, ca_file) as client:
        records = client.audit(limit=limit, retained_only=retained)

    def render() -> None:
        rows = [
            (
                record.revision,
                time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(record.time_s)),
                record.principal,
                record.operation,
                _audited(record),
            )
            for record in records
        ]
        console.print(table(("revision>", "time (UTC)", "who", "what", "on"), rows))

    emit([asdict(record) for record in records], as_json=as_json, render=render)


def topic_json(topic: Topic) -> dict[str, object]:
    """Return a topic as JSON-able values."""
    return {
        "topic": str(topic.ref),
        "label": topic.label,
        "state": topic.state.name.lower(),
        "version": topic.version,
        "steps": topic.step,
        "documents": topic.num_documents,
        "bytes": topic.num_bytes,
        "partition": topic.partition,
    }


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


def _topic_row(topic: Topic) -> tuple[object, ...]:
    state = topic.state.name.lower()
    indent = "  " * (topic.ref.level - 1)
    colour = {BlockState.ACTIVE: "green", BlockState.WITHHELD: "yellow", BlockState.DELETED: "red"}
    return (
        f"{indent}{topic.ref}",
        topic.label,
        f"[{colour[topic.state]}]{state}[/]",
        topic.version,
        topic.step,
        topic.num_documents,
        format_bytes(topic.num_bytes),
    )
