"""The configuration of a whole run: corpus, tree, anchor, bank and both stages of training."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace

from membank.trainer.model import AnchorConfig
from membank.trainer.training import AnchorStageConfig, MemoryStageConfig
from membank.trainer.tree import TreeConfig
from membank.wire.errors import InvalidArgumentError, Reason
from membank.wire.spec import BankSpec, LevelSpec, OptimizerSpec


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """Everything that decides what a run computes; saved with the run."""

    name: str
    """Name of the run and of its bank."""
    corpus: str
    """A carried corpus ("fast", "demo", "full") or the path or URL of a JSONL file."""
    vocab_size: int
    """Tokens of the byte-level BPE vocabulary that is trained on the corpus."""
    seq_len: int
    """Tokens of a training sequence."""
    anchor: AnchorConfig
    """Shape of the anchor; its vocabulary is replaced by the tokenizer's."""
    tree: TreeConfig
    """Shape of the topic tree."""
    embedder: str = "lsa"
    """What the tree is fitted on: "lsa", "minilm", or "minilm:PATH" for a local copy."""
    block_widths: tuple[int, ...]
    """Width r of the blocks of each level, coarsest first."""
    learning_rates: tuple[float, ...]
    """Learning rate of the blocks of each level, coarsest first."""
    generic_learning_rate: float
    """Learning rate of the generic memory (the control)."""
    optimizer: OptimizerSpec = field(default_factory=OptimizerSpec)
    """Optimizer of the blocks."""
    init_std: float = 0.02
    """Standard deviation of the blocks' initial gate and up parts."""
    asked_relations: tuple[str, ...] = ()
    """Relations of the corpus that are asked in evaluation."""
    only_asked_subtrees: bool = False
    """True trains only those level-1 subtrees that hold the documents of asked relations; the
    control trains on exactly the same sequences."""
    stage1: AnchorStageConfig
    """How the anchor is trained."""
    stage2: MemoryStageConfig
    """How the memories are trained."""
    num_partitions: int = 4
    """Partitions of the bank."""
    seed: int = 0
    """Seed of packing, of the anchor's start and of random choices in evaluation."""

    def __post_init__(self) -> None:
        depth = len(self.tree.fan_outs)
        for name in ("block_widths", "learning_rates"):
            given = len(getattr(self, name))
            if given != depth:
                raise InvalidArgumentError(
                    f"{name} has {given} levels and the tree {depth}; they must be equal",
                    reason=Reason.BAD_CONFIG,
                )

    def bank_spec(self, *, fingerprint: str) -> BankSpec:
        """Return the spec of this run's bank.

        Parameters
        ----------
        fingerprint
            Digest of anchor and tokenizer that the blocks are trained for.
        """
        levels = tuple(
            LevelSpec(fan_out=fan_out, block_width=width, learning_rate=rate)
            for fan_out, width, rate in zip(
                self.tree.all_fan_outs, self.block_widths, self.learning_rates, strict=True
            )
        )
        return BankSpec(
            name=self.name,
            num_layers=self.anchor.num_layers,
            width=self.anchor.width,
            levels=levels,
            optimizer=self.optimizer,
            num_partitions=self.num_partitions,
            # Below level 2 a subtree stays together; level-1 blocks, which every step touches,
            # and their children are spread, so that one busy topic is not one busy shard.
            partition_level=min(2, len(levels)),
            init_seed=self.seed,
            init_std=self.init_std,
            fingerprint=fingerprint,
        )

    def with_vocab_size(self, vocab_size: int) -> RunConfig:
        """Return the configuration with the tokenizer's real vocabulary."""
        return replace(self, anchor=replace(self.anchor, vocab_size=vocab_size))

    def to_json(self) -> dict[str, object]:
        """Return the configuration as JSON-able values."""
        return asdict(self)
