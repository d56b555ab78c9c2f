"""A deletion through the client: what it took, and that nothing else that changes goes unseen."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fake_bank import FakeBank
from fake_service import FakeService
from membank.client import BankClient
from membank.client.retriever import Retriever
from membank.trainer.corpus import Corpus
from membank.trainer.removal.deletion import (
    DeletionReport,
    delete_topic,
    install,
    router_among,
)
from membank.trainer.training import InProcessMemory
from membank.trainer.tree import TreeConfig, build_tree
from membank.wire.format import TreeDocument, encode_tree
from membank.wire.records import TransactionReport
from membank.wire.spec import BlockRef
from tiny_world import World, make_world


@pytest.fixture(scope="module")
def world() -> World:
    return make_world()


@pytest.fixture(scope="module")
def tree(world: World) -> TreeDocument:
    corpus = Corpus(name="tiny", documents=world.documents, facts=world.facts)
    return build_tree(corpus, TreeConfig(fan_outs=(2, 2))).document()


@pytest.fixture
def bank(world: World, tree: TreeDocument) -> FakeBank:
    bank = FakeBank(spec=replace(world.spec, num_partitions=4), tree=encode_tree(tree))
    rng = np.random.default_rng(0)
    for ref in bank.spec.blocks():
        held = bank.held(ref)
        held.weight = rng.standard_normal(held.weight.shape, np.float32)
    return bank


@pytest.fixture
def service(bank: FakeBank) -> Iterator[FakeService]:
    service = FakeService(bank)
    yield service
    service.close()


class Meddler(BankClient):
    """A client of a service that changes one more block than it was asked to."""

    also: BlockRef

    def delete(
        self,
        topic: BlockRef,
        *,
        only_block: bool = False,
        dry_run: bool = False,
        request_id: str | None = None,
        timeout_s: float | None = None,
    ) -> TransactionReport:
        report = super().delete(
            topic,
            only_block=only_block,
            dry_run=dry_run,
            request_id=request_id,
            timeout_s=timeout_s,
        )
        if not dry_run:
            weight = self.fetch_blocks([self.also])[self.also].weight
            assert weight is not None
            self.swap({self.also: np.asarray(weight, np.float32) + np.float32(1e-3)})
        return report


def routed(world: World, tree: TreeDocument) -> dict[str, BlockRef]:
    """Return the level-1 topic of each prompt."""
    prompts = [fact.prompt for fact in world.facts]
    paths = Retriever.from_tree(tree).route_all(prompts)
    return {prompt: path[0] for prompt, path in zip(prompts, paths, strict=True)}


def delete(client: BankClient, world: World, topic: BlockRef, folder: Path) -> DeletionReport:
    prompts = [fact.prompt for fact in world.facts]
    return delete_topic(
        client,
        world.anchor,
        [topic],
        folder=folder,
        forget=prompts[:3],
        prompts={prompt: world.tokenizer.encode(prompt) for prompt in prompts},
    )


def test_only_the_topic_changes(
    service: FakeService, world: World, tree: TreeDocument, tmp_path: Path
) -> None:
    topic = BlockRef(1, 0)
    topics = routed(world, tree)
    with BankClient.connect(service.endpoint) as client:
        report = delete(client, world, topic, tmp_path)
    inside = sum(found == topic for found in topics.values())
    assert 0 < inside < len(topics)
    assert report.prompts_elsewhere == len(topics) - inside
    assert report.forget_prompts == 3
    # The topic and its two leaves are gone; the other and its two are looked at.
    assert (report.num_blocks, report.blocks_elsewhere) == (3, 3)
    assert (report.blocks_changed, report.prompts_changed, report.prompts_rerouted) == (0, 0, 0)
    assert report.seconds > 0


def test_a_block_that_changes_beside_it_is_seen(
    service: FakeService, world: World, tree: TreeDocument, tmp_path: Path
) -> None:
    topic, also = BlockRef(1, 0), BlockRef(1, 1)
    with Meddler.connect(service.endpoint) as client:
        assert isinstance(client, Meddler)
        client.also = also
        report = delete(client, world, topic, tmp_path)
    assert report.blocks_changed == 1
    elsewhere = sum(found == also for found in routed(world, tree).values())
    assert report.prompts_changed == elsewhere > 0


def test_files_that_go_and_come_are_counted(
    service: FakeService, world: World, tmp_path: Path
) -> None:
    kept, gone = tmp_path / "kept", tmp_path / "gone"
    kept.write_bytes(b"1234")
    gone.write_bytes(b"123456789")

    class Files(BankClient):
        """A client of a service that removes a file and writes two."""

        def delete(
            self,
            topic: BlockRef,
            *,
            only_block: bool = False,
            dry_run: bool = False,
            request_id: str | None = None,
            timeout_s: float | None = None,
        ) -> TransactionReport:
            if not dry_run:
                gone.unlink()
                (tmp_path / "new").write_bytes(b"12")
                kept.write_bytes(b"12345")
            return super().delete(
                topic,
                only_block=only_block,
                dry_run=dry_run,
                request_id=request_id,
                timeout_s=timeout_s,
            )

    with Files.connect(service.endpoint) as client:
        report = delete(client, world, BlockRef(1, 0), tmp_path)
    assert report.bytes_destroyed == 9
    assert report.bytes_written == 2 + 5


def test_installed_blocks_are_those_that_were_trained(
    service: FakeService, bank: FakeBank, world: World
) -> None:
    trained = InProcessMemory(replace(world.spec, num_partitions=4))
    refs = [BlockRef(1, 1), BlockRef(2, 3)]
    trained.push(
        {ref: trained.fetch([ref]).weights[ref] + 1 for ref in refs},
        dict.fromkeys(refs, 0),
        step=0,
    )
    untouched = np.array(bank.held(BlockRef(1, 0)).weight)
    with BankClient.connect(service.endpoint) as client:
        assert install(client, trained) == len(refs)
    for ref in refs:
        np.testing.assert_array_equal(bank.held(ref).weight, trained.fetch([ref]).weights[ref])
    np.testing.assert_array_equal(bank.held(BlockRef(1, 0)).weight, untouched)


def test_texts_go_to_the_nearest_of_some_topics_as_if_there_were_no_others(
    world: World, tree: TreeDocument
) -> None:
    prompts = list(routed(world, tree))
    for cluster in range(2):
        paths = router_among(tree, [BlockRef(1, cluster)])(prompts)
        assert {path[0] for path in paths} == {BlockRef(1, cluster)}
        assert all(len(path) == 2 for path in paths)
    both = router_among(tree, [BlockRef(1, 0), BlockRef(1, 1)])(prompts)
    assert [path[0] for path in both] == list(routed(world, tree).values())
