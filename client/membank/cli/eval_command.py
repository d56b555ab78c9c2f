"""`membank eval`: recall of a served bank by itself; studies of knowledge operations under it."""

from __future__ import annotations

import typer

from membank.cli import eval_edit, eval_removal
from membank.cli.train import evaluate


def register(app: typer.Typer) -> None:
    """Add this module's commands to `app`."""
    group = typer.Typer(invoke_without_command=True)
    group.callback()(evaluate)
    eval_edit.register(group)
    eval_removal.register(group)
    app.add_typer(group, name="eval")
