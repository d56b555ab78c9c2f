"""Delete a topic of a served bank, and write down what that took and what else it touched."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from membank.client import BankClient
from membank.client.retriever import Retriever
from membank.trainer.model import Anchor
from membank.trainer.removal.knowledge import Router
from membank.trainer.removal.scoring import Model, last_logits
from membank.trainer.training import InProcessMemory, ServedMemory
from membank.trainer.tree import embedder_from_config
from membank.wire.format import TreeDocument
from membank.wire.spec import BankSpec, BlockRef, BlockState
from membank.wire.spec import Path as BlockPath

_BLOCKS_PER_CALL = 64


class BankHost(Protocol):
    """Makes banks and serves them; the trainer itself knows a bank through its client alone."""

    def serve(
        self, folder: Path, spec: BankSpec, tree: TreeDocument
    ) -> AbstractContextManager[BankClient]:
        """Return a client of a new bank, which is served until the context ends.

        Parameters
        ----------
        folder
            Directory of the bank; what an earlier attempt left in it is removed first.
        spec, tree
            What the bank is.
        """
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class DeletionReport:
    """What a deletion took, and what else it touched."""

    seconds: float
    """Time until the service had acknowledged that all clusters of the topic are gone."""
    num_blocks: int
    """Blocks deleted."""
    num_slots_destroyed: int
    """Stored versions destroyed."""
    bytes_destroyed: int
    """Bytes of the files of the bank's directory that are gone afterwards."""
    bytes_written: int
    """Bytes of the files that are new or changed afterwards, whole files counted."""
    forget_prompts: int
    """Prompts of the topic's facts."""
    forget_routed_inside: int
    """Those of them that were routed into the topic before."""
    prompts_elsewhere: int
    """Prompts of all kinds that were routed elsewhere before."""
    prompts_rerouted: int
    """Those of them that another path answers afterwards; must be 0."""
    prompts_changed: int
    """Those of them whose logits differ in any bit; must be 0."""
    blocks_elsewhere: int
    """Blocks outside the topic."""
    blocks_changed: int
    """Those of them whose state or CRC-32C differs afterwards; must be 0."""


def router_of(tree: TreeDocument) -> Router:
    """Return what routes texts by a tree document, as a client of a bank with that tree does."""
    return Retriever.from_tree(tree, embedder=embedder_from_config(tree)).route_all


def router_among(tree: TreeDocument, topics: Sequence[BlockRef]) -> Router:
    """Return what routes texts to the nearest of some level-1 topics, as if there were no others."""
    level_1 = np.full_like(tree.centroids[0], np.nan)
    rows = [topic.cluster for topic in topics]
    level_1[rows] = tree.centroids[0][rows]
    return router_of(replace(tree, centroids=(level_1, *tree.centroids[1:])))


def install(client: BankClient, trained: InProcessMemory) -> int:
    """Write every trained block of a bank in memory to a served one; return how many there are."""
    content = trained.fetch(list(trained.spec.blocks()))
    written = [ref for ref, version in content.versions.items() if version > 0]
    for part in _parts(written):
        client.swap({ref: content.weights[ref].numpy() for ref in part})
    return len(written)


def delete_topic(
    client: BankClient,
    anchor: Anchor,
    clusters: Sequence[BlockRef],
    *,
    folder: Path,
    forget: Sequence[str],
    prompts: Mapping[str, Sequence[int]],
) -> DeletionReport:
    """Delete the clusters of a topic and look at all that must not have changed.

    Parameters
    ----------
    client
        The served bank.
    anchor
        The anchor that its blocks belong to.
    clusters
        Level-1 topics to delete.
    folder
        Directory of the bank.
    forget
        Prompts of the topic's facts.
    prompts
        Tokens of every prompt that is looked at, by its text.

    Returns
    -------
    DeletionReport
        What was seen.
    """
    model = Model(anchor=anchor, bank=ServedMemory(client))
    texts = list(prompts)
    gone = frozenset(clusters)
    paths = dict(zip(texts, router_of(client.tree())(texts), strict=True))
    elsewhere = [text for text in texts if not _inside(paths[text], gone)]
    logits = _logits(model, elsewhere, prompts, paths)
    blocks, files = _fingerprints(client), _files(folder)
    # A dry run first, as an operator does; it is no part of the time.
    for cluster in clusters:
        client.delete(cluster, dry_run=True)
    start = time.perf_counter()
    reports = [client.delete(cluster) for cluster in clusters]
    seconds = time.perf_counter() - start
    blocks_after, files_after = _fingerprints(client), _files(folder)
    after = dict(zip(elsewhere, router_of(client.tree())(elsewhere), strict=True))
    rerouted = [text for text in elsewhere if after[text] != paths[text]]
    logits_after = _logits(model, elsewhere, prompts, after)
    kept = [ref for ref in blocks if not _inside(client.info().spec.path_to(ref), gone)]
    return DeletionReport(
        seconds=seconds,
        num_blocks=sum(len(report.changes) for report in reports),
        num_slots_destroyed=sum(report.num_slots_destroyed for report in reports),
        bytes_destroyed=sum(size for name, (size, _) in files.items() if name not in files_after),
        bytes_written=sum(
            state[0] for name, state in files_after.items() if files.get(name) != state
        ),
        forget_prompts=len(forget),
        forget_routed_inside=sum(_inside(paths[text], gone) for text in forget),
        prompts_elsewhere=len(elsewhere),
        prompts_rerouted=len(rerouted),
        prompts_changed=sum(
            not torch.equal(one, other) for one, other in zip(logits, logits_after, strict=True)
        ),
        blocks_elsewhere=len(kept),
        blocks_changed=sum(blocks[ref] != blocks_after[ref] for ref in kept),
    )


def _inside(path: BlockPath, clusters: frozenset[BlockRef]) -> bool:
    return any(ref in clusters for ref in path)


def _logits(
    model: Model,
    texts: Sequence[str],
    prompts: Mapping[str, Sequence[int]],
    paths: Mapping[str, BlockPath],
) -> list[Tensor]:
    return last_logits(model, [prompts[text] for text in texts], [paths[text] for text in texts])


def _fingerprints(client: BankClient) -> dict[BlockRef, tuple[BlockState, int]]:
    """Return the state of every block, and the CRC-32C of its weight, which the client checked."""
    found: dict[BlockRef, tuple[BlockState, int]] = {}
    for part in _parts(list(client.info().spec.blocks())):
        for ref, block in client.fetch_blocks(part).items():
            found[ref] = (block.header.state, block.header.crc32c)
    return found


def _files(folder: Path) -> dict[str, tuple[int, int]]:
    """Return size and time of change of every file of a directory."""
    found = {}
    for file in folder.rglob("*"):
        try:
            if file.is_file():
                status = file.stat()
                found[str(file.relative_to(folder))] = (status.st_size, status.st_mtime_ns)
        except FileNotFoundError:
            continue  # the service removed it while we looked
    return found


def _parts(refs: Sequence[BlockRef]) -> Iterator[Sequence[BlockRef]]:
    for start in range(0, len(refs), _BLOCKS_PER_CALL):
        yield refs[start : start + _BLOCKS_PER_CALL]
