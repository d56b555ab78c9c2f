"""The files of a bank that is killed: what a service left is judged, and kept in case of need."""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection, Iterator
from contextlib import suppress

from campaign_model import History, Wrong
from campaign_setting import Setting
from campaign_tally import Tally
from membank.bank_service.fsck import Severity, check_bank
from membank.wire.errors import NotFoundError

DAMAGE = (Severity.DAMAGE,)
"""What a service may never leave, however it dies."""
ANY_FAULT = (Severity.DAMAGE, Severity.REPAIRABLE)
"""What it may not leave once it has started again, and settled what it was at."""


class Remains:
    """What lies in the storage and on the machines of one bank.

    Parameters
    ----------
    setting
        The bank, which exists.
    history
        Is told what is wrong.
    tally
        Counts the checks.
    """

    def __init__(self, setting: Setting, history: History, tally: Tally) -> None:
        self._folder = setting.folder
        self._url = setting.url if setting.is_directory else None
        self._objects = setting.objects()
        self._history = history
        self._tally = tally
        self._num_forbidden = 0
        self.journal_dirs = [setting.journal_dir]
        """Of every machine, the present one last."""

    def check(self, when: str, wrong: Collection[Severity]) -> None:
        """Let the check of a bank judge what lies in the storage."""
        report = check_bank(self._objects, journal_dir=self.journal_dirs[-1], deep=True)
        self._tally.checks += 1
        for finding in report.findings:
            if finding.severity in wrong:
                self._history.blame(
                    Wrong.FSCK, f"{when}: {finding.kind.value}: {finding.key}: {finding.problem}"
                )

    def look_for_deleted(self, *, since_ever: bool = False) -> None:
        """Look into every object and journal for what was deleted since the last look, or ever."""
        forbidden = self._history.forbidden[0 if since_ever else self._num_forbidden :]
        if not forbidden:
            return
        self._num_forbidden = len(self._history.forbidden)
        for where, data in self._contents():
            found = [pattern.hex() for pattern in forbidden if pattern in data]
            if found:
                self._history.blame(
                    Wrong.RESURRECTED, f"{where} holds deleted content that begins with {found[0]}"
                )

    def _contents(self) -> Iterator[tuple[str, bytes]]:
        for key in self._objects.list(""):
            with suppress(NotFoundError):
                yield key, self._objects.get(key)
        for folder in self.journal_dirs:
            for path in sorted(folder.rglob("*")):
                with suppress(FileNotFoundError):
                    if path.is_file():
                        yield str(path), path.read_bytes()

    def copy(self) -> None:
        """Keep what the last kill left, in case that the next start goes wrong."""
        copy = self._folder / "before"
        shutil.rmtree(copy, ignore_errors=True)
        if self.journal_dirs[-1].exists():
            shutil.copytree(self.journal_dirs[-1], copy / "journals")
        if self._url is not None:
            # Objects are replaced, never written into, so that a link is a copy.
            shutil.copytree(self._url, copy / "bank", copy_function=os.link)

    def keep(self) -> None:
        """Keep the objects of a bucket, which ends with its server."""
        if self._url is not None:
            return
        for key in self._objects.list(""):
            path = self._folder / "objects" / key
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(self._objects.get(key))
