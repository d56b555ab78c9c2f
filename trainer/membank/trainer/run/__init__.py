"""A run: its configuration, its directory, and what is prepared before training."""

from membank.trainer.run.config import RunConfig
from membank.trainer.run.deleted import DeletedDocuments
from membank.trainer.run.directory import RunDirectory, open_corpus
from membank.trainer.run.material import RunMaterial
from membank.trainer.run.prepare import Prepared, prepare_run, trained_leaves
from membank.trainer.run.presets import RUNS, load_config, named_run

__all__ = [
    "RUNS",
    "DeletedDocuments",
    "Prepared",
    "RunConfig",
    "RunDirectory",
    "RunMaterial",
    "load_config",
    "named_run",
    "open_corpus",
    "prepare_run",
    "trained_leaves",
]
