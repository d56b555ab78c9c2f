"""Names of the objects of a bank, relative to the bank's URL.

::

    bank.json                                   the spec, written once
    revisions/0000000007.json                   what each committed revision consists of
    trees/0000000003.safetensors                tree documents: retriever and topic labels
    snapshots/NAME.json                         pinned revisions
    packs/NAME.json                             what a pack that is kept here holds
    packs/NAME.pack                             the pack
    receipts/0000000007.json                    signed receipt of what revision 7 deleted
    keys/0123456789abcdef.json                  public key that receipts are signed with
    partitions/0002/manifests/0000000031        block -> (slot, version, CRCs, ...)
    partitions/0002/log/0000000123              a batch of updates that are not in slots yet
    partitions/0002/level-1/weight/zarr.json    a zarr v3 array; one chunk = one slot
    partitions/0002/level-1/weight/c.17.0.0.0.0

Numbers are zero-padded so that listings sort. A journal on the owner's disk lies outside
or, for a bank in a directory, under ``partitions/0002/journal``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from membank.wire.spec import NAME_PATTERN, Role

FORMAT_VERSION = 1
"""Version of the layout; a reader refuses a bank with a greater one."""

SPEC_KEY = "bank.json"
REVISIONS = "revisions"
TREES = "trees"
PARTITIONS = "partitions"
SNAPSHOTS = "snapshots"
PACKS = "packs"
RECEIPTS = "receipts"
KEYS = "keys"
CLAIMS = "claims"
"""Who serves the bank; not part of it."""


def revision_key(revision: int) -> str:
    """Key of the record that commits `revision`."""
    return f"{REVISIONS}/{revision:010d}.json"


def tree_key(revision: int) -> str:
    """Key of the tree document written at `revision`."""
    return f"{TREES}/{revision:010d}.safetensors"


def snapshot_key(name: str) -> str:
    """Key of the snapshot called `name`."""
    return f"{SNAPSHOTS}/{name}.json"


def snapshot_name(key: str) -> str | None:
    """Return the name of the snapshot whose key this is; None = it is a stray (see `number_in`)."""
    name = key.removeprefix(f"{SNAPSHOTS}/").removesuffix(".json")
    return name if snapshot_key(name) == key and "/" not in name else None


def pack_key(name: str) -> str:
    """Key of the pack called `name`."""
    return f"{PACKS}/{name}.pack"


def pack_record_key(name: str) -> str:
    """Key of what is said of the pack called `name`."""
    return f"{PACKS}/{name}.json"


def pack_name(key: str) -> str | None:
    """Return the name of the pack that a key belongs to; None = it is a stray (see `number_in`)."""
    name = key.removeprefix(f"{PACKS}/").rpartition(".")[0]
    is_named = key in {pack_key(name), pack_record_key(name)}
    return name if is_named and NAME_PATTERN.fullmatch(name) else None


def receipt_key(revision: int) -> str:
    """Key of the receipt of what `revision` deleted."""
    return f"{RECEIPTS}/{revision:010d}.json"


def public_key_key(key_id: str) -> str:
    """Key of the public key whose id this is."""
    return f"{KEYS}/{key_id}.json"


def key_id_in(key: str) -> str | None:
    """Return the id of the public key whose key this is; None = it is a stray (see `number_in`)."""
    name = key.removeprefix(f"{KEYS}/").removesuffix(".json")
    return name if public_key_key(name) == key and "/" not in name else None


def claim_key(number: int) -> str:
    """Key of claim `number` of a service on the bank."""
    return f"{CLAIMS}/{number:010d}.json"


def partition_prefix(partition: int) -> str:
    """Prefix of everything that belongs to `partition`."""
    return f"{PARTITIONS}/{partition:04d}"


def manifest_prefix(partition: int) -> str:
    """Prefix of the manifests of `partition`."""
    return f"{partition_prefix(partition)}/manifests"


def manifest_key(partition: int, number: int) -> str:
    """Key of manifest `number` of `partition`."""
    return f"{manifest_prefix(partition)}/{number:010d}"


def log_prefix(partition: int) -> str:
    """Prefix of the journal of `partition`, where it is kept with the bank."""
    return f"{partition_prefix(partition)}/log"


def log_key(partition: int, number: int) -> str:
    """Key of object `number` of the journal of `partition`."""
    return f"{log_prefix(partition)}/{number:010d}"


def array_prefix(partition: int, level: int, role: Role) -> str:
    """Prefix of the zarr array that holds `role` of the blocks of `level`."""
    return f"{partition_prefix(partition)}/level-{level}/{role.value}"


def slot_key(partition: int, level: int, role: Role, slot: int) -> str:
    """Key of the zarr chunk that is `slot`; blocks are 4-dimensional, so arrays have 5."""
    return f"{array_prefix(partition, level, role)}/c.{slot}.0.0.0.0"


def number_of(key: str) -> int:
    """Return the number in the last part of a numbered key; `ValueError` where there is none."""
    return int(key.rsplit("/", 1)[-1].split(".", 1)[0])


def number_in(key: str, key_of: Callable[[int], str]) -> int | None:
    """Return the number for which `key_of` gives `key`.

    None = there is none: a stray, such as somebody's copy of an object, which is no part of the bank.
    """
    try:
        number = number_of(key)
    except ValueError:
        return None
    return number if key_of(number) == key else None


def numbers_in(keys: Iterable[str], key_of: Callable[[int], str]) -> list[int]:
    """Return the numbers in `keys`, ascending, strays left out."""
    numbers = (number_in(key, key_of) for key in keys)
    return sorted(number for number in numbers if number is not None)
