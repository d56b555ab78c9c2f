"""Who has a bank, as its storage says."""

from __future__ import annotations

import json
from contextlib import suppress

from membank.bank_service.cluster.claim import Claim
from membank.bank_service.store import ObjectStore
from membank.wire.format.layout import CLAIMS, claim_key, numbers_in


def read_claim(objects: ObjectStore) -> Claim | None:
    """Return who claims a bank; None = nobody, or only claims that cannot be read."""
    for number in reversed(numbers_in(objects.list(CLAIMS), claim_key)):
        with suppress(ValueError, TypeError):
            claim = Claim(**json.loads(objects.get(claim_key(number))))
            return None if claim.ended else claim
    return None
