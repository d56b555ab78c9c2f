"""What is bound and what is told, for one machine and for several."""

from __future__ import annotations

import ipaddress

import pytest

from membank.bank_service.cluster.addresses import (
    Listening,
    gateway_listening,
    shard_listening,
)
from membank.wire.errors import FailedPreconditionError, Reason

HERE, THERE = "198.51.100.1", "198.51.100.2"


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", HERE, "bank.example.org"])
def test_a_host_that_was_chosen_is_bound_and_told(host: str) -> None:
    assert gateway_listening(host, HERE) == Listening(host, host)
    assert shard_listening(host, gateway_ip=HERE, node_ip=HERE) == Listening(host, host)


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_a_wildcard_is_told_as_the_address_of_the_node(host: str) -> None:
    assert gateway_listening(host, HERE) == Listening(host, HERE)
    assert shard_listening(host, gateway_ip=HERE, node_ip=HERE) == Listening(host, HERE)


def test_a_wildcard_in_a_ray_on_loopback_is_told_as_an_address() -> None:
    listening = gateway_listening("0.0.0.0", "127.0.0.2")
    assert listening.bind == "0.0.0.0"
    assert not ipaddress.ip_address(listening.advertise).is_unspecified


def test_a_shard_elsewhere_listens_at_its_own_node() -> None:
    listening = shard_listening("0.0.0.0", gateway_ip=HERE, node_ip=THERE)
    assert listening == Listening(THERE, THERE)


def test_loopback_does_not_reach_to_another_machine() -> None:
    with pytest.raises(FailedPreconditionError) as caught:
        shard_listening("127.0.0.1", gateway_ip=HERE, node_ip=THERE)
    assert caught.value.reason is Reason.INSECURE_ENDPOINT
