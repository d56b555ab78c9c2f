"""A bank seen through the client: the same training as in process, also when answers are lost."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from membank.client import (
    BankClient,
    ClientConfig,
    Compression,
    FetchAnswer,
    PushAnswer,
    RetryConfig,
)
from membank.trainer.corpus import PackedSequences
from membank.trainer.model import Anchor
from membank.trainer.training import (
    InProcessMemory,
    MemoryStageConfig,
    PrefetchConfig,
    ServedMemory,
    load_sequences,
    read_losses,
    save_sequences,
    train_memories,
)
from membank.wire.codec import push_codec
from membank.wire.errors import NotFoundError, UnavailableError
from membank.wire.records import (
    BankInfo,
    Block,
    BlockHeader,
    Gradient,
    PartitionOwner,
    Placement,
    Update,
)
from membank.wire.spec import Array, BankSpec, BlockRef, BlockState

CONFIG = MemoryStageConfig(num_tokens=50 * 6 * 12, batch_size=6, run_length=2)


class Loopback:
    """A transport to a service that is memory in this process; every n-th answer to a push is lost."""

    def __init__(self, memory: InProcessMemory) -> None:
        self.memory = memory
        self.lose_every = 0
        self.num_pushes = 0
        self.num_lost = 0
        self.pushed_bytes = 0
        self._answers: dict[tuple[str, tuple[BlockRef, ...]], PushAnswer] = {}

    async def get_bank(self, *, timeout_s: float) -> BankInfo:
        del timeout_s
        spec = self.memory.spec
        owners = tuple(
            PartitionOwner(partition=n, shard_id=f"shard-{n}", endpoint=f"shard-{n}:1")
            for n in range(spec.num_partitions)
        )
        return BankInfo(spec=spec, revision=1, placement=Placement(generation=1, owners=owners))

    async def fetch(
        self,
        refs: Sequence[BlockRef],
        *,
        held_versions: Sequence[int | None] | None = None,
        dtype: str | None = None,
        min_revision: int = 0,
        snapshot: str = "",
        into: Mapping[BlockRef, Array] | None = None,
        timeout_s: float,
    ) -> FetchAnswer:
        del held_versions, min_revision, snapshot, into, timeout_s
        assert dtype == "float32"
        fetched = self.memory.fetch(refs)
        return FetchAnswer(
            revision=1,
            blocks=tuple(
                _block(
                    fetched.weights.get(ref), ref, fetched.versions[ref], fetched.absent.get(ref)
                )
                for ref in refs
            ),
        )

    async def push(self, update: Update, *, timeout_s: float) -> PushAnswer:
        del timeout_s
        refs = tuple(gradient.ref for gradient in update.gradients)
        known = self._answers.get((update.request_id, refs))
        if known is not None:
            return PushAnswer(results=known.results, duplicate=True)
        gradients = {g.ref: self._tensor(g) for g in update.gradients}
        self.pushed_bytes += sum(g.values.nbytes for g in update.gradients)
        (applied,) = self.memory.push(
            gradients,
            {g.ref: g.base_version for g in update.gradients},
            step=update.step,
            learning_rate_scale=update.learning_rate_scale,
        )
        answer = PushAnswer(results=applied.results, duplicate=False)
        self._answers[update.request_id, refs] = answer
        self.num_pushes += 1
        if self.lose_every and self.num_pushes % self.lose_every == 0:
            self.num_lost += 1
            raise UnavailableError("the answer was lost")
        return answer

    def _tensor(self, gradient: Gradient) -> torch.Tensor:
        values = np.asarray(gradient.values)
        if gradient.encoding:
            shape = self.memory.spec.block_shape(gradient.ref.level)
            values = push_codec(gradient.encoding).decode(gradient.values.view(np.uint8), shape)
        return torch.from_numpy(values)

    async def close(self, *, grace_s: float = 0.0) -> None:
        del grace_s


def _block(
    weight: torch.Tensor | None, ref: BlockRef, version: int, state: BlockState | None
) -> Block:
    if weight is None:
        assert state is not None
        return Block(header=BlockHeader(ref=ref, version=version, state=state), weight=None)
    values = weight.numpy().copy()
    values.flags.writeable = False
    header = BlockHeader(ref=ref, version=version, shape=values.shape, num_bytes=values.nbytes)
    return Block(header=header, weight=values)


@pytest.fixture
def service(spec: BankSpec) -> Loopback:
    return Loopback(InProcessMemory(spec))


@pytest.fixture
def client(service: Loopback) -> Iterator[BankClient]:
    config = ClientConfig(retry=RetryConfig(initial_backoff_s=1e-4, max_backoff_s=1e-4))
    with BankClient.connect("loopback:1", config=config, connector=lambda _: service) as client:  # type: ignore[arg-type, return-value]
        yield client


def _losses(path: Path) -> list[float]:
    return [record.loss for record in read_losses(path)]


@pytest.mark.parametrize("depth", [0, 1, 2])
@pytest.mark.parametrize("lose_every", [0, 7])
def test_one_worker_through_the_client_equals_memory_in_process(
    anchor: Anchor,
    sequences: PackedSequences,
    spec: BankSpec,
    client: BankClient,
    service: Loopback,
    tmp_path: Path,
    depth: int,
    lose_every: int,
) -> None:
    service.lose_every = lose_every
    config = MemoryStageConfig(
        num_tokens=CONFIG.num_tokens,
        batch_size=6,
        run_length=2,
        prefetch=PrefetchConfig(depth=depth),
    )
    reference = InProcessMemory(spec)
    train_memories(anchor, reference, sequences, config, losses=tmp_path / "reference")
    result = train_memories(
        anchor, ServedMemory(client), sequences, config, losses=tmp_path / "served"
    )
    assert result.num_steps == 50
    assert result.num_refused == 0
    assert _losses(tmp_path / "served") == _losses(tmp_path / "reference")
    assert bool(service.num_lost) == bool(lose_every)
    ours = reference.fetch(list(spec.blocks()))
    assert service.memory.fetch(list(spec.blocks())).versions == ours.versions


@pytest.mark.parametrize(("depth", "lose_every"), [(0, 0), (1, 3)])
def test_compressed_gradients_train_with_fewer_bytes(
    anchor: Anchor,
    sequences: PackedSequences,
    spec: BankSpec,
    client: BankClient,
    service: Loopback,
    tmp_path: Path,
    depth: int,
    lose_every: int,
) -> None:
    service.lose_every = lose_every
    config = MemoryStageConfig(
        num_tokens=CONFIG.num_tokens,
        batch_size=6,
        run_length=2,
        prefetch=PrefetchConfig(depth=depth),
    )
    reference = Loopback(InProcessMemory(spec))
    train_memories(anchor, reference.memory, sequences, config, losses=tmp_path / "exact")
    source = ServedMemory(client, compression=Compression(wire="int8"))
    result = train_memories(anchor, source, sequences, config, losses=tmp_path / "compressed")
    assert result.num_refused == 0
    exact, compressed = _losses(tmp_path / "exact"), _losses(tmp_path / "compressed")
    assert exact != compressed
    np.testing.assert_allclose(compressed, exact, rtol=0.01)
    refs = list(spec.blocks())
    versions = service.memory.fetch(refs).versions
    assert versions == reference.memory.fetch(refs).versions
    whole = sum(4 * spec.block_params(ref.level) * version for ref, version in versions.items())
    assert service.pushed_bytes < 0.3 * whole


def test_a_step_done_again_after_a_restart_is_not_applied_again(
    client: BankClient, service: Loopback, spec: BankSpec
) -> None:
    ref = BlockRef(2, 1)
    gradient = {ref: torch.ones(spec.block_shape(2))}
    for _ in range(2):  # the second is the worker after its restart
        source = ServedMemory(client, run_id="run-of-worker-0")
        source.push(gradient, {ref: 0}, step=4)
    assert service.memory.fetch([ref]).versions[ref] == 1
    ServedMemory(client, run_id="another").push(gradient, {ref: 1}, step=4)
    assert service.memory.fetch([ref]).versions[ref] == 2


def test_what_is_awaited_is_sent_first_and_not_applied_again_after_a_restart(
    client: BankClient, service: Loopback, spec: BankSpec
) -> None:
    refs = [BlockRef(2, cluster) for cluster in range(3)]
    gradients = {ref: torch.ones(spec.block_shape(2)) for ref in refs}
    seen: list[list[int]] = []
    for _ in range(2):  # the second is the worker after its restart
        source = ServedMemory(client, run_id="run-of-worker-0")
        (push,) = source.push(
            gradients,
            dict.fromkeys(refs, 0),
            step=4,
            first=refs[1:2],
            then=lambda: seen.append([service.memory.fetch([r]).versions[r] for r in refs]),
        )
        assert [(result.ref, result.version) for result in push.results] == [(r, 1) for r in refs]
    assert seen == [[0, 1, 0], [1, 1, 1]]
    assert service.num_pushes == 2


@pytest.mark.parametrize("first", [[], [0], [1]], ids=["nothing", "everything", "others"])
def test_a_push_with_nothing_to_send_before_or_after_is_one_request(
    client: BankClient, service: Loopback, spec: BankSpec, first: list[int]
) -> None:
    told: list[int] = []
    (push,) = ServedMemory(client, run_id="run").push(
        {BlockRef(2, 0): torch.ones(spec.block_shape(2))},
        {BlockRef(2, 0): 0},
        step=0,
        first=[BlockRef(2, cluster) for cluster in first],
        then=lambda: told.append(service.num_pushes),
    )
    assert (len(push.results), service.num_pushes) == (1, 1)
    assert told == [1 if first == [0] else 0]


def test_what_is_withheld_is_said(client: BankClient, service: Loopback) -> None:
    refs = [BlockRef(1, 0), BlockRef(2, 0)]
    service.memory.set_state(refs[1], BlockState.WITHHELD)
    fetched = ServedMemory(client).fetch(refs)
    assert fetched.absent == {refs[1]: BlockState.WITHHELD}
    assert set(fetched.weights) == {refs[0]}


def test_bytes_sent_are_in_proportion_to_the_blocks_touched(
    client: BankClient, service: Loopback, spec: BankSpec
) -> None:
    source = ServedMemory(client)
    for count in (1, 2, 5):
        refs = [BlockRef(2, cluster) for cluster in range(count)]
        fetched = source.fetch(refs)
        service.pushed_bytes = 0
        source.push(dict(fetched.weights), fetched.versions, step=0)
        assert service.pushed_bytes == count * spec.block_params(2) * 4


def test_nothing_to_fetch_or_push_asks_nobody(client: BankClient, service: Loopback) -> None:
    source = ServedMemory(client)
    assert source.fetch([]).weights == {}
    (push,) = source.push({}, {}, step=3)
    assert (push.step, push.results) == (3, ())
    assert source.flush() == ()
    assert service.num_pushes == 0


def test_sequences_come_back_from_their_file(sequences: PackedSequences, tmp_path: Path) -> None:
    save_sequences(tmp_path / "sequences", sequences)
    assert load_sequences(tmp_path / "sequences").fingerprint == sequences.fingerprint
    with pytest.raises(NotFoundError):
        load_sequences(tmp_path / "missing")
