"""Files of steps: one JSON object a line, applied as one transaction."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np

from membank.client import Transaction
from membank.wire.errors import InvalidArgumentError
from membank.wire.spec import Array, BlockRef

T = TypeVar("T")

Resolve = Callable[[str], BlockRef]
"""Returns the block or topic that a text names."""

_KINDS = ("swap", "copy", "blend", "scale", "zero", "withhold", "restore", "delete", "place")


def add_steps(transaction: Transaction, path: Path, resolve: Resolve) -> None:
    """Add the steps of a file to a transaction.

    Parameters
    ----------
    transaction
        Takes the steps.
    path
        The file; docs/transactions.md has its format. Empty lines are left out. Files that it names
        are looked for beside it.
    resolve
        Returns the block or topic that a text names.

    Raises
    ------
    InvalidArgumentError
        If the file, or one that it names, cannot be read, or a line is no step; the message has the
        number of the line.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as err:
        raise InvalidArgumentError(f"{path} cannot be read: {err}") from err
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            fields = _Fields.of(line, path.parent, resolve)
            _add(transaction, fields)
            fields.require_all_taken()
        except InvalidArgumentError as err:
            raise InvalidArgumentError(
                f"{path}:{number}: {err}", reason=err.reason, metadata=err.metadata
            ) from err


def load_array(path: Path) -> Array:
    """Read an array from a .npy file.

    Raises
    ------
    InvalidArgumentError
        If it is none.
    """
    try:
        array: Array = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as err:
        raise InvalidArgumentError(f"{path} is not a readable .npy file: {err}") from err
    return array


@dataclass(slots=True)
class _Fields:
    """The fields of one line, which must all be taken."""

    left: dict[str, object]
    folder: Path
    resolve: Resolve

    @classmethod
    def of(cls, line: str, folder: Path, resolve: Resolve) -> _Fields:
        try:
            left = json.loads(line)
        except ValueError as err:
            raise InvalidArgumentError(f"it is no JSON: {err}") from err
        if not isinstance(left, dict):
            raise InvalidArgumentError('it is no JSON object; write {"step": "zero", "block": ...}')
        return cls(left, folder, resolve)

    def text(self, name: str) -> str:
        return self._required(name, self.maybe(name, str, "a text"))

    def number(self, name: str) -> float:
        if type(self.left.get(name)) is int:
            return float(self._required(name, self.maybe(name, int, "a number")))
        return self._required(name, self.maybe(name, float, "a number"))

    def ref(self, name: str) -> BlockRef:
        return self.resolve(self.text(name))

    def array(self, name: str) -> Array:
        return load_array(self.folder / self.text(name))

    def version(self, name: str) -> int | None:
        return self.maybe(name, int, "a version")

    def flag(self, name: str) -> bool:
        return bool(self.maybe(name, bool, "true or false"))

    def maybe(self, name: str, kind: type[T], what: str) -> T | None:
        """Take a field that may be left out."""
        value = self.left.pop(name, None)
        # By its very type: true is an int to Python.
        if value is not None and type(value) is not kind:
            raise InvalidArgumentError(f"{name} is {value!r}; it must be {what}")
        return value

    def is_null(self, name: str) -> bool:
        """Take a field that is there and null."""
        return name in self.left and self.left[name] is None and self.left.pop(name) is None

    def require_all_taken(self) -> None:
        if self.left:
            raise InvalidArgumentError(f"the step has no field {next(iter(self.left))!r}")

    @staticmethod
    def _required(name: str, value: T | None) -> T:
        if value is None:
            raise InvalidArgumentError(f"the step needs a field {name!r}")
        return value


def _add(transaction: Transaction, fields: _Fields) -> None:
    match kind := fields.text("step"):
        case "swap":
            transaction.swap(
                fields.ref("block"),
                fields.array("weights"),
                expected_version=fields.version("expect_version"),
            )
        case "copy":
            transaction.copy(
                fields.ref("from"),
                fields.ref("to"),
                expected_version=fields.version("expect_version"),
                expected_source_version=fields.version("expect_from_version"),
            )
        case "blend":
            transaction.blend(
                fields.ref("block"),
                fields.ref("with"),
                share=fields.number("share"),
                expected_version=fields.version("expect_version"),
                expected_other_version=fields.version("expect_with_version"),
            )
        case "scale":
            transaction.scale(
                fields.ref("block"),
                fields.number("by"),
                expected_version=fields.version("expect_version"),
            )
        case "zero":
            transaction.zero(fields.ref("block"), expected_version=fields.version("expect_version"))
        case "withhold":
            transaction.withhold(fields.ref("topic"), only_block=fields.flag("only_block"))
        case "restore":
            transaction.restore(fields.ref("topic"), only_block=fields.flag("only_block"))
        case "delete":
            transaction.delete(fields.ref("topic"), only_block=fields.flag("only_block"))
        case "place":
            _place(transaction, fields)
        case _:
            raise InvalidArgumentError(f"there is no step {kind!r}; steps: {', '.join(_KINDS)}")


def _place(transaction: Transaction, fields: _Fields) -> None:
    removes = fields.is_null("centroid")
    centroid = fields.maybe("centroid", str, "the name of a .npy file, or null to remove it")
    transaction.place(
        fields.ref("topic"),
        label=fields.maybe("label", str, "a text"),
        num_documents=fields.maybe("documents", int, "a number of documents"),
        centroid=None if centroid is None else load_array(fields.folder / centroid),
        remove_centroid=removes,
    )
