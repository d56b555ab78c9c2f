"""What an update costs in a large bank, beside a small one."""

from __future__ import annotations

from membank.bank_service.bench.banks import Shelf
from membank.bank_service.bench.contract import Progress, Row, Target
from membank.bank_service.bench.measure import costs, interleave, stopwatch
from membank.bank_service.bench.pusher import Pusher
from membank.bank_service.bench.scale import Scale
from membank.wire.spec import BlockRef

_TARGET = Target(1.1, at_least=False)


class UpdateBench:
    """Pushes to the same few blocks of a large and of a small bank, and folds the journals.

    Parameters
    ----------
    shelf
        Banks.
    scale
        Sizes of the banks.
    """

    def __init__(self, shelf: Shelf, scale: Scale) -> None:
        self._shelf = shelf
        self._scale = scale
        self.name = f"update-{scale.num_blocks_large}"
        self.expected_s = 40.0

    def run(self, progress: Progress) -> Row:
        # docstring inherited
        scale = self._scale
        # As many blocks change in both banks: what differs is only what else there is.
        refs = [BlockRef(1, cluster) for cluster in range(scale.num_blocks_small)]
        large = Pusher(self._shelf.bank(scale.num_blocks_large), refs)
        small = Pusher(self._shelf.bank(scale.num_blocks_small), refs)
        try:
            pairs = interleave(
                lambda: _run(large, scale.num_updates),
                lambda: _run(small, scale.num_updates),
                num_pairs=scale.num_slow_pairs,
                progress=progress,
            )
        finally:
            large.shard.close(consolidate=False)
            small.shard.close(consolidate=False)
        num_partitions = large.shard.spec.num_partitions
        return Row(
            name=self.name,
            what=f"one push of one block of {large.shard.spec.weight_bytes(1)} bytes, with its "
            f"share of one consolidation per {scale.num_updates // num_partitions} updates of a "
            f"partition, in a bank of {scale.num_blocks_large} written blocks / in one of "
            f"{scale.num_blocks_small}; the same {scale.num_blocks_small} are pushed to in both",
            unit="s",
            target=_TARGET,
            samples=costs(pairs, scale.num_updates),
        )


def _run(pusher: Pusher, count: int) -> float:
    with stopwatch() as watch:
        pusher.push(count)
        pusher.shard.consolidate()
    return watch.seconds
