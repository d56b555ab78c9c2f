"""Banks that fail their clients when they are killed: what a campaign must find out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from campaign_setting import Setting
from membank.bank_service.shard import ShardConfig
from membank.bank_service.store import ObjectStore
from membank.bank_service.store.journal import LogFile
from storage_faults import FaultPlan
from tiny_bank import UnsyncedObjects


class LateLogFile:
    """A `LogFile` that makes each append with the next call, all but the first.

    The first one is the head of the segment, which the journal reads again at once.

    Parameters
    ----------
    inner
        The file.
    """

    def __init__(self, inner: LogFile) -> None:
        self._inner = inner
        self._held = b""
        self._is_begun = False

    def append(self, buffers: Sequence[bytes | memoryview]) -> None:
        # docstring inherited
        self._catch_up()
        self._held = b"".join(buffers)
        if not self._is_begun:
            self._is_begun = True
            self._catch_up()

    def truncate(self, num_bytes: int) -> None:
        # docstring inherited
        self._catch_up()
        self._inner.truncate(num_bytes)

    def sync(self) -> None:
        # docstring inherited
        self._catch_up()
        self._inner.sync()

    def close(self) -> None:
        # docstring inherited
        self._catch_up()
        self._inner.close()

    def _catch_up(self) -> None:
        if self._held:
            self._inner.append([self._held])
            self._held = b""


@dataclass(frozen=True, kw_only=True)
class LateSetting(Setting):
    """A bank whose journals say too early that they have written an update."""

    def open_log_file(self, path: Path, plan: FaultPlan) -> LogFile:
        # docstring inherited
        return LateLogFile(super().open_log_file(path, plan))


@dataclass(frozen=True, kw_only=True)
class ForgetfulSetting(Setting):
    """A bank that remembers the last request alone, and so applies repeated ones again."""

    def config(self) -> ShardConfig:
        # docstring inherited
        return replace(super().config(), retained_requests=1)


class HoardingObjects(UnsyncedObjects):
    """A directory that deletes no slot, and says that it has."""

    def delete(self, key: str) -> None:
        # docstring inherited
        if "/level-" not in key:
            super().delete(key)


@dataclass(frozen=True, kw_only=True)
class HoardingSetting(Setting):
    """A bank whose deleted content stays where it is."""

    def objects(self) -> ObjectStore:
        # docstring inherited
        return HoardingObjects(self.url)
