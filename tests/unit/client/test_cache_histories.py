"""Random histories: whatever a cache answers was true at one moment, not too long ago."""

import asyncio
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache_rig import CacheRig
from membank.client import FetchedBlocks
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
)


@dataclass(frozen=True)
class Moment:
    """The bank since some time."""

    since_s: float
    blocks: dict[BlockRef, tuple[int, BlockState, bytes]]


class History:
    """A cache whose news may be late or lost, beside a record of what was true when."""

    def __init__(self, max_staleness_s: float, max_bytes: int) -> None:
        self.rig = CacheRig(max_staleness_s=max_staleness_s, max_bytes=max_bytes)
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

    def hear(self, event: BlockEvent) -> None:
        self.rig.ear.hear(event)
        kept = self.rig.store.get(event.ref, "float32")
        if event.state is not BlockState.ACTIVE:
            assert kept is None or kept.version > event.version
        else:
            assert kept is None or kept.version >= event.version

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
