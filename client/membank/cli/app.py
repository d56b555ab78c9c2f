"""The command line's entry: every command, in the order a user meets them."""

from __future__ import annotations

import importlib
import os

import typer

from membank.cli.exits import run

_COMMAND_MODULES = (
    "demo_command",
    "build",
    "serve",
    "train",
    "eval_command",
    "query",
    "find_command",
    "operate",
    "transact",
    "packs",
    "grow",
    "edit_command",
    "history",
    "audit",
    "fsck_command",
    "bench_command",
)

app = typer.Typer(
    name="membank",
    help="A served, trainable, editable bank of language-model memories.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def register_commands() -> None:
    """Let every command module add its commands to the app.

    The modules import torch, Ray and zarr only inside the commands that need them, so that
    ``membank --help`` is quick and a client-only install has the client's commands.
    """
    for name in _COMMAND_MODULES:
        importlib.import_module(f"membank.cli.{name}").register(app)


def main() -> None:
    """Run the command line and end the process."""
    # Before torch loads OpenMP: threads that wait by spinning take the cores from the shards and
    # workers beside them (5 times the CPU time for stage 1 on two busy cores). Ray's processes
    # inherit it.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    register_commands()
    run(app)
