"""Named run configurations, each a function that returns a whole `RunConfig`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import TypedDict

from pydantic import TypeAdapter, ValidationError

from membank.trainer.model import AnchorConfig, Recipe, recipes
from membank.trainer.run.config import RunConfig
from membank.trainer.run.directory import RunDirectory
from membank.trainer.training import AnchorStageConfig, MemoryStageConfig
from membank.trainer.tree import TreeConfig
from membank.wire.errors import FailedPreconditionError, InvalidArgumentError, Reason

ASKED = ("atomic_number", "capital")
"""What the demo asks: the paper's own test, and a second topic that must stay untouched."""


def demo() -> RunConfig:
    """Return the demo: about 12 minutes on two cores.

    Notes
    -----
    The control's learning rate is the better of two: at 3e-3 it recalled 4 of 118 elements and 1 of
    218 capitals, at the leaves' 1e-2 it recalled 1 and 2 (docs/log.md).
    """
    return RunConfig(
        name="demo",
        corpus="demo",
        seq_len=64,
        **_shape(recipes.demo()),
        learning_rates=(3e-3, 1e-2),
        generic_learning_rate=3e-3,
        asked_relations=ASKED,
        only_asked_subtrees=True,
        stage1=AnchorStageConfig(num_tokens=2_500_000),
        stage2=MemoryStageConfig(num_tokens=3_000_000),
    )


def fast() -> RunConfig:
    """Return a smaller demo that only shows that everything works; no claim rests on it."""
    base = demo()
    return replace(
        base,
        name="fast",
        corpus="fast",
        **_shape(recipes.fast()),
        stage1=replace(base.stage1, num_tokens=500_000),
        stage2=replace(base.stage2, num_tokens=500_000),
    )


def _shape(recipe: Recipe) -> _Shape:
    assert isinstance(recipe.anchor, AnchorConfig)  # the demos train their own anchor
    return {
        "anchor": recipe.anchor,
        "vocab_size": recipe.anchor.vocab_size,
        "tree": TreeConfig(fan_outs=recipe.memory.fan_outs),
        "block_widths": recipe.memory.block_widths,
    }


class _Shape(TypedDict):
    anchor: AnchorConfig
    vocab_size: int
    tree: TreeConfig
    block_widths: tuple[int, ...]


RUNS: Mapping[str, Callable[[], RunConfig]] = MappingProxyType({"demo": demo, "fast": fast})
"""Every named run configuration."""


def named_run(
    name: str,
    *,
    corpus: str | None = None,
    fan_outs: tuple[int, ...] | None = None,
    reserve: int | None = None,
    embedder: str | None = None,
    bank_name: str | None = None,
    stage1_tokens: int | None = None,
    stage2_tokens: int | None = None,
) -> RunConfig:
    """Return a named configuration, changed where something is given.

    Parameters
    ----------
    name
        One of `RUNS`.
    corpus
        Another corpus; all of its subtrees are trained.
    fan_outs
        Another tree shape. More or fewer levels than the recipe's keep its leaf width for the
        last level and its first width for the others.
    reserve
        Free clusters beside them, per cluster of the level above, for topics to come.
    embedder
        Another embedder.
    bank_name
        Another name of run and bank.
    stage1_tokens, stage2_tokens
        Other lengths of the stages, in tokens.

    Raises
    ------
    InvalidArgumentError
        If there is no such configuration.
    """
    if name not in RUNS:
        raise InvalidArgumentError(
            f"unknown run configuration {name!r}; use one of {', '.join(RUNS)}",
            reason=Reason.BAD_CONFIG,
        )
    config = RUNS[name]()
    if corpus is not None and corpus != config.corpus:
        config = replace(config, corpus=corpus, only_asked_subtrees=False, asked_relations=())
    if fan_outs is not None:
        upper = len(fan_outs) - 1
        config = replace(
            config,
            tree=replace(config.tree, fan_outs=fan_outs),
            block_widths=(config.block_widths[0],) * upper + (config.block_widths[-1],),
            learning_rates=(config.learning_rates[0],) * upper + (config.learning_rates[-1],),
        )
    if reserve is not None:
        config = replace(config, tree=replace(config.tree, reserve=reserve))
    if stage1_tokens is not None:
        config = replace(config, stage1=replace(config.stage1, num_tokens=stage1_tokens))
    if stage2_tokens is not None:
        config = replace(config, stage2=replace(config.stage2, num_tokens=stage2_tokens))
    return replace(config, name=bank_name or config.name, embedder=embedder or config.embedder)


def load_config(run: RunDirectory) -> RunConfig:
    """Read the configuration that a run was prepared with.

    Raises
    ------
    NotFoundError
        If the run was not prepared.
    FailedPreconditionError
        If it was written by another version whose fields differ.
    """
    saved = run.read_json(run.config_file)
    try:
        return TypeAdapter(RunConfig).validate_python(saved)
    except ValidationError as err:
        raise FailedPreconditionError(
            f"{run.config_file} does not fit this version of membank ({err.error_count()} fields); "
            "prepare the run again in another directory",
            reason=Reason.BAD_CONFIG,
        ) from err
