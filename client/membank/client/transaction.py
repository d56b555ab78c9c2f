"""Steps collected into one transaction."""

from __future__ import annotations

from membank.wire.errors import InvalidArgumentError
from membank.wire.records import Applied, TransactionReport
from membank.wire.spec import Array, BlockRef
from membank.wire.steps import Combine, Delete, Place, Restore, Step, Swap, Withhold


class Transaction:
    """Collects steps, to be sent as one: all take effect at one revision, or none does.

    Every step sees the bank as it was before the transaction, so that their order says nothing: to
    exchange two blocks, copy each to the other. No block may be changed by two steps; a step of a
    topic changes everything under it. Whatever the service refuses is raised when the context ends,
    and nothing is changed then.

    Parameters
    ----------
    dry_run
        True only finds out what would change.
    """

    def __init__(self, *, dry_run: bool = False) -> None:
        self.dry_run = dry_run
        """True only finds out what would change."""
        self.applied: Applied | None = None
        """What was done; None until the context has ended without an error, or without a step."""
        self._steps: dict[tuple[bool, BlockRef], Step] = {}

    @property
    def steps(self) -> tuple[Step, ...]:
        """The steps so far."""
        return tuple(self._steps.values())

    @property
    def report(self) -> TransactionReport | None:
        """What was changed, or would be; None as `applied`."""
        return None if self.applied is None else self.applied.report

    @property
    def receipt(self) -> bytes:
        """Signed receipt of what was deleted (JSON); empty where nothing was."""
        return b"" if self.applied is None else self.applied.receipt

    def add(self, step: Step) -> None:
        """Add a step.

        Parameters
        ----------
        step
            The step.

        Raises
        ------
        InvalidArgumentError
            If a step of the same block is there already.
        """
        ref = step.ref if isinstance(step, Swap | Combine) else step.topic
        key = (isinstance(step, Place), ref)
        if key in self._steps:
            raise InvalidArgumentError(
                f"block {ref} is in this transaction already, by {self._steps[key].kind}; name it "
                f"once, not by {step.kind} as well",
                metadata={"block": str(ref)},
            )
        self._steps[key] = step

    def swap(self, ref: BlockRef, weight: Array, *, expected_version: int | None = None) -> None:
        """Replace the content of a block; its optimizer state starts afresh.

        Parameters
        ----------
        ref
            The block; a deleted one is created anew.
        weight
            (L, P, R, D) in the bank's dtype; must not change until the end.
        expected_version
            Version that the block must have then; None = any.
        """
        self.add(Swap(ref=ref, weight=weight, expected_version=expected_version))

    def copy(
        self,
        source: BlockRef,
        target: BlockRef,
        *,
        expected_version: int | None = None,
        expected_source_version: int | None = None,
    ) -> None:
        """Give a block the content of another one, bit for bit; its optimizer state starts afresh.

        Parameters
        ----------
        source
            The block to copy; active.
        target
            The block to replace, of the same shape; a deleted one is created anew.
        expected_version
            Version that `target` must have; None = any.
        expected_source_version
            Version that `source` must have; None = any.
        """
        self.add(
            Combine(
                ref=target,
                keep=0.0,
                other=source,
                add=1.0,
                expected_version=expected_version,
                expected_other_version=expected_source_version,
            )
        )

    def blend(
        self,
        ref: BlockRef,
        other: BlockRef,
        *,
        share: float,
        expected_version: int | None = None,
        expected_other_version: int | None = None,
    ) -> None:
        """Give a block ``(1 - share)`` of its own content and `share` of another's.

        Parameters
        ----------
        ref
            The block to change.
        other
            The block to take from, active and of the same shape.
        share
            Share of `other`, usually between 0 and 1.
        expected_version
            Version that `ref` must have; None = any.
        expected_other_version
            Version that `other` must have; None = any.
        """
        self.add(
            Combine(
                ref=ref,
                keep=1.0 - share,
                other=other,
                add=share,
                expected_version=expected_version,
                expected_other_version=expected_other_version,
            )
        )

    def scale(self, ref: BlockRef, factor: float, *, expected_version: int | None = None) -> None:
        """Multiply the content of a block, all three parts of it.

        A block is a SwiGLU FFN, so its effect does not grow and shrink alike.

        Parameters
        ----------
        ref
            The block.
        factor
            The factor; 0 is what `zero` does.
        expected_version
            Version that the block must have; None = any.
        """
        self.add(Combine(ref=ref, keep=factor, expected_version=expected_version))

    def zero(self, ref: BlockRef, *, expected_version: int | None = None) -> None:
        """Make the content of a block zero: it adds nothing to the anchor, and cannot be trained.

        Where all parts of a SwiGLU FFN are zero, so are their gradients. To train the block anew, swap
        in its initial content, ``membank.wire.format.initial_weight(spec, ref)``.

        Parameters
        ----------
        ref
            The block; a deleted one is created anew.
        expected_version
            Version that the block must have; None = any.
        """
        self.scale(ref, 0.0, expected_version=expected_version)

    def withhold(self, topic: BlockRef, *, only_block: bool = False) -> None:
        """Hide a topic from fetches and updates, reversibly.

        Parameters
        ----------
        topic
            The topic.
        only_block
            True leaves what lies under it as it is.
        """
        self.add(Withhold(topic=topic, only_block=only_block))

    def restore(self, topic: BlockRef, *, only_block: bool = False) -> None:
        """End the withholding of a topic.

        Parameters
        ----------
        topic
            The topic.
        only_block
            True leaves what lies under it as it is.
        """
        self.add(Restore(topic=topic, only_block=only_block))

    def delete(self, topic: BlockRef, *, only_block: bool = False) -> None:
        """Delete a topic, in every retained version.

        Parameters
        ----------
        topic
            The topic.
        only_block
            True leaves what lies under it as it is.
        """
        self.add(Delete(topic=topic, only_block=only_block))

    def place(
        self,
        topic: BlockRef,
        *,
        label: str | None = None,
        num_documents: int | None = None,
        centroid: Array | None = None,
        remove_centroid: bool = False,
    ) -> None:
        """Change what the tree says of a topic, so that texts find it, or do not.

        Parameters
        ----------
        topic
            The topic.
        label
            Its label, "" = none; None = left as it is.
        num_documents
            Documents of the training corpus in it; None = left as it is.
        centroid
            (dims,) float32, as many as the level's others have; None = left as it is.
        remove_centroid
            True removes the centroid: texts of the topic go to its neighbours from then on.
        """
        self.add(
            Place(
                topic=topic,
                label=label,
                num_documents=num_documents,
                centroid=centroid,
                remove_centroid=remove_centroid,
            )
        )
