"""Deleting documents from a served bank, step by step; each is noted, and gone on from."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace

import torch

from membank.client import BankClient
from membank.trainer.deletion.config import DeletionConfig
from membank.trainer.deletion.exchange import BlockExchange, TopicWords
from membank.trainer.deletion.folder import DeletionState, Phase
from membank.trainer.deletion.forecast import DeletionForecast, states_of
from membank.trainer.deletion.residue import residue_words
from membank.trainer.deletion.retraining import retrain
from membank.trainer.finding.influence import InfluenceConfig, TextLoss, measure_loss
from membank.trainer.run import RunMaterial
from membank.trainer.training import (
    Fetched,
    InProcessMemory,
    ProgressCallback,
    as_fetched,
    leaf_path,
)
from membank.trainer.training.files import write_atomically
from membank.wire.errors import ConflictError, InternalError
from membank.wire.records import TransactionReport
from membank.wire.spec import Array, BlockRef, BlockState, Path

_AUDIT_RECORDS = 10_000
"""Newest records of the audit log that are searched for the transaction of a job."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DeletionReport:
    """What deleting documents did."""

    job_id: str
    """Identity of the job; its transactions have request ids that begin with it."""
    forecast: DeletionForecast
    """What was to be done."""
    figures: Mapping[str, object]
    """What was done: training, transactions, losses before and after; JSON-able."""
    residue: tuple[str, ...]
    """What still holds something of the documents, in words."""

    def to_json(self) -> dict[str, object]:
        """Return the report as JSON-able values."""
        return {
            **self.forecast.to_json(),
            "phase": Phase.DONE.value,
            "job_id": self.job_id,
            **self.figures,
            "residue": list(self.residue),
        }


