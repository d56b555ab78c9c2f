"""The ratios that matter, each with its target."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from benchmarks.peers.contestant import Reach
from benchmarks.peers.rounds import Results, Samples

_VIEWS = (
    "membank reads the whole block to check its CRC, in this time; Ray maps it and reads nothing, so "
    "its time does not depend on the size"
)


class Figure(StrEnum):
    """What a ratio's value is."""

    SPEED = "speed, ours / theirs"
    """How many times as fast we are: more is better."""
    COST = "time, ours / theirs"
    """How many times as long we take: less is better."""
    SECONDS = "seconds, p50"
    """Our own time, beside nobody's: less is better."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rule:
    """One ratio: who is compared with whom at what."""

    name: str
    """Name, which says what it is."""
    task: str
    """Task whose samples it compares."""
    ours: str
    """Contestant."""
    others: tuple[str, ...] = ()
    """Contestants of whom the fastest one, by the median of its rounds, is compared with."""
    figure: Figure = Figure.SPEED
    """What is compared."""
    limit: float | None = None
    """Target: at least that for a speed, at most that otherwise; None = for information."""
    note: str = ""
    """What to know before one quotes it; empty = nothing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Ratio:
    """What became of a rule."""

    rule: Rule
    """The rule."""
    other: str = ""
    """Who was compared with; empty = nobody."""
    rounds: tuple[float, ...] = ()
    """The value in each round."""
    reason: str = ""
    """Why there is no value; empty = there is one."""

    @property
    def value(self) -> float | None:
        """Median over the rounds, which a slow moment of the machine hardly moves."""
        return statistics.median(self.rounds) if self.rounds else None

    @property
    def target(self) -> str | None:
        """The target in words, such as ``>= 0.75``."""
        if self.rule.limit is None:
            return None
        return f"{'>=' if self.rule.figure is Figure.SPEED else '<='} {self.rule.limit:g}"

    @property
    def passed(self) -> bool | None:
        """Whether the target is reached; None where there is none, or no value."""
        if self.rule.limit is None or self.value is None:
            return None
        if self.rule.figure is Figure.SPEED:
            return self.value >= self.rule.limit
        return self.value <= self.rule.limit

    def to_json(self) -> dict[str, object]:
        """Return the ratio as a JSON document."""
        return {
            "name": self.rule.name,
            "task": self.rule.task,
            "figure": self.rule.figure.value,
            "ours": self.rule.ours,
            "other": self.other or None,
            "value": self.value,
            "min": min(self.rounds, default=None),
            "max": max(self.rounds, default=None),
            "target": self.target,
            "passed": self.passed,
            "not_run": self.reason or None,
            "note": self.rule.note or None,
            "rounds": list(self.rounds),
        }


def rules(reaches: Mapping[str, Reach], large: str, small: str) -> list[Rule]:
    """Return all ratios.

    Parameters
    ----------
    reaches
        How far each contestant reaches.
    large, small
        Contestants that are banks of many and of few leaves.
    """
    peers = {n: r for n, r in reaches.items() if not n.startswith("membank")}
    networked = tuple(n for n, reach in peers.items() if reach is Reach.NETWORK)
    copying = tuple(n for n, reach in peers.items() if reach in {Reach.NETWORK, Reach.SAME_HOST})
    grpc, same_host = "membank grpc", "membank same-host"
    fetches = [
        *(_fetch(grpc, s, "fastest-networked-peer", networked, 1.0) for s in ("8mb", "32mb")),
        *(_fetch(grpc, s, "raw-tcp", ("raw tcp",), 0.75) for s in ("8mb", "32mb")),
        *(_fetch(same_host, s, "memcpy", ("memcpy",), 0.6) for s in ("8mb", "36mb")),
        *(_fetch(same_host, s, "fastest-copying-peer", copying, 3.0) for s in ("8mb", "36mb")),
    ]
    views = [
        replace(_fetch("membank view", s, "ray-view", ("ray view",), None), note=_VIEWS)
        for s in ("8mb", "36mb")
    ]
    return [
        *fetches,
        *views,
        Rule(
            name="grpc-push-4m-to-fastest-networked-peer",
            task="push-4m",
            ours=grpc,
            others=networked,
            limit=2.0,
        ),
        Rule(
            name="same-host-push-4m-to-fastest-peer",
            task="push-4m",
            ours=same_host,
            others=copying,
            limit=2.0,
        ),
        Rule(
            name="same-host-push-4m-to-bare-kernel",
            task="push-4m",
            ours=same_host,
            others=("fused adamw",),
            limit=0.5,
        ),
        Rule(
            name="grpc-conditional-fetch-p50",
            task="conditional-fetch",
            ours=large,
            figure=Figure.SECONDS,
            limit=0.002,
        ),
        Rule(
            name="grpc-fetch-1000x100kb-to-redis-mget",
            task="fetch-1000x100kb",
            ours=grpc,
            others=("redis tcp",),
            limit=0.8,
        ),
        Rule(
            name="path-fetch-many-leaves-to-few",
            task="path-fetch",
            ours=large,
            others=(small,),
            figure=Figure.COST,
            limit=1.1,
        ),
    ]


def judge(rule: Rule, results: Results) -> Ratio:
    """Return the ratio that `rule` names, or why there is none."""
    samples = results.get(rule.task, {})
    ours = samples.get(rule.ours)
    if ours is None:
        return Ratio(rule=rule, reason=f"{rule.ours} was not run")
    if rule.figure is Figure.SECONDS:
        return Ratio(rule=rule, rounds=ours.costs_s)
    there = [name for name in rule.others if name in samples]
    if not there:
        return Ratio(rule=rule, reason=f"none of {', '.join(rule.others)} was run")
    other = min(there, key=lambda name: samples[name].cost_s)
    return Ratio(rule=rule, other=other, rounds=_by_round(rule.figure, ours, samples[other]))


def tally(ratios: Sequence[Mapping[str, object]]) -> dict[str, int]:
    """Count the ratios with a target, as JSON documents: reached, missed and without a value."""
    verdicts = [ratio["passed"] for ratio in ratios if ratio["target"]]
    words = {"reached": True, "missed": False, "not_run": None}
    return {word: verdicts.count(verdict) for word, verdict in words.items()}


def changes(
    ratios: Sequence[Mapping[str, object]], baseline: Sequence[Mapping[str, object]]
) -> list[tuple[str, float, float]]:
    """Return name, earlier and present value of each ratio that both have."""
    earlier = {ratio["name"]: ratio["value"] for ratio in baseline}
    return [
        (str(ratio["name"]), before, now)
        for ratio in ratios
        if isinstance(before := earlier.get(ratio["name"]), float)
        and isinstance(now := ratio["value"], float)
    ]


def _fetch(ours: str, size: str, than: str, others: tuple[str, ...], limit: float | None) -> Rule:
    return Rule(
        name=f"{ours.removeprefix('membank ')}-fetch-{size}-to-{than}",
        task=f"fetch-{size}",
        ours=ours,
        others=others,
        limit=limit,
    )


def _by_round(figure: Figure, ours: Samples, theirs: Samples) -> tuple[float, ...]:
    pairs = zip(ours.costs_s, theirs.costs_s, strict=True)
    if figure is Figure.SPEED:
        return tuple(their_s / our_s for our_s, their_s in pairs)
    return tuple(our_s / their_s for our_s, their_s in pairs)
