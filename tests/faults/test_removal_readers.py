"""A thousand readers while a topic is deleted: all of it or nothing, and nothing once it is said to be gone."""

from __future__ import annotations

import asyncio
from collections import Counter
from pathlib import Path

import pytest

from membank.client import AsyncBankClient, ClientConfig, FetchedBlocks
from membank.wire.spec import BlockRef, BlockState
from raw_scan import marked
from removal_service import SPEC, RemovalService

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

NUM_READERS = 1_000
TOPIC = BlockRef(1, 0)
# The small blocks: a thousand answers at a time are to be a matter of calls, and not of bytes.
DOOMED = [BlockRef(2, 0), BlockRef(2, 1)]
OTHERS = [BlockRef(2, 2), BlockRef(2, 3)]
WAYS = {
    "shared memory": ClientConfig(timeout_s=120.0),
    "network": ClientConfig(timeout_s=120.0, same_host=None),
}


class Judge:
    """Looks at every answer.

    Parameters
    ----------
    before
        The blocks before the delete.
    """

    def __init__(self, before: FetchedBlocks) -> None:
        self._contents = {ref: weight.tobytes() for ref, weight in before.weights.items()}
        self.counts: Counter[str] = Counter()

    def look(self, answer: FetchedBlocks, *, may_be_there: bool) -> None:
        """Raise unless an answer is of one side of the delete, and of the right one."""
        weights = {ref: weight.tobytes() for ref, weight in answer.weights.items()}
        assert {ref: weights[ref] for ref in OTHERS} == {r: self._contents[r] for r in OTHERS}
        states = {answer[ref].header.state for ref in DOOMED}
        if states == {BlockState.DELETED}:
            assert weights.keys() == set(OTHERS)
            self.counts["gone"] += 1
            return
        assert states == {BlockState.ACTIVE}, "a mixture"
        assert weights == self._contents
        assert may_be_there, "asked for after the acknowledgement"
        self.counts["there"] += 1


@pytest.mark.parametrize("way", WAYS)
async def test_a_thousand_readers_see_the_topic_or_its_end(tmp_path: Path, way: str) -> None:
    with RemovalService(tmp_path) as service:
        for number, ref in enumerate([*DOOMED, *OTHERS]):
            service.swap(ref, marked(SPEC.block_shape(2), number))
        client = await AsyncBankClient.connect(service.endpoint, config=WAYS[way])
        judge = Judge(await client.fetch_blocks([*DOOMED, *OTHERS]))
        acknowledged = asyncio.Event()
        first_answers: asyncio.Queue[None] = asyncio.Queue()

        async def read() -> None:
            is_after = False
            while not is_after:
                is_after = acknowledged.is_set()
                answer = await client.fetch_blocks([*DOOMED, *OTHERS])
                judge.look(answer, may_be_there=not is_after)
                first_answers.put_nowait(None)

        readers = [asyncio.create_task(read()) for _ in range(NUM_READERS)]
        try:
            for _ in range(NUM_READERS):
                await first_answers.get()
            await asyncio.to_thread(service.delete, TOPIC)
            acknowledged.set()
            # No error is a documented one here: whatever the shard refuses for its load is asked again.
            await asyncio.gather(*readers)
        finally:
            for reader in readers:
                reader.cancel()
            await client.close()
        assert judge.counts["there"] >= NUM_READERS
        assert judge.counts["gone"] >= NUM_READERS
