"""From facts to the blocks that they route to: paths, contents, and what each block is to learn."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from membank.client.retriever import Retriever
from membank.trainer.corpus import PackedSequences, Tokenizer
from membank.trainer.editing.config import EditConfig
from membank.trainer.editing.contract import EditedBank, FactEdit
from membank.trainer.editing.likeness import Wordings
from membank.trainer.editing.log import LoggedBlock, LoggedNeighbour, LoggedPrompt
from membank.trainer.editing.training import BlockTask
from membank.trainer.model import PADDING_SEGMENT
from membank.trainer.training import distinct_blocks
from membank.trainer.tree import embedder_from_config
from membank.wire.errors import FailedPreconditionError, Reason
from membank.wire.spec import BankSpec, BlockRef, BlockState, Path


@dataclass(frozen=True, kw_only=True, slots=True)
class FetchedContents:
    """Blocks in this process, as of one revision."""

    spec: BankSpec
    """What the bank is."""
    weights: Mapping[BlockRef, Tensor]
    """(L, P, R, D) float32; not to be changed."""
    versions: Mapping[BlockRef, int]
    """Version of each block."""
    revision: int
    """Revision of the bank."""


class ReplaySequences:
    """The run's training text, leaf by leaf.

    Parameters
    ----------
    sequences
        Packed documents, each sequence of one leaf; None = the run has none at hand.
    """

    def __init__(self, sequences: PackedSequences | None) -> None:
        self._sequences = sequences

    def of_leaf(self, leaf: int) -> tuple[tuple[int, ...], ...]:
        """Return the tokens of each document that a leaf was trained on, none twice."""
        packed = self._sequences
        if packed is None:
            return ()
        documents: dict[tuple[int, ...], None] = {}
        for row in np.flatnonzero(packed.leaf_N == leaf):
            tokens_T, segments_T = packed.tokens_NT[row], packed.doc_ids_NT[row]
            for segment in np.unique(segments_T[segments_T != PADDING_SEGMENT]):
                tokens = tuple(map(int, tokens_T[segments_T == segment]))
                if len(tokens) > 1:
                    documents[tokens] = None
        return tuple(documents)


class Router:
    """Routes prompts by the retriever that the bank holds.

    Parameters
    ----------
    bank
        The bank.
    """

    def __init__(self, bank: EditedBank) -> None:
        document = bank.tree()
        self._retriever = Retriever.from_tree(document, embedder=embedder_from_config(document))

    def route(self, prompts: Iterable[str]) -> dict[str, Path]:
        """Return the path of each prompt."""
        distinct = list(dict.fromkeys(prompts))
        return dict(zip(distinct, self._retriever.route_all(distinct), strict=True))

    def route_facts(self, spec: BankSpec, facts: Sequence[FactEdit]) -> dict[str, Path]:
        """Return the path of each prompt of some facts, and of their neighbours.

        Raises
        ------
        FailedPreconditionError
            If the path of a fact's prompt does not reach a leaf: the tree ends above it.
        """
        paths = self.route(
            prompt
            for fact in facts
            for prompt in (*fact.prompts, *(n.prompt for n in fact.neighbours))
        )
        for fact in facts:
            for prompt in fact.prompts:
                if len(paths[prompt]) < spec.num_levels:
                    raise FailedPreconditionError(
                        f"{fact.where}: {prompt!r} routes to no leaf of the tree; say it with words of "
                        "the topic, or look with `membank route`",
                        reason=Reason.UNKNOWN_TOPIC,
                        metadata={"edit": fact.edit_id},
                    )
        return paths


def fetch_contents(bank: EditedBank, paths: Iterable[Path]) -> FetchedContents:
    """Fetch every block of some paths, all of one revision.

    Raises
    ------
    FailedPreconditionError
        If one is withheld or deleted: what cannot be read cannot be edited.
    """
    refs = distinct_blocks(paths)
    fetched = bank.fetch_blocks(refs, dtype="float32")
    for ref, state in fetched.states.items():
        if state is not BlockState.ACTIVE:
            withheld = state is BlockState.WITHHELD
            remedy = (
                f"`membank restore {ref}` brings it back" if withheld else "an import may bring it"
            )
            raise FailedPreconditionError(
                f"block {ref}, to which a prompt is routed, is {state.name.lower()}; {remedy}",
                reason=Reason.BLOCK_WITHHELD if withheld else Reason.BLOCK_DELETED,
                metadata={"block": str(ref)},
            )
    return FetchedContents(
        spec=bank.info().spec,
        # Copies: fetched arrays are read-only and may lie in memory that others use again.
        weights={ref: torch.tensor(np.array(weight)) for ref, weight in fetched.weights.items()},
        versions=fetched.versions,
        revision=fetched.revision,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Lesson:
    """What one block is to be taught by one transaction, in words."""

    path: Path
    """Path of the block."""
    prompts: tuple[LoggedPrompt, ...]
    """Prompts and their targets."""
    neighbours: tuple[LoggedNeighbour, ...]
    """Prompts that were given to be kept and are routed here."""

    def logged(self, *, version: int) -> LoggedBlock:
        """Return it as the log has it, made from `version` of the block."""
        return LoggedBlock(
            ref=str(self.path[-1]),
            version_before=version,
            version_after=version + 1,
            prompts=self.prompts,
            neighbours=self.neighbours,
        )

    @classmethod
    def again(cls, spec: BankSpec, block: LoggedBlock) -> Lesson:
        """Return what the log has, to be taught again."""
        return cls(
            path=spec.path_to(BlockRef.parse(block.ref)),
            prompts=block.prompts,
            neighbours=block.neighbours,
        )

    def task(
        self,
        told: Mapping[str, str],
        replay: ReplaySequences,
        tokenizer: Tokenizer,
        config: EditConfig,
    ) -> BlockTask:
        """Return it as a task of training.

        Parameters
        ----------
        told
            What earlier edits have taught the block, prompt -> target. It is guarded, unless it is
            a prompt of this lesson, whose target is another now.
        replay
            The run's training text.
        tokenizer
            Its vocabulary.
        config
            How many wordings are carried over.
        """
        taught = {p.prompt: p.target for p in self.prompts}
        documents = replay.of_leaf(self.path[-1].cluster)
        texts = [tokenizer.decode(tokens) for tokens in documents]
        given = tuple(dict.fromkeys(neighbour.prompt for neighbour in self.neighbours))
        alike, carried = self._alike([*given, *told, *texts], config)
        return BlockTask(
            path=self.path,
            facts=tuple(taught.items()),
            guards=tuple(p for p in dict.fromkeys((*given, *told, *alike)) if p not in taught),
            # Not where an edit has told otherwise.
            carried=tuple(
                (p, source) for p, source in carried if p not in taught and p not in told
            ),
            documents=tuple(
                tokens
                for tokens, text in zip(documents, texts, strict=True)
                # The old statement of what is changed is not to be kept.
                if not any(prompt in text for prompt in taught)
            ),
        )

    def _alike(
        self, texts: Sequence[str], config: EditConfig
    ) -> tuple[list[str], list[tuple[str, str]]]:
        """Return other facts that are stated like those of the lesson, and their carried prompts."""
        by_edit: dict[str, list[str]] = {}
        for taught in self.prompts:
            by_edit.setdefault(taught.edit_id, []).append(taught.prompt)
        alike: list[str] = []
        carried: dict[str, str] = {}
        for prompts in by_edit.values():
            wordings = Wordings.of(prompts, texts)
            if wordings is None:
                continue
            rng = random.Random(f"{config.seed} {prompts[0]}")
            for subject in wordings.other_subjects(texts):
                source = wordings.asked(subject)
                alike.append(source)
                for prompt in wordings.reworded(subject, config.carried_each, rng):
                    carried.setdefault(prompt, source)
        return alike, list(carried.items())


def make_lessons(facts: Sequence[FactEdit], paths: Mapping[str, Path]) -> tuple[Lesson, ...]:
    """Return what each block is to be taught, by level and cluster.

    Parameters
    ----------
    facts
        The facts.
    paths
        Path of each prompt and neighbour.
    """
    prompts: dict[Path, list[LoggedPrompt]] = {}
    neighbours: dict[Path, list[LoggedNeighbour]] = {}
    for fact in facts:
        for prompt in fact.prompts:
            taught = LoggedPrompt(edit_id=fact.edit_id, prompt=prompt, target=fact.target)
            prompts.setdefault(paths[prompt], []).append(taught)
        for neighbour in fact.neighbours:
            given = LoggedNeighbour(edit_id=fact.edit_id, prompt=neighbour.prompt)
            neighbours.setdefault(paths[neighbour.prompt], []).append(given)
    return tuple(
        Lesson(
            path=path,
            prompts=tuple(prompts[path]),
            neighbours=tuple(dict.fromkeys(neighbours.get(path, ()))),
        )
        for path in sorted(prompts, key=lambda path: path[-1])
    )
