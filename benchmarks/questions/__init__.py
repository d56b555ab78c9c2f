"""Answers to open questions of the paper, measured: ``python -m benchmarks.questions``.

One module for each question; `docs/questions.md` holds the answers, whose tables `rendering` writes
from the document of a run.
"""
