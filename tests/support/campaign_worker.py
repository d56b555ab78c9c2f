"""The body of each process that is killed."""

from __future__ import annotations

import faulthandler
import logging
import os
import signal
import sys
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any, Protocol

from campaign_bank import ArmKill, Phase
from campaign_board import ArmedKill, Board
from campaign_calls import listen
from campaign_operator import OperatorDesk
from campaign_setting import SHARDS, Seat, Setting
from campaign_shard import ShardDesk
from membank.wire.errors import InternalError, MembankError

_SWITCH_S = 1e-5


class Desk(Protocol):
    """What a process has to offer."""

    def phase(self, method: str, args: Sequence[Any]) -> Phase:
        """Return what a call is about."""

    def answer(self, method: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Do a call."""

    def stop(self) -> None:
        """Stop as told by an operator."""


def serve(setting: Setting, seat: Seat, control: Connection, kill: ArmKill | None) -> None:
    """Open one process's part of a bank and serve it until killed or stopped.

    Parameters
    ----------
    setting
        Which bank.
    seat
        Which part.
    control
        Is told when it is open, or why not; then says, by anything at all, when to stop.
    kill
        When the process is to kill itself, counted from its very start; None = never.
    """
    os.environ.update(setting.environment)
    # Threads that change places this often meet in ways in which they seldom do otherwise.
    sys.setswitchinterval(_SWITCH_S)
    log = (setting.folder / f"{seat}.log").open("a")
    faulthandler.register(signal.SIGUSR1, file=log)
    logging.basicConfig(stream=log, format="%(asctime)s %(message)s", force=True)
    board = Board(setting.board(seat))
    plan = ArmedKill(board)
    if kill is not None:
        plan.arm(kill.calls, kill.after)
    try:
        with board.at(Phase.OPENING):
            desk = _open(setting, seat, board, plan)
    except Exception as err:
        logging.getLogger(__name__).warning("%s", traceback.format_exc())
        control.send(err if isinstance(err, MembankError) else InternalError(repr(err)))
        return

    def answer(method: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        if method == "arm":
            return plan.arm(*args, **kwargs)
        with board.at(desk.phase(method, args)):
            return desk.answer(method, args, kwargs)

    listen(setting.address(seat), answer)
    control.send(None)
    with suppress(EOFError, OSError):  # the parent is gone
        control.recv()
    desk.stop()


def _open(setting: Setting, seat: Seat, board: Board, plan: ArmedKill) -> Desk:
    if seat is Seat.COORDINATOR:
        return OperatorDesk(setting, plan)
    return ShardDesk(setting, SHARDS.index(seat), board, plan)
