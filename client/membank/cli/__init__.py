"""The `membank` command: the top layer, imported by nobody."""

from membank.cli.app import main

__all__ = ["main"]
