"""Diffs: what of a topic differs from an earlier state, and whether a bank holds that state."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from membank.bank_service.shard.contract import BlockContent, BlockStatus
from membank.wire.crc import crc32c
from membank.wire.errors import ConflictError, Reason
from membank.wire.format import Entry, initial_weight
from membank.wire.format.entries import NO_SLOT
from membank.wire.format.pack import BlockBase, Pack, PackBase
from membank.wire.spec import Array, BankSpec, BlockRef, BlockState

_NAMED = 5
"""Blocks that an error names; it counts the others."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BaseState:
    """An earlier state of a topic."""

    revision: int
    """Revision whose end, or with `snapshot` whose beginning, it is."""
    snapshot: str
    """Name of the snapshot; "" = the end of the revision."""
    entries: Mapping[BlockRef, Entry]
    """What it says of each block of the topic."""


class Difference:
    """Finds out which blocks differ from a base, as they are read.

    Parameters
    ----------
    spec
        Spec of the bank.
    base
        The state to compare with.
    weights_only
        True where optimizer state and steps do not count.
    """

    def __init__(self, spec: BankSpec, base: BaseState, *, weights_only: bool) -> None:
        self._spec = spec
        self._base = base
        self._weights_only = weights_only
        self._unchanged: dict[BlockRef, BlockBase] = {}

    def may_differ(self, status: BlockStatus) -> bool:
        """Say whether a block must be read; one that need not be is noted as unchanged."""
        entry = self._base.entries[status.ref]
        # A version is given once, so an equal one means that nothing has changed since.
        if entry.state is BlockState.DELETED or entry.version != status.version:
            return True
        self._note(status.ref, status.version, held_crc(self._spec, status))
        return False

    def differs(self, content: BlockContent) -> bool:
        """Say whether a block that was read differs; one that does not is noted as unchanged."""
        entry = self._base.entries[content.ref]
        if entry.state is BlockState.DELETED or not self._is_equal(content, entry):
            return True
        self._note(content.ref, content.version, crc32c(content.weight))
        return False

    def base_of(self, ref: BlockRef) -> BlockBase | None:
        """Return what a block held at the base; None = it was deleted."""
        entry = self._base.entries[ref]
        if entry.state is BlockState.DELETED:
            return None
        return BlockBase(version=entry.version, crc32c=self._crc(ref, entry))

    def described(self) -> PackBase:
        """Return what the pack is to say of its base, once all blocks were looked at."""
        return PackBase(
            revision=self._base.revision,
            snapshot=self._base.snapshot,
            unchanged=dict(sorted(self._unchanged.items())),
        )

    def _note(self, ref: BlockRef, version: int, crc: int) -> None:
        self._unchanged[ref] = BlockBase(version=version, crc32c=crc)

    def _crc(self, ref: BlockRef, entry: Entry) -> int:
        if entry.slot == NO_SLOT:
            return crc32c(initial_weight(self._spec, ref))
        return entry.crcs[0]

    def _is_equal(self, content: BlockContent, entry: Entry) -> bool:
        if crc32c(content.weight) != self._crc(content.ref, entry):
            return False
        if self._weights_only:
            return True
        states = [content.optimizer_state[role] for role in self._spec.optimizer.state_roles]
        if entry.slot == NO_SLOT:
            return content.step == 0 and not any(map(np.any, states))
        return content.step == entry.step and tuple(map(_crc_of, states)) == tuple(entry.crcs[1:])


def check_base(
    pack: Pack, spec: BankSpec, statuses: Mapping[BlockRef, BlockStatus]
) -> dict[BlockRef, int]:
    """Raise unless a bank holds what a diff was made against, or what it leads to.

    A block that the diff does not carry must have the content that it had, and one that it carries
    that of the base, or the new one already. Contents are compared by the CRC-32C of weights.

    Parameters
    ----------
    pack
        The diff, under the topic that it is to be installed under.
    spec
        Spec of the bank.
    statuses
        What the bank holds of the pack's blocks, carried or not.

    Returns
    -------
    dict
        Version that each block that is carried must still have when it is replaced.

    Raises
    ------
    ConflictError
        If the bank holds something else (BASE_MISMATCH).
    """
    assert pack.base is not None
    held = {
        ref: None if status.state is BlockState.DELETED else held_crc(spec, status)
        for ref, status in statuses.items()
    }
    wrong = [ref for ref, base in pack.base.unchanged.items() if held[ref] != base.crc32c]
    for block in pack.blocks:
        before = None if block.base is None else block.base.crc32c
        if held[block.ref] not in {before, crc32c(np.ascontiguousarray(block.weight))}:
            wrong.append(block.ref)
    if wrong:
        raise _mismatch(pack, spec, sorted(wrong))
    return {block.ref: statuses[block.ref].version for block in pack.blocks}


def held_crc(spec: BankSpec, status: BlockStatus) -> int:
    """Return the CRC-32C of the weight of a block that is not deleted."""
    # The status of one without stored content has 0.
    return status.crc32c or crc32c(initial_weight(spec, status.ref))


def _crc_of(array: Array) -> int:
    return crc32c(np.ascontiguousarray(array))


def _mismatch(pack: Pack, spec: BankSpec, wrong: list[BlockRef]) -> ConflictError:
    base = pack.base
    assert base is not None
    state = f"snapshot {base.snapshot!r}" if base.snapshot else f"revision {base.revision}"
    named = ", ".join(map(str, wrong[:_NAMED])) + (" ..." if len(wrong) > _NAMED else "")
    return ConflictError(
        f"the pack is a diff against {state} of bank {pack.spec.name}, and {len(wrong)} of the topic's "
        f"blocks in bank {spec.name} hold neither that nor what it leads to: {named}; import the full "
        "pack, or force it (--force) to replace the blocks that it carries whatever they hold",
        reason=Reason.BASE_MISMATCH,
        metadata={"base": state, "blocks": ",".join(map(str, wrong[:_NAMED]))},
    )
