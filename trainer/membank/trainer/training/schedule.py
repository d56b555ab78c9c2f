"""Learning rate schedules, as factors of a base rate."""

from __future__ import annotations

import math

from membank.wire.errors import InvalidArgumentError, Reason


def cosine_scale(step: int, num_steps: int, *, warmup_fraction: float, final_scale: float) -> float:
    """Return the factor of a step: a linear warm-up from 0, then half a cosine down.

    Parameters
    ----------
    step
        Number of the step, from 0.
    num_steps
        Steps of the whole run, at least 1.
    warmup_fraction
        Part of the run that warms up, in [0, 1).
    final_scale
        Factor that the end approaches, in [0, 1].
    """
    done = step / num_steps
    if done < warmup_fraction:
        # Never 0: a step without effect would still count in the moments.
        return (step + 1) / (warmup_fraction * num_steps + 1)
    part = (done - warmup_fraction) / (1 - warmup_fraction)
    return final_scale + (1 - final_scale) * 0.5 * (1 + math.cos(math.pi * part))


def check_range(name: str, value: float, low: float, high: float, *, open_high: bool) -> None:
    """Raise `InvalidArgumentError` unless low <= value <= high (< high where `open_high`)."""
    if low <= value < high or (value == high and not open_high):
        return
    accepted = f"[{low:g}, {high:g}{')' if open_high else ']'}"
    raise InvalidArgumentError(
        f"{name} is {value!r}; accepted: {accepted}",
        reason=Reason.BAD_CONFIG,
        metadata={"field": name, "value": str(value)},
    )
