"""The removal study: what a deletion leaves, beside retraining and beside unlearning by gradients."""

from membank.trainer.removal.config import STUDIES, RemovalConfig, full, quick
from membank.trainer.removal.deletion import BankHost, DeletionReport
from membank.trainer.removal.measure import RemovalStudy
from membank.trainer.removal.page import write_report
from membank.trainer.removal.report import summarise

__all__ = [
    "STUDIES",
    "BankHost",
    "DeletionReport",
    "RemovalConfig",
    "RemovalStudy",
    "full",
    "quick",
    "summarise",
    "write_report",
]
