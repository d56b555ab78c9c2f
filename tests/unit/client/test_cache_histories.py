"""Random histories: whatever a cache answers was true at one moment, not too long ago."""

import asyncio
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache_rig import CacheRig
from fake_bank import SPEC
from membank.client import DiskTierConfig, FetchedBlocks
from membank.client.cache.disk_files import TRAILER_BYTES
from membank.wire.records import BlockEvent
from membank.wire.spec import BlockRef, BlockState

# Few, so that short programs do much to each: two topics, each on a shard of its own.
REFS = (BlockRef(1, 0), BlockRef(1, 1))
MAX_STALENESS_S = 5.0

some_refs = st.lists(st.sampled_from(REFS), min_size=1, unique=True).map(tuple)
steps = st.one_of(
    st.tuples(st.just("fetch"), some_refs),
    st.tuples(st.just("fetch"), some_refs),
    st.tuples(st.just("fetch"), some_refs),
    st.tuples(st.just("push"), st.sampled_from(REFS)),
    st.tuples(st.just("swap"), some_refs),
    st.tuples(st.just("withhold"), st.sampled_from(REFS)),
    st.tuples(st.just("restore"), st.sampled_from(REFS)),
    st.tuples(st.just("hear"), st.integers(1, 3)),
    st.tuples(st.just("break"), st.booleans()),
    st.tuples(st.just("wait"), st.integers(1, 4)),
    st.tuples(st.just("recount"), st.sampled_from(REFS)),
)
files_fare = st.one_of(
    st.tuples(st.just("restart"), st.none()),
    st.tuples(st.just("settle"), st.none()),
    st.tuples(st.just("damage"), st.tuples(st.integers(0, 5), st.integers(-1, 1 << 12))),
)


@dataclass(frozen=True)
class Moment:
    """The bank since some time."""

    since_s: float
    blocks: dict[BlockRef, tuple[int, BlockState, bytes]]


