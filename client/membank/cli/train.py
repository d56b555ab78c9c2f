"""Commands that train a served bank, measure what it knows, and ask it."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from membank.cli.build import DEFAULT_RUN, RunOption
from membank.cli.connection import (
    DEFAULT_ENDPOINT,
    BankOption,
    CaOption,
    TokenOption,
    client_config,
    connect,
)
from membank.cli.extras import needs_extra
from membank.cli.output import JsonOption, console, emit, err_console, format_share, table
from membank.cli.progress import counted_progress, stage_progress

if TYPE_CHECKING:
    # Only for the annotation: importing the trainer takes seconds.
    from membank.trainer.evaluation import PerplexityReport


def register(app: typer.Typer) -> None:
    """Add this module's commands to `app`."""
    app.command("train")(train)
    app.command("ask")(ask)


def train(
    run: RunOption = DEFAULT_RUN,
    stage: Annotated[
        str, typer.Option(help="anchor (stage 1), memories (stage 2), control, or all.")
    ] = "all",
    workers: Annotated[int, typer.Option(min=1, help="Ray workers of stage 2.")] = 2,
    ray_address: Annotated[
        str | None, typer.Option(help="Ray for the workers, auto or HOST:PORT; default: local.")
    ] = None,
    bank: BankOption = DEFAULT_ENDPOINT,
    token_file: TokenOption = None,
    ca_file: CaOption = None,
    as_json: JsonOption = False,
) -> None:
    """Train a prepared run: the anchor here, then the memories of the served bank, then the control.

    Interrupt it whenever you like; the same command goes on where it stopped.

    Examples: ``membank train --run runs/mine --stage anchor``, and once the bank is served,
    ``membank train --run runs/mine --stage memories --bank localhost:7600``.
    """
    stages = _stages(stage)
    with needs_extra("trainer"):
        from membank.trainer.run import RunDirectory, load_config
        from membank.trainer.run.stages import run_generic, run_stage1, run_stage2
    directory = RunDirectory(run)
    config = load_config(directory)
    results: dict[str, object] = {}
    if "anchor" in stages and directory.anchor_file.is_file():
        err_console.print(f"stage 1: {directory.anchor_file} is trained already")
    elif "anchor" in stages:
        with stage_progress("stage 1: anchor") as on_progress:
            results["anchor"] = run_stage1(directory, config, on_progress=on_progress).to_json()
    if "memories" in stages:
        with connect(bank, token_file, ca_file) as client:
            directory.check_fingerprint(client.info().spec.fingerprint)
        with stage_progress("stage 2: memories") as on_progress:
            report = run_stage2(
                directory,
                config,
                endpoint=bank,
                ray_address=ray_address,
                num_workers=workers,
                client=client_config(token_file, ca_file),
                on_progress=on_progress,
            )
        results["memories"] = report.to_json()
    if "control" in stages:
        with stage_progress("control: generic memory") as on_progress:
            results["control"] = run_generic(directory, config, on_progress=on_progress).to_json()

    def render() -> None:
        for name, result in results.items():
            assert isinstance(result, dict)  # made above
            console.print(
                f"{name}: {result['seconds']:.0f} s, {result['tokens_per_s']:.0f} tokens/s"
            )

    emit(results, as_json=as_json, render=render)


