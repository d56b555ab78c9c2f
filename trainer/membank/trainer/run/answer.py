"""One question to a served bank: route, stream, complete; the answer says what it rests on."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial

from membank.client import BankClient
from membank.client.retriever import Retriever
from membank.trainer.model import generate
from membank.trainer.run.directory import RunDirectory
from membank.trainer.run.streamed_memory import StreamedMemory
from membank.trainer.tree import embedder_from_config


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
    """Time until the first layer of the path could be used, in ms."""
    waited_ms: float
    """Time that the anchor then stood still for later layers, in ms."""

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
        """Complete `prompt` greedily, with each layer of its memory as soon as that has come.

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
        tokens = self._tokenizer.encode(prompt)
        generated = partial(
            generate, self._anchor, [tokens],
            max_new_tokens=max_new_tokens, stop_token=self._tokenizer.eot_id,
        )  # fmt: skip
        if not path:
            (completion,) = generated(None)
            return self._answer(
                completion, revision=client.info().revision, routed_s=routed - start
            )
        with client.stream(path) as stream:
            head = stream.head()
            fetched = time.perf_counter()
            memory = StreamedMemory(stream)
            (completion,) = generated(memory)
        answer = self._answer(completion, revision=head.revision, routed_s=routed - start)
        return replace(
            answer,
            blocks=tuple(
                UsedBlock(ref=str(ref), version=version, label=document.labels.get(ref, ""))
                for ref, version in head.versions.items()
            ),
            ended_at=None if head.ended_at is None else str(head.ended_at),
            fetch_ms=1e3 * (fetched - routed),
            waited_ms=1e3 * memory.waited_s,
        )

    def _answer(self, tokens: Sequence[int], *, revision: int, routed_s: float) -> Answer:
        return Answer(
            text=self._tokenizer.decode(tokens).split("\n")[0],
            blocks=(),
            ended_at=None,
            revision=revision,
            route_ms=1e3 * routed_s,
            fetch_ms=0.0,
            waited_ms=0.0,
        )
