"""What the manifests of a partition say when its owner starts."""

from __future__ import annotations

from dataclasses import dataclass

from membank.wire.format import Manifest


@dataclass(frozen=True, slots=True)
class LoadedManifests:
    """What a partition's storage says when its owner starts."""

    current: Manifest | None
    """The newest manifest that counts; None = nothing was ever changed."""
    undecided: Manifest | None
    """A prepared manifest whose revision nobody has decided."""
    last_published: Manifest | None
    """Of those that count, the one with the greatest number: by the last owner. It is another than
    `current` where that owner came between the preparation of `current` and its commit."""
    bases: frozenset[str]
    """Nonces of what an owner may have started from that published nothing."""


def bases_of(before: Manifest | None, last: Manifest | None) -> frozenset[str]:
    """Return what an owner may have started from that died before it published.

    While `last` was undecided that was the manifest before it, which its owner wrote as well.
    """
    found = {"" if last is None else last.nonce}
    if last is not None and last.prepared and before is not None and before.owner == last.owner:
        found.add(before.nonce)
    return frozenset(found)
