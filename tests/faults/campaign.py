"""Kill a served bank again and again, on a local disk and on S3, and report what was lost: nothing.

``make faults COUNT=200`` runs it. It ends with status 1 if anything was lost, applied twice, torn or
damaged, or if no more updates were acknowledged than there were kills; the files of a bank that went
wrong are kept, and the report says where.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import secrets
import shutil
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import Protocol

from campaign_service import preloaded_context
from campaign_setting import Promise, Setting
from campaign_siege import LOCAL_PACE, LOCAL_PROMISES, S3_PACE, S3_PROMISES, Pace, Siege
from campaign_tally import Tally
from membank.cli.machine import environment
from s3_server import S3Server, open_server, why_no_s3

KILLS_PER_BANK = 25
"""Kills after which a new bank is made, so that the chain of its revisions stays short."""
MAX_FAILED_BANKS = 3
"""Banks that may go wrong before the campaign ends early."""


class Places(Protocol):
    """Where banks can be made."""

    name: str
    """Kind of storage."""
    pace: Pace
    """How long services live there."""
    promises: Sequence[Promise]
    """What they promise."""

    def make(self, folder: Path) -> Setting:
        """Return an empty place; the bank's files on this machine go into `folder`."""

    def clear(self, setting: Setting) -> None:
        """Remove a bank that is whole."""


class LocalPlaces:
    """Directories of this machine."""

    name = "local"
    pace = LOCAL_PACE
    promises: Sequence[Promise] = LOCAL_PROMISES

    def make(self, folder: Path) -> Setting:
        # docstring inherited
        return Setting(
            name=uuid.uuid4().hex,
            url=str(folder / "bank"),
            journal_dir=folder / "journals",
            folder=folder,
        )

    def clear(self, setting: Setting) -> None:
        # docstring inherited
        del setting  # the campaign removes its folder


class S3Places:
    """Buckets of a server.

    Parameters
    ----------
    server
        The server.
    """

    name = "s3"
    pace = S3_PACE
    promises: Sequence[Promise] = S3_PROMISES

    def __init__(self, server: S3Server) -> None:
        self._server = server

    def make(self, folder: Path) -> Setting:
        # docstring inherited
        return Setting(
            name=uuid.uuid4().hex,
            url=self._server.make_place(),
            journal_dir=folder / "journals",
            folder=folder,
            environment=self._server.owner.environment,
        )

    def clear(self, setting: Setting) -> None:
        # docstring inherited
        self._server.clear(setting.url)


def run_campaign(places: Places, num_kills: int, seed: int, folder: Path) -> Tally:
    """Kill the services of one bank after the other.

    Parameters
    ----------
    places
        Where the banks are made.
    num_kills
        Kills in all.
    seed
        Seed of the campaign.
    folder
        Where the banks' files on this machine go.
    """
    tally = Tally()
    context = preloaded_context()
    for index in count():
        left = num_kills - tally.kills
        if left <= 0 or len(tally.failures) >= MAX_FAILED_BANKS:
            break
        name = f"{places.name}-{index}"
        setting = places.make(folder / name)
        siege = Siege(
            context,
            setting,
            tally,
            seed=f"{seed}-{name}",
            pace=places.pace,
            promises=places.promises,
        )
        is_whole = siege.run(min(left, KILLS_PER_BANK))
        if is_whole:
            places.clear(setting)
            shutil.rmtree(setting.folder)
        print(
            f"{places.name}: {tally.kills} of {num_kills} kills, {tally.seconds:.0f} s, "
            f"bank {index} {'is whole' if is_whole else 'WENT WRONG:'}",
            flush=True,
        )
        if not is_whole:
            print(json.dumps(tally.failures[-1], indent=2), flush=True)
    return tally


@contextlib.contextmanager
def s3_campaign_server() -> Iterator[S3Server]:
    """Run a server for the time of a campaign; this process acts as its owner."""
    folder = Path(tempfile.mkdtemp(prefix="membank-faults-s3-"))
    with open_server(folder) as server:
        for variable in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_S3"):
            os.environ.pop(variable, None)
        os.environ.update(server.owner.environment)
        yield server
    shutil.rmtree(folder, ignore_errors=True)


def main() -> int:
    """Run the campaigns that were asked for, and write the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=200, help="kills on each kind of storage")
    parser.add_argument("--only", choices=("local", "s3"), help="one kind of storage alone")
    parser.add_argument("--seed", type=int, default=None, help="seed; printed if left out")
    parser.add_argument("--out", type=Path, default=Path("runs/faults.json"))
    parser.add_argument("--folder", type=Path, default=None, help="where the banks are made")
    options = parser.parse_args()
    seed = secrets.randbelow(1 << 31) if options.seed is None else options.seed
    folder = options.folder or Path(tempfile.mkdtemp(prefix="membank-faults-"))
    print(f"seed {seed}, banks under {folder}", flush=True)
    if options.only != "local" and (reason := why_no_s3()) is not None:
        print(f"no campaign on S3: {reason}", file=sys.stderr)
        return 2
    began = time.monotonic()
    tallies: dict[str, Tally] = {}
    if options.only != "s3":
        tallies["local"] = run_campaign(LocalPlaces(), options.count, seed, folder)
    if options.only != "local":
        with s3_campaign_server() as server:
            tallies["s3"] = run_campaign(S3Places(server), options.count, seed, folder)
    report = {
        "format": 1,
        **environment(folder),
        "seed": seed,
        "count": options.count,
        "seconds": round(time.monotonic() - began, 1),
        **{name: tally.to_json() for name, tally in tallies.items()},
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=2) + "\n")
    for name, tally in tallies.items():
        print(f"{name}: {tally.summary()}")
    print(f"report: {options.out}")
    if any(tally.failures or tally.is_vacuous for tally in tallies.values()):
        return 1
    shutil.rmtree(folder, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