class History:
    """A cache whose news may be late or lost, beside a record of what was true when."""

    def __init__(
        self, max_staleness_s: float, max_bytes: int, disk: DiskTierConfig | None = None
    ) -> None:
        self.rig = CacheRig(max_staleness_s=max_staleness_s, max_bytes=max_bytes, disk=disk)
        self.max_staleness_s = max_staleness_s
        self.moments: list[Moment] = []
        self.on_their_way: list[BlockEvent] = []
        self.own_versions = dict.fromkeys(REFS, 0)
        self.seen_revision = 0
        self.note()

    def note(self) -> None:
        """Take down how things are now."""
        held = {ref: self.rig.bank.held(ref) for ref in REFS}
        blocks = {
            ref: (
                kept.version,
                kept.state,
                kept.weight.tobytes() if kept.state is BlockState.ACTIVE else b"",
            )
            for ref, kept in held.items()
        }
        before = self.moments[-1].blocks if self.moments else {}
        self.moments.append(Moment(self.rig.now_s, blocks))
        if self.rig.ear.span is not None:
            self.on_their_way += [
                BlockEvent(ref=ref, version=version, state=state, revision=self.rig.bank.revision)
                for ref, (version, state, _) in blocks.items()
                if before.get(ref, (0,))[0] != version
            ]

    async def take(self, step: str, what: object) -> None:
        match step, what:
            case "fetch", tuple():
                # Not every caller knows what another one has seen.
                least = self.seen_revision if len(self.moments) % 2 else 0
                fetched = await self.rig.fetch(*what, min_revision=least)
                assert fetched.revision >= least
                self.seen_revision = fetched.revision
                self.check(fetched, what)
            case "push", BlockRef() as ref:
                base = self.rig.bank.held(ref).version
                self.own_versions |= (await self.rig.push(ref, base=base)).versions
                self.note()
            case "swap", tuple():
                self.rig.swap(*what, value=float(len(self.moments)))
                self.note()
            case "withhold", BlockRef() as ref:
                self.rig.set_state(ref, BlockState.WITHHELD)
                self.note()
            case "restore", BlockRef() as ref:
                self.rig.set_state(ref, BlockState.ACTIVE)
                self.note()
            case "hear", int():
                news, self.on_their_way = self.on_their_way[:what], self.on_their_way[what:]
                for event in news:
                    self.hear(event)
            case "break", bool():
                self.on_their_way.clear()
                self.rig.ear.span = None if what else len(self.moments) + 1000
            case "wait", int():
                self.rig.now_s += what
            case "recount", BlockRef() as ref:
                # A machine is lost, and an update that nobody saw takes the number of another.
                held = self.rig.bank.held(ref)
                held.weight = held.weight + 1
                self.note()
            case "restart", None:
                await self.rig.restart()
                self.on_their_way.clear()
            case "settle", None:
                await self.rig.settle()
            case "damage", (int() as number, int() as position):
                await self.rig.settle()
                self.damage(number, position)

    def files(self) -> list[Path]:
        assert self.rig.config.disk is not None
        return sorted(self.rig.config.disk.directory.glob("bank-*/*"))

    def damage(self, number: int, position: int) -> None:
        """Flip a bit of a file, cut it off or remove it."""
        for path in self.files()[number : number + 1]:
            data = bytearray(path.read_bytes())
            if position < 0:
                path.unlink()
            elif position < len(data):
                data[position] ^= 1
                path.write_bytes(data)
            else:
                path.write_bytes(data[:-1])

    def hear(self, event: BlockEvent) -> None:
        self.rig.ear.hear(event)
        kept = self.rig.store.get(event.ref, "float32")
        found = None if self.rig.disk is None else self.rig.disk.get(event.ref, "float32")
        for version in (each.version for each in (kept, found) if each is not None):
            if event.state is not BlockState.ACTIVE:
                assert version > event.version
            else:
                assert version >= event.version

    def check(self, fetched: FetchedBlocks, refs: tuple[BlockRef, ...]) -> None:
        assert tuple(fetched) == refs
        answered = {
            ref: (
                block.version,
                block.header.state,
                b"" if block.weight is None else block.weight.tobytes(),
            )
            for ref, block in fetched.items()
        }
        for ref, (version, _, _) in answered.items():
            assert version >= self.own_versions[ref]
        ends = [moment.since_s for moment in self.moments[1:]]
        recent = [
            moment.blocks
            for moment, end_s in zip(self.moments, [*ends, float("inf")], strict=True)
            if end_s > self.rig.now_s - self.max_staleness_s or end_s == float("inf")
        ]
        if self.max_staleness_s == 0:
            recent = recent[-1:]
        assert any(answered.items() <= blocks.items() for blocks in recent)


@pytest.mark.slow
@given(
    program=st.lists(steps, max_size=40),
    max_staleness_s=st.sampled_from([0.0, MAX_STALENESS_S]),
    max_bytes=st.sampled_from([1 << 20, 500]),
)
def test_answers_were_true_together_and_not_long_ago(
    program: list[tuple[str, object]], max_staleness_s: float, max_bytes: int
) -> None:
    async def run() -> None:
        history = History(max_staleness_s, max_bytes)
        for step, what in program:
            await history.take(step, what)
        assert history.rig.store.num_bytes <= max_bytes

    asyncio.run(run())


@pytest.mark.slow
@given(
    program=st.lists(st.one_of(steps, files_fare), max_size=40),
    max_staleness_s=st.sampled_from([0.0, MAX_STALENESS_S]),
    max_bytes=st.sampled_from([1, SPEC.weight_bytes(1)]),
    max_disk_bytes=st.sampled_from([1 << 20, SPEC.weight_bytes(1) + TRAILER_BYTES]),
)
def test_so_they_were_with_files_under_it_whatever_became_of_them(
    program: list[tuple[str, object]], max_staleness_s: float, max_bytes: int, max_disk_bytes: int
) -> None:
    async def run(directory: Path) -> None:
        disk = DiskTierConfig(directory=directory, max_bytes=max_disk_bytes)
        history = History(max_staleness_s, max_bytes, disk)
        try:
            for step, what in program:
                await history.take(step, what)
            await history.rig.settle()
            assert sum(path.stat().st_size for path in history.files()) <= max_disk_bytes
        finally:
            await history.rig.cache.close()

    with TemporaryDirectory() as directory:
        asyncio.run(run(Path(directory)))
