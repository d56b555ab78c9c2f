"""Where servers bind, and under which address others find them."""

from __future__ import annotations

import ipaddress
import socket
from dataclasses import dataclass

from membank.bank_service.rpc.server import is_loopback
from membank.wire.errors import FailedPreconditionError, Reason

# TEST-NET-1 (RFC 5737): routed like any address of the network, and no packet is ever sent to it.
_ELSEWHERE = ("192.0.2.1", 9)


@dataclass(frozen=True, slots=True)
class Listening:
    """Where one server is found."""

    bind: str
    """Address that it binds."""
    advertise: str
    """Address that others are told."""


def gateway_listening(host: str, node_ip: str) -> Listening:
    """Return where the gateway is found.

    Parameters
    ----------
    host
        Address that the operator chose.
    node_ip
        Address of the gateway's node in Ray.
    """
    return Listening(host, _reachable(host, node_ip))


def shard_listening(host: str, *, gateway_ip: str, node_ip: str) -> Listening:
    """Return where a shard is found.

    Parameters
    ----------
    host
        Address that the operator chose for the gateway.
    gateway_ip, node_ip
        Addresses of the gateway's node and of the shard's node in Ray.

    Returns
    -------
    Listening
        On the gateway's machine, what the operator chose; elsewhere, the node's own address.

    Raises
    ------
    FailedPreconditionError
        If the operator chose loopback and the shard is on another machine (INSECURE_ENDPOINT).
    """
    if node_ip == gateway_ip:
        return Listening(host, _reachable(host, node_ip))
    if is_loopback(host):
        raise FailedPreconditionError(
            f"the service is bound to {host}, but Ray has the node {node_ip}: give --host with "
            "--tls-cert, --tls-key and --token-file to serve from several machines",
            reason=Reason.INSECURE_ENDPOINT,
            metadata={"node": node_ip},
        )
    return Listening(node_ip, node_ip)


def _reachable(host: str, node_ip: str) -> str:
    try:
        if not ipaddress.ip_address(host).is_unspecified:
            return host
    except ValueError:
        return host
    if not is_loopback(node_ip):
        return node_ip
    # A Ray of our own knows loopback alone; the machine's routes tell its address in the network.
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(_ELSEWHERE)
            return str(probe.getsockname()[0])
        except OSError:
            return node_ip
