"""Finds the benchmarks, which are not installed."""

import sys
from pathlib import Path

# Last, so that the folders beside them hide nothing that is installed.
sys.path.append(str(Path(__file__).resolve().parents[3]))
