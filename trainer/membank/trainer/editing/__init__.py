"""Editing: facts changed in the blocks that they route to, on a staged copy, and swapped in."""

from membank.trainer.editing.answers import Answers
from membank.trainer.editing.config import EditConfig
from membank.trainer.editing.contract import (
    BlockTraining,
    EditedBank,
    EditReport,
    FactEdit,
    NeighbourChange,
    PromptChange,
    Statement,
)
from membank.trainer.editing.editor import Editor, Notice
from membank.trainer.editing.facts import parse_facts, read_facts
from membank.trainer.editing.log import EditHistory, EditLog
from membank.trainer.editing.staging import ReplaySequences
from membank.trainer.editing.training import BlockTask, TrainedBlock, train_block

__all__ = [
    "Answers",
    "BlockTask",
    "BlockTraining",
    "EditConfig",
    "EditHistory",
    "EditLog",
    "EditReport",
    "EditedBank",
    "Editor",
    "FactEdit",
    "NeighbourChange",
    "Notice",
    "PromptChange",
    "ReplaySequences",
    "Statement",
    "TrainedBlock",
    "parse_facts",
    "read_facts",
    "train_block",
]
