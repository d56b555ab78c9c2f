"""What a demo must show: facts about the service that must hold, and goals that recall may miss."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """One line of the acceptance list."""

    name: str
    """Name for programs."""
    what: str
    """What is claimed."""
    ok: bool
    """Whether it was seen."""
    seen: str
    """What was seen."""
    must: bool
    """True for a property of the service, whose failure is a defect; False for a goal of learning
    that more training may reach."""


def service_checks(document: Mapping[str, Any], results: Mapping[str, Any]) -> list[Check]:
    """Return the checks of operations: what is deleted is gone, all else is untouched.

    Parameters
    ----------
    document
        The report so far.
    results
        Results of the steps ``before``, ``hot_operations``, ``delete`` and ``import``.
    """
    before, deleted = results["before"], results["delete"]["fingerprints"]
    gone = {ref for ref, (state, _) in deleted.items() if state == "DELETED"}
    kept = {ref for ref in before if ref not in gone}
    untouched = sum(before[ref] == deleted[ref] for ref in kept)
    elements = document["after_delete"]["recall"]["elements"]
    capitals = document["recall"]["capitals"], document["after_delete"]["recall"]["capitals"]
    hot = results["hot_operations"]
    return [
        _must("hot_swap", "a swapped block changes the answer at once, swapping back restores it",
              hot["swap"], "while serving"),
        _must("withhold", "a withheld topic ends the path; restored, it answers as before",
              hot["withhold"], "while serving"),
        _must("deleted", "every block of the deleted topics is gone",
              results["delete"]["deleted"] and bool(gone), f"{len(gone)} blocks"),
        _must("others_untouched", "all other blocks are bit-identical after the deletion",
              untouched == len(kept), f"{untouched} of {len(kept)}"),
        _must("elements_gone", "after deletion, fetched recall of elements is the anchor's",
              elements["fetched"] == elements["anchor"],
              f"{_pct(elements['fetched'])} and {_pct(elements['anchor'])}"),
        _must("capitals_stay", "after deletion, recall of capitals is what it was",
              capitals[0] == capitals[1],
              f"{_pct(capitals[0]['fetched'])} and {_pct(capitals[1]['fetched'])}"),
        _must("import_bit_identical", "after import, blocks, moments, labels and centroids are back",
              document["import_bit_identical"], "compared bit by bit"),
        _must("import_recall", "after import, recall is what it was",
              document["recall"] == document["after_import"]["recall"], "every condition"),
    ]  # fmt: skip


def recall_goals(recall: Mapping[str, Mapping[str, float]]) -> list[Check]:
    """Return the goals of learning, for elements; nothing is claimed for a fast demo."""
    elements = recall["elements"]
    fetched, anchor, generic = (elements[name] for name in ("fetched", "anchor", "generic"))
    return [
        _goal("recall_expected", "fetched recall of atomic numbers is at least 60 %",
              fetched >= 0.60, _pct(fetched)),
        _goal("recall_goal", "... and at least 83 %, the paper's figure for its rarest bucket",
              fetched >= 0.83, _pct(fetched)),
        _goal("above_generic", "at least 40 points above the generic memory",
              fetched - generic >= 0.40, f"{_pct(fetched)} and {_pct(generic)}"),
        _goal("above_anchor", "at least 40 points above the anchor",
              fetched - anchor >= 0.40, f"{_pct(fetched)} and {_pct(anchor)}"),
        _goal("random_near_anchor", "a random block is at most 5 points above the anchor",
              elements["random"] <= anchor + 0.05, f"{_pct(elements['random'])} and {_pct(anchor)}"),
    ]  # fmt: skip


def _must(name: str, what: str, ok: bool, seen: str) -> Check:
    return Check(name=name, what=what, ok=bool(ok), seen=seen, must=True)


def _goal(name: str, what: str, ok: bool, seen: str) -> Check:
    return Check(name=name, what=what, ok=bool(ok), seen=seen, must=False)


def _pct(share: float) -> str:
    return f"{100 * share:.1f} %"
