"""The topic tree: embedders, balanced hierarchical k-means, labels, and scores."""

from membank.trainer.tree._build import (
    PREFIX_SHARES,
    BuiltTree,
    build_tree,
    embedder_from_config,
    prefix_of,
)
from membank.trainer.tree._fit import DocumentViews, Progress, TopicTree, TreeConfig, fit_tree
from membank.trainer.tree._growth import (
    centroid_of,
    free_child,
    halves_of,
    has_centroid,
    views_of,
)
from membank.trainer.tree._kmeans import KMeansConfig, balanced_kmeans, rebalance
from membank.trainer.tree._labels import topic_labels
from membank.trainer.tree._lsa import LsaConfig, fit_lsa, pages_of
from membank.trainer.tree._minilm import DEFAULT_MODEL, MiniLmEmbedder, pool_pieces
from membank.trainer.tree._score import LevelScore, RoutingScore, routing_report, topic_scores

__all__ = [
    "DEFAULT_MODEL",
    "PREFIX_SHARES",
    "BuiltTree",
    "DocumentViews",
    "KMeansConfig",
    "LevelScore",
    "LsaConfig",
    "MiniLmEmbedder",
    "Progress",
    "RoutingScore",
    "TopicTree",
    "TreeConfig",
    "balanced_kmeans",
    "build_tree",
    "centroid_of",
    "embedder_from_config",
    "fit_lsa",
    "fit_tree",
    "free_child",
    "halves_of",
    "has_centroid",
    "pages_of",
    "pool_pieces",
    "prefix_of",
    "rebalance",
    "routing_report",
    "topic_labels",
    "topic_scores",
    "views_of",
]
