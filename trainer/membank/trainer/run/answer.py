"""One question to a served bank: route, fetch, complete; the answer says what it rests on."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass

import torch

from membank.client import BankClient
from membank.client.retriever import Retriever
from membank.trainer.model import LevelBlocks, MemoryBatch, generate
from membank.trainer.run.directory import RunDirectory
from membank.trainer.tree import embedder_from_config
from membank.wire.records import Block
from membank.wire.spec import BlockRef


@dataclass(frozen=True, kw_only=True, slots=True)
class UsedBlock:
    """A block that an answer rests on."""

    ref: str
    """The block, LEVEL/CLUSTER."""
    version: int
    """Version that was used."""
    label: str
    """Label of its topic."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """A completion and what it rests on."""

    text: str
    """The completion, up to the end-of-text token or a line's end."""
    blocks: tuple[UsedBlock, ...]
    """The fetched path."""
    ended_at: str | None
    """Withheld or deleted block at which the path ended; None = it did not."""
    revision: int
    """Revision of the bank."""
    route_ms: float
    """Time to route, in ms."""
    fetch_ms: float
    """Time to fetch, in ms."""

    def to_json(self) -> dict[str, object]:
        """Return the fields as JSON-able values."""
        return asdict(self)


class Answerer:
    """Holds what answering needs: anchor, tokenizer, and the retriever once it is known.

    Parameters
    ----------
    run
        The run that the bank belongs to.
    """

    def __init__(self, run: RunDirectory) -> None:
        self._run = run
        self._anchor = run.anchor()
        self._tokenizer = run.tokenizer()

    def check(self, client: BankClient) -> None:
        """Refuse a bank that was trained for another anchor or tokenizer."""
        self._run.check_fingerprint(client.info().spec.fingerprint)

    def ask(
        self,
        client: BankClient,
        prompt: str,
        *,
        max_new_tokens: int = 16,
        with_memory: bool = True,
    ) -> Answer:
        """Complete `prompt` greedily.

        Parameters
        ----------
        client
            The served bank.
        prompt
            What to complete.
        max_new_tokens
            Longest completion.
        with_memory
            False asks the anchor alone.

        Returns
        -------
        Answer
            The completion, with the path, versions and times.
        """
        start = time.perf_counter()
        document = client.tree()
        retriever = Retriever.from_tree(document, embedder=embedder_from_config(document))
        path = retriever.route(prompt) if with_memory else ()
        routed = time.perf_counter()
        memory = client.fetch(path) if path else None
        fetched = time.perf_counter()
        blocks = [] if memory is None else [memory[ref] for ref in memory]
        (tokens,) = generate(
            self._anchor,
            [self._tokenizer.encode(prompt)],
            _memory_batch(blocks, client.info().spec.num_levels) if blocks else None,
            max_new_tokens=max_new_tokens,
            stop_token=self._tokenizer.eot_id,
        )
        return Answer(
            text=self._tokenizer.decode(tokens).split("\n")[0],
            blocks=tuple(
                UsedBlock(ref=str(b.ref), version=b.version, label=document.labels.get(b.ref, ""))
                for b in blocks
            ),
            ended_at=_name(memory.ended_at if memory is not None else None),
            revision=client.info().revision if memory is None else memory.revision,
            route_ms=1e3 * (routed - start),
            fetch_ms=1e3 * (fetched - routed),
        )


def _memory_batch(blocks: list[Block], num_levels: int) -> MemoryBatch:
    """Return the memory of one sequence; a level that the path does not reach has no block."""
    by_level = {block.ref.level: block for block in blocks}
    levels = []
    for level in range(1, num_levels + 1):
        if level not in by_level:
            break  # a path never skips a level
        weight_LPRD = by_level[level].weight
        assert weight_LPRD is not None  # the client leaves inactive blocks out of a path
        weight = torch.tensor(weight_LPRD.astype("float32"))
        levels.append(
            LevelBlocks(blocks_KLPRD=weight[None], index_B=torch.zeros(1, dtype=torch.long))
        )
    return MemoryBatch(levels)


def _name(ref: BlockRef | None) -> str | None:
    return None if ref is None else str(ref)
