"""The list of documents that were deleted from banks of a run."""

from __future__ import annotations

from pathlib import Path

import pytest

from membank.trainer.run import DeletedDocuments
from membank.wire.errors import CorruptionError


def test_documents_are_listed_per_bank_and_stay(tmp_path: Path) -> None:
    file = tmp_path / "deletion" / "deleted.json"
    assert DeletedDocuments(file).of("bank-1") == frozenset()
    DeletedDocuments(file).add("bank-1", ["b", "a"])
    DeletedDocuments(file).add("bank-2", ["c"])
    DeletedDocuments(file).add("bank-1", ["a", "d"])
    assert DeletedDocuments(file).of("bank-1") == {"a", "b", "d"}
    assert DeletedDocuments(file).of("bank-2") == {"c"}


@pytest.mark.parametrize("content", ["{", "[]", '{"bank-1": "a"}', '{"bank-1": [1]}'])
def test_a_damaged_list_is_not_taken_for_an_empty_one(tmp_path: Path, content: str) -> None:
    file = tmp_path / "deleted.json"
    file.write_text(content)
    with pytest.raises(CorruptionError, match="what was deleted"):
        DeletedDocuments(file).of("bank-1")
