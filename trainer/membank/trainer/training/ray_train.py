"""Stage 2 on Ray Train workers, against a served bank.

Workers share nothing but the bank: no collective, no barrier inside the loop, so a slow worker
holds nobody up. Each takes its share of the shuffled sequences, fetches and pushes through a client
of its own, and keeps its position in a file. A worker that dies makes Ray Train start the group
again, and each worker goes on from its position; a shard that dies is waited for by the client.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import ray
import ray.train
import torch

# Not TorchTrainer: it would join the workers in a process group that nothing here uses, and that
# makes each of them wait for the others at the start.
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

from membank.client import BankClient, ClientConfig, Compression
from membank.trainer.training.checkpoint import PositionCheckpoint, load_anchor
from membank.trainer.training.memory_stage import MemoryStageConfig, train_memories
from membank.trainer.training.progress import Progress, ProgressCallback, StageResult
from membank.trainer.training.schedule import check_range
from membank.trainer.training.sequences import load_sequences
from membank.trainer.training.served import ServedMemory
from membank.wire.errors import InternalError

_LOGGER = logging.getLogger(__name__)
# An actor's methods get `.remote`, which Ray's annotations do not carry over.
_Handle = Any
_NAMESPACE = "membank-train"
_POLL_S = 0.5


@dataclass(frozen=True, kw_only=True, slots=True)
class ServedTraining:
    """One run of stage 2 against a served bank; it pickles, and its paths hold on every node."""

    endpoint: str
    """Address of the service, host:port."""
    anchor: Path
    """File of `save_anchor`."""
    sequences: Path
    """File of `save_sequences`."""
    config: MemoryStageConfig
    """How to train."""
    run_dir: Path
    """Folder for positions and losses; a run that is started again goes on from what is there. On
    several nodes it must be a shared one."""
    num_workers: int = 2
    """Workers, at least 1; a run is resumed with as many as it began with."""
    client: ClientConfig = field(default_factory=ClientConfig)
    """Configuration of each worker's client; credentials by `token_file` alone."""
    ray_address: str | None = None
    """Ray to join: "auto" or host:port. None = the one that this process is connected to, or else
    one of its own on this machine."""
    cpus_per_worker: float = 0.01
    """Logical CPUs that Ray books for a worker, > 0; near 0 so that it fits beside the service."""
    use_gpu: bool = False
    """True gives each worker a GPU for the anchor; blocks still come and go over the CPU."""
    num_threads: int = 1
    """Threads of one worker, at least 1."""
    max_failures: int = 3
    """Times that the group of workers is started again before the run fails; -1 = no limit."""
    patience_s: float = 120.0
    """How long a fetch or push waits for a shard that is away, in seconds, > 0."""
    compression: Compression | None = None
    """What gradients travel as; None = as they are, float32. Whoever resumes a run keeps to it."""

    def __post_init__(self) -> None:
        for name in ("anchor", "sequences", "run_dir"):
            object.__setattr__(self, name, Path(getattr(self, name)).absolute())
        for name in ("num_workers", "num_threads"):
            check_range(name, getattr(self, name), 1, float("inf"), open_high=True)
        check_range("max_failures", self.max_failures, -1, float("inf"), open_high=True)
        for name in ("patience_s", "cpus_per_worker"):
            check_range(name, getattr(self, name), 1e-3, float("inf"), open_high=True)

    @property
    def patient_client(self) -> ClientConfig:
        """Configuration of a worker's client, whose retries end with `patience_s` alone."""
        retry = replace(self.client.retry, max_attempts=sys.maxsize)
        return replace(self.client, retry=retry)

    def losses_path(self, rank: int) -> Path:
        """Return the file with the losses of one worker (`read_losses`)."""
        return self.run_dir / f"worker-{rank}.losses.jsonl"

    def position_path(self, rank: int) -> Path:
        """Return the file with the position of one worker."""
        return self.run_dir / f"worker-{rank}.position.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class ServedTrainingResult:
    """What a run of stage 2 did, from its start or resume on."""

    workers: tuple[StageResult, ...]
    """One result per worker, by rank; of its last process where it was started again."""
    seconds: float
    """Seconds in all, start of the workers included."""
    num_restarts: int
    """Times that the group of workers was started again."""

    @property
    def tokens_per_s(self) -> float:
        """Positions per second of all workers together while they trained."""
        return sum(worker.tokens_per_s for worker in self.workers)

    @property
    def num_refused(self) -> int:
        """Gradients that were refused."""
        return sum(worker.num_refused for worker in self.workers)

    def to_json(self) -> dict[str, object]:
        """Return the fields as JSON-able values."""
        return {
            "workers": [worker.to_json() for worker in self.workers],
            "seconds": self.seconds,
            "num_restarts": self.num_restarts,
            "tokens_per_s": self.tokens_per_s,
            "num_refused": self.num_refused,
        }


