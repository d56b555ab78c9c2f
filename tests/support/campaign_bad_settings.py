"""Banks whose processes die without being killed: what a campaign must tell from its own kills."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from campaign_setting import Setting
from membank.bank_service.store.journal import LogFile
from storage_faults import FaultPlan

_LIFE = 60


class MortalLogFile:
    """A `LogFile` whose process is killed from outside after so many appends.

    Parameters
    ----------
    inner
        The file.
    """

    num_appends = 0
    """By all files of this process."""

    def __init__(self, inner: LogFile) -> None:
        self._inner = inner

    def append(self, buffers: Sequence[bytes | memoryview]) -> None:
        # docstring inherited
        MortalLogFile.num_appends += 1
        if MortalLogFile.num_appends > _LIFE:
            os.kill(os.getpid(), signal.SIGKILL)
        self._inner.append(buffers)

    def truncate(self, num_bytes: int) -> None:
        # docstring inherited
        self._inner.truncate(num_bytes)

    def sync(self) -> None:
        # docstring inherited
        self._inner.sync()

    def close(self) -> None:
        # docstring inherited
        self._inner.close()


@dataclass(frozen=True, kw_only=True)
class MortalSetting(Setting):
    """A bank whose shards are killed by somebody else, as by a machine that is out of memory."""

    def open_log_file(self, path: Path, plan: FaultPlan) -> LogFile:
        # docstring inherited
        return MortalLogFile(super().open_log_file(path, plan))
