"""Routing: the tree is fetched once, and again when the bank says that it changed."""

from collections.abc import AsyncIterator, Mapping, Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

from fake_bank import SPEC, FakeBank
from in_process import InProcessNetwork
from membank.client import AsyncBankClient
from membank.wire.errors import InvalidArgumentError, NotFoundError, Reason
from membank.wire.format import TreeDocument, encode_tree
from membank.wire.spec import BlockRef

TREE = TreeDocument(
    labels={BlockRef(1, 0): "metals"},
    centroids=(
        np.array([[1, 0], [0, 1], [-1, 0], [0, -1]], np.float32),
        np.array([[1, 0], [0.9, 0.1]] * 4, np.float32),
    ),
    embedder={"kind": "fixed"},
)


class NumberEmbedder:
    """Reads a vector from the text itself."""

    @property
    def config(self) -> Mapping[str, object]:
        return {"kind": "fixed"}

    @property
    def arrays(self) -> Mapping[str, NDArray[np.generic]]:
        return {}

    @property
    def level_dims(self) -> tuple[int, ...]:
        return (2,)

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        return np.array([[float(word) for word in text.split()] for text in texts], np.float32)


@pytest.fixture
def network(bank: FakeBank) -> InProcessNetwork:
    return InProcessNetwork(bank)


@pytest.fixture
def bank() -> FakeBank:
    return FakeBank(tree=encode_tree(TREE))


@pytest.fixture
async def client(network: InProcessNetwork) -> AsyncIterator[AsyncBankClient]:
    async with await AsyncBankClient.connect(
        network.GATEWAY, connector=network, embedder=NumberEmbedder()
    ) as client:
        yield client


async def test_fetches_the_tree_once(network: InProcessNetwork, client: AsyncBankClient) -> None:
    assert await client.route("1 0") == (BlockRef(1, 0), BlockRef(2, 0))
    assert await client.route("0 1") == (BlockRef(1, 1), BlockRef(2, 3))
    assert (await client.tree()).labels == TREE.labels
    assert network.scripts[network.GATEWAY].num_calls("get_tree") == 1


async def test_fetches_a_changed_tree_again(
    bank: FakeBank, network: InProcessNetwork, client: AsyncBankClient
) -> None:
    await client.route("1 0")
    bank.tree_bytes = encode_tree(TREE.without_topic(SPEC, BlockRef(1, 0)))
    bank.tree_revision = 1
    await client.delete(BlockRef(1, 0))
    assert await client.route("1 0") == (BlockRef(1, 0),)
    await client.route("1 0")
    assert network.scripts[network.GATEWAY].num_calls("get_tree") == 2


async def test_beams(client: AsyncBankClient) -> None:
    scored = await client.route_beam("1 0", 3)
    assert len(scored) == 3
    assert scored[0].path == await client.route("1 0", beams=3)
    with pytest.raises(InvalidArgumentError, match="beams"):
        await client.route_beam("1 0", 0)


async def test_without_a_tree(bank: FakeBank, client: AsyncBankClient) -> None:
    bank.tree_bytes = b""
    with pytest.raises(NotFoundError) as caught:
        await client.route("1 0")
    assert caught.value.reason is Reason.NO_TREE
