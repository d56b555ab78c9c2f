"""Commands that compute what blocks hold, and that apply files of steps, each as one transaction."""

from __future__ import annotations

from collections.abc import Sequence
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
from membank.cli.operate import confirm_deletion, show_report
from membank.cli.output import JsonOption, err_console
from membank.cli.step_file import add_steps
from membank.client import BankClient, Transaction
from membank.wire.errors import FailedPreconditionError, InvalidArgumentError, Reason
from membank.wire.spec import BlockRef, BlockState
from membank.wire.steps import Delete

OnlyBlockOption = Annotated[
    bool, typer.Option("--only-block", help="Leave what lies under the topic as it is.")
]
ExpectOption = Annotated[
    int | None,
    typer.Option("--expect-version", min=0, help="Refuse unless the one block has this version."),
]


def register(app: typer.Typer) -> None:
    """Add this module's commands to `app`."""
    app.command("copy")(copy)
    app.command("blend")(blend)
    app.command("scale")(scale)
    app.command("zero")(zero)
    app.command("apply")(apply)


def copy(
    source: Annotated[str, typer.Argument(help="The topic to copy.")],
    target: Annotated[str, typer.Argument(help="The topic whose content is replaced.")],
    only_block: OnlyBlockOption = False,
    expect_version: ExpectOption = None,
    dry_run: DryRunOption = False,
    bank: BankOption = DEFAULT_ENDPOINT,
    token_file: TokenOption = None,
    ca_file: CaOption = None,
    as_json: JsonOption = False,
) -> None:
    """Give a topic the content of another one, with everything under it where both are of one level.

    Optimizer states start afresh; blocks of the target that are deleted are created anew.

    Examples: ``membank copy 2/3 2/4``, ``membank copy 1/3 1/5 --dry-run``.
    """
    with connect(bank, token_file, ca_file) as client:
        pairs = _pairs(client, source, target, only_block=only_block)
        pairs = _without_deleted(client, pairs, [source for source, _ in pairs])
        transaction = Transaction(dry_run=dry_run)
        expected = _expected([target for _, target in pairs], expect_version)
        for source_ref, target_ref in pairs:
            transaction.copy(source_ref, target_ref, expected_version=expected)
        _apply(client, "copy", transaction, as_json=as_json)


def blend(
    target: TopicArgument,
    other: Annotated[str, typer.Option("--with", help="The topic to take from.")],
    share: Annotated[
        float, typer.Option("--share", help="Share of the other's content; the rest is its own.")
    ],
    only_block: OnlyBlockOption = False,
    expect_version: ExpectOption = None,
    dry_run: DryRunOption = False,
    bank: BankOption = DEFAULT_ENDPOINT,
    token_file: TokenOption = None,
    ca_file: CaOption = None,
    as_json: JsonOption = False,
) -> None:
    """Mix a share of another topic's content into a topic; optimizer states start afresh.

    Example: ``membank blend 2/4 --with 2/3 --share 0.3``.
    """
    with connect(bank, token_file, ca_file) as client:
        pairs = _pairs(client, other, target, only_block=only_block)
        pairs = _without_deleted(client, pairs, [ref for pair in pairs for ref in pair])
        transaction = Transaction(dry_run=dry_run)
        expected = _expected([target for _, target in pairs], expect_version)
        for other_ref, target_ref in pairs:
            transaction.blend(target_ref, other_ref, share=share, expected_version=expected)
        _apply(client, "blend", transaction, as_json=as_json)


def scale(
    topic: TopicArgument,
    by: Annotated[float, typer.Option("--by", help="The factor.")],
    only_block: OnlyBlockOption = False,
    expect_version: ExpectOption = None,
    dry_run: DryRunOption = False,
    bank: BankOption = DEFAULT_ENDPOINT,
    token_file: TokenOption = None,
    ca_file: CaOption = None,
    as_json: JsonOption = False,
) -> None:
    """Multiply the content of a topic by a factor; optimizer states start afresh.

    Example: ``membank scale 1/3 --by 0.5``.
    """
    with connect(bank, token_file, ca_file) as client:
        refs = _blocks(client, topic, only_block=only_block)
        transaction = Transaction(dry_run=dry_run)
        expected = _expected(refs, expect_version)
        for ref in refs:
            transaction.scale(ref, by, expected_version=expected)
        _apply(client, "scale", transaction, as_json=as_json)


