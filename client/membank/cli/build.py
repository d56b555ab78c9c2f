"""Commands that make what a service needs: look at a corpus, fit a tree, create a bank, size one."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from membank.cli.extras import needs_extra
from membank.cli.fsck_command import KeyringOption
from membank.cli.output import (
    JsonOption,
    console,
    emit,
    err_console,
    format_bytes,
    format_count,
    format_share,
    table,
)
from membank.wire.errors import InvalidArgumentError, Reason

RunOption = Annotated[
    Path, typer.Option("--run", help="Directory of the run: tokenizer, tree, anchor, losses.")
]
RecipeOption = Annotated[str, typer.Option(help="Named run configuration: demo or fast.")]
DEFAULT_RUN = Path("runs/run")


def register(app: typer.Typer) -> None:
    """Add this module's commands to `app`."""
    app.command("plan")(plan)
    app.command("corpus")(corpus)
    app.command("tree")(tree)
    app.command("create")(create)


def plan(
    recipe: Annotated[
        str | None, typer.Option(help="Name of a recipe; without one, all are listed.")
    ] = None,
    optimizer: Annotated[
        str, typer.Option(help="Optimizer whose state is counted: sgd, adagrad or adamw.")
    ] = "adamw",
    as_json: JsonOption = False,
) -> None:
    """Print what a recipe costs: anchor, fetch, resident, bank and optimizer, side by side.

    Examples: ``membank plan``, ``membank plan --recipe paper_410m --json``.
    """
    with needs_extra("trainer"):
        from membank.trainer.model import RECIPES
        from membank.trainer.model import plan as make_plan
    if optimizer not in ("sgd", "adagrad", "adamw"):
        raise InvalidArgumentError(
            f"unknown optimizer {optimizer!r}; use sgd, adagrad or adamw", reason=Reason.BAD_CONFIG
        )
    if recipe is not None and recipe not in RECIPES:
        raise InvalidArgumentError(
            f"unknown recipe {recipe!r}; use one of {', '.join(RECIPES)}", reason=Reason.BAD_CONFIG
        )
    names = list(RECIPES) if recipe is None else [recipe]
    plans = [make_plan(RECIPES[name](), optimizer=optimizer) for name in names]  # type: ignore[arg-type]  # checked above

    def render() -> None:
        columns = (
            "recipe", "anchor>", "fetch>", "fetched>", "resident>", "bank>", "stored>",
            "optimizer>", "all parameters>",
        )  # fmt: skip
        rows = [
            (
                p.recipe,
                format_count(p.anchor_params),
                format_count(p.fetch_params),
                format_bytes(p.fetch_bytes),
                format_bytes(p.resident_bytes),
                format_count(p.bank_params),
                format_bytes(p.bank_bytes),
                format_bytes(p.optimizer_bytes),
                format_count(p.total_params),
            )
            for p in plans
        ]
        console.print(table(columns, rows))
        if len(plans) == 1:
            level_columns = ("level>", "width r>", "blocks>", "one block>", "level in all>")
            levels = [
                (v.level, v.block_width, v.num_blocks, format_bytes(v.block_bytes),
                 format_bytes(v.level_bytes))
                for v in plans[0].levels
            ]  # fmt: skip
            console.print(table(level_columns, levels))

    payload = [asdict(p) for p in plans]
    emit(payload if recipe is None else payload[0], as_json=as_json, render=render)


