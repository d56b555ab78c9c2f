"""How a bank comes to be: its first documents, of which the last decides."""

from __future__ import annotations

from collections.abc import Mapping

from membank.bank_service.store.objects import ObjectStore, publish
from membank.wire.errors import AlreadyExistsError, CorruptionError, NotFoundError, Reason
from membank.wire.format.layout import SPEC_KEY, revision_key, tree_key


def publish_first(objects: ObjectStore, documents: Mapping[str, bytes], spec: bytes) -> None:
    """Publish what a bank begins with.

    `bank.json` comes last and decides which of two creations it is that happened: whatever a crash
    leaves before it is no bank and is replaced.
    """
    replaced: dict[str, bytes] = {}
    for key, data in documents.items():
        try:
            publish(objects, key, data)
        except AlreadyExistsError as err:
            if exists(objects, SPEC_KEY):
                raise bank_exists(objects) from err
            replaced[key] = objects.get(key)
            objects.put(key, data, durable=True)
    try:
        publish(objects, SPEC_KEY, spec)
    except AlreadyExistsError as err:
        for key, data in replaced.items():
            # No leftovers, then: they belong to the bank that was made meanwhile.
            objects.put(key, data, durable=True)
        raise bank_exists(objects) from err
    if tree_key(0) not in documents:
        objects.delete(tree_key(0))
    for key, data in documents.items():
        # One that ran at the same time, and lost, may have taken ours for leftovers.
        if objects.get(key) != data:
            objects.put(key, data, durable=True)


def exists(objects: ObjectStore, key: str) -> bool:
    """Say whether there is an object."""
    try:
        objects.get_range(key, 0, 1)
    except NotFoundError:
        return False
    return True


def bank_exists(objects: ObjectStore) -> AlreadyExistsError:
    """Return the error for a place that holds a bank already."""
    return AlreadyExistsError(
        f"{objects.url} holds a bank already; choose another place",
        reason=Reason.BANK_EXISTS,
        metadata={"bank": objects.url},
    )


def no_records(objects: ObjectStore) -> CorruptionError:
    """Return the error for a bank whose records do not begin."""
    return CorruptionError(
        f"{objects.url} has no {revision_key(0)}; restore the bank from a copy",
        reason=Reason.MANIFEST_CORRUPT,
        metadata={"key": revision_key(0)},
    )
