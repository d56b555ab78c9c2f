"""Sets the results of a run against those of an earlier one."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from membank.wire.errors import InvalidArgumentError, Reason


@dataclass(frozen=True, kw_only=True, slots=True)
class Compared:
    """One figure now and then."""

    row: str
    """Name of the row."""
    figure: str
    """Name of the figure, with its unit."""
    now: float
    """Its value in this run."""
    before: float
    """Its value in the earlier run."""

    @property
    def ratio(self) -> float:
        """Now to before; infinite where it was 0 before and is not now."""
        if self.before:
            return self.now / self.before
        return 1.0 if not self.now else float("inf")

    def to_json(self) -> dict[str, object]:
        """Return the comparison as a JSON document."""
        ratio = self.ratio if self.before else None
        return {
            "row": self.row, "figure": self.figure, "now": self.now, "before": self.before,
            "ratio": ratio,
        }  # fmt: skip


def read_results(path: Path) -> dict[str, Any]:
    """Read a file of results.

    Raises
    ------
    InvalidArgumentError
        If it cannot be read, or holds no results.
    """
    try:
        document: Any = json.loads(path.read_text(encoding="utf-8"))
    except OSError as err:
        raise InvalidArgumentError(f"{path} cannot be read: {err.strerror}") from err
    except ValueError as err:
        raise InvalidArgumentError(f"{path} is no JSON: {err}") from err
    rows = document.get("rows") if isinstance(document, dict) else None
    if not isinstance(rows, list) or not all(isinstance(r, dict) and "name" in r for r in rows):
        raise InvalidArgumentError(
            f"{path} holds no results; give a file that `membank bench ... --json` wrote",
            reason=Reason.BAD_ARGUMENT,
        )
    return dict(document)


def compare(
    rows: Sequence[Mapping[str, Any]], before: Sequence[Mapping[str, Any]]
) -> list[Compared]:
    """Compare the figures that rows of the same name have in both runs.

    Parameters
    ----------
    rows
        Rows of this run, as JSON documents.
    before
        Rows of the earlier one.

    Returns
    -------
    list of Compared
        In the order of `rows`; rows and figures that one of the runs lacks are left out.
    """
    earlier = {row["name"]: _figures(row) for row in before}
    return [
        Compared(row=row["name"], figure=name, now=now, before=earlier[row["name"]][name])
        for row in rows
        for name, now in _figures(row).items()
        if name in earlier.get(row["name"], {})
    ]


def differences(document: Mapping[str, Any], before: Mapping[str, Any]) -> list[str]:
    """Say in what the runs differ beside what was measured: machine, versions, configuration.

    Returns
    -------
    list of str
        One line for each difference, ``NAME: BEFORE -> NOW``. The commit, the moment and the load
        of the machine are left out.
    """
    parts = (
        (part, document.get(part) or {}, before.get(part) or {})
        for part in ("machine", "versions", "config")
    )
    return [
        f"{part} {name}: {then.get(name)} -> {now.get(name)}"
        for part, now, then in parts
        for name in sorted({*now, *then} - {"load_5_minutes"})
        if now.get(name) != then.get(name)
    ]


def _figures(row: Mapping[str, Any]) -> dict[str, float]:
    found = row.get("figures")
    if not isinstance(found, dict):
        # A row that sets two things side by side.
        found = {name: row.get(name) for name in ("ours", "raw", "ratio")}
    return {name: float(value) for name, value in found.items() if isinstance(value, int | float)}