def corpus(
    name: Annotated[
        str, typer.Argument(help="fast, demo, full (carried), or a JSONL file: path or URL.")
    ] = "demo",
    sample: Annotated[int, typer.Option(min=0, help="Documents to print.")] = 3,
    as_json: JsonOption = False,
) -> None:
    """Look at a corpus: documents, bytes, topics, facts. JSONL lines hold text, title, labels.

    Examples: ``membank corpus demo``, ``membank corpus s3://team/texts.jsonl --sample 10``.
    """
    with needs_extra("trainer"):
        from membank.trainer.run import open_corpus
    found = open_corpus(name)
    sources = Counter(document.source for document in found.documents)
    topics = Counter(document.labels[0] for document in found.documents if document.labels)
    relations = Counter(fact.relation for fact in found.facts)
    num_bytes = sum(len(document.text.encode()) for document in found.documents)
    payload = {
        "corpus": name,
        "documents": len(found.documents),
        "bytes": num_bytes,
        "sources": sources,
        "topics": topics,
        "facts": relations,
    }

    def render() -> None:
        console.print(f"{name}: {len(found.documents)} documents, {format_bytes(num_bytes)}")
        for title, counts in (("source", sources), ("topic", topics), ("facts about", relations)):
            if counts:
                console.print(table((title, "count>"), counts.most_common()))
        step = max(1, len(found.documents) // max(1, sample))
        for document in found.documents[: step * sample : step]:
            console.print(f"[dim]{escape(document.doc_id)}[/] {escape(document.text[:200])}")

    emit(payload, as_json=as_json, render=render)


def tree(
    corpus_name: Annotated[
        str | None, typer.Argument(metavar="[CORPUS]", help="Corpus; default: the recipe's.")
    ] = None,
    run: RunOption = DEFAULT_RUN,
    recipe: RecipeOption = "demo",
    fan_out: Annotated[
        str | None, typer.Option(help="Children per cluster and level, such as 16,16.")
    ] = None,
    reserve: Annotated[
        int | None,
        typer.Option(min=0, help="Free clusters beside them, for topics to come (membank grow)."),
    ] = None,
    embedder: Annotated[
        str | None, typer.Option(help="lsa, minilm, or minilm:PATH of a local copy.")
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="Name of the bank; default: the recipe's.")
    ] = None,
    stage1_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens to train the anchor on.")
    ] = None,
    stage2_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens to train the memories on.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Prepare a run: train the tokenizer, fit the topic tree and retriever, pack the sequences.

    Sizes and lengths come from the recipe, where they are not given here.

    Example: ``membank tree texts.jsonl --run runs/mine --fan-out 16,16 --stage2-tokens 500000``.
    """
    with needs_extra("trainer"):
        from membank.trainer.run import RunDirectory, named_run, prepare_run
    config = named_run(
        recipe,
        corpus=corpus_name,
        fan_outs=_fan_outs(fan_out),
        reserve=reserve,
        embedder=embedder,
        bank_name=name,
        stage1_tokens=stage1_tokens,
        stage2_tokens=stage2_tokens,
    )
    directory = RunDirectory(run)
    with err_console.status("preparing") as spinner:
        done = prepare_run(directory, config, notice=lambda what: spinner.update(f"making {what}"))
    document = directory.tree()

    def render() -> None:
        console.print(
            f"{run}: {done.num_documents} documents, {format_count(done.num_tokens)} tokens, "
            f"{format_count(done.num_trained_tokens)} of them trained in stage 2"
        )
        rows = [
            (ref, label, document.num_documents.get(ref, 0))
            for ref, label in sorted(document.labels.items())
            if ref.level == 1
        ]
        console.print(table(("topic", "label", "documents>"), rows))
        routed = [
            (score.relation, score.num_facts, *(format_share(share) for share in score.prompts))
            for score in done.routing
        ]
        if routed:
            levels = tuple(f"level {n + 1}>" for n in range(len(routed[0]) - 2))
            title = "prompts routed to the cluster of their document"
            console.print(table(("relation", "facts>", *levels), routed, title=title))

    emit({"run": str(run), **asdict(done)}, as_json=as_json, render=render)


def create(
    bank: Annotated[str, typer.Option("--bank", help="Where: a directory or URL.")],
    run: RunOption = DEFAULT_RUN,
    keyring: KeyringOption = "",
    as_json: JsonOption = False,
) -> None:
    """Create the bank of a run whose tree is fitted and whose anchor is trained.

    The blocks belong to that anchor: its digest, and the tokenizer's, are kept in the bank.

    With --keyring it is sealed: content is encrypted, each object with a key of its own, which a
    deletion destroys. Every command that opens the bank needs the keyring then.

    Examples: ``membank create --bank ./bank --run runs/mine``,
    ``membank create --bank s3://team/bank --keyring /mnt/keys/bank``.
    """
    with needs_extra("service"):
        from membank.bank_service.store import Bank
    with needs_extra("trainer"):
        from membank.trainer.run import RunDirectory, load_config
    directory = RunDirectory(run)
    config = load_config(directory)
    spec = config.bank_spec(fingerprint=directory.fingerprint())
    created = Bank.create(
        bank, spec, keyring=keyring, tree=directory.tree(), principal="local"
    ).spec
    payload = {"bank": bank, "name": created.name, "bank_id": created.bank_id, "keyring": keyring}

    def render() -> None:
        console.print(
            f"created bank [bold]{created.name}[/] at {bank}: {created.num_blocks} blocks"
            + (f", sealed with the keys in {keyring}" if keyring else "")
        )
        console.print(
            f"next: membank up --bank {bank}" + (f" --keyring {keyring}" if keyring else "")
        )

    emit(payload, as_json=as_json, render=render)


def _fan_outs(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise InvalidArgumentError(
            f"--fan-out is {text!r}; write numbers of at least 1 with commas, such as 16,16",
            reason=Reason.BAD_CONFIG,
        )
    return tuple(int(part) for part in parts)
