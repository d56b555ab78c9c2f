"""Journalled updates computed again, block by block, and compared with what was acknowledged.

A shard replays a journal update by update and keeps every block that it touches. Updates of
different blocks do not depend on each other, so here one block after the other is brought from its
slot to its newest version, and no more than that block is in memory.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from membank.bank_service.fsck.journals import updates_since
from membank.bank_service.fsck.report import Finding, FindingKind
from membank.bank_service.fsck.segments import JournalledUpdate, JournalScan
from membank.bank_service.fsck.view import PartitionView
from membank.bank_service.shard.content import (
    INITIAL_ENTRY,
    BlockRecord,
    Content,
    content_crcs,
    initial_content,
    zero_state,
)
from membank.bank_service.store.arrays import SlotArrays
from membank.wire.errors import MembankError
from membank.wire.format import NO_SLOT, Entry
from membank.wire.spec import Array, BlockRef, Role, dtype_of

if TYPE_CHECKING:
    # torch takes seconds to import, and most banks at rest have nothing to compute again.
    from membank.bank_service.shard.update_rule import UpdateRule


Source = tuple[JournalScan, JournalledUpdate]
"""An update, and the journal that holds it."""


def check_replay(view: PartitionView) -> Iterator[Finding]:
    """Compute the updates after the manifest in force again."""
    by_block: dict[BlockRef, list[Source]] = defaultdict(list)
    for source in updates_since(view.manifests, view.journals)[0]:
        by_block[source[1].ref].append(source)
    rule: UpdateRule | None = None
    if any(update.dtype for sources in by_block.values() for _, update in sources):
        try:
            from membank.bank_service.shard.update_rule import UpdateRule
        except ImportError as err:
            journal = next(iter(by_block.values()))[0][0]
            yield _not_checked(journal, f"updates are not computed again: {err.name} is missing")
            return
        rule = UpdateRule(view.spec)
    for ref, sources in sorted(by_block.items()):
        yield from _check_block(view, rule, ref, sources)


def _check_block(
    view: PartitionView, rule: UpdateRule | None, ref: BlockRef, sources: Sequence[Source]
) -> Iterator[Finding]:
    manifest = view.manifests.current
    entry = INITIAL_ENTRY if manifest is None else manifest.entries.get(ref, INITIAL_ENTRY)
    content = _load(view, ref, entry)
    for journal, update in sources:
        if content is None:
            return  # its slot is damaged, which is reported, or it is deleted
        data = _read(journal, update)
        if data is None:
            return  # trimmed meanwhile: its effect is in a slot by now
        after = _apply(view, rule, entry, content, update, data)
        if after is None or _traits(after[0]) != _traits(update.after):
            yield _differs(journal, update)
            return
        entry, content = after
        view.bank.tally.num_replayed += 1


def _apply(
    view: PartitionView,
    rule: UpdateRule | None,
    before: Entry,
    content: Content,
    update: JournalledUpdate,
    data: bytes,
) -> tuple[Entry, Content] | None:
    shape = view.spec.block_shape(update.ref.level)
    if rule is not None and update.dtype:
        gradient = np.frombuffer(data, dtype_of(update.dtype)).reshape(shape)
        return rule.apply(update.ref, before, content, gradient, update.frame.scale)
    arrays: dict[Role, Array] = {}
    offset = 0
    for role in view.spec.roles:
        dtype, count = view.spec.role_dtype(role), view.spec.block_params(update.ref.level)
        arrays[role] = np.frombuffer(data, dtype, count, offset).reshape(shape)
        offset += arrays[role].nbytes
    crcs = content_crcs(view.spec, arrays)
    after = Entry(
        slot=NO_SLOT,
        version=before.version + 1,
        step=before.step + 1,
        updates=before.updates + 1,
        crcs=crcs,
    )
    return after, Content(arrays, crcs[0])


def _traits(entry: Entry) -> tuple[object, ...]:
    return (entry.version, entry.step, entry.updates, entry.crcs)


def _load(view: PartitionView, ref: BlockRef, entry: Entry) -> Content | None:
    record = BlockRecord(entry)
    if record.is_initial:
        content = initial_content(view.spec, ref)
        return Content({**content.arrays, **zero_state(view.spec, ref)}, content.weight_crc)
    if not entry.crcs:
        return None
    slots = SlotArrays(view.bank.objects, view.spec, view.number)
    arrays: dict[Role, Array] = {}
    try:
        for role, crc in zip(view.spec.roles, entry.crcs, strict=True):
            arrays[role] = slots.read(ref.level, entry.slot, role, crc)
    except MembankError:
        return None
    return Content(arrays, entry.crcs[0])


def _read(journal: JournalScan, update: JournalledUpdate) -> bytes | None:
    end = update.start + update.num_bytes
    try:
        data = journal.objects.get_range(update.frame.key, update.start, end)
    except MembankError:
        return None
    return data if len(data) == update.num_bytes else None


def _differs(journal: JournalScan, update: JournalledUpdate) -> Finding:
    frame = update.frame
    what = f"update {frame.lsn} (request {frame.request_id}) of block {update.ref}"
    if update.dtype:
        from membank.bank_service.shard.optimizer import kernel_fingerprint

        # Other kernels may round otherwise, and be right.
        if frame.kernel != (here := kernel_fingerprint()):
            problem = (
                f"{what} was computed with {frame.kernel}, and gives another result with {here}"
            )
            return _not_checked(journal, problem)
    return Finding(
        kind=FindingKind.REPLAY_MISMATCH,
        key=journal.name(frame.key),
        offset=frame.offset,
        problem=f"{what} does not give what was acknowledged",
        affects=f"block {update.ref}, and the shard of its partition: it does not start",
        remedy="restore manifest, slot and journal of one moment from a copy",
    )


def _not_checked(journal: JournalScan, problem: str) -> Finding:
    return Finding(
        kind=FindingKind.REPLAY_NOT_CHECKED,
        key=journal.segments[-1].name,
        problem=problem,
        remedy="check the bank where its service runs, with the same torch",
    )
