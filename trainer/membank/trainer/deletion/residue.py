"""What a deletion of documents cannot take back, in words and figures."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from membank.trainer.deletion.config import Scope
from membank.trainer.finding.influence import TextLoss


@dataclass(frozen=True, kw_only=True, slots=True)
class Residue:
    """What stays of documents that were deleted from a bank."""

    before: TextLoss
    """How hard they were to predict before."""
    after: TextLoss | None
    """And afterwards; None for what is not done yet."""
    words: tuple[str, ...]
    """What else still holds something of them, one sentence each."""

    def to_json(self) -> dict[str, object]:
        """Return the fields as JSON-able values."""
        return asdict(self)


def residue_words(
    scope: Scope, *, num_fixed: int, num_repeated: int, num_edits: int = 0
) -> tuple[str, ...]:
    """Say what a deletion does not reach.

    Parameters
    ----------
    scope
        Which blocks are trained anew.
    num_fixed
        Blocks that were trained together with those, and stay.
    num_repeated
        Documents of the corpus with one of the deleted texts that were not named.
    num_edits
        Edits and undos in the run's log that keep what blocks held before them.
    """
    words = [
        "the anchor was trained on the whole corpus in stage 1, these documents included: what it "
        "holds of them is the loss of the anchor alone",
        "tokenizer and retriever (vocabulary, centroids) were fitted with them",
        "corpus and packed sequences of the run hold them still, and so do packs that were exported",
    ]
    if scope is Scope.PATHS and num_fixed:
        words.append(
            f"{num_fixed} blocks beside the ones trained anew stay: they never saw these documents, "
            "but were trained together with blocks that had; --scope topics trains them anew, too"
        )
    if num_edits:
        words.append(
            f"the run's log of edits keeps what blocks held before {num_edits} edits: remove `edits` "
            "in its directory, and what it could undo"
        )
    if num_repeated:
        words.append(f"{num_repeated} other documents of the corpus have the same text")
    return tuple(words)
