"""A trace of requests: texts of the carried corpus, in the order in which somebody reads them."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from membank.trainer.corpus import Corpus, Document, load_corpus
from membank.trainer.tree import TreeConfig, build_tree
from membank.wire.spec import Path

T = TypeVar("T")

CORPUS = "fast"
"""The carried corpus that is routed; its tree is fitted in seconds."""
FAN_OUTS = (8, 8, 8)
"""Children of a cluster at each level of its tree."""
WINDOW_WORDS = 32
"""Words of a request at most; longer documents are several requests."""
OPEN_SESSIONS = 8
"""Sessions that take turns where they are interleaved."""


@dataclass(frozen=True, slots=True)
class Trace:
    """Paths that are asked for, session by session."""

    sessions: tuple[tuple[Path, ...], ...]
    """Path of each window of a page, in the order of the text."""

    @property
    def num_requests(self) -> int:
        """Requests of all sessions."""
        return sum(map(len, self.sessions))

    def orders(self, seed: int = 0) -> dict[str, list[Path]]:
        """Return the requests in three orders.

        Returns
        -------
        dict
            ``sequential``: one session after the other. ``interleaved``: some are open at a time
            and take turns, as the users of one service do. ``shuffled``: no order at all.
        """
        sequential = [path for session in self.sessions for path in session]
        order = np.random.Generator(np.random.PCG64(seed)).permutation(len(sequential))
        return {
            "sequential": sequential,
            "interleaved": interleave(self._mixed(seed), OPEN_SESSIONS),
            "shuffled": [sequential[n] for n in order],
        }

    def _mixed(self, seed: int) -> list[tuple[Path, ...]]:
        # Those that are open together come from everywhere, as users do.
        order = np.random.Generator(np.random.PCG64([seed, 1])).permutation(len(self.sessions))
        return [self.sessions[n] for n in order]


def interleave(sessions: Sequence[Sequence[T]], num_open: int) -> list[T]:
    """Return the requests of sessions of which `num_open` take turns; the next begins as one ends."""
    waiting = deque(deque(session) for session in sessions if session)
    is_open: deque[deque[T]] = deque()
    found: list[T] = []
    while waiting or is_open:
        while waiting and len(is_open) < num_open:
            is_open.append(waiting.popleft())
        session = is_open.popleft()
        found.append(session.popleft())
        if session:
            is_open.append(session)
    return found


def windows_of(text: str, num_words: int) -> list[str]:
    """Return a text in pieces of `num_words` words; the last may be shorter."""
    words = text.split()
    return [" ".join(words[n : n + num_words]) for n in range(0, len(words), num_words)]


def sessions_of(documents: Sequence[Document], num_words: int) -> list[list[str]]:
    """Return the windows of each page: of documents that follow each other under one title."""
    sessions: list[list[str]] = []
    last: tuple[str, str] | None = None
    for document in documents:
        page = (document.source, document.title or document.doc_id)
        if page != last:
            sessions.append([])
            last = page
        sessions[-1] += windows_of(document.text, num_words)
    return sessions


def routed_trace(max_windows: int) -> tuple[Trace, Corpus]:
    """Return the trace of the carried corpus, routed by a tree that is fitted to it."""
    corpus = load_corpus(CORPUS)
    retriever = build_tree(corpus, TreeConfig(fan_outs=FAN_OUTS)).retriever
    texts: list[list[str]] = []
    for session in sessions_of(corpus.documents, WINDOW_WORDS):
        if sum(map(len, texts)) + len(session) > max_windows:
            break
        texts.append(session)
    paths = iter(retriever.route_all([text for session in texts for text in session]))
    return Trace(tuple(tuple(next(paths) for _ in session) for session in texts)), corpus


def stays(sessions: Sequence[Sequence[Path]], level: int) -> dict[str, float]:
    """Return how long sessions stay in one cluster of a level.

    Parameters
    ----------
    sessions
        Paths of each session.
    level
        Level, from 1.

    Returns
    -------
    dict
        ``stay_share``: of the steps from one request of a session to its next, those that stay in
        the cluster. ``mean_run``: requests in a row from one cluster within a session, on average.
    """
    clusters = [_clusters(session, level) for session in sessions]
    steps = sum(len(each) - 1 for each in clusters if len(each))
    stayed = sum(int((each[1:] == each[:-1]).sum()) for each in clusters)
    num_requests = sum(map(len, clusters))
    return {
        "stay_share": stayed / steps if steps else float("nan"),
        "mean_run": num_requests / (num_requests - stayed),
    }


def _clusters(paths: Sequence[Path], level: int) -> NDArray[np.int64]:
    # A path that ends above the level is in no cluster of it, and in none that another one is in.
    return np.array(
        [path[level - 1].cluster if len(path) >= level else -1 - n for n, path in enumerate(paths)],
        dtype=np.int64,
    )
