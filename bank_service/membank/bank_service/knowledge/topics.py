"""Topics as people see them: labels from the tree, states and versions from the shards."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from membank.bank_service.knowledge.revisions import RevisionLog
from membank.bank_service.knowledge.shards import ShardGroup
from membank.bank_service.knowledge.trees import TreeStore
from membank.bank_service.shard.contract import BlockStatus
from membank.wire.errors import InvalidArgumentError, Reason
from membank.wire.format import RevisionRecord, TreeDocument
from membank.wire.records import BlockDescription, Topic
from membank.wire.spec import BankSpec, BlockRef

MAX_TOPICS = 65_536
"""Most topics of one listing; an answer is one message."""


class TopicCatalog:
    """Lists and describes topics.

    Parameters
    ----------
    spec
        Spec of the bank.
    shards
        All shards.
    log
        The bank's records.
    trees
        The bank's tree documents.
    """

    def __init__(
        self, spec: BankSpec, shards: ShardGroup, log: RevisionLog, trees: TreeStore
    ) -> None:
        self._spec = spec
        self._shards = shards
        self._log = log
        self._trees = trees

    def list(self, parent: BlockRef | None, *, depth: int) -> tuple[tuple[Topic, ...], int]:
        """Return topics by level, then by cluster, and the revision they were read at.

        Raises
        ------
        InvalidArgumentError
            If there are more than `MAX_TOPICS`.
        """
        refs = list(self._refs(parent, depth))
        record, tree = self._tree()
        statuses = self._shards.describe(refs)
        return tuple(self._topic(tree, statuses[ref]) for ref in refs), record.revision

    def describe(self, refs: Sequence[BlockRef]) -> tuple[BlockDescription, ...]:
        """Return blocks in full, in the order asked."""
        for ref in refs:
            self._spec.check_ref(ref)
        _, tree = self._tree()
        statuses = self._shards.describe(refs)
        return tuple(
            BlockDescription(
                topic=self._topic(tree, statuses[ref]),
                crc32c=statuses[ref].crc32c,
                shape=self._spec.block_shape(ref.level),
                optimizer_bytes=self._spec.optimizer_bytes(ref.level),
                shard_id=self._shards.owner_of(ref).shard_id,
            )
            for ref in refs
        )

    def _tree(self) -> tuple[RevisionRecord, TreeDocument]:
        return self._log.read_in_force(lambda record: self._trees.read(record.tree_revision))

    def _refs(self, parent: BlockRef | None, depth: int) -> Iterable[BlockRef]:
        spec = self._spec
        if parent is not None:
            spec.check_ref(parent)
        first = 1 if parent is None else parent.level
        # Without a parent the root, which is no level, is the top: `depth` levels below it.
        last = depth if parent is None else parent.level + depth
        if depth == 0:
            last = spec.num_levels
        last = min(last, spec.num_levels)
        top = 1 if parent is None else spec.num_clusters(parent.level)
        count = sum(spec.num_clusters(level) // top for level in range(first, last + 1))
        if count > MAX_TOPICS:
            raise InvalidArgumentError(
                f"{count} topics; at most {MAX_TOPICS} are listed at a time: give a parent or a "
                "smaller depth",
                reason=Reason.MESSAGE_TOO_LARGE,
            )
        refs = spec.blocks() if parent is None else spec.subtree(parent)
        return (ref for ref in refs if ref.level <= last)

    def _topic(self, tree: TreeDocument, status: BlockStatus) -> Topic:
        ref = status.ref
        return Topic(
            ref=ref,
            label=tree.labels.get(ref, ""),
            state=status.state,
            version=status.version,
            step=status.step,
            num_bytes=self._spec.weight_bytes(ref.level),
            num_documents=tree.num_documents.get(ref, 0),
            partition=self._spec.partition_of(ref),
        )
