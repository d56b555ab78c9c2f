"""How a class of options becomes a command."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

from membank.cli.bench.load_options import (
    FetchOptions,
    LoadOptions,
    MixedOptions,
    PushOptions,
    command,
)


def run(options: type[LoadOptions], *args: str) -> LoadOptions:
    """Return what a command of such options is given."""
    given: list[LoadOptions] = []
    app = typer.Typer()
    app.command()(command(options, given.append))
    result = CliRunner().invoke(app, args, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return given[0]


@pytest.mark.parametrize("options", [FetchOptions, PushOptions, MixedOptions])
def test_without_arguments_a_command_gets_the_defaults(options: type[LoadOptions]) -> None:
    assert run(options) == options()


def test_inherited_and_own_options_are_given() -> None:
    got = run(MixedOptions, "--clients", "1", "--clients", "4", "--push-share", "0.1", "--dtype",
              "int8", "--yes-change-this-bank")  # fmt: skip
    assert got == MixedOptions(clients=[1, 4], push_share=0.1, dtype="int8", yes=True)
    assert got.may_change
    assert not run(FetchOptions, "--scale").may_change


def test_an_option_without_a_default_is_the_programmers_mistake() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Wrong(LoadOptions):
        needed: Annotated[int, typer.Option()]

    with pytest.raises(TypeError, match="needed"):
        command(Wrong, print)