class DocumentDeletion:
    """Does what a forecast says, or goes on with it.

    Parameters
    ----------
    client
        The served bank.
    exchange
        Its two transactions.
    material
        Its run.
    config
        How to delete.
    """

    def __init__(
        self,
        client: BankClient,
        exchange: BlockExchange,
        material: RunMaterial,
        config: DeletionConfig,
    ) -> None:
        self._client = client
        self._exchange = exchange
        self._material = material
        self._config = config
        self._spec = client.info().spec
        self._contents: dict[BlockRef, Array] | None = None

    def run(
        self, forecast: DeletionForecast, *, on_progress: ProgressCallback | None = None
    ) -> DeletionReport:
        """Delete the documents; returns once the new blocks are in place.

        Parameters
        ----------
        forecast
            What to do.
        on_progress
            Told about twice a second while blocks are trained.

        Returns
        -------
        DeletionReport
            What was done, by this process and by those that it goes on from.

        Raises
        ------
        ConflictError
            Somebody has changed a block meanwhile: the same command begins anew. Or another process
            has gone on with the deletion since the forecast.
        FailedPreconditionError
            Another process is deleting documents by this run.
        MembankError
            The bank cannot answer; the same command goes on.
        """
        with forecast.folder.exclusive():
            return self._run(forecast, self._begun(forecast), on_progress)

    def _begun(self, forecast: DeletionForecast) -> DeletionState:
        """Return how far the job is; it begins where it has not."""
        folder = forecast.folder
        now = folder.load()
        is_as_seen = (
            now == forecast.state
            if forecast.state is not None
            else now is None or now.phase is Phase.TRAINING
        )
        if not is_as_seen:
            raise ConflictError(
                "another process has gone on with this deletion meanwhile; give the command again"
            )
        return forecast.state or folder.begin(forecast.plan, forecast.recipe, self._spec.bank_id)

    def _run(
        self,
        forecast: DeletionForecast,
        state: DeletionState,
        on_progress: ProgressCallback | None,
    ) -> DeletionReport:
        steps = {
            Phase.TRAINING: lambda: self._train(forecast, state, on_progress),
            Phase.DESTROYING: lambda: self._destroy(forecast, state),
            Phase.INSTALLING: lambda: self._install(forecast, state),
        }
        while state.phase is not Phase.DONE:
            state = forecast.folder.save(steps[state.phase]())
        # Only now: what a step leaves behind is what the next one needs.
        forecast.folder.discard_weights()
        return DeletionReport(
            job_id=state.job_id,
            forecast=forecast,
            figures=state.figures,
            residue=residue_words(
                self._config.scope,
                num_fixed=int(str(state.figures.get("num_fixed", 0))),
                num_repeated=forecast.num_repeated,
                num_edits=len(list(self._material.run.edits_dir.glob("contents/*.safetensors"))),
            ),
        )

    # ---- the steps

    def _train(
        self,
        forecast: DeletionForecast,
        state: DeletionState,
        on_progress: ProgressCallback | None,
    ) -> DeletionState:
        torch.set_num_threads(self._config.num_threads)
        figures: dict[str, object] = {"loss_before": asdict(self._loss(forecast))}
        if forecast.retraining is not None:
            folder, plan = forecast.folder, forecast.plan
            fixed = folder.load_fixed()
            if fixed is None:
                fixed = self._fetch_fixed(forecast)
                folder.save_fixed(fixed)
            _, result = retrain(
                self._material.run.anchor(),
                self._spec,
                plan,
                forecast.retraining,
                fixed,
                file=folder.staged_file,
                losses=folder.losses_file,
                every_steps=self._config.checkpoint_every_steps,
                on_progress=on_progress,
            )
            figures |= {"trained": result.to_json(), "num_fixed": len(fixed.weights)}
        self._check_unchanged(forecast, deleted_is_fine=False)
        words = self._words(forecast)
        return replace(state, phase=Phase.DESTROYING, words=words, figures=figures)

    def _destroy(self, forecast: DeletionForecast, state: DeletionState) -> DeletionState:
        # Read first: a damaged file must be found while the old blocks are there, and between the
        # transactions no reader shall wait for it.
        self._contents = self._staged(forecast)
        try:
            self._check_unchanged(forecast, deleted_is_fine=True)
        except ConflictError:
            if not self._is_destroyed(state):
                self._give_up(forecast, state)
                raise
        # Before anything is destroyed, as a later training must not bring back what goes now; and
        # after the plan was kept, as no plan can be made of documents that are in this list.
        self._material.run.deleted_documents.add(self._spec.bank_id, self._names(state))
        began = time.time()
        refs = sorted(state.plan.retrained_refs)
        destroyed = self._exchange.destroy(state.plan.topics, refs, request_id=_destroy_id(state))
        if destroyed.receipt:
            write_atomically(forecast.folder.receipt_file, destroyed.receipt)
        after = {change.ref: change.version_after for change in destroyed.report.changes}
        lacking = [str(ref) for ref in refs if ref not in after]
        if lacking:
            raise InternalError(f"the deletion says nothing of block {lacking[0]}")
        figures = {
            **state.figures,
            "destroyed": _summary(destroyed.report),
            "receipt": str(forecast.folder.receipt_file) if destroyed.receipt else None,
            "destroy_began_s": began,
        }
        state = replace(
            state,
            phase=Phase.INSTALLING if refs else Phase.DONE,
            versions={str(ref): after[ref] for ref in refs},
            figures=figures,
        )
        return state if refs else self._with_loss_after(forecast, state)

    def _install(self, forecast: DeletionForecast, state: DeletionState) -> DeletionState:
        installed = self._exchange.install(
            self._staged(forecast) if self._contents is None else self._contents,
            {BlockRef.parse(name): words for name, words in state.words.items()},
            expected={BlockRef.parse(name): v for name, v in state.versions.items()},
            request_id=f"{state.job_id}-install",
        )
        began = float(str(state.figures["destroy_began_s"]))
        figures = {
            **state.figures,
            "installed": _summary(installed.report),
            "short_paths_s": time.time() - began,
        }
        state = replace(state, phase=Phase.DONE, figures=figures)
        return self._with_loss_after(forecast, state)

    def _give_up(self, forecast: DeletionForecast, state: DeletionState) -> None:
        """Let the same command begin anew; nothing was destroyed."""
        # In this order: documents that are noted as deleted would be in no later plan, though the bank
        # holds them still.
        self._material.run.deleted_documents.take_back(self._spec.bank_id, self._names(state))
        forecast.folder.save(replace(state, phase=Phase.TRAINING))

    # ---- what they need

    def _is_destroyed(self, state: DeletionState) -> bool:
        made = self._client.audit(limit=_AUDIT_RECORDS)
        return any(record.request_id == _destroy_id(state) for record in made)

    def _names(self, state: DeletionState) -> list[str]:
        return [self._material.corpus.documents[row].doc_id for row in state.plan.removed]

    def _staged(self, forecast: DeletionForecast) -> dict[BlockRef, Array]:
        if not forecast.plan.retrained:
            return {}
        memory = InProcessMemory.load(forecast.folder.staged_file)
        weights = memory.fetch(sorted(forecast.plan.retrained_refs)).weights
        # Exact: they were kept in the bank's dtype, which float32 holds.
        dtype = self._spec.numpy_dtype
        return {ref: weight.numpy().astype(dtype) for ref, weight in weights.items()}

    def _fetch_fixed(self, forecast: DeletionForecast) -> Fetched:
        plan = forecast.plan
        gone = {ref for topic in plan.topics for ref in self._spec.subtree(topic)}
        paths = self._paths(plan.remaining)
        others = sorted({r for path in paths for r in path} - plan.retrained_refs - gone)
        fetched = as_fetched(self._client.fetch_blocks(others, dtype="float32"))
        # What is about to be deleted ends its paths already: so it will be for a reader.
        return Fetched.merge(
            [
                fetched,
                Fetched(
                    weights={},
                    versions=dict.fromkeys(gone, 0),
                    absent=dict.fromkeys(gone, BlockState.DELETED),
                ),
            ]
        )

    def _paths(self, rows: tuple[int, ...]) -> list[Path]:
        return [leaf_path(self._spec, int(self._material.leaf_N[row])) for row in rows]

    def _check_unchanged(self, forecast: DeletionForecast, *, deleted_is_fine: bool) -> None:
        parts = {part.ref: part for part in (*forecast.plan.deleted, *forecast.plan.retrained)}
        for ref, (version, block_state) in states_of(self._client, sorted(parts)).items():
            if deleted_is_fine and block_state is BlockState.DELETED:
                continue
            if version != parts[ref].version:
                raise ConflictError(
                    f"block {ref} had version {parts[ref].version} when the deletion was planned "
                    f"and has {version} now; give the command again, and it begins anew",
                    metadata={"block": str(ref), "version": str(version)},
                )

    def _words(self, forecast: DeletionForecast) -> dict[str, TopicWords]:
        """Return what the tree is to say of the topics that are created anew."""
        if not forecast.plan.retrained:
            return {}
        tree, fitted = self._client.tree(), self._material.run.tree()
        anew = self._material.labels_without(forecast.plan.removed)
        words = {}
        for part in forecast.plan.retrained:
            label = tree.labels.get(part.ref, "")
            # A label that people gave stays; one that was made of the documents is made anew.
            if label and label == fitted.labels.get(part.ref):
                label = anew.get(part.ref, "")
            count = tree.num_documents.get(part.ref, 0) - part.removed_documents
            words[str(part.ref)] = TopicWords(label=label, num_documents=max(0, count))
        return words

    def _with_loss_after(self, forecast: DeletionForecast, state: DeletionState) -> DeletionState:
        loss = asdict(self._loss(forecast))
        return replace(state, figures={**state.figures, "loss_after": loss})

    def _loss(self, forecast: DeletionForecast) -> TextLoss:
        """Measure the documents that go, each on the path that it was trained on."""
        rows = forecast.plan.removed
        material = self._material
        leaves = material.placed_N
        paths = [leaf_path(self._spec, int(leaves[row])) for row in rows]
        refs = sorted({ref for path in paths for ref in path})
        return measure_loss(
            material.run.anchor(),
            material.tokenizer,
            [material.corpus.documents[row].text for row in rows],
            paths,
            as_fetched(self._client.fetch_blocks(refs, dtype="float32")),
            self._spec,
            InfluenceConfig(seq_len=material.config.seq_len),
        )


def _destroy_id(state: DeletionState) -> str:
    return f"{state.job_id}-destroy"


def _summary(report: TransactionReport) -> dict[str, object]:
    return {
        "revision": report.revision,
        "slots_destroyed": report.num_slots_destroyed,
        "blocks": {str(change.ref): change.version_after for change in report.changes},
    }
