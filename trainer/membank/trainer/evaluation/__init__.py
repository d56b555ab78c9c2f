"""Evaluation: recall of facts and perplexity of topics, every memory condition side by side."""

from membank.trainer.evaluation.answers import first_integer, normalised_words, states
from membank.trainer.evaluation.conditions import (
    Condition,
    ConditionMemory,
    EvaluationPaths,
    random_paths,
)
from membank.trainer.evaluation.perplexity import (
    PerplexityReport,
    TopicPerplexity,
    evaluate_perplexity,
)
from membank.trainer.evaluation.recall import (
    FactCompletion,
    RecallProgress,
    RecallReport,
    RelationRecall,
    evaluate_recall,
)

__all__ = [
    "Condition",
    "ConditionMemory",
    "EvaluationPaths",
    "FactCompletion",
    "PerplexityReport",
    "RecallProgress",
    "RecallReport",
    "RelationRecall",
    "TopicPerplexity",
    "evaluate_perplexity",
    "evaluate_recall",
    "first_integer",
    "normalised_words",
    "random_paths",
    "states",
]