def zero(
    topic: TopicArgument,
    only_block: OnlyBlockOption = False,
    expect_version: ExpectOption = None,
    dry_run: DryRunOption = False,
    bank: BankOption = DEFAULT_ENDPOINT,
    token_file: TokenOption = None,
    ca_file: CaOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make the content of a topic zero: it adds nothing to the anchor, whatever is pushed to it.

    What it held stays in the bank's history, as after any change; ``membank delete`` destroys.

    Example: ``membank zero 2/17 --expect-version 40``.
    """
    with connect(bank, token_file, ca_file) as client:
        refs = _blocks(client, topic, only_block=only_block)
        transaction = Transaction(dry_run=dry_run)
        expected = _expected(refs, expect_version)
        for ref in refs:
            transaction.zero(ref, expected_version=expected)
        _apply(client, "zero", transaction, as_json=as_json)


def apply(
    steps: Annotated[Path, typer.Argument(help="A file with one step a line (JSON).")],
    dry_run: DryRunOption = False,
    yes: Annotated[
        bool, typer.Option("--yes", "-y", help="Do not ask where something is deleted.")
    ] = False,
    bank: BankOption = DEFAULT_ENDPOINT,
    token_file: TokenOption = None,
    ca_file: CaOption = None,
    as_json: JsonOption = False,
) -> None:
    r"""Apply a file of steps as one transaction: all of them take effect, or none does.

    Steps are swap, copy, blend, scale, zero, withhold, restore, delete and place; their fields are in
    docs/transactions.md. Each sees the bank as it was before, so their order says nothing.

    Example: ``membank apply steps.jsonl --dry-run``, where a line is
    ``{"step": "blend", "block": "2/4", "with": "2/3", "share": 0.3}``.
    """
    with connect(bank, token_file, ca_file) as client:
        transaction = Transaction(dry_run=dry_run)
        add_steps(transaction, steps, lambda text: resolve_topic(client, text))
        if not transaction.steps:
            raise InvalidArgumentError(f"{steps} holds no step; write at least one")
        if any(isinstance(step, Delete) for step in transaction.steps) and not (dry_run or yes):
            confirm_deletion(client.apply(transaction.steps, dry_run=True).report)
        _apply(client, "apply", transaction, as_json=as_json)


def _apply(client: BankClient, name: str, transaction: Transaction, *, as_json: bool) -> None:
    applied = client.apply(transaction.steps, dry_run=transaction.dry_run)
    show_report(name, applied.report, as_json=as_json, has_receipt=bool(applied.receipt))


def _pairs(
    client: BankClient, source: str, target: str, *, only_block: bool
) -> list[tuple[BlockRef, BlockRef]]:
    """Return which block goes to which."""
    spec = client.info().spec
    one, other = resolve_topic(client, source), resolve_topic(client, target)
    for ref in (one, other):
        spec.check_ref(ref)
    if only_block:
        return [(one, other)]
    if one.level != other.level:
        raise InvalidArgumentError(
            f"topics {one} and {other} are of different levels; with --only-block their own blocks "
            "are taken, if they have one shape",
            reason=Reason.BAD_SHAPE,
            metadata={"topic": str(one), "other": str(other)},
        )
    return list(zip(spec.subtree(one), spec.subtree(other), strict=True))


def _blocks(client: BankClient, text: str, *, only_block: bool) -> list[BlockRef]:
    topic = resolve_topic(client, text)
    client.info().spec.check_ref(topic)
    refs = [topic] if only_block else list(client.info().spec.subtree(topic))
    return [ref for ref, _ in _without_deleted(client, [(ref, ref) for ref in refs], refs)]


def _without_deleted(
    client: BankClient, pairs: Sequence[tuple[BlockRef, BlockRef]], needed: Sequence[BlockRef]
) -> list[tuple[BlockRef, BlockRef]]:
    """Return the pairs of which no needed block is deleted, and say which are left out."""
    states = {block.topic.ref: block.topic.state for block in client.describe(needed)}
    gone = {ref for ref, state in states.items() if state is BlockState.DELETED}
    left = [pair for pair in pairs if not gone.intersection(pair)]
    if not left:
        raise FailedPreconditionError(
            f"all blocks of topic {pairs[0][0]} are deleted; there is nothing to work on",
            reason=Reason.BLOCK_DELETED,
            metadata={"topic": str(pairs[0][0])},
        )
    if gone:
        names = ", ".join(map(str, sorted(gone)))
        err_console.print(f"[yellow]notice[/]: deleted, and left out: {names}")
    return left


def _expected(refs: Sequence[BlockRef], version: int | None) -> int | None:
    if version is not None and len(refs) > 1:
        raise InvalidArgumentError(
            f"--expect-version is of one block, and this changes {len(refs)}; name a topic with "
            "nothing under it, or give --only-block"
        )
    return version
