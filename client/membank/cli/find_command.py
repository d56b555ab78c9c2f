"""The command that says which blocks hold some texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer
from rich.markup import escape

from membank.cli.connection import (
    DEFAULT_ENDPOINT,
    BankOption,
    CaOption,
    TokenOption,
    connect,
)
from membank.cli.extras import needs_extra
from membank.cli.output import JsonOption, console, emit, err_console, format_share, table
from membank.cli.query import coloured_state
from membank.client import BankClient
from membank.client.retriever import Retriever
from membank.wire.errors import InvalidArgumentError
from membank.wire.spec import BlockRef, BlockState

if TYPE_CHECKING:
    # Only for the annotation: a client-only install lacks the trainer's packages.
    from membank.trainer.finding import NamedDocument
    from membank.trainer.finding.finder import Found

_Item = TypeVar("_Item")


def register(app: typer.Typer) -> None:
    """Add this module's command to `app`."""
    app.command("find")(find)


def find(
    text: Annotated[str | None, typer.Argument(help="A text, or a question.")] = None,
    documents: Annotated[
        Path | None,
        typer.Option(help='JSON lines: {"text": ...}, or with --run also {"id": ...}.'),
    ] = None,
    run: Annotated[
        Path | None,
        typer.Option(
            help="Directory of the bank's run; measures what each block does for the texts."
        ),
    ] = None,
    top: Annotated[int, typer.Option(min=0, help="Blocks to print; 0 = all.")] = 20,
    bank: BankOption = DEFAULT_ENDPOINT,
    token_file: TokenOption = None,
    ca_file: CaOption = None,
    as_json: JsonOption = False,
) -> None:
    """Say which blocks hold a text, or a file of documents.

    Without --run: how many of them the retriever sends to each block. With --run also how many of
    them each block was trained on, and its influence: by how many nats per token they are harder to
    predict without that block. Nothing is changed in the bank.

    Examples: ``membank find "The atomic number of hafnium is 72."``, and
    ``membank find --documents takedown.jsonl --run runs/demo``.
    """
    from membank.trainer.finding import NamedDocument, read_documents

    if (text is None) == (documents is None):
        raise InvalidArgumentError("give either a text or --documents FILE")
    if text is not None and not text.strip():
        raise InvalidArgumentError("the text is empty")
    if documents is not None:
        asked = read_documents(documents)
    else:
        asked = (NamedDocument(line=0, text=text or ""),)
    if run is None:
        _find_routes(asked, top, bank, token_file, ca_file, as_json=as_json)
    else:
        _find_influence(asked, run, top, bank, token_file, ca_file, as_json=as_json)


def _find_routes(
    asked: Sequence[NamedDocument],
    top: int,
    bank: str,
    token_file: Path | None,
    ca_file: Path | None,
    *,
    as_json: bool,
) -> None:
    from membank.trainer.finding import count_routes

    unnamed = next((document for document in asked if not document.text), None)
    if unnamed is not None:
        raise InvalidArgumentError(
            f"{unnamed.named} has no text; with --run RUN it is looked up in the run's corpus"
        )
    with connect(bank, token_file, ca_file) as client:
        routing = count_routes(_retriever(client), [d.embed_text or d.text for d in asked])
        revision = client.info().revision
        blocks = _described(client, [block.ref for block in routing.blocks])

    def render() -> None:
        console.print(
            f"{len(asked)} documents, {routing.num_unrouted} of them routed nowhere; "
            f"revision {revision}"
        )
        rows = [
            (*_block_cells(block.ref, blocks), block.num_documents, format_share(block.share))
            for block in _first(routing.blocks, top)
        ]
        console.print(table(("block", "label", "state", "version>", "routed>", "share>"), rows))
        _say_rest(len(routing.blocks) - len(rows))

    counts = routing.to_json()
    counts["blocks"] = [
        {**blocks[block.ref], "documents_routed": block.num_documents, "share": block.share}
        for block in routing.blocks
    ]
    emit({"revision": revision, **counts}, as_json=as_json, render=render)


def _find_influence(
    asked: Sequence[NamedDocument],
    run: Path,
    top: int,
    bank: str,
    token_file: Path | None,
    ca_file: Path | None,
    *,
    as_json: bool,
) -> None:
    with needs_extra("trainer"):
        from membank.trainer.finding.finder import Finder
        from membank.trainer.run import RunDirectory
    finder = Finder(RunDirectory(run))
    with connect(bank, token_file, ca_file) as client:
        found = finder.find(client, asked)
        labels = client.tree().labels
    for unknown in found.unknown:
        err_console.print(f"[yellow]not found[/]: {escape(unknown)}")
    shown = {block.ref for block in found.influence.blocks}
    shown |= {block.ref for block in found.routing.blocks}
    named = {str(ref): label for ref, label in labels.items() if ref in shown}
    payload = {**found.to_json(), "labels": named}
    emit(payload, as_json=as_json, render=lambda: _render(found, labels, top))


def _render(found: Found, labels: Mapping[BlockRef, str], top: int) -> None:
    influence = found.influence
    console.print(
        f"{found.num_documents} documents, {influence.num_tokens} tokens scored; nats per token: "
        f"anchor alone {_nats(influence.anchor_nats_per_token)}, with its blocks "
        f"{_nats(influence.memory_nats_per_token)}; revision {found.revision}"
    )
    routed = {block.ref: block.num_documents for block in found.routing.blocks}
    trained = dict(found.trained)
    rows = [
        (
            block.ref,
            labels.get(block.ref, ""),
            coloured_state(block.state),
            block.version,
            routed.get(block.ref, 0),
            trained.get(block.ref, 0),
            block.num_tokens,
            _nats(block.nats_per_token),
        )
        for block in _first(influence.blocks, top)
    ]
    columns = (
        "block", "label", "state", "version>", "routed>", "trained>", "tokens>", "influence>",
    )  # fmt: skip
    console.print(table(columns, rows))
    _say_rest(len(influence.blocks) - len(rows))


def _retriever(client: BankClient) -> Retriever:
    tree = client.tree()
    if tree.embedder.get("kind", "lsa") == "lsa":
        return client.retriever()
    with needs_extra("trainer"):
        from membank.trainer.tree import embedder_from_config
    return Retriever.from_tree(tree, embedder=embedder_from_config(tree))


def _described(client: BankClient, refs: Sequence[BlockRef]) -> dict[BlockRef, dict[str, object]]:
    found = client.describe(refs) if refs else ()
    return {
        block.topic.ref: {
            "block": str(block.topic.ref),
            "label": block.topic.label,
            "state": block.topic.state.name.lower(),
            "version": block.topic.version,
        }
        for block in found
    }


def _block_cells(
    ref: BlockRef, blocks: Mapping[BlockRef, Mapping[str, object]]
) -> tuple[object, ...]:
    block = blocks[ref]
    return (
        ref,
        block["label"],
        coloured_state(BlockState[str(block["state"]).upper()]),
        block["version"],
    )


def _first(items: Sequence[_Item], top: int) -> Sequence[_Item]:
    return items[:top] if top else items


def _say_rest(count: int) -> None:
    if count > 0:
        console.print(f"... and {count} more (--top 0 or --json lists them)")


def _nats(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
