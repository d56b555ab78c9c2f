"""The actors of shards in Ray."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, cast

import ray
from ray.exceptions import GetTimeoutError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from membank.bank_service.cluster.config import NAMESPACE
from membank.bank_service.cluster.identity import ShardSettings
from membank.bank_service.cluster.shard_actor import ShardActor
from membank.wire.errors import InternalError, MembankError, Reason, UnavailableError

if TYPE_CHECKING:
    Actor = ray.actor.ActorHandle[ShardActor]


class RayShardActors:
    """`ShardActors` in the Ray that this process is connected to.

    Actors are detached: they outlive a controller, which finds them by name when it starts again.

    Parameters
    ----------
    key
        Short name of the bank.
    """

    def __init__(self, key: str) -> None:
        self._key = key

    @property
    def node_ip(self) -> str:
        # docstring inherited
        return str(ray.util.get_node_ip_address())

    def nodes(self) -> list[tuple[str, str]]:
        # docstring inherited
        nodes = [(n["NodeID"], n["NodeManagerAddress"]) for n in ray.nodes() if n["Alive"]]
        return sorted(nodes, key=lambda node: (node[1], node[0]))

    def make(self, settings: ShardSettings, node_id: str) -> object:
        # docstring inherited
        return (
            ray.remote(ShardActor)
            .options(
                name=self._name(settings.shard_id),
                namespace=NAMESPACE,
                get_if_exists=True,
                lifetime="detached",
                max_restarts=-1,
                max_concurrency=16,
                num_cpus=0,
                # Not soft: Ray would put the shard anywhere while it hardly knows the node yet.
                # Where the node is lost for good, Ray gives up and the fleet finds another.
                scheduling_strategy=NodeAffinitySchedulingStrategy(node_id=node_id, soft=False),
            )
            .remote(settings)
        )

    def find(self, shard_id: str) -> object | None:
        # docstring inherited
        try:
            return cast("object", ray.get_actor(self._name(shard_id), namespace=NAMESPACE))
        except ValueError:
            return None

    def kill(self, actor: object) -> None:
        # docstring inherited
        ray.kill(cast("Actor", actor), no_restart=True)

    def restart(self, actor: object) -> None:
        # docstring inherited
        ray.kill(cast("Actor", actor), no_restart=False)

    def tell(self, actor: object, method: str) -> None:
        # docstring inherited
        getattr(actor, method).remote()

    def call(
        self,
        actor: object,
        method: str,
        *arguments: object,
        options: Mapping[str, object] | None = None,
        timeout_s: float,
        who: str,
    ) -> object:
        # docstring inherited
        try:
            reference = getattr(actor, method).remote(*arguments, **(options or {}))
            return ray.get(reference, timeout=timeout_s)
        except RayTaskError as err:
            cause = err.cause
            if isinstance(cause, MembankError):
                raise cause from None
            raise InternalError(f"{who}: {cause!r}") from err
        except GetTimeoutError as err:
            raise _unavailable(f"{who} did not answer within {timeout_s:g} s") from err
        except RayError as err:
            raise _unavailable(f"{who} is down and being started again; retry") from err

    def _name(self, shard_id: str) -> str:
        return f"{self._key}-{shard_id}"


def _unavailable(message: str) -> UnavailableError:
    return UnavailableError(message, reason=Reason.SHARD_UNAVAILABLE)
