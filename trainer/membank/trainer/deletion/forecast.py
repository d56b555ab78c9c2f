"""What deleting some documents would do: read from run and bank, nothing is changed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from membank.client import BankClient
from membank.trainer.corpus import NO_LEAF
from membank.trainer.deletion.config import DeletionConfig
from membank.trainer.deletion.folder import DeletionFolder, DeletionState, Phase
from membank.trainer.deletion.plan import DeletionPlan, TrainedDocuments, plan_deletion
from membank.trainer.deletion.retraining import Retraining, plan_retraining, seconds_per_step
from membank.trainer.finding import NamedDocument
from membank.trainer.finding.matching import match_documents
from membank.trainer.run import RunMaterial
from membank.wire.errors import FailedPreconditionError, InvalidArgumentError, Reason
from membank.wire.spec import BankSpec, BlockRef, BlockState

_MAX_DESCRIBED = 4096
"""Blocks that one call describes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DeletionForecast:
    """What deleting some documents takes, and what was named in vain."""

    folder: DeletionFolder
    """Where the deletion of these documents is kept."""
    state: DeletionState | None
    """How far it is, where it has begun and its plan still holds; None = it begins."""
    plan: DeletionPlan
    """What is to be done."""
    retraining: Retraining | None
    """What blocks are trained anew on; None where none is, or that is done."""
    unknown: tuple[str, ...]
    """What fits no document of the corpus, in words."""
    untrained: tuple[str, ...]
    """Documents of the corpus that the bank was not trained on, by name."""
    num_repeated: int
    """Documents of the corpus with the same text that were not named."""

    @property
    def recipe(self) -> str:
        """Digest of the training; empty where there is none."""
        return "" if self.retraining is None else self.retraining.fingerprint

    @property
    def is_done(self) -> bool:
        """Whether all of it was done before."""
        return self.state is not None and self.state.phase is Phase.DONE

    def to_json(self) -> dict[str, object]:
        """Return what a dry run says, as JSON-able values."""
        training = None
        if self.retraining is not None:
            training = {
                "num_steps": self.retraining.num_steps,
                "num_sequences": len(self.retraining.sequences),
                "num_tokens": self.retraining.config.num_tokens,
            }
        return {
            **self.plan.to_json(),
            "phase": None if self.state is None else self.state.phase.value,
            "training": training,
            "unknown": list(self.unknown),
            "untrained": list(self.untrained),
            "repeated": self.num_repeated,
        }


def forecast_deletion(
    client: BankClient,
    material: RunMaterial,
    documents: Sequence[NamedDocument],
    config: DeletionConfig,
) -> DeletionForecast:
    """Say what deleting documents from a bank takes.

    Parameters
    ----------
    client
        The served bank.
    material
        Its run.
    documents
        The documents, by text or name.
    config
        How to delete.

    Raises
    ------
    InvalidArgumentError
        None of them is in the corpus, or the bank was trained on none of them.
    FailedPreconditionError
        The bank belongs to another run, a block that is to be trained anew is withheld, or another
        deletion has begun to destroy and is not done.
    """
    spec = client.info().spec
    material.run.check_fingerprint(spec.fingerprint)
    matched = match_documents(documents, material.corpus)
    named = matched.distinct
    if not named:
        raise InvalidArgumentError(
            f"none of the documents is in corpus {material.corpus.name} of {material.run.path}; "
            f"the first: {matched.unknown[0]}",
            reason=Reason.BAD_ARGUMENT,
        )
    folder = DeletionFolder(material.run.deletion_dir / _digest(spec, material, named, config))
    _check_none_beside(folder, spec, material)
    state = folder.load()
    if state is not None and state.phase is not Phase.TRAINING:
        plan, retraining = state.plan, None  # the bank is not any more what it was planned for
    else:
        plan = _plan(client, spec, material, named, config)
        retraining = _retraining(plan, material) if plan.retrained else None
        recipe = "" if retraining is None else retraining.fingerprint
        if state is not None and (state.plan, state.recipe) != (plan, recipe):
            state = None  # the blocks or the run have changed meanwhile
    removed = set(plan.removed)
    return DeletionForecast(
        folder=folder,
        state=state,
        plan=plan,
        retraining=retraining,
        unknown=matched.unknown,
        untrained=tuple(
            material.corpus.documents[row].doc_id for row in named if row not in removed
        ),
        num_repeated=_num_repeated(material, named),
    )


