"""Ways to damage a bank in a directory, and what its check says then."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from membank.bank_service.fsck import FindingKind, FsckReport, check_bank
from membank.bank_service.store import Bank, LocalObjects
from membank.wire.format import Manifest, decode_manifest, encode_manifest
from membank.wire.format.layout import manifest_key
from membank.wire.spec import BlockRef

Found = set[tuple[FindingKind, str]]
"""Kind and key of each finding."""


def check(root: Path, *, deep: bool = True) -> FsckReport:
    """Check the bank in `root`."""
    return check_bank(LocalObjects(root), deep=deep)


def found(root: Path, *, deep: bool = True) -> Found:
    """Return what a check of the bank in `root` finds."""
    return {(finding.kind, finding.key) for finding in check(root, deep=deep).findings}


def flip(path: Path, position: int | None = None) -> None:
    """Flip a bit of a file, in its middle unless told where."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2 if position is None else position] ^= 0x10
    path.write_bytes(data)


def newest(root: Path, partition: int) -> Manifest:
    """Return the newest manifest of a partition."""
    bank = Bank.open(LocalObjects(root))
    return bank.read_manifest(partition, bank.manifest_numbers(partition)[-1])


def named(root: Path, partition: int, revision: int) -> int:
    """Return the manifest that a revision begins with."""
    return Bank.open(LocalObjects(root)).named_manifest(revision, partition)


def rewrite(root: Path, number: int, change: Callable[[Manifest], Manifest]) -> str:
    """Replace manifest `number` of partition 0 by another that is whole in itself."""
    key = manifest_key(0, number)
    manifest = decode_manifest((root / key).read_bytes(), num_roles=3, key=key)
    (root / key).write_bytes(encode_manifest(change(manifest)))
    return key


def slot_of(root: Path, ref: BlockRef, role: str = "weight", partition: int = 0) -> str:
    """Return the key of the slot that the newest manifest names for a block."""
    slot = newest(root, partition).entries[ref].slot
    return f"partitions/{partition:04d}/level-{ref.level}/{role}/c.{slot}.0.0.0.0"
