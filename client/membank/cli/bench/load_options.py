"""The options of `membank bench fetch`, `push` and `mixed`: each said once, in a class.

Typer reads a command's options off its signature. `command` makes that of a class of options, so
that a command is a function of one argument, and what commands have in common is inherited.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import MISSING, Field, dataclass, fields
from typing import Annotated, Any, TypeVar, get_type_hints

import typer

from membank.cli.bench.options import (
    BaselineOption,
    BenchBankOption,
    ChangeOption,
    ClientsOption,
    CreateOption,
    DtypeOption,
    DurationOption,
    PlotOption,
    PresetOption,
    QuickOption,
    RequestsOption,
    ResultOption,
    ScratchOption,
    SeedOption,
    ShardsOption,
    StrictOption,
    TimeoutOption,
    TouchOption,
    ZipfOption,
)
from membank.cli.bench.presets import preset_spec
from membank.cli.bench.report import Outputs
from membank.cli.bench.workload import Traffic
from membank.cli.connection import CaOption, TokenOption
from membank.wire.errors import InvalidArgumentError, Reason

_DURATION_S = 10.0
_QUICK_REQUESTS = 200
_TOUCH_MB = 512.0
_QUICK_TOUCH_MB = 8.0
_PRESETS = ("4mb",)
_QUICK_PRESETS = ("100kb",)


@dataclass(frozen=True, kw_only=True)
class CommandOptions:
    """What a command takes; fields are named as the options are."""


@dataclass(frozen=True, kw_only=True)
class LoadOptions(CommandOptions):
    """What all three take."""

    preset: PresetOption = None
    bank: BenchBankOption = None
    create: CreateOption = False
    clients: ClientsOption = None
    requests: RequestsOption = None
    duration: DurationOption = None
    zipf: ZipfOption = 1.0
    dtype: DtypeOption = None
    touch_mb: TouchOption = None
    seed: SeedOption = 0
    shards: ShardsOption = 1
    timeout: TimeoutOption = 30.0
    folder: ScratchOption = None
    json_file: ResultOption = None
    plot: PlotOption = None
    baseline: BaselineOption = None
    strict: StrictOption = False
    quick: QuickOption = False
    token_file: TokenOption = None
    ca_file: CaOption = None

    @property
    def may_change(self) -> bool:
        """Whether pushes may change a bank that was not made for it."""
        return False

    @property
    def touch_bytes(self) -> int:
        """Bytes that a run touches at most."""
        default = _QUICK_TOUCH_MB if self.quick else _TOUCH_MB
        return int(1e6 * (default if self.touch_mb is None else self.touch_mb))

    @property
    def preset_names(self) -> tuple[str, ...]:
        """Presets to run, in their order."""
        return tuple(self.preset or (_QUICK_PRESETS if self.quick else _PRESETS))

    def outputs(self) -> Outputs:
        """Return where results go; errors as `Outputs`."""
        return Outputs(json_file=self.json_file, plot=self.plot, baseline=self.baseline)

    def traffic(self, push_share: float) -> Traffic:
        """Return what the clients do.

        Raises
        ------
        InvalidArgumentError
            If an option is out of range.
        """
        requests, duration = self.requests, self.duration
        if requests is None and duration is None:
            requests, duration = (_QUICK_REQUESTS, None) if self.quick else (None, _DURATION_S)
        return Traffic(
            push_share=push_share,
            num_requests=requests,
            duration_s=math.inf if duration is None else duration,
            zipf=self.zipf,
            dtype=self.dtype,
            seed=self.seed,
        )

    def check(self) -> None:
        """Raise `InvalidArgumentError` where options do not go together."""
        for name in self.preset_names:
            preset_spec(name)
        if self.bank is None and (self.create or self.may_change):
            raise InvalidArgumentError(
                "--create and --yes-change-this-bank are about the service at --bank; name one",
                reason=Reason.BAD_CONFIG,
            )
        if self.bank is not None and self.preset and not self.create:
            raise InvalidArgumentError(
                "--preset is for a bank made to be measured; leave it or --bank out, or say --create",
                reason=Reason.BAD_CONFIG,
            )
        if self.bank is not None and len(self.preset_names) > 1:
            raise InvalidArgumentError(
                "a service has one bank; give one --preset with --create", reason=Reason.BAD_CONFIG
            )


@dataclass(frozen=True, kw_only=True)
class FetchOptions(LoadOptions):
    """What `fetch` takes."""

    scale: Annotated[
        bool,
        typer.Option(
            "--scale",
            help="Instead: fetch paths of a bank of 65,536 leaves beside one of 256, in turn.",
        ),
    ] = False


@dataclass(frozen=True, kw_only=True)
class PushOptions(LoadOptions):
    """What `push` takes."""

    yes: ChangeOption = False

    @property
    def may_change(self) -> bool:
        # docstring inherited
        return self.yes


@dataclass(frozen=True, kw_only=True)
class MixedOptions(PushOptions):
    """What `mixed` takes."""

    push_share: Annotated[
        float, typer.Option(min=0.001, max=0.999, help="Share of the calls that are pushes.")
    ] = 0.5


_OptionsT = TypeVar("_OptionsT", bound=CommandOptions)


def command(options: type[_OptionsT], work: Callable[[_OptionsT], None]) -> Callable[..., None]:
    """Return a function that Typer can make a command of.

    Parameters
    ----------
    options
        Class of the options, each field annotated as a parameter of a command would be.
    work
        What the command does, with the options that were given; its docstring is the command's help.
    """
    hints = get_type_hints(options, include_extras=True)

    def run(**given: Any) -> None:  # noqa: ANN401  (whatever the options are)
        work(options(**given))

    run.__doc__ = work.__doc__
    run.__annotations__ = {field.name: hints[field.name] for field in fields(options)}
    run.__signature__ = inspect.Signature(  # type: ignore[attr-defined]  # read by inspect.signature
        [_parameter(field, hints[field.name]) for field in fields(options)]
    )
    return run


def _parameter(field: Field[Any], annotation: object) -> inspect.Parameter:
    if field.default is MISSING:
        raise TypeError(f"option {field.name} has no default")
    return inspect.Parameter(
        field.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=field.default,
        annotation=annotation,
    )
