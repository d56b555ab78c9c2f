"""Everybody who takes part."""

from __future__ import annotations

from benchmarks.peers import (
    arrow_flight,
    floors,
    membank_service,
    mooncake_store,
    ray_actor,
    redis_server,
    torch_rpc,
)
from benchmarks.peers.blocks import Blocks
from benchmarks.peers.contestant import Contestant
from benchmarks.peers.tasks import Scale, Task, block_tasks, conditional_task, path_task


class Stage:
    """Contestants whose servers run at the same time, and what they do.

    Parameters
    ----------
    contestants
        Who takes part.
    tasks
        Tasks of each contestant, by its name and by the task's.
    blocks
        What they are loaded with; None = nothing, they bring their own.
    scale
        How much is measured.
    """

    def __init__(
        self,
        contestants: list[Contestant],
        tasks: dict[str, dict[str, Task]],
        blocks: Blocks | None,
        scale: Scale,
    ) -> None:
        self.contestants = contestants
        self.tasks = tasks
        self.blocks = blocks
        self.scale = scale

    @property
    def task_names(self) -> list[str]:
        """Names of the tasks, in the order in which they are measured."""
        return list(dict.fromkeys(name for tasks in self.tasks.values() for name in tasks))

    def num_clients(self, contestant: Contestant) -> int:
        """Return how many measuring processes a contestant has."""
        return max((task.num_clients for task in self.tasks[contestant.name].values()), default=1)


def blocks_stage(scale: Scale) -> Stage:
    """Return the stage in which membank and its peers hold the same blocks."""
    blocks = Blocks.of(scale.num_large)
    contestants = [
        *membank_service.contestants(blocks),
        *redis_server.contestants(),
        *arrow_flight.contestants(),
        *torch_rpc.contestants(),
        *ray_actor.contestants(),
        *mooncake_store.contestants(),
        *floors.contestants(),
    ]
    all_tasks = block_tasks(blocks, scale)
    tasks = {
        contestant.name: {
            task.name: task
            for task in all_tasks
            if task.work in contestant.works and (contestant.many_clients or task.num_clients == 1)
        }
        for contestant in contestants
    }
    return Stage(contestants, tasks, blocks, scale)


def paths_stage(scale: Scale) -> Stage:
    """Return the stage in which two banks of membank differ in nothing but their size."""
    counts = (scale.num_leaves, scale.num_leaves_small)
    contestants = [membank_service.path_contestant(count) for count in counts]
    tasks = {
        contestant.name: {
            task.name: task for task in (path_task(count, scale), conditional_task(count, scale))
        }
        for contestant, count in zip(contestants, counts, strict=True)
    }
    return Stage(contestants, tasks, None, scale)


STAGES = {"blocks": blocks_stage, "paths": paths_stage}
"""Stages, in the order in which they run."""
