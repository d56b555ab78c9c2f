"""What the removal study runs: sizes, lengths, topics. Named presets are functions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from types import MappingProxyType

from membank.trainer.run import RunConfig, named_run
from membank.trainer.training.schedule import check_range
from membank.wire.errors import InvalidArgumentError, Reason

METHODS = ("gradient ascent", "GradDiff", "NPO")
"""The baselines, in the order in which they are shown."""


@dataclass(frozen=True, kw_only=True, slots=True)
class UnlearningConfig:
    """How the baselines unlearn; TOFU's setting at the learning rate of a small model."""

    methods: tuple[str, ...] = METHODS
    """Which of `METHODS` are run."""
    epochs: int = 5
    """Passes over the forget documents, at least 1."""
    shown_epochs: tuple[int, ...] = (1, 3, 5)
    """Epochs after which the model is measured; the last of them counts."""
    learning_rate: float = 1e-4
    """Learning rate of AdamW, constant, > 0."""
    batch_size: int = 16
    """Forget documents of a step, and as many retained ones where the method takes them."""
    retain_weight: float = 1.0
    """Lambda: weight of the retained documents' loss in GradDiff and NPO, >= 0."""
    beta: float = 0.1
    """Beta of NPO, > 0."""

    def __post_init__(self) -> None:
        if unknown := set(self.methods) - set(METHODS):
            raise InvalidArgumentError(
                f"unknown methods {sorted(unknown)}; use {', '.join(METHODS)}",
                reason=Reason.BAD_CONFIG,
            )
        if not self.shown_epochs or not 1 <= max(self.shown_epochs) <= self.epochs:
            raise InvalidArgumentError(
                f"shown_epochs is {self.shown_epochs}; name epochs of 1..{self.epochs}",
                reason=Reason.BAD_CONFIG,
            )
        for name in ("learning_rate", "beta"):
            check_range(name, getattr(self, name), 1e-12, float("inf"), open_high=True)


@dataclass(frozen=True, kw_only=True, slots=True)
class RelearningConfig:
    """How somebody tries to bring the knowledge back: fine-tuning on a part of it."""

    share: float = 0.2
    """Part of the forgotten facts whose documents are trained on, in (0, 1); the curve is of the
    other facts."""
    steps: tuple[int, ...] = (0, 5, 15, 30, 60)
    """Steps at which the curve is measured, ascending, from 0."""
    learning_rate: float = 1e-3
    """Learning rate of AdamW, constant, > 0."""
    batch_size: int = 16
    """Documents of a step."""
    max_facts: int = 100
    """Facts that a curve is measured on at most, at least 1."""

    def __post_init__(self) -> None:
        check_range("share", self.share, 1e-6, 1, open_high=True)
        if not self.steps or self.steps[0] != 0 or list(self.steps) != sorted(set(self.steps)):
            raise InvalidArgumentError(
                f"steps is {self.steps}; give ascending steps from 0", reason=Reason.BAD_CONFIG
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class RemovalConfig:
    """Everything that decides what the study computes; saved with it."""

    run: RunConfig
    """Corpus, tokenizer, tree, anchor and bank. Lengths of training are those below, in passes: a
    model that is trained without a topic sees the rest as often."""
    topics: tuple[str, ...] = ("elements", "capitals", "economy")
    """Coarsest labels of the corpus to remove, one at a time. A label stands for the level-1
    clusters whose documents are mostly its own."""
    anchor_passes: float = 7.0
    """Passes of stage 1 over the packed documents, > 0."""
    memory_passes: float = 20.0
    """Passes of stage 2 over those of the topics, > 0; the dense model's second stage too."""
    held_out_share: float = 0.15
    """Part of all documents that no model is trained on, in (0, 1): what members are told from."""
    num_wrong: int = 5
    """Wrong answers of a fact, at least 1: the answers of its neighbours."""
    max_facts: int = 250
    """Facts of a topic at most, evenly spread over all: those that are asked once it is removed."""
    max_documents: int = 120
    """Documents of a topic that are scored at most, trained and held-out ones apart."""
    max_retained_facts: int = 60
    """Facts of each other topic that utility is measured on at most."""
    unlearning: UnlearningConfig = field(default_factory=UnlearningConfig)
    """The baselines."""
    relearning: RelearningConfig = field(default_factory=RelearningConfig)
    """The attack."""
    num_shards: int = 2
    """Shards of the service that deletes."""

    def __post_init__(self) -> None:
        check_range("held_out_share", self.held_out_share, 1e-6, 1, open_high=True)
        for name in ("anchor_passes", "memory_passes"):
            check_range(name, getattr(self, name), 1e-6, float("inf"), open_high=True)
        for name in ("num_wrong", "max_facts", "max_documents", "max_retained_facts", "num_shards"):
            check_range(name, getattr(self, name), 1, float("inf"), open_high=True)
        if len(set(self.topics)) < 2 or len(set(self.topics)) != len(self.topics):
            raise InvalidArgumentError(
                f"topics is {self.topics}; name at least two, each once: one is removed and the "
                "others show what it costs",
                reason=Reason.BAD_CONFIG,
            )

    def to_json(self) -> dict[str, object]:
        """Return the configuration as JSON-able values."""
        return asdict(self)


def full() -> RemovalConfig:
    """Return the study that is kept."""
    return RemovalConfig(run=replace(named_run("fast"), name="removal"))


def quick() -> RemovalConfig:
    """Return a small study that only shows that everything works; no claim rests on it."""
    base = full()
    return replace(
        base,
        topics=("elements", "economy"),
        anchor_passes=0.5,
        memory_passes=1.0,
        max_facts=24,
        max_documents=24,
        max_retained_facts=12,
        unlearning=UnlearningConfig(epochs=1, shown_epochs=(1,)),
        relearning=RelearningConfig(steps=(0, 4)),
    )


STUDIES: Mapping[str, Callable[[], RemovalConfig]] = MappingProxyType(
    {"full": full, "quick": quick}
)
"""Every named study."""