def train_served(
    job: ServedTraining, *, on_progress: ProgressCallback | None = None
) -> ServedTrainingResult:
    """Train the memories of a served bank with Ray Train, and return when all workers are done.

    Parameters
    ----------
    job
        What to train, and where.
    on_progress
        Told about twice a second how far all workers are together, from a thread of its own.

    Returns
    -------
    ServedTrainingResult
        What the workers did.

    Raises
    ------
    ray.train.TrainingFailedError
        Workers failed more often than `max_failures`; the last error is its cause.
    KeyboardInterrupt
        Ctrl-C; the workers have been stopped.
    MembankError
        The anchor or the sequences cannot be read.
    """
    # Read here once: a wrong file is an error of the caller, not of a worker far away.
    load_anchor(job.anchor)
    load_sequences(job.sequences)
    began = time.monotonic()
    with _ray(job):
        board = _board(job.num_workers)
        trainer = DataParallelTrainer(
            _train_worker,
            train_loop_config={"job": job, "board": board},
            scaling_config=ray.train.ScalingConfig(
                num_workers=job.num_workers,
                use_gpu=job.use_gpu,
                resources_per_worker=_resources(job),
            ),
            run_config=ray.train.RunConfig(
                name=_NAMESPACE,
                storage_path=str(job.run_dir / "ray"),
                failure_config=ray.train.FailureConfig(max_failures=job.max_failures),
            ),
        )
        with _watched(board, on_progress), _interruptible():
            trainer.fit()
        results, num_starts = ray.get(board.results.remote())
    if len(results) != job.num_workers:
        raise InternalError(f"{len(results)} of {job.num_workers} workers reported a result")
    return ServedTrainingResult(
        workers=tuple(results[rank] for rank in sorted(results)),
        seconds=time.monotonic() - began,
        num_restarts=num_starts - 1,
    )


def _resources(job: ServedTraining) -> dict[str, float]:
    return {"CPU": job.cpus_per_worker} | ({"GPU": 1.0} if job.use_gpu else {})


def _train_worker(config: Mapping[str, object]) -> None:
    """Run one worker: what Ray Train calls in each process of the group."""
    job = config["job"]
    assert isinstance(job, ServedTraining)
    board = cast("_Handle", config["board"])
    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    board.start.remote(rank, os.getpid())
    # Here and not at import: OpenMP keeps the number per thread, and this thread trains.
    torch.set_num_threads(job.num_threads)
    position = PositionCheckpoint(job.position_path(rank))
    with BankClient.connect(job.endpoint, config=job.patient_client) as client:
        result = train_memories(
            # Ray shows each worker its own GPU alone.
            load_anchor(job.anchor).to("cuda" if job.use_gpu else "cpu"),
            ServedMemory(
                client,
                run_id=position.run_id,
                patience_s=job.patience_s,
                compression=job.compression,
            ),
            load_sequences(job.sequences),
            job.config,
            rank=rank,
            world_size=world_size,
            checkpoint=position,
            losses=job.losses_path(rank),
            on_progress=lambda progress: board.post.remote(rank, progress),
        )
    ray.get(board.finish.remote(rank, result))
    # Once, at the end: every report waits for all workers.
    ray.train.report({"loss": result.final_loss, "tokens_per_s": result.tokens_per_s})


