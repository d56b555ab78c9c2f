"""Commands that read a served bank: topics, show, route."""

from __future__ import annotations

import time
from typing import Annotated

import typer
from rich.markup import escape
from rich.text import Text

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
from membank.wire.records import Topic
from membank.wire.spec import BlockState


def register(app: typer.Typer) -> None:
    """Add this module's commands to `app`."""
    app.command("topics")(topics)
    app.command("show")(show)
    app.command("route")(route)


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
        console.print(f"[bold]{block.topic.ref}[/] {escape(block.topic.label or '(no label)')}")
        steps = " > ".join(f"{b.topic.ref} {b.topic.label}" for b in blocks)
        console.print(f"path      {steps}", markup=False)
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
            steps = (f"{ref} {labels.get(ref, '')}".rstrip() for ref in path)
            console.print(" > ".join(steps), markup=False)
        console.print(f"[dim]{route_ms:.1f} ms, the retriever's first use included[/]")

    payload = {
        "paths": [[{"topic": str(ref), "label": labels.get(ref, "")} for ref in p] for p in paths],
        "route_ms": route_ms,
    }
    emit(payload, as_json=as_json, render=render)


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


def coloured_state(state: BlockState) -> Text:
    """Return a state in words, as a table shows it."""
    colour = {BlockState.ACTIVE: "green", BlockState.WITHHELD: "yellow", BlockState.DELETED: "red"}
    return Text(state.name.lower(), colour[state])


def _topic_row(topic: Topic) -> tuple[object, ...]:
    indent = "  " * (topic.ref.level - 1)
    return (
        f"{indent}{topic.ref}",
        topic.label,
        coloured_state(topic.state),
        topic.version,
        topic.step,
        topic.num_documents,
        format_bytes(topic.num_bytes),
    )
