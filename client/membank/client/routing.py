"""What a client knows of a bank beside its blocks, and the paths of texts."""

from __future__ import annotations

import asyncio

from membank.client.admin.calls import GatewayCalls
from membank.client.retriever import Embedder, Retriever, ScoredPath
from membank.client.retrying import call_with_retries
from membank.client.session import Session
from membank.wire.errors import InvalidArgumentError
from membank.wire.format import TreeDocument, decode_tree
from membank.wire.records import BankInfo
from membank.wire.spec import Path


class RoutingCalls(GatewayCalls):
    """The part of `AsyncBankClient` that finds paths.

    Parameters
    ----------
    session
        What the calls share.
    embedder
        Embeds texts for `route`; None = the one that the bank's tree holds (``lsa`` only).
    """

    def __init__(self, session: Session, *, embedder: Embedder | None = None) -> None:
        super().__init__(session)
        self._embedder = embedder
        self._tree: tuple[int, TreeDocument] | None = None
        self._retriever: tuple[TreeDocument, Retriever] | None = None
        self._tree_lock = asyncio.Lock()

    async def info(self, *, timeout_s: float | None = None) -> BankInfo:
        """Ask for spec, revision and placement, and adopt the placement.

        Parameters
        ----------
        timeout_s
            Deadline.

        Raises
        ------
        NotFoundError
            If the service has no bank, or not the configured one.
        FailedPreconditionError
            If another bank is served there now.
        """
        shards = self._session.shards

        async def attempt(timeout_s: float) -> BankInfo:
            return await shards.refresh(timeout_s=timeout_s)

        info = await call_with_retries(
            attempt,
            what="info",
            deadline=self._session.deadline(timeout_s),
            config=self._session.config.retry,
        )
        self._session.note_revision(info.revision)
        return info

    async def tree(self, *, timeout_s: float | None = None) -> TreeDocument:
        """Return topic labels and retriever; kept until the bank says that they changed.

        Parameters
        ----------
        timeout_s
            Deadline.

        Raises
        ------
        NotFoundError
            If the bank has no tree.
        CorruptionError
            If the document was damaged.
        """
        deadline = self._session.deadline(timeout_s)
        async with self._tree_lock:
            known = self._session.shards.known_info
            # Something was changed since we asked; perhaps the tree.
            is_stale = known is None or known.revision < self._session.revision
            if self._tree is None or is_stale or known is None:
                known = await self.info(timeout_s=deadline.remaining_s("tree"))
            if self._tree is None or self._tree[0] != known.tree_revision:
                data = await self._session.ask_gateway(
                    lambda gateway, timeout_s: gateway.get_tree(timeout_s=timeout_s),
                    what="tree",
                    deadline=deadline,
                )
                document = await asyncio.to_thread(decode_tree, data, key=self._session.endpoint)
                self._tree = (known.tree_revision, document)
            return self._tree[1]

    async def retriever(self, *, timeout_s: float | None = None) -> Retriever:
        """Return what routes texts: the tree's retriever, or the tree with the given embedder.

        Parameters
        ----------
        timeout_s
            Deadline.

        Raises
        ------
        FailedPreconditionError
            If the bank has no retriever, or its embedder is not the client's to build.
        """
        tree = await self.tree(timeout_s=timeout_s)
        if self._retriever is None or self._retriever[0] is not tree:
            self._retriever = (tree, Retriever.from_tree(tree, embedder=self._embedder))
        return self._retriever[1]

    async def route(self, text: str, *, beams: int = 1, timeout_s: float | None = None) -> Path:
        """Return the path of a text: one cluster per level, shorter where the tree ends.

        Parameters
        ----------
        text
            The text.
        beams
            Paths to follow at the same time, >= 1; more find a nearer leaf at a higher cost.
        timeout_s
            Deadline.

        Raises
        ------
        FailedPreconditionError
            If the bank has no retriever, or its embedder is not the client's to build.
        """
        if beams == 1:
            return (await self.retriever(timeout_s=timeout_s)).route(text)
        return (await self.route_beam(text, beams, timeout_s=timeout_s))[0].path

    async def route_beam(
        self, text: str, beams: int, *, timeout_s: float | None = None
    ) -> tuple[ScoredPath, ...]:
        """Return up to `beams` paths of a text, nearest first; otherwise as `route`.

        Parameters
        ----------
        text
            The text.
        beams
            Paths to keep at each level, >= 1.
        timeout_s
            Deadline.
        """
        if beams < 1:
            raise InvalidArgumentError(f"beams is {beams}; accepted: >= 1")
        return tuple((await self.retriever(timeout_s=timeout_s)).route_beam(text, beams))