class _Board:
    """Where workers post how far they are; a tiny actor, so that nobody waits for anybody."""

    def __init__(self, num_workers: int) -> None:
        self._num_workers = num_workers
        self._progress: dict[int, Progress] = {}
        self._results: dict[int, StageResult] = {}
        self._starts: dict[int, int] = {}
        self._pids: dict[int, int] = {}

    def start(self, rank: int, pid: int) -> None:
        self._starts[rank] = self._starts.get(rank, 0) + 1
        self._pids[rank] = pid

    def post(self, rank: int, progress: Progress) -> None:
        self._progress[rank] = progress

    def finish(self, rank: int, result: StageResult) -> None:
        self._results[rank] = result

    def read(self) -> list[Progress] | None:
        complete = len(self._progress) == self._num_workers
        return list(self._progress.values()) if complete else None

    def pids(self) -> dict[int, int]:
        return dict(self._pids)

    def results(self) -> tuple[dict[int, StageResult], int]:
        return dict(self._results), max(self._starts.values(), default=1)


def _board(num_workers: int) -> _Handle:
    return ray.remote(num_cpus=0)(_Board).remote(num_workers)


def together(workers: Sequence[Progress]) -> Progress:
    """Return how far workers are as one: steps and speeds add up, the slowest sets the time left.

    Parameters
    ----------
    workers
        At least one.
    """
    return Progress(
        stage=workers[0].stage,
        step=sum(worker.step for worker in workers),
        num_steps=sum(worker.num_steps for worker in workers),
        loss=sum(worker.loss for worker in workers) / len(workers),
        tokens_per_s=sum(worker.tokens_per_s for worker in workers),
        elapsed_s=max(worker.elapsed_s for worker in workers),
        left_s=max(worker.left_s for worker in workers),
        num_refused=sum(worker.num_refused for worker in workers),
    )


@contextmanager
def _watched(board: _Handle, on_progress: ProgressCallback | None) -> Iterator[None]:
    """Tell `on_progress` what is on the board until the block ends."""
    if on_progress is None:
        yield
        return
    ended = threading.Event()

    def poll() -> None:
        told = -1
        while True:
            last = ended.wait(_POLL_S)
            try:
                workers = ray.get(board.read.remote())
            except ray.exceptions.RayError:
                _LOGGER.warning("progress is not to be had any more", exc_info=True)
                return
            if workers and (progress := together(workers)).step != told:
                told = progress.step
                on_progress(progress)
            if last:
                return

    thread = threading.Thread(target=poll, name="membank-progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


@contextmanager
def _interruptible() -> Iterator[None]:
    """Let Ctrl-C end a fit as it ends anything else.

    Ray Train puts a handler of its own in place, which stops the workers, then leaves the program
    with a status of success; and it stays there after the fit.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit as err:
        raise KeyboardInterrupt from err
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def _ray(job: ServedTraining) -> Iterator[None]:
    """Be connected to Ray for a while; a connection that is there already is used and left."""
    if ray.is_initialized():
        yield
        return
    local = job.ray_address is None
    # A training run reports to nobody unless its owner says so.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray.init(
        address="local" if local else job.ray_address,
        namespace=_NAMESPACE,
        log_to_driver=False,
        logging_level=logging.ERROR,
        # Both describe a new Ray; to one that is joined they would be wrong.
        include_dashboard=False if local else None,
        num_cpus=job.num_workers if local else None,
    )
    try:
        yield
    finally:
        ray.shutdown()
