"""Reading blocks of a bank in a bucket, beside obstore alone."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TypeVar

import obstore
from obstore.store import S3Store

from membank.bank_service.bench.banks import BLOCK_4MB, PLAIN_SGD, flat_spec, written_bank
from membank.bank_service.bench.contract import Progress, Row, Target
from membank.bank_service.bench.measure import interleave, rates, stopwatch
from membank.bank_service.bench.scale import Scale
from membank.bank_service.store.open_objects import open_objects
from membank.wire.format.layout import slot_key
from membank.wire.spec import Role

_TARGET = Target(0.9, at_least=True)
_CONCURRENT = 8

T = TypeVar("T")


class S3ReadBench:
    """Reads blocks, eight at a time.

    Parameters
    ----------
    url
        An ``s3://bucket/prefix`` under which a bank may be made and removed; None = none is given.
        Credentials and endpoint come from the usual ``AWS_*`` variables.
    scale
        How much is read.
    """

    def __init__(self, url: str | None, scale: Scale) -> None:
        self._url = url
        self._scale = scale
        self.name = "s3-read-4mb"
        self.expected_s = 1.0 if url is None else 20.0

    def run(self, progress: Progress) -> Row:
        # docstring inherited
        spec = flat_spec(BLOCK_4MB, 2 * _CONCURRENT, optimizer=PLAIN_SGD)
        total = spec.num_blocks * spec.weight_bytes(1)
        row = Row(
            name=self.name,
            what=f"{spec.num_blocks} blocks of {spec.weight_bytes(1)} bytes that are not resident, "
            f"CRC checked, {_CONCURRENT} at a time by threads / obstore's get of the same objects, "
            f"{_CONCURRENT} at a time by threads or by its event loop, whichever is faster",
            unit="MB/s",
            target=_TARGET,
        )
        if self._url is None:
            return replace(row, reason="no --s3 URL was given")
        url = f"{self._url.rstrip('/')}/bench-{uuid.uuid4().hex}"
        objects = open_objects(url)
        try:
            written = written_bank(objects, spec)
            plain = S3Store.from_url(url, client_options={"allow_http": True})
            keys = [
                slot_key(spec.partition_of(ref), 1, Role.WEIGHT, record.entry.slot)
                for ref, record in written.records.items()
            ]
            with ThreadPoolExecutor(_CONCURRENT) as pool:
                pairs = interleave(
                    lambda: _by_threads(pool, written.read, list(written.records)),
                    lambda: min(
                        _by_threads(pool, lambda key: obstore.get(plain, key).bytes(), keys),
                        asyncio.run(_by_event_loop(plain, keys)),
                    ),
                    num_pairs=self._scale.num_pairs,
                    progress=progress,
                )
        finally:
            for key in objects.list(""):
                objects.delete(key)
        return replace(row, samples=rates(pairs, total / 1e6))


def _by_threads(pool: ThreadPoolExecutor, read: Callable[[T], object], items: Sequence[T]) -> float:
    with stopwatch() as watch:
        list(pool.map(read, items))
    return watch.seconds


async def _by_event_loop(store: S3Store, keys: Sequence[str]) -> float:
    places = asyncio.Semaphore(_CONCURRENT)

    async def get(key: str) -> None:
        async with places:
            await (await obstore.get_async(store, key)).bytes_async()

    with stopwatch() as watch:
        await asyncio.gather(*map(get, keys))
    return watch.seconds
