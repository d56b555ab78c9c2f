"""Opening a large bank."""

from __future__ import annotations

from membank.bank_service.bench.banks import Shelf
from membank.bank_service.bench.contract import Judged, Progress, Row, Target
from membank.bank_service.bench.measure import interleave, stopwatch
from membank.bank_service.bench.scale import Scale
from membank.bank_service.shard import Shard
from membank.bank_service.store.bank import Bank
from membank.wire.crc import crc32c
from membank.wire.format.layout import manifest_prefix

_TARGET = Target(1.0, at_least=False, judged=Judged.OURS)


class OpenBench:
    """Opens all partitions of a bank, every block of which is written, in one process.

    Parameters
    ----------
    shelf
        Banks.
    scale
        Size of the bank.
    """

    def __init__(self, shelf: Shelf, scale: Scale) -> None:
        self._shelf = shelf
        self._scale = scale
        self.name = f"open-{scale.num_blocks_large}"
        self.expected_s = 20.0

    def run(self, progress: Progress) -> Row:
        # docstring inherited
        num_blocks = self._scale.num_blocks_large
        url = self._shelf.bank(num_blocks).url

        def ours() -> float:
            with stopwatch() as watch:
                shard = Shard.open(url)
            shard.close(consolidate=False)
            return watch.seconds

        def raw() -> float:
            with stopwatch() as watch:
                _read_manifests(Bank.open(url))
            return watch.seconds

        pairs = interleave(ours, raw, num_pairs=self._scale.num_slow_pairs, progress=progress)
        return Row(
            name=self.name,
            what=f"Shard.open of {num_blocks} written blocks, with takeover / reading the same "
            "manifests and checking their CRCs, page cache warm for both",
            unit="s",
            target=_TARGET,
            samples=tuple(pairs),
        )


def _read_manifests(bank: Bank) -> None:
    for number in range(bank.spec.num_partitions):
        for key in bank.objects.list(manifest_prefix(number)):
            crc32c(bank.objects.get(key))
