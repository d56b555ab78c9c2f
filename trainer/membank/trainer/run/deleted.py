"""Documents that were deleted from banks of a run: no later training for that bank may use them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from membank.trainer.training.files import read_json, write_json
from membank.wire.errors import CorruptionError, Reason

_LISTS = TypeAdapter(dict[str, list[str]])


class DeletedDocuments:
    """The list of a run, per bank, in a JSON file of names; it holds no text.

    Parameters
    ----------
    file
        The file; it need not be there.
    """

    def __init__(self, file: Path) -> None:
        self._file = file

    def of(self, bank_id: str) -> frozenset[str]:
        """Return the names of the documents that were deleted from a bank.

        Raises
        ------
        CorruptionError
            If the file is damaged: to take it for empty would train on what was deleted.
        """
        return frozenset(self._read().get(bank_id, ()))

    def add(self, bank_id: str, doc_ids: Iterable[str]) -> None:
        """Add documents; returns once that is on the disk."""
        record = self._read()
        record[bank_id] = sorted({*record.get(bank_id, ()), *doc_ids})
        write_json(self._file, record)

    def take_back(self, bank_id: str, doc_ids: Iterable[str]) -> None:
        """Take documents out of the list: their deletion was given up before it destroyed anything."""
        record = self._read()
        record[bank_id] = sorted({*record.get(bank_id, ())} - {*doc_ids})
        write_json(self._file, record)

    def _read(self) -> dict[str, list[str]]:
        try:
            return _LISTS.validate_python(read_json(self._file) or {})
        except (ValidationError, CorruptionError) as err:
            raise CorruptionError(
                f"{self._file} is damaged; it says what was deleted, so restore it from a copy",
                reason=Reason.CHECKSUM_MISMATCH,
                metadata={"path": str(self._file)},
            ) from err
