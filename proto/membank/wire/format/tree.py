"""The tree document: topic labels and the fitted retriever, as one safetensors file.

Arrays ``centroids.1``, ``centroids.2`` ... hold one row per cluster of a level; a row of NaN is a
cluster that leads nowhere (never filled, or deleted), so that a path ends above it. Arrays
``retriever.NAME`` are the embedder's own. The JSON in the metadata key ``membank`` holds labels,
document counts and the embedder's configuration.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import safetensors.numpy
from safetensors import SafetensorError

from membank.wire.crc import crc32c
from membank.wire.errors import CorruptionError, Reason
from membank.wire.spec import Array, BankSpec, BlockRef

_METADATA_KEY = "membank"
_CRC_KEY = "membank.crc32c"


@dataclass(frozen=True, kw_only=True, slots=True)
class TreeDocument:
    """Labels and retriever of a bank."""

    labels: Mapping[BlockRef, str] = field(default_factory=dict)
    """Label of each topic that has one."""
    num_documents: Mapping[BlockRef, int] = field(default_factory=dict)
    """Documents of the training corpus in each topic."""
    centroids: tuple[Array, ...] = ()
    """Per level, (clusters, dims) float32, rows of finite numbers or NaN; levels may look at
    different numbers of the embedding's first dims; empty = no retriever."""
    embedder: Mapping[str, object] = field(default_factory=dict)
    """Kind and configuration of the embedder, JSON-able; empty = no retriever."""
    arrays: Mapping[str, Array] = field(default_factory=dict)
    """Arrays of the embedder."""

    def without_topic(
        self, spec: BankSpec, topic: BlockRef, *, only_block: bool = False
    ) -> TreeDocument:
        """Return the document after `topic`, or its block alone, was deleted.

        Labels and counts of the topic and of everything under it go, and so do the centroids
        under it. The topic's own centroid stays: without it, texts of the topic would be routed
        to a neighbour instead of ending there.
        """
        gone = {topic} if only_block else set(spec.subtree(topic))
        centroids = tuple(array.copy() for array in self.centroids)
        for ref in gone - {topic}:
            if ref.level <= len(centroids):
                centroids[ref.level - 1][ref.cluster] = np.nan
        return replace(
            self,
            labels={ref: label for ref, label in self.labels.items() if ref not in gone},
            num_documents={ref: n for ref, n in self.num_documents.items() if ref not in gone},
            centroids=centroids,
        )

    def with_topic(
        self,
        labels: Mapping[BlockRef, str],
        num_documents: Mapping[BlockRef, int],
        centroids: Mapping[BlockRef, Array],
    ) -> TreeDocument:
        """Return the document after a topic with these labels and centroids was imported."""
        arrays = tuple(array.copy() for array in self.centroids)
        for ref, row in centroids.items():
            if ref.level <= len(arrays):
                arrays[ref.level - 1][ref.cluster] = row
        return replace(
            self,
            labels={**self.labels, **labels},
            num_documents={**self.num_documents, **num_documents},
            centroids=arrays,
        )


def encode_tree(tree: TreeDocument) -> bytes:
    """Encode `tree` as a safetensors file."""
    meta = {
        "labels": {str(ref): label for ref, label in sorted(tree.labels.items())},
        "num_documents": {str(ref): n for ref, n in sorted(tree.num_documents.items())},
        "embedder": dict(tree.embedder),
    }
    arrays = {f"retriever.{name}": np.ascontiguousarray(a) for name, a in tree.arrays.items()}
    for level, array in enumerate(tree.centroids, start=1):
        arrays[f"centroids.{level}"] = np.ascontiguousarray(array)
    text = json.dumps(meta, sort_keys=True)
    # safetensors has no checksum of its own.
    metadata = {_METADATA_KEY: text, _CRC_KEY: f"{_crc(text, arrays):08x}"}
    return _in_one_order(safetensors.numpy.save(arrays, metadata=metadata))


def decode_tree(data: bytes, *, key: str) -> TreeDocument:
    """Decode a tree document.

    Raises
    ------
    CorruptionError
        If it is not one.
    """
    try:
        arrays = safetensors.numpy.load(data)
        metadata = _metadata(data)
        if int(metadata[_CRC_KEY], 16) != _crc(metadata[_METADATA_KEY], arrays):
            raise ValueError("CRC-32C does not match")
        meta = json.loads(metadata[_METADATA_KEY])
        count = sum(name.startswith("centroids.") for name in arrays)
        return TreeDocument(
            labels={BlockRef.parse(ref): label for ref, label in meta["labels"].items()},
            num_documents={BlockRef.parse(ref): n for ref, n in meta["num_documents"].items()},
            centroids=tuple(arrays[f"centroids.{level}"] for level in range(1, count + 1)),
            embedder=meta["embedder"],
            arrays={
                name.removeprefix("retriever."): array
                for name, array in arrays.items()
                if name.startswith("retriever.")
            },
        )
    except (SafetensorError, ValueError, KeyError, TypeError) as err:
        raise CorruptionError(
            f"tree document {key} is damaged ({err}); restore the file from a copy",
            reason=Reason.SPEC_CORRUPT,
            metadata={"key": key},
        ) from err


def _crc(text: str, arrays: Mapping[str, Array]) -> int:
    crc = crc32c(text.encode())
    for name in sorted(arrays):
        crc = crc32c(arrays[name], start=crc32c(name.encode(), start=crc))
    return crc


def _in_one_order(data: bytes) -> bytes:
    """Return the file with its metadata sorted, so that equal trees have equal bytes."""
    # safetensors writes them in the order of a hash table, which is another one each time.
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data[start:]


def _metadata(data: bytes) -> dict[str, str]:
    # A safetensors file starts with u64 header length and a JSON header.
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    return dict(header["__metadata__"])
