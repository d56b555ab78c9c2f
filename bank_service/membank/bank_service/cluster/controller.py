"""The controller actor: a `Service`, started and then looked after by one thread.

Its truth is in the bank's storage. It may be killed at any time: Ray starts it again, it finds the
shards by their names, settles what was under way, and listens at the same address.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from dataclasses import replace

import ray

from membank.bank_service.cluster.config import UpConfig
from membank.bank_service.cluster.ray_actors import RayShardActors
from membank.bank_service.cluster.service import ControllerStatus, Service
from membank.wire.errors import InternalError, MembankError

_LOG = logging.getLogger(__name__)

_SUPERVISE_EVERY_S = 0.25
_RESTART_BACKOFF_S = 2.0
# Of the time that a stop may take, what a start or a look at the shards under way is given.
_UNDER_WAY_SHARE = 1 / 3


class ControllerActor:
    """Lifecycle of the controller; made remote by `up`.

    Ray runs methods on several threads; one more thread starts everything and then supervises.
    The constructor never fails (see `ShardActor`).
    """

    # Set by the starting thread before `_ready`, read by others after it.

    def __init__(self, config: UpConfig) -> None:
        logging.basicConfig(level=logging.INFO)
        self._is_restart = ray.get_runtime_context().was_current_actor_reconstructed
        # A controller that comes back may have been on the node that was lost: waiting for as many
        # nodes as at first would keep the shards that are left from being served.
        config = replace(config, min_nodes=1) if self._is_restart else config
        self._ready = threading.Event()
        self._stopping = threading.Event()
        self._error: MembankError | None = None
        self._service = Service(
            config,
            RayShardActors(config.key),
            is_restart=self._is_restart,
            end_process=_end_process,
        )
        self._thread = threading.Thread(target=self._run, name="membank-controller", daemon=True)
        self._thread.start()

    def wait_ready(self) -> ControllerStatus:
        """Return once the service answers, or raise what keeps it from that."""
        self._ready.wait()
        if self._error is not None:
            raise self._error
        return self.status()

    def status(self) -> ControllerStatus:
        """Return what is known of the service now."""
        return self._service.status()

    def stop(self, timeout_s: float) -> tuple[str, ...]:
        """End gateway and shards; the caller ends this actor after.

        Parameters
        ----------
        timeout_s
            Longest wait for all of it.

        Returns
        -------
        tuple[str, ...]
            Shards that may have left acknowledged updates in their journals.
        """
        self._stopping.set()
        # A start that hangs must not keep shards and claim from being given back.
        deadline = time.monotonic() + timeout_s
        self._thread.join(timeout_s * _UNDER_WAY_SHARE)
        return self._service.stop(deadline - time.monotonic())

    def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                self._service.start()
                break
            except MembankError as err:
                error = err
            except Exception as err:
                _LOG.exception("the controller did not start")
                error = InternalError(f"{type(err).__name__}: {err}")
            if not self._is_restart:
                self._error = error
                self._ready.set()
                return
            # Clients wait for the service to come back; nobody waits for an error.
            _LOG.error("the controller does not start again: %s; trying again", error)
            self._stopping.wait(_RESTART_BACKOFF_S)
        self._ready.set()
        while not self._stopping.wait(_SUPERVISE_EVERY_S):
            try:
                self._service.supervise()
            except Exception:
                # Supervision must outlive any single failure of it.
                _LOG.exception("supervision failed once")


def _end_process() -> None:
    """Die as by kill -9, so that nothing of this process is left; Ray starts the controller again."""
    _LOG.info("the controller ends: what was deleted may have come through it")
    os.kill(os.getpid(), signal.SIGKILL)