def seconds_of(
    forecast: DeletionForecast, material: RunMaterial, spec: BankSpec, config: DeletionConfig
) -> float:
    """Return about how long the training of a forecast takes here, measured on a few steps.

    Parameters
    ----------
    forecast
        What is to be done.
    material
        The run.
    spec
        The bank.
    config
        How to delete.
    """
    if forecast.retraining is None:
        return 0.0
    torch.set_num_threads(config.num_threads)
    pace = seconds_per_step(material.run.anchor(), spec, forecast.retraining)
    return pace * forecast.retraining.num_steps


def states_of(
    client: BankClient, refs: Iterable[BlockRef]
) -> dict[BlockRef, tuple[int, BlockState]]:
    """Return version and state of blocks."""
    wanted = list(refs)
    return {
        block.topic.ref: (block.topic.version, block.topic.state)
        for start in range(0, len(wanted), _MAX_DESCRIBED)
        for block in client.describe(wanted[start : start + _MAX_DESCRIBED])
    }


def _check_none_beside(folder: DeletionFolder, spec: BankSpec, material: RunMaterial) -> None:
    # Its documents are noted as deleted and may not be, its new blocks were trained on documents that
    # this one is to delete: no plan beside it can be right.
    found = folder.unfinished_beside(spec.bank_id)
    if found is None:
        return
    path, other = found
    documents = material.corpus.documents
    names = ", ".join(documents[row].doc_id for row in other.plan.removed[:3])
    raise FailedPreconditionError(
        f"another deletion is in phase {other.phase} and not done: of {len(other.plan.removed)} "
        f"documents, {names} the first of them; give its command again, and it goes on. Only if its "
        f"blocks were put in order otherwise, remove {path}",
        reason=Reason.TRANSACTION_IN_PROGRESS,
        metadata={"path": str(path)},
    )


def _plan(
    client: BankClient,
    spec: BankSpec,
    material: RunMaterial,
    named: Sequence[int],
    config: DeletionConfig,
) -> DeletionPlan:
    leaves = {int(material.leaf_N[row]) for row in named} - {NO_LEAF}
    tops = {spec.ancestor(BlockRef(spec.num_levels, leaf), 1) for leaf in leaves}
    blocks: Mapping[BlockRef, tuple[int, BlockState]] = states_of(
        client, (ref for top in sorted(tops) for ref in spec.subtree(top))
    )
    trained = TrainedDocuments(leaf_N=material.leaf_N, num_tokens_N=material.num_tokens_N)
    return plan_deletion(spec, trained, named, blocks, config)


def _retraining(plan: DeletionPlan, material: RunMaterial) -> Retraining:
    return plan_retraining(
        plan,
        material.leaf_N,
        material.tokens,
        eot_id=material.tokenizer.eot_id,
        run=material.config,
        run_leaf_N=material.run_leaf_N,
    )


def _digest(
    spec: BankSpec, material: RunMaterial, named: Sequence[int], config: DeletionConfig
) -> str:
    """Name a deletion by what is asked: the same command goes on with the same one."""
    names = sorted(material.corpus.documents[row].doc_id for row in named)
    body = json.dumps([spec.bank_id, names, config.threshold, config.scope.value])
    return hashlib.sha256(body.encode()).hexdigest()[:16]


def _num_repeated(material: RunMaterial, named: Sequence[int]) -> int:
    documents = material.corpus.documents
    texts = {" ".join(documents[row].text.split()) for row in named}
    rows = set(named)
    return sum(
        row not in rows and " ".join(document.text.split()) in texts
        for row, document in enumerate(documents)
    )
