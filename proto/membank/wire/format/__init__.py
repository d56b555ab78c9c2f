"""The read-only half of the bank format (docs/format.md), numpy only.

Shards and anything that opens a bank without a server decode with the same functions.
"""

from membank.wire.format.document import (
    BankDocument,
    decode_bank,
    decode_spec,
    encode_bank,
    encode_spec,
)
from membank.wire.format.entries import NO_SLOT, Entry, EntryTable
from membank.wire.format.initial import initial_weight
from membank.wire.format.layout import FORMAT_VERSION
from membank.wire.format.manifest import Manifest, decode_manifest, encode_manifest
from membank.wire.format.revision import RevisionRecord, decode_revision, encode_revision
from membank.wire.format.slot import decode_slot, encode_slot
from membank.wire.format.snapshot import decode_snapshot, encode_snapshot
from membank.wire.format.tree import TreeDocument, decode_tree, encode_tree

__all__ = [
    "FORMAT_VERSION",
    "NO_SLOT",
    "BankDocument",
    "Entry",
    "EntryTable",
    "Manifest",
    "RevisionRecord",
    "TreeDocument",
    "decode_bank",
    "decode_manifest",
    "decode_revision",
    "decode_slot",
    "decode_snapshot",
    "decode_spec",
    "decode_tree",
    "encode_bank",
    "encode_manifest",
    "encode_revision",
    "encode_slot",
    "encode_snapshot",
    "encode_spec",
    "encode_tree",
    "initial_weight",
]
