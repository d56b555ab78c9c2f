"""Corpus, topic tree, anchor, memories, training and evaluation."""

__all__: list[str] = []
