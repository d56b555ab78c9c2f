"""The rules of the tree, as tests: namespace portions, leaf packages, import direction, declared dependencies."""

import ast
import importlib
import io
import re
import subprocess
import sys
import tokenize
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement

REPOSITORY = Path(__file__).resolve().parents[2]
ROOTS = {
    "proto": ("v1", "wire"),
    "client": ("client", "cli"),
    "bank_service": ("bank_service",),
    "trainer": ("trainer",),
}
LEAVES = {
    leaf: REPOSITORY / root / "membank" / leaf for root, leaves in ROOTS.items() for leaf in leaves
}
MAX_LINES = 600

PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]

# What a leaf may import from outside, by the extras that bring it; the base is always there.
EXTRAS_OF_LEAF: dict[str, tuple[str, ...]] = {
    "wire": (),
    "client": (),
    # The command imports the other parts inside the verbs that need them.
    "cli": ("service", "trainer"),
    "bank_service": ("service",),
    "trainer": ("trainer", "minilm"),
}
# What a leaf uses where it is installed, and does without where not.
OPTIONAL_OF_LEAF: dict[str, set[str]] = {"wire": {"awscrt"}, "client": {"fsspec"}}
# Distributions whose import name is not their own name.
IMPORT_NAME = {
    "google-crc32c": "google_crc32c",
    "googleapis-common-protos": "google",
    "grpcio": "grpc",
    "grpcio-health-checking": "grpc_health",
    "grpcio-reflection": "grpc_reflection",
    "grpcio-status": "grpc_status",
    "protobuf": "google",
    "scikit-learn": "sklearn",
}


def _is_generated(path: Path) -> bool:
    return "_pb2" in path.name


