"""The README's example in Python does what it says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from membank.bank_service.cluster import UpConfig, down, up
from membank.bank_service.store import Bank
from membank.trainer.corpus import load_corpus
from membank.trainer.tree import TreeConfig, build_tree
from membank.wire.spec import BankSpec, LevelSpec

README = Path(__file__).parents[3] / "README.md"
SPEC = BankSpec(
    name="readme",
    num_layers=2,
    width=8,
    levels=(LevelSpec(fan_out=4, block_width=2), LevelSpec(fan_out=4, block_width=2)),
)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(180)
def test_the_example_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    tree = build_tree(load_corpus("fast"), TreeConfig(fan_outs=(4, 4))).document()
    Bank.create(str(tmp_path / "bank"), SPEC, tree=tree)
    runtime_dir = tmp_path / "run"
    endpoint = up(UpConfig(bank_url=str(tmp_path / "bank"), port=0, runtime_dir=runtime_dir))
    try:
        exec(compile(example.replace("localhost:7600", endpoint.address), str(README), "exec"), {})
    finally:
        down(runtime_dir=runtime_dir)
    printed = capsys.readouterr().out
    assert re.search(r"BlockRef\(level=2, cluster=\d+\): 1", printed)
