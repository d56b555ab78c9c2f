"""What an edit is given, what it asks of a bank, and what it reports."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Protocol

from membank.client.memory import FetchedBlocks
from membank.wire.format import TreeDocument
from membank.wire.records import AuditRecord, BankInfo, TransactionReport
from membank.wire.spec import Array, BlockRef


@dataclass(frozen=True, kw_only=True, slots=True)
class Statement:
    """A prompt and how it goes on."""

    prompt: str
    """Beginning of a sentence, without a space at its end."""
    target: str
    """How it is to go on, without the space before it and without the final stop."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FactEdit:
    """A fact to be changed."""

    edit_id: str
    """Name of the edit, unique in the log of the run: what it is undone by."""
    prompt: str
    """Beginning of the sentence that states the fact."""
    target: str
    """What it is to say from now on."""
    paraphrases: tuple[str, ...] = ()
    """Other prompts that must get the same target; they are trained too."""
    neighbours: tuple[Statement, ...] = ()
    """Statements that must stay as the bank answers them now; their targets are what is expected."""
    line: int = 0
    """Line of the file that it was read from, from 1; 0 = none."""

    @property
    def prompts(self) -> tuple[str, ...]:
        """The prompt, then its paraphrases; none twice."""
        return tuple(dict.fromkeys((self.prompt, *self.paraphrases)))

    @property
    def where(self) -> str:
        """How a message names the fact."""
        return f"edit {self.edit_id}" + (f" (line {self.line})" if self.line else "")


class EditedBank(Protocol):
    """What an edit asks of a bank; a `membank.client.BankClient` is one."""

    def info(self) -> BankInfo:
        """Return spec and revision."""
        ...

    def tree(self) -> TreeDocument:
        """Return the tree document, which holds the retriever."""
        ...

    def fetch_blocks(self, refs: Iterable[BlockRef], *, dtype: str | None = None) -> FetchedBlocks:
        """Return blocks of one revision."""
        ...

    def swap(
        self,
        weights: Mapping[BlockRef, Array],
        *,
        expected: Mapping[BlockRef, int] | None = None,
        dry_run: bool = False,
        request_id: str | None = None,
    ) -> TransactionReport:
        """Replace blocks in one transaction; `ConflictError` where a version is another."""
        ...

    def audit(self, *, limit: int = 20) -> tuple[AuditRecord, ...]:
        """Return the newest records of the audit log, newest first."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptChange:
    """What one prompt answered before and answers after."""

    edit_id: str
    """The edit that it belongs to."""
    prompt: str
    """The prompt."""
    block: str
    """The block that is trained on it: the leaf of its path."""
    target: str
    """What it is to answer."""
    before: str
    """What it answered before, up to the end of the sentence."""
    after: str
    """What it answers after."""
    probability_before: float
    """Probability of the whole target before, 0 to 1."""
    probability_after: float
    """The same after."""
    reached: bool
    """Whether the answer after states the target."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NeighbourChange:
    """What a given neighbour answered before and answers after."""

    edit_id: str
    """The edit that it was given with."""
    prompt: str
    """The prompt."""
    block: str
    """The leaf that it is routed to."""
    expected: str
    """Its target, as given."""
    before: str
    """What it answered before."""
    after: str
    """What it answers after."""

    @property
    def kept(self) -> bool:
        """Whether the answer is the same as before."""
        return self.before == self.after


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockTraining:
    """How the training of one block went."""

    ref: str
    """The block."""
    version: int
    """Version that it was trained from."""
    steps: int
    """Steps taken to the content that was kept."""
    num_facts: int
    """Prompts trained on."""
    num_guards: int
    """Prompts guarded: given neighbours, earlier edits, facts that the leaf's text states alike."""
    num_carried: int
    """Prompts that carry the wordings over to other facts of the block."""
    least_probability: float
    """Least probability of any token of a target, at the end."""
    kept_share: float
    """Share of the guards' tokens that are still the most likely ones, 0 to 1; 1 without guards."""
    carried_share: float
    """Share of the carried answers' tokens that are the most likely ones, 0 to 1; 1 without any."""
    seconds: float
    """Time it took."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EditReport:
    """What an edit or an undo did, or would do."""

    transaction: str
    """Id of the transaction in the log; its request id in the bank's audit log ends in it."""
    operation: str
    """``edit`` or ``undo``."""
    edit_ids: tuple[str, ...]
    """The edits that were made, or undone."""
    reapplied: tuple[str, ...]
    """Later edits of the same blocks that an undo made anew, in their order."""
    prompts: tuple[PromptChange, ...]
    """Every prompt that was trained on."""
    undone: tuple[PromptChange, ...]
    """Every prompt of the edit that was undone, with its target, which should not be the answer
    after; empty for an edit."""
    neighbours: tuple[NeighbourChange, ...]
    """Every neighbour that was given."""
    blocks: tuple[BlockTraining, ...]
    """Every training of a block."""
    changed: Mapping[str, tuple[int, int]]
    """Version of each changed block before and after; empty for a dry run."""
    revision: int
    """Revision of the bank after it."""
    attempts: int
    """Times it was made: more than one where blocks were changed meanwhile."""
    seconds: float
    """Time it took in all."""
    dry_run: bool
    """True where nothing was to be swapped."""
    refused: str = ""
    """Why nothing was swapped, where it fell short; empty = it was, or was not to be."""

    @property
    def missed(self) -> tuple[PromptChange, ...]:
        """Prompts that do not answer as they should."""
        return tuple(prompt for prompt in self.prompts if not prompt.reached)

    def to_json(self) -> dict[str, object]:
        """Return the fields as JSON-able values."""
        return asdict(self)