def _sources(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*.py")) if not _is_generated(path))


def _all_sources() -> list[Path]:
    folders = [REPOSITORY / name for name in (*ROOTS, "tests", "benchmarks", "examples", "scripts")]
    return [path for folder in folders if folder.is_dir() for path in _sources(folder)]


def _imported_modules(path: Path) -> set[str]:
    """Absolute names of the modules that `path` imports, at any depth of its code."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(), filename=str(path))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names.add(node.module)
    return names


def _public_packages() -> list[str]:
    """Dotted names of every package with an `__init__.py`, the generated one aside."""
    return [
        ".".join(("membank", *init.parent.relative_to(folder.parent).parts))
        for leaf, folder in LEAVES.items()
        if leaf != "v1"
        for init in sorted(folder.rglob("__init__.py"))
    ]


@pytest.mark.parametrize("root", ROOTS)
def test_namespace_portion_has_no_init(root: str) -> None:
    # One would make the portions of the other three roots vanish.
    assert not (REPOSITORY / root / "__init__.py").exists()
    assert not (REPOSITORY / root / "membank" / "__init__.py").exists()


@pytest.mark.parametrize(("root", "leaves"), ROOTS.items())
def test_root_holds_its_leaves_alone(root: str, leaves: tuple[str, ...]) -> None:
    portion = REPOSITORY / root / "membank"
    found = {path.name for path in portion.iterdir() if path.name != "__pycache__"}
    assert found == set(leaves)
    assert {path.name for path in portion.parent.iterdir()} - {"__pycache__"} == {"membank"}


@pytest.mark.parametrize("leaf", LEAVES)
def test_leaf_is_a_typed_package(leaf: str) -> None:
    assert (LEAVES[leaf] / "__init__.py").is_file()
    assert (LEAVES[leaf] / "py.typed").is_file()


def test_every_folder_of_modules_is_a_package() -> None:
    folders = {path.parent for leaf in LEAVES.values() for path in leaf.rglob("*.py")}
    assert sorted(str(f) for f in folders if not (f / "__init__.py").is_file()) == []


def test_tests_are_outside_of_any_package() -> None:
    assert list((REPOSITORY / "tests").rglob("__init__.py")) == []


@pytest.mark.parametrize("package", _public_packages())
def test_package_exports_all_that_it_binds(package: str) -> None:
    folder = LEAVES[package.split(".")[1]].parent.joinpath(*package.split(".")[1:])
    tree = ast.parse((folder / "__init__.py").read_text())
    assert ast.get_docstring(tree), "a package says what it is"

    # A package that only groups modules binds nothing and needs no list.
    exported: list[str] = list(getattr(importlib.import_module(package), "__all__", []))
    # ruff's RUF022 keeps the order: constants, classes, functions, each sorted.
    assert len(exported) == len(set(exported))

    bound: set[str] = set()
    for node in tree.body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            bound.update(alias.asname or alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            bound.add(node.name)
    public = {name for name in bound if not name.startswith("_")} - {"annotations"}
    # A lazy package defines module __getattr__: then its list may hold more than it binds.
    lazy = "__getattr__" in bound
    assert public - set(exported) - sys.stdlib_module_names == set()
    assert lazy or set(exported) <= public | _assigned(tree)


def _assigned(tree: ast.Module) -> set[str]:
    targets = [
        target
        for node in tree.body
        if isinstance(node, ast.Assign | ast.AnnAssign)
        for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
    ]
    return {target.id for target in targets if isinstance(target, ast.Name)}


@pytest.mark.parametrize("leaf", LEAVES)
def test_exported_names_exist(leaf: str) -> None:
    module = importlib.import_module(f"membank.{leaf}")
    exported = getattr(module, "__all__", [])
    assert [name for name in exported if not hasattr(module, name)] == []


def _public_methods(path: Path) -> Iterator[tuple[ast.FunctionDef | ast.AsyncFunctionDef, str]]:
    """The methods of public classes in `path`, each with its source."""
    text = path.read_text()
    for owner in ast.parse(text).body:
        if not isinstance(owner, ast.ClassDef) or owner.name.startswith("_"):
            continue
        # What an RPC does is said in the schema, once.
        if any(ast.unparse(base).endswith("Servicer") for base in owner.bases):
            continue
        for node in owner.body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                decorators = {ast.unparse(decorator) for decorator in node.decorator_list}
                if not node.name.startswith("_") and not decorators & {
                    "overload",
                    "typing.overload",
                }:
                    yield node, ast.get_source_segment(text, node) or ""


@pytest.mark.parametrize("leaf", [leaf for leaf in LEAVES if leaf != "v1"])
def test_public_methods_say_what_they_do(leaf: str) -> None:
    offenders = [
        f"{path.relative_to(REPOSITORY)}:{node.lineno} {node.name}"
        for path in _sources(LEAVES[leaf])
        for node, source in _public_methods(path)
        if not ast.get_docstring(node) and "# docstring inherited" not in source
    ]
    assert offenders == []


def test_no_bare_folder_name_is_imported() -> None:
    # `proto` is proto-plus (Ray installs it) and `trainer` another published package: always membank.x.
    offenders = [
        f"{path.relative_to(REPOSITORY)}: {module}"
        for path in _all_sources()
        for module in _imported_modules(path)
        if module.split(".")[0] in ROOTS
    ]
    assert offenders == []


def test_no_file_is_over_the_limit() -> None:
    lengths = {path: len(path.read_text().splitlines()) for path in _all_sources()}
    too_long = {str(p.relative_to(REPOSITORY)): n for p, n in lengths.items() if n > MAX_LINES}
    assert too_long == {}


def test_no_module_is_a_drawer_for_everything() -> None:
    drawers = {"utils", "util", "helpers", "common", "misc"}
    names = [p for p in _all_sources() if p.stem.strip("_") in drawers]
    assert [str(path.relative_to(REPOSITORY)) for path in names] == []


def test_comments_are_ascii() -> None:
    # Strings are free to hold any text: the corpus does.
    offenders = [
        f"{path.relative_to(REPOSITORY)}:{token.start[0]}"
        for path in _all_sources()
        for token in tokenize.generate_tokens(io.StringIO(path.read_text()).readline)
        if token.type == tokenize.COMMENT and not token.string.isascii()
    ]
    assert offenders == []


@pytest.mark.slow
def test_import_direction_is_kept() -> None:
    linter = Path(sys.executable).with_name("lint-imports")
    result = subprocess.run(
        [linter, "--no-cache"], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout


@pytest.mark.slow
@pytest.mark.parametrize("package", ["membank.wire", "membank.client", "membank.cli"])
def test_light_packages_import_no_heavy_library(package: str) -> None:
    heavy = ("torch", "ray", "zarr", "sklearn", "matplotlib", "pandas")
    program = f"import sys, {package}; print(*(set({heavy!r}) & set(sys.modules)))"
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == ""


def _import_names(requirements: list[str]) -> set[str]:
    names = (Requirement(text).name for text in requirements)
    return {IMPORT_NAME.get(name, name.replace("-", "_").lower()) for name in names}


@pytest.mark.parametrize("leaf", EXTRAS_OF_LEAF)
def test_third_party_imports_are_declared(leaf: str) -> None:
    declared = _import_names(PROJECT["dependencies"]) | OPTIONAL_OF_LEAF.get(leaf, set())
    for extra in EXTRAS_OF_LEAF[leaf]:
        declared |= _import_names(EXTRAS[extra])
    imported = {
        module.split(".")[0]
        for path in _sources(LEAVES[leaf])
        for module in _imported_modules(path)
    }
    assert imported - declared - sys.stdlib_module_names - {"membank"} == set()


def test_what_is_optional_comes_with_an_extra() -> None:
    offered = set().union(*(_import_names(requirements) for requirements in EXTRAS.values()))
    assert set().union(*OPTIONAL_OF_LEAF.values()) - offered == set()


def test_every_way_to_torch_pins_the_same_version() -> None:
    # A journal is replayed by the kernels of one torch version; a resolver must not choose another.
    brings_torch = re.compile(r"^(torch|sentence-transformers|ray\[train\])\b")
    pins = {
        extra: [r for r in requirements if Requirement(r).name == "torch"]
        for extra, requirements in EXTRAS.items()
        if any(brings_torch.match(requirement) for requirement in requirements)
    }
    assert set(pins) == {"service", "trainer", "minilm"}
    assert {tuple(pin) for pin in pins.values()} == {("torch==2.13.0",)}
