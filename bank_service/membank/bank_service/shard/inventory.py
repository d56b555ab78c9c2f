"""What a partition holds of blocks that are to be destroyed, while it is still there."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from membank.bank_service.shard.content import BlockRecord
from membank.bank_service.shard.partition_store import PartitionStore
from membank.wire.errors import MembankError
from membank.wire.format.receipt import DestroyedBlock
from membank.wire.spec import BankSpec, BlockRef

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Inventory:
    """What is there of some blocks."""

    blocks: tuple[DestroyedBlock, ...]
    """The blocks."""
    num_manifests: int
    """Stored manifests that name content of any of them."""


def take_inventory(
    store: PartitionStore, spec: BankSpec, records: Mapping[BlockRef, BlockRecord], owner: str
) -> Inventory:
    """Return what is stored of blocks, all of whose content is in slots.

    Parameters
    ----------
    store
        Their partition.
    spec
        Spec of the bank.
    records
        What is known of each block.
    owner
        Owner of the partition.
    """
    held = store.holdings(records, owner)
    return Inventory(
        blocks=tuple(
            DestroyedBlock(
                ref=ref,
                version=record.entry.version,
                num_slots=len(held.slots[ref]),
                sha256=_digests(store, spec, ref, record),
            )
            for ref, record in sorted(records.items())
        ),
        num_manifests=held.num_manifests,
    )


def _digests(
    store: PartitionStore, spec: BankSpec, ref: BlockRef, record: BlockRecord
) -> dict[str, str]:
    if record.is_initial:
        return {}
    try:
        arrays = store.load_content(ref, record, spec.roles).arrays
    except MembankError as err:
        # What is damaged must be possible to delete, all the more.
        _LOG.warning("block %s is deleted without a digest of it: %s", ref, err)
        return {}
    # As bytes: not every element type of a bank can be handed out as a buffer.
    return {
        role.value: hashlib.sha256(
            np.ascontiguousarray(arrays[role]).view(np.uint8).data
        ).hexdigest()
        for role in spec.roles
    }
