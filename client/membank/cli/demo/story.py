"""The story: what `membank demo` does, top to bottom. Every step that is done is not done again."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from membank.bank_service.cluster import Endpoint, UpConfig, down, up
from membank.bank_service.store import Bank
from membank.cli.demo.document import report_document
from membank.cli.demo.operations import Operator, fetch_latencies
from membank.cli.demo.report import write_report
from membank.cli.demo.state import DemoState
from membank.cli.ending import ended_by_sigterm
from membank.cli.output import err_console
from membank.cli.progress import counted_progress, stage_progress
from membank.client import BankClient
from membank.trainer.run import RunConfig, RunDirectory, prepare_run
from membank.trainer.run.answer import Answerer
from membank.trainer.run.stages import (
    Evaluator,
    longer_anchor,
    run_generic,
    run_stage1,
    run_stage2,
)
from membank.wire.errors import AlreadyExistsError, NotFoundError, Reason, UnavailableError
from membank.wire.format.pack import Pack, decode_pack
from membank.wire.spec import BlockRef

_TIMED_AS = {
    "latency": "eval",
    "before": "operate",
    "hot_operations": "operate",
    "delete": "operate",
    "import": "operate",
}
"""Heading of the report under which a step's time is counted, where it is not its own."""

_LAST_SERVED = "after_import"
"""The last step that needs the service."""

QUESTION = "The atomic number of hafnium is"


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoConfig:
    """What the demo runs, and where."""

    out: Path
    """Directory of the run and its report."""
    run: RunConfig
    """What is trained."""
    bank_url: str = ""
    """Directory or URL where the bank is kept; empty = in `out`. All else is in `out`."""
    keyring_url: str = ""
    """Directory or URL of the keyring that the bank is sealed with; empty = it is not sealed."""
    num_shards: int = 2
    """Shard actors."""
    num_workers: int = 2
    """Ray workers of stage 2."""
    num_fetches: int = 1000
    """Fetches whose latency is measured."""
    claims: bool = True
    """False leaves the goals of learning out of the report: the run is too small for them."""
    study: bool = False
    """True also trains the anchor on for as many tokens as both stages took."""