def evaluate(
    context: typer.Context,
    run: RunOption = DEFAULT_RUN,
    perplexity: Annotated[bool, typer.Option(help="Also perplexity per topic.")] = False,
    bank: BankOption = DEFAULT_ENDPOINT,
    token_file: TokenOption = None,
    ca_file: CaOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure recall of facts: anchor, generic, fetched, oracle, random and withheld side by side.

    Example: ``membank eval --run runs/mine --bank localhost:7600``.
    """
    if context.invoked_subcommand is not None:
        return
    with needs_extra("trainer"):
        from membank.trainer.run import RunDirectory, load_config
        from membank.trainer.run.stages import Evaluator
    directory = RunDirectory(run)
    config = load_config(directory)
    evaluator = Evaluator(directory, config)
    with connect(bank, token_file, ca_file) as client:
        directory.check_fingerprint(client.info().spec.fingerprint)
        with counted_progress("asking") as on_progress:
            recall = evaluator.recall(client, on_progress=on_progress)
        per_topic = evaluator.perplexity(client) if perplexity else None
    payload = recall.to_json(facts=False)
    if per_topic is not None:
        payload["perplexity"] = per_topic.to_json()

    def render() -> None:
        relations = list(recall.relations.values())
        conditions = list(relations[0].recall) if relations else []
        rows = [
            (r.relation, r.num_facts, *(format_share(r.recall[c]) for c in conditions))
            for r in relations
        ]
        if rows:
            columns = ("relation", "facts>", *(f"{c}>" for c in conditions))
            console.print(table(columns, rows, title="recall by completion"))
        else:
            console.print("the corpus has no facts to ask for; --perplexity measures its texts")
        if per_topic is not None:
            console.print(_perplexity_table(per_topic))

    emit(payload, as_json=as_json, render=render)


def ask(
    prompt: Annotated[str, typer.Argument(help="The text to complete.")],
    run: RunOption = DEFAULT_RUN,
    max_new_tokens: Annotated[int, typer.Option(min=1, max=512)] = 16,
    without_memory: Annotated[
        bool, typer.Option("--without-memory", help="The anchor alone.")
    ] = False,
    snapshot: Annotated[
        str, typer.Option(help="Ask the memories as this snapshot pins them.")
    ] = "",
    bank: BankOption = DEFAULT_ENDPOINT,
    token_file: TokenOption = None,
    ca_file: CaOption = None,
    as_json: JsonOption = False,
) -> None:
    """Complete a prompt with the memory it is routed to; says path, versions and milliseconds.

    Examples: ``membank ask "The atomic number of hafnium is" --run runs/demo``, and the same with
    ``--snapshot before-training``.
    """
    if not prompt:
        raise typer.BadParameter("the prompt is empty")
    with needs_extra("trainer"):
        from membank.trainer.run import RunDirectory
        from membank.trainer.run.answer import Answerer
    answerer = Answerer(RunDirectory(run))
    with connect(bank, token_file, ca_file, snapshot=snapshot) as client:
        answerer.check(client)
        start = time.perf_counter()
        answer = answerer.ask(
            client, prompt, max_new_tokens=max_new_tokens, with_memory=not without_memory
        )
        total_ms = 1e3 * (time.perf_counter() - start)

    def render() -> None:
        console.print(f"{escape(prompt)}[bold]{escape(answer.text)}[/]")
        for block in answer.blocks:
            console.print(f"[dim]  {block.ref} v{block.version} {escape(block.label)}[/]")
        if answer.ended_at is not None:
            console.print(f"[yellow]  the path ends at {answer.ended_at}: withheld or deleted[/]")
        console.print(
            f"[dim]  route {answer.route_ms:.1f} ms, fetch {answer.fetch_ms:.1f} ms, "
            f"wait for layers {answer.waited_ms:.1f} ms, "
            f"all {total_ms:.1f} ms, revision {answer.revision}[/]"
        )

    emit(
        {**answer.to_json(), "prompt": prompt, "total_ms": total_ms}, as_json=as_json, render=render
    )


def _perplexity_table(report: PerplexityReport) -> Table:
    topics = list(report.topics.values())
    conditions = list(topics[0].perplexity) if topics else []
    columns = ("topic", "documents>", *(f"{condition}>" for condition in conditions))
    rows = [
        (t.topic, t.num_documents, *(f"{t.perplexity[c]:.1f}" for c in conditions)) for t in topics
    ]
    return table(columns, rows, title="perplexity")


def _stages(text: str) -> frozenset[str]:
    known = frozenset({"anchor", "memories", "control"})
    if text == "all":
        return known
    if text not in known:
        raise typer.BadParameter(f"{text!r} is no stage; use anchor, memories, control or all")
    return frozenset({text})
