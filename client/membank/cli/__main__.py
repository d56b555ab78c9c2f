"""Run the command as ``python -m membank.cli``."""

from membank.cli.app import main

main()