class Demo:
    """One run of the story.

    Parameters
    ----------
    config
        What to run.
    """

    def __init__(self, config: DemoConfig) -> None:
        self._config = config
        self._run = RunDirectory(config.out)
        self._bank_url = config.bank_url or str(self._run.bank_dir)
        # Not the study: it may be added to a demo that is done.
        saved = {**config.run.to_json(), "bank": self._bank_url}
        self._state = DemoState(config.out / "state.json", saved)

    def tell(self) -> dict[str, Any]:
        """Run what is left of the story and write the report.

        Returns
        -------
        dict
            Content of ``report.json``.
        """
        with self._state.timed("total"):
            self._check_bank()
            self._step("prepare", self._prepare)
            self._step("stage1", self._stage1)
            if not self._state.has(_LAST_SERVED):
                with self._served() as endpoint:
                    self._step("stage2", lambda: self._stage2(endpoint))
                    self._step("generic", self._generic)
                    with BankClient.connect(endpoint.address) as client:
                        self._ask_and_operate(client)
            if self._config.study:
                self._step("study", self._longer_anchor)
        return self._report()

    def _ask_and_operate(self, client: BankClient) -> None:
        self._step("eval", lambda: self._evaluate(client, perplexity=True))
        self._step("latency", lambda: self._latency(client))
        self._step("before", lambda: Operator(client, self._answerer()).fingerprints())
        self._step("hot_operations", lambda: self._hot_operations(client))
        self._step("delete", lambda: self._delete(client))
        self._step("after_delete", lambda: self._evaluate(client), timed_as="eval")
        self._step("import", lambda: self._import(client))
        self._step(_LAST_SERVED, lambda: self._evaluate(client), timed_as="eval")

    # The steps, in the order in which they happen.

    def _prepare(self) -> object:
        with err_console.status("preparing") as spinner:
            prepared = prepare_run(
                self._run, self._config.run, notice=lambda what: spinner.update(f"making {what}")
            )
        return asdict(prepared)

    def _stage1(self) -> object:
        with stage_progress("stage 1: anchor") as on_progress:
            return run_stage1(self._run, self._run_config(), on_progress=on_progress).to_json()

    def _stage2(self, endpoint: Endpoint) -> object:
        with stage_progress("stage 2: memories") as on_progress:
            report = run_stage2(
                self._run,
                self._run_config(),
                endpoint=endpoint.address,
                ray_address=endpoint.ray_address,
                num_workers=self._config.num_workers,
                on_progress=on_progress,
            )
        return report.to_json()

    def _generic(self) -> object:
        with stage_progress("control: generic memory") as on_progress:
            return run_generic(self._run, self._run_config(), on_progress=on_progress).to_json()

    def _evaluate(self, client: BankClient, *, perplexity: bool = False) -> object:
        with counted_progress("asking") as on_progress:
            recall = self._evaluator.recall(client, on_progress=on_progress)
        topics = None
        if perplexity:
            with err_console.status("scoring documents of every topic"):
                topics = self._evaluator.perplexity(client)
        return {
            "recall": recall.to_json()["relations"],
            "perplexity": None if topics is None else topics.to_json(),
        }

    def _latency(self, client: BankClient) -> object:
        retriever = client.retriever()
        paths = retriever.route_all([fact.prompt for fact in self._evaluator.facts])
        latencies, num_bytes = fetch_latencies(client, paths, count=self._config.num_fetches)
        return {"ms": latencies, "bytes": num_bytes}

    def _hot_operations(self, client: BankClient) -> object:
        operator = Operator(client, self._answerer())
        topics = self._topics()
        return {
            "swap": operator.swap_and_back(QUESTION),
            "withhold": operator.withhold_and_restore(topics, QUESTION),
            "steps": operator.steps_json(),
        }

    def _delete(self, client: BankClient) -> object:
        operator = Operator(client, self._answerer())
        for topic in self._topics():
            # A run that was stopped in between has exported what it deleted.
            if not operator.is_deleted(topic):
                operator.export(topic, self._pack(topic))
                operator.delete(topic)
        answer = operator.ask(QUESTION)
        return {
            "answer": answer,
            "deleted": all(operator.is_deleted(topic) for topic in self._topics()),
            "fingerprints": operator.fingerprints(),
            "steps": operator.steps_json(),
        }

    def _import(self, client: BankClient) -> object:
        operator = Operator(client, self._answerer())
        for topic in self._topics():
            operator.import_pack(self._pack(topic))
            operator.export(topic, self._pack(topic).with_suffix(".again"))
        operator.ask(QUESTION)
        return {
            "packs_equal": all(
                same_content(self._pack(topic), self._pack(topic).with_suffix(".again"))
                for topic in self._topics()
            ),
            "fingerprints": operator.fingerprints(),
            "steps": operator.steps_json(),
        }

    def _longer_anchor(self) -> object:
        longer = RunDirectory(self._config.out / "longer-anchor")
        config = longer_anchor(self._run_config())
        if not longer.is_trained:
            prepare_run(longer, config)
        with stage_progress("study: the anchor, for the tokens of both stages") as on_progress:
            run_stage1(longer, config, on_progress=on_progress)
        return Evaluator(longer, config).anchor_recall().to_json()["relations"]

    # What the steps share.

    def _step(self, name: str, do: Callable[[], object], *, timed_as: str | None = None) -> None:
        if self._state.has(name):
            return
        err_console.rule(name.replace("_", " "), align="left", style="dim")
        with self._state.timed(timed_as or _TIMED_AS.get(name, name)):
            result = do()
        self._state.finish(name, result)

    def _check_bank(self) -> None:
        """Refuse a bank that another run made, and a place that cannot be used, before any work."""
        if not self._config.bank_url or self._state.has(_LAST_SERVED):
            return
        try:
            bank = Bank.open(self._bank_url, keyring=self._config.keyring_url)
        except NotFoundError:
            return
        if bank.require_record(0).request_id != self._request_id():
            raise AlreadyExistsError(
                f"{self._bank_url} holds a bank that the run in {self._config.out} did not make; "
                "give another --bank, or remove it",
                reason=Reason.BANK_EXISTS,
                metadata={"bank": self._bank_url},
            )

    def _request_id(self) -> str:
        """Return the id under which this run creates its bank, the same after a stop."""
        if not self._state.has("bank"):
            self._state.finish("bank", uuid.uuid4().hex)
        return str(self._state.result("bank"))

    @contextmanager
    def _served(self) -> Iterator[Endpoint]:
        """Serve the bank, which is created here the first time, until the block ends."""
        config = self._run_config()
        spec = config.bank_spec(fingerprint=self._run.fingerprint())
        # Before the bank: a run that is stopped in between must know it for its own.
        request_id = self._request_id()
        with suppress(AlreadyExistsError):
            Bank.create(
                self._bank_url,
                spec,
                keyring=self._config.keyring_url,
                tree=self._run.tree(),
                principal="demo",
                request_id=request_id,
            )
        is_url = "://" in self._bank_url
        # A run that was killed could not stop its service.
        with suppress(UnavailableError):
            down(bank_url=self._bank_url)
        with (
            err_console.status("starting the service"),
            self._state.timed("up"),
            ended_by_sigterm(),
        ):
            endpoint = up(
                UpConfig(
                    bank_url=self._bank_url,
                    keyring_url=self._config.keyring_url,
                    num_shards=self._config.num_shards,
                    port=0,
                    journal_dir=self._config.out / "journals" if is_url else None,
                )
            )
        try:
            with ended_by_sigterm():
                yield endpoint
        finally:
            with err_console.status("stopping the service"):
                down(bank_url=self._bank_url)

    def _run_config(self) -> RunConfig:
        return self._config.run.with_vocab_size(self._run.tokenizer().vocab_size)

    @cached_property
    def _evaluator(self) -> Evaluator:
        """Made when it is first needed, since it reads what the stages before leave behind."""
        return Evaluator(self._run, self._run_config())

    def _answerer(self) -> Answerer:
        return Answerer(self._run)

    def _topics(self) -> tuple[BlockRef, ...]:
        """Level-1 topics that hold the elements; they are what is deleted."""
        return self._evaluator.holding_topics("atomic_number")

    def _pack(self, topic: BlockRef) -> Path:
        return self._config.out / f"topic-{topic.level}-{topic.cluster}.pack"

    # The report.

    def _report(self) -> dict[str, Any]:
        config = self._run_config()
        document = report_document(self._state, config, claims=self._config.claims)
        latency: Any = self._state.result("latency")
        workers = range(self._config.num_workers)
        write_report(
            self._config.out,
            document,
            title="A memory bank, from text to deletion",
            lead=f"{config.corpus} corpus, {document['prepared']['num_documents']} documents; "
            f"membank demo, run {config.name}"
            + (f"; the bank in {self._config.bank_url}" if self._config.bank_url else ""),
            tree=self._run.tree(),
            losses={
                "stage 1: anchor": [self._run.stage1_dir / "losses.jsonl"],
                "stage 2: fetched memories": [
                    self._run.stage2_dir / f"worker-{rank}.losses.jsonl" for rank in workers
                ],
                "control: generic memory": [self._run.generic_dir / "generic.losses.jsonl"],
            },
            latencies_ms=latency["ms"],
        )
        return document


def same_content(first: Path, second: Path) -> bool:
    """Return whether two packs hold bit-identical blocks, labels and centroids."""
    one, two = (decode_pack(file.read_bytes(), what=str(file)) for file in (first, second))

    def content(pack: Pack) -> dict[str, bytes]:
        arrays = {f"centroid {ref}": row.tobytes() for ref, row in pack.centroids.items()}
        for block in pack.blocks:
            arrays[f"{block.ref} weight {block.step}"] = block.weight.tobytes()
            for role, state in block.optimizer_state.items():
                arrays[f"{block.ref} {role}"] = state.tobytes()
        return arrays

    return content(one) == content(two) and dict(one.labels) == dict(two.labels)
