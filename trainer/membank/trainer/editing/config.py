"""How blocks are trained on new facts."""

from __future__ import annotations

from dataclasses import dataclass

from membank.trainer.training.schedule import check_range


@dataclass(frozen=True, kw_only=True, slots=True)
class EditConfig:
    """How one block is trained on the facts that are routed to it, and when that is enough.

    The defaults are measured on the demo (docs/editing.md).
    """

    learning_rate: float = 3e-3
    """Step size of Adam, > 0. It runs in the client; the bank's own optimizer has no part."""
    max_steps: int = 100
    """Steps after which training ends with what was best, >= 1."""
    check_every: int = 5
    """Steps between two looks at every fact and every guard, >= 1."""
    target_probability: float = 0.9
    """Training ends once each token of each target has at least this probability, in (0, 1), and
    the guards hold."""
    guard_weight: float = 1.0
    """Weight of the guards' loss beside that of the facts, >= 0."""
    guard_batch: int = 16
    """Guarded prompts drawn for a step, >= 1; all of them where there are fewer."""
    carried_each: int = 2
    """Wordings of a fact that are carried over to each other fact of the block that is stated alike,
    >= 0: these are trained to be answered as that fact is answered now."""
    carried_batch: int = 16
    """Carried prompts drawn for a step, >= 1."""
    carried_goal: float = 0.95
    """Share of the carried answers' tokens with which training may end, 0 to 1."""
    replay_batch: int = 4
    """Documents of the block's training text drawn for a step, >= 0."""
    guard_tokens: int = 8
    """Tokens of what a guarded prompt answered that are held to it, >= 1."""
    decided_probability: float = 0.5
    """A guard's token counts as kept if it is still the most likely one; those that had less than
    this probability before are not asked, in [0, 1)."""
    kept_goal: float = 1.0
    """Share of kept tokens with which training may end, 0 to 1."""
    least_kept: float = 0.95
    """Least share of kept tokens with which an edit may be swapped in, 0 to 1."""
    ending: str = "."
    """Text that ends a statement of the corpus; it is trained after each target, so that the answer
    is known to be over, before the end-of-text token."""
    max_attempts: int = 4
    """Times that an edit is made anew because its blocks were changed meanwhile, >= 1."""
    seed: int = 0
    """Seed of what is drawn, >= 0."""

    def __post_init__(self) -> None:
        for name in (
            "max_steps",
            "check_every",
            "guard_batch",
            "carried_batch",
            "guard_tokens",
            "max_attempts",
        ):
            check_range(name, getattr(self, name), 1, float("inf"), open_high=True)
        for name in ("guard_weight", "carried_each", "replay_batch", "seed"):
            check_range(name, getattr(self, name), 0, float("inf"), open_high=True)
        check_range("learning_rate", self.learning_rate, 1e-9, 10, open_high=False)
        check_range("target_probability", self.target_probability, 1e-9, 1, open_high=True)
        check_range("decided_probability", self.decided_probability, 0, 1, open_high=True)
        for name in ("carried_goal", "kept_goal", "least_kept"):
            check_range(name, getattr(self, name), 0, 1, open_high=False)
