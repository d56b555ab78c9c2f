"""Tree documents: the one in force is there and whole."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from membank.bank_service.fsck.reading import Fault, FaultKind, examine, finding_of
from membank.bank_service.fsck.report import Finding, FindingKind
from membank.bank_service.fsck.view import BankView
from membank.wire.format import decode_tree
from membank.wire.format.layout import TREES, number_in, tree_key


def check_trees(bank: BankView) -> Iterator[Finding]:
    """Check the tree document in force, and report others."""
    chain = bank.chain
    # A record that cannot be read may have brought another tree into force.
    is_certain = bool(chain.links) and not any(n > chain.latest_commit for n in chain.bad)
    in_force = chain.links[chain.latest_commit].tree_revision if chain.latest_commit >= 0 else -1
    for key in bank.objects.list(TREES):
        revision = number_in(key, tree_key)
        if revision is None or revision == in_force:
            continue
        if is_certain:
            yield _superseded(key, revision, in_force)
    if in_force >= 0:
        yield from _check(bank, in_force)


def _check(bank: BankView, revision: int) -> Iterator[Finding]:
    key = tree_key(revision)
    found = examine(bank.objects, key, partial(decode_tree, key=key))
    if not isinstance(found, Fault):
        return
    if found.kind is FaultKind.MISSING and revision == 0:
        return  # a bank may be created without one
    yield finding_of(
        found,
        key,
        missing=FindingKind.TREE_MISSING,
        damaged=FindingKind.TREE_DAMAGED,
        affects="labels of topics, and the retriever; blocks are served",
    )


def _superseded(key: str, revision: int, in_force: int) -> Finding:
    return Finding(
        kind=FindingKind.TREE_SUPERSEDED,
        key=key,
        problem=f"it is of revision {revision}, and the one of {in_force} is in force",
        affects="labels of topics that were deleted since may be in it",
        remedy="nothing; the next start of the service, or `membank gc`, removes it",
    )
