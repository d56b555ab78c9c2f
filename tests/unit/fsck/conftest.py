from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from whole_bank import make_whole_bank


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bank with something of everything; nobody changes it."""
    root = tmp_path_factory.mktemp("whole") / "bank"
    make_whole_bank(root)
    return root


@pytest.fixture
def root(template: Path, tmp_path: Path) -> Path:
    """A copy of it to be damaged."""
    shutil.copytree(template, tmp_path / "bank")
    return tmp_path / "bank"


@pytest.fixture
def another(template: Path, tmp_path: Path) -> Callable[[str], Path]:
    """Make further copies."""

    def copy(name: str) -> Path:
        shutil.copytree(template, tmp_path / name)
        return tmp_path / name

    return copy
