"""Results of single stages, each kept once it is there and not computed again."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from membank.trainer.training.files import read_json, write_json
from membank.wire.errors import FailedPreconditionError, Reason


class StageStore:
    """A directory with one JSON file per finished stage.

    Parameters
    ----------
    folder
        The directory; it is made.
    config
        What the results follow from, JSON-able.

    Raises
    ------
    FailedPreconditionError
        The directory holds results of another configuration.
    """

    def __init__(self, folder: Path, config: Mapping[str, object]) -> None:
        self.folder = folder
        # Through JSON, in which tuples and lists are one.
        wanted = json.loads(json.dumps(config, default=str))
        found = read_json(folder / "config.json")
        if found is not None and found != wanted:
            raise FailedPreconditionError(
                f"{folder} holds a study of another configuration; give another --run, or remove it",
                reason=Reason.BAD_CONFIG,
                metadata={"run": str(folder)},
            )
        write_json(folder / "config.json", wanted)

    def once(self, name: str, compute: Callable[[], Mapping[str, object]]) -> dict[str, Any]:
        """Return the result of a stage, computed unless an earlier run did.

        Parameters
        ----------
        name
            Name of the stage, such as ``seed-0/elements/delete``.
        compute
            Computes it; JSON-able.
        """
        file = self.folder / f"{name}.json"
        found = read_json(file)
        if found is None:
            write_json(file, compute())
            found = read_json(file)
            assert found is not None  # just written
        return found
