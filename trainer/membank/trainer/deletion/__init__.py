"""Deleting documents from a bank: leaves that they dominate go, blocks they share are trained anew."""

from membank.trainer.deletion.config import DeletionConfig, Scope
from membank.trainer.deletion.exchange import (
    BlockExchange,
    ServedExchange,
    TopicWords,
)
from membank.trainer.deletion.forecast import DeletionForecast, forecast_deletion, seconds_of
from membank.trainer.deletion.job import DeletionReport, DocumentDeletion
from membank.trainer.deletion.plan import (
    BlockPart,
    DeletionPlan,
    TrainedDocuments,
    plan_deletion,
)
from membank.trainer.deletion.retraining import (
    Retraining,
    plan_retraining,
    retrain,
)
from membank.trainer.deletion.staged import StagedMemory

__all__ = [
    "BlockExchange",
    "BlockPart",
    "DeletionConfig",
    "DeletionForecast",
    "DeletionPlan",
    "DeletionReport",
    "DocumentDeletion",
    "Retraining",
    "Scope",
    "ServedExchange",
    "StagedMemory",
    "TopicWords",
    "TrainedDocuments",
    "forecast_deletion",
    "plan_deletion",
    "plan_retraining",
    "retrain",
    "seconds_of",
]
