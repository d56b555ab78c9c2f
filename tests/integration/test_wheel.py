"""The wheel holds every portion of the namespace and works away from the source tree."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
PORTIONS = ("proto", "client", "bank_service", "trainer")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this tree, built without a network."""
    out = tmp_path_factory.mktemp("dist")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", out],
        cwd=REPOSITORY,
        check=True,
        capture_output=True,
    )
    (built,) = out.glob("*.whl")
    return built


def test_wheel_holds_every_file_of_every_portion(wheel: Path) -> None:
    packaged = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("membank/")}
    sources = {
        str(path.relative_to(REPOSITORY / portion))
        for portion in PORTIONS
        for path in (REPOSITORY / portion / "membank").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    # Code, schema, py.typed and carried data alike: a pattern in .gitignore that is too wide shows here.
    assert packaged == sources


def test_wheel_brings_licences_and_the_command(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert [name for name in names if name.endswith("/licenses/LICENSE")]
    (entry_points,) = (name for name in names if name.endswith("entry_points.txt"))
    text = zipfile.ZipFile(wheel).read(entry_points).decode()
    assert "membank = membank.cli:main" in text


def test_wheel_imports_away_from_the_tree(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    # The roots of an editable install would answer in the wheel's stead.
    roots = [str(REPOSITORY / portion) for portion in PORTIONS]
    program = f"""
import sys
sys.path[:] = [{str(site)!r}, *(p for p in sys.path if p not in {roots!r})]
import membank.bank_service, membank.cli, membank.client, membank.trainer, membank.v1, membank.wire
assert list(membank.__path__) == [{str(site / "membank")!r}], list(membank.__path__)
"""
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=True)
