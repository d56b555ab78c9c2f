"""The examples in docstrings are true."""

import doctest
import importlib
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
ROOTS = ("proto", "client", "bank_service", "trainer")


def _modules_with_examples() -> list[str]:
    return [
        ".".join(path.relative_to(REPOSITORY / root).with_suffix("").parts)
        for root in ROOTS
        for path in sorted((REPOSITORY / root).rglob("*.py"))
        if "_pb2" not in path.name and ">>> " in path.read_text()
    ]


@pytest.mark.parametrize("name", _modules_with_examples())
def test_examples_in_docstrings(name: str) -> None:
    module = importlib.import_module(name.removesuffix(".__init__"))
    result = doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    assert result.failed == 0
    assert result.attempted > 0
