"""A cache as a client's session has it: what it watches, asks, and hears."""

from __future__ import annotations

from membank.client.blocks import BlockSource
from membank.client.cache.blocks import CachedBlocks
from membank.client.cache.disk_tier import DiskTier
from membank.client.cache.listening import WatchEar
from membank.client.cache.store import BlockStore
from membank.client.session import Session
from membank.client.watching import ShardWatch
from membank.wire.spec import BankSpec


def cached(blocks: BlockSource, session: Session, spec: BankSpec) -> CachedBlocks:
    """Return `blocks` behind the cache that the session's configuration asks for.

    Parameters
    ----------
    blocks
        Where blocks come from.
    session
        The session; its configuration has a cache.
    spec
        Spec of the bank.
    """
    config = session.config.cache
    assert config is not None
    # Who asks every time need hear only of what must not be held any more.
    admin_only = config.max_staleness_s == 0

    def open_watch() -> ShardWatch:
        return ShardWatch(session.shards, spec, (), admin_only=admin_only, config=session.config)

    async def last_removal() -> int:
        info = await session.ask_gateway(
            lambda gateway, timeout_s: gateway.get_bank(timeout_s=timeout_s),
            what="last removal of the bank",
            deadline=session.deadline(None),
        )
        return info.removal_revision

    disk = None if config.disk is None else DiskTier(config.disk, spec)
    cache = CachedBlocks(
        blocks,
        config,
        store=BlockStore(config, demote=None if disk is None else disk.put),
        ear=WatchEar(open_watch, session.config.retry),
        disk=disk,
        last_removal=last_removal,
    )
    session.report_listeners.append(cache.hear_report)
    return cache
