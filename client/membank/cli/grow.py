"""Commands that change the tree of a served bank: grow, split, retire; each is one transaction."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

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
from membank.cli.extras import needs_extra
from membank.cli.operate import confirm_deletion, report_json, show_report
from membank.cli.output import JsonOption, console, emit
from membank.client import Transaction

if TYPE_CHECKING:
    # A client-only install lacks the trainer.
    from membank.trainer.run.growth import Growth

ROOT = "root"
"""What commands call the parent of the topics of level 1."""


def register(app: typer.Typer) -> None:
    """Add this module's commands to `app`."""
    app.command("grow")(grow)
    app.command("split")(split)
    app.command("retire")(retire)


def grow(
    parent: Annotated[
        str, typer.Argument(help="The topic to put it under (LEVEL/CLUSTER or label), or root.")
    ],
    label: Annotated[str, typer.Option("--label", help="Label of the new topic.")],
    documents: Annotated[
        str | None,
        typer.Option("--from", help="JSONL file of texts that it is for: path or URL."),
    ] = None,
    dry_run: DryRunOption = False,
    bank: BankOption = DEFAULT_ENDPOINT,
    token_file: TokenOption = None,
    ca_file: CaOption = None,
    as_json: JsonOption = False,
) -> None:
    """Put a topic into a free cluster under another one, with initial content, while serving.

    Its centroid is the mean of its texts; without texts, nothing is routed to it. It adds nothing
    until it is trained. Room comes from ``membank tree --reserve``, or from topics that were deleted.

    Example: ``membank grow 1/3 --label alloys --from alloys.jsonl``.
    """
    with needs_extra("trainer"):
        from membank.trainer.run.directory import open_corpus
        from membank.trainer.run.growth import TreeGrower
    texts = () if documents is None else open_corpus(documents).documents
    with connect(bank, token_file, ca_file) as client:
        above = None if parent == ROOT else resolve_topic(client, parent)
        grown = TreeGrower(client).grow(above, label=label, documents=texts, dry_run=dry_run)
    _show("grow", grown, as_json=as_json)


def split(
    leaf: TopicArgument,
    documents: Annotated[
        str,
        typer.Option("--documents", help="JSONL file of texts, path or URL; its own are taken."),
    ],
    label: Annotated[
        str | None,
        typer.Option("--label", help="Label of the new leaf; default: the old one's, (2)."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the 2-means.")] = 0,
    dry_run: DryRunOption = False,
    bank: BankOption = DEFAULT_ENDPOINT,
    token_file: TokenOption = None,
    ca_file: CaOption = None,
    as_json: JsonOption = False,
) -> None:
    """Split a leaf in two: a new one beside it begins as its copy and takes half of its texts.

    Example: ``membank split 2/17 --documents texts.jsonl``.
    """
    with needs_extra("trainer"):
        from membank.trainer.run.directory import open_corpus
        from membank.trainer.run.growth import TreeGrower
    texts = open_corpus(documents).documents
    with connect(bank, token_file, ca_file) as client:
        grown = TreeGrower(client).split(
            resolve_topic(client, leaf), documents=texts, label=label, seed=seed, dry_run=dry_run
        )
    _show("split", grown, as_json=as_json)


def retire(
    topic: TopicArgument,
    dry_run: DryRunOption = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    bank: BankOption = DEFAULT_ENDPOINT,
    token_file: TokenOption = None,
    ca_file: CaOption = None,
    as_json: JsonOption = False,
) -> None:
    """Delete a topic and take its centroid out of the tree: its texts go to its neighbours.

    After ``membank delete`` they would end above it, as where they know nothing.

    Example: ``membank retire 2/17``.
    """
    with connect(bank, token_file, ca_file) as client:
        ref = resolve_topic(client, topic)
        transaction = Transaction(dry_run=dry_run)
        transaction.delete(ref)
        transaction.place(ref, remove_centroid=True)
        if not (dry_run or yes):
            confirm_deletion(client.apply(transaction.steps, dry_run=True).report)
        report = client.apply(transaction.steps, dry_run=dry_run).report
    show_report("retire", report, as_json=as_json)


def _show(operation: str, grown: Growth, *, as_json: bool) -> None:
    payload = {
        "operation": operation,
        "topic": str(grown.topic),
        **report_json(grown.report),
        "routed": {"" if ref is None else str(ref): n for ref, n in grown.routed.items()},
    }

    def render() -> None:
        show_report(operation, grown.report, as_json=False)
        would = "would be" if grown.report.dry_run else "is"
        console.print(f"the new topic {would} {grown.topic}")
        if grown.routed:
            found = grown.routed.get(grown.topic, 0)
            console.print(f"{found} of {sum(grown.routed.values())} documents go there")

    emit(payload, as_json=as_json, render=render)
