"""The study of editing: many facts changed one after another, and what that does to all others."""

from membank.trainer.editing.study.campaign import EditingStudy, StudyConfig
from membank.trainer.editing.study.report import write_editing_report

__all__ = ["EditingStudy", "StudyConfig", "write_editing_report"]
