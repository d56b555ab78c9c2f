"""What comes out of a campaign."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from campaign_model import Wrong


@dataclass(kw_only=True)
class Tally:
    """What came out of the kills of one kind of storage."""

    kills: int = 0
    """Kills, of one process or of all at once; a start that is killed too counts as another one."""
    restarts: int = 0
    """Times that, after one or two kills, every request was settled, every block compared and every
    file checked."""
    stops: int = 0
    """The same after a clean stop."""
    victims: Counter[str] = field(default_factory=Counter)
    """Kills by who was killed."""
    banks: int = 0
    """Banks."""
    checks: int = 0
    """Runs of the check of a whole bank."""
    seconds: float = 0.0
    """Seconds in all."""
    phases: Counter[str] = field(default_factory=Counter)
    """Kills by what a thread of the service was at; one kill may hit several."""
    triggers: Counter[str] = field(default_factory=Counter)
    """Kills by how they came about."""
    calls: Counter[str] = field(default_factory=Counter)
    """Kills at a call of the storage, by the call."""
    durability: Counter[str] = field(default_factory=Counter)
    """Kills by what was promised."""
    machines: int = 0
    """Starts without the journals and locks of the life before, as on another machine."""
    machines_lost: int = 0
    """Machines that were lost with the journals of which copies were in the bank's storage."""
    shipped: int = 0
    """Gradients that were acknowledged in the seconds before that, beside all others."""
    gradients_gone: int = 0
    """Those of them that are gone, as promised."""
    requests: Counter[str] = field(default_factory=Counter)
    """What became of requests."""
    wrong: Counter[Wrong] = field(default_factory=Counter)
    """Failures."""
    failures: list[dict[str, object]] = field(default_factory=list)
    """What exactly failed, and where the evidence lies."""

    @property
    def acknowledged(self) -> int:
        """Updates that were acknowledged."""
        return self.requests["update acknowledged"]

    @property
    def is_vacuous(self) -> bool:
        """Whether so little was acknowledged that hardly anything could be lost."""
        return self.acknowledged <= self.kills

    def to_json(self) -> dict[str, object]:
        """Return the figures, JSON-able."""
        return {
            "kills": self.kills,
            "restarts": self.restarts,
            "acknowledged": self.acknowledged,
            **{kind.value: self.wrong[kind] for kind in Wrong},
            "clean_stops": self.stops,
            "banks": self.banks,
            "fsck_runs": self.checks,
            "seconds": round(self.seconds, 1),
            "kills_by_phase": _ordered(self.phases),
            "kills_by_victim": _ordered(self.victims),
            "kills_by_trigger": _ordered(self.triggers),
            "kills_by_call": _ordered(self.calls),
            "kills_by_durability": _ordered(self.durability),
            "starts_elsewhere": self.machines,
            "machines_lost": self.machines_lost,
            "gradients_before_that": self.shipped,
            "gradients_gone_with_them": self.gradients_gone,
            "requests": _ordered(self.requests),
            "failures": self.failures,
        }

    def summary(self) -> str:
        """Return the figures that matter, in one line."""
        wrong = ", ".join(f"{self.wrong[kind]} {kind.value}" for kind in Wrong)
        vacuous = "; TOO FEW TO PROVE ANYTHING" if self.is_vacuous else ""
        return (
            f"{self.kills} kills, {self.restarts} restarts looked at, "
            f"{self.acknowledged} updates acknowledged: {wrong}{vacuous}"
        )


def _ordered(counter: Counter[str]) -> dict[str, int]:
    return dict(sorted(counter.items()))
