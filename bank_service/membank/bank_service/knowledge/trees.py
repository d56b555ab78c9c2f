"""Tree documents of a bank: one is in force, and no other is kept.

Older documents would tell the labels and centroids of deleted topics, so a transaction that writes
a new document destroys the others once it is committed.
"""

from __future__ import annotations

from membank.bank_service.store import Bank
from membank.wire.errors import NotFoundError, Reason
from membank.wire.format import TreeDocument
from membank.wire.format.layout import TREES, number_in, tree_key


class TreeStore:
    """The tree documents of one bank.

    Parameters
    ----------
    bank
        The bank.
    """

    def __init__(self, bank: Bank) -> None:
        self._bank = bank

    def read_bytes(self, revision: int) -> bytes:
        """Return the document written at `revision`.

        Raises
        ------
        NotFoundError
            If the bank has no tree (NO_TREE).
        """
        try:
            return self._bank.objects.get(tree_key(revision))
        except NotFoundError as err:
            raise NotFoundError(
                "the bank has no tree: it was created without labels and retriever",
                reason=Reason.NO_TREE,
            ) from err

    def read(self, revision: int) -> TreeDocument:
        """Return the document written at `revision`, an empty one where the bank has no tree."""
        return self._bank.read_tree(revision) or TreeDocument()

    def write(self, revision: int, tree: TreeDocument) -> None:
        """Write the document that comes into force with `revision`."""
        # Replaces what a transaction of the same number may have left that was never committed.
        self._bank.write_tree(revision, tree)

    def destroy_others(self, revision: int) -> None:
        """Destroy every document but that of `revision`."""
        for key in self._bank.objects.list(TREES):
            if number_in(key, tree_key) not in {None, revision}:
                self._bank.objects.delete(key)
