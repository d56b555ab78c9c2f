"""Configuration: ranges, and credentials that show themselves nowhere."""

import copy
import dataclasses
import pickle
import socket
from pathlib import Path

import pytest

from membank.client import (
    CacheConfig,
    ClientConfig,
    DiskTierConfig,
    Eviction,
    RetryConfig,
    Secret,
    TlsConfig,
)
from membank.client.deadline import Deadline
from membank.wire.errors import DeadlineError, InvalidArgumentError

TOKEN = "open-sesame"


@pytest.mark.parametrize(
    "fields",
    [
        {"timeout_s": 0.0},
        {"timeout_s": float("inf")},
        {"admin_timeout_s": -1.0},
        {"connect_timeout_s": float("nan")},
        {"keepalive_s": 0.0},
        {"keepalive_timeout_s": float("inf")},
        {"max_answer_bytes": 0},
        {"max_push_bytes": 0},
        {"max_request_bytes": 0},
        {"max_revision_rounds": 0},
        {"token": TOKEN, "token_file": Path("token")},
    ],
)
def test_client_config_refuses(fields: dict[str, object]) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        ClientConfig(**fields)  # type: ignore[arg-type]  # of several types
    assert next(iter(fields)) in str(caught.value)
    assert TOKEN not in str(caught.value)


@pytest.mark.parametrize(
    "fields",
    [
        {"max_attempts": 0},
        {"initial_backoff_s": 0.0},
        {"initial_backoff_s": 3.0, "max_backoff_s": 2.0},
        {"max_backoff_s": float("inf")},
    ],
)
def test_retry_config_refuses(fields: dict[str, float]) -> None:
    with pytest.raises(InvalidArgumentError):
        RetryConfig(**fields)  # type: ignore[arg-type]  # of several types


@pytest.mark.parametrize(
    "fields",
    [
        {"max_bytes": 0},
        {"max_staleness_s": -1.0},
        {"max_staleness_s": float("nan")},
        {"max_staleness_s": float("inf")},
        {"pinned_levels": (1, 0)},
        {"eviction": "fifo"},
    ],
)
def test_cache_config_refuses(fields: dict[str, object]) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        CacheConfig(**fields)  # type: ignore[arg-type]  # of several types
    assert next(iter(fields)) in str(caught.value)


@pytest.mark.parametrize(
    "fields",
    [
        {"max_bytes": 0},
        {"max_queued_bytes": 0},
        {"pause_s": -1.0},
        {"pause_s": float("inf")},
        {"levels": (0,)},
        {"direct_levels": (-1,)},
        {"direct_levels": (2,), "levels": (1, 3)},
    ],
)
def test_disk_tier_config_refuses(fields: dict[str, object]) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        DiskTierConfig(directory="cache", **fields)  # type: ignore[arg-type]  # of several types
    assert next(iter(fields)) in str(caught.value)


def test_a_level_is_pinned_in_memory_or_kept_out_of_it() -> None:
    disk = DiskTierConfig(directory=Path("cache"), direct_levels=(2,))
    with pytest.raises(InvalidArgumentError, match="pinned_levels"):
        CacheConfig(pinned_levels=(1, 2), disk=disk)
    config = CacheConfig(pinned_levels=(1,), disk=disk)
    assert pickle.loads(pickle.dumps(ClientConfig(cache=config))).cache == config


def test_cache_config_takes_names_and_lists() -> None:
    config = CacheConfig(eviction="lfu", pinned_levels=[1, 2])  # type: ignore[arg-type]  # as from a file
    assert (config.eviction, config.pinned_levels) == (Eviction.LFU, (1, 2))
    assert pickle.loads(pickle.dumps(ClientConfig(cache=config))).cache == config


def test_all_bounds_are_finite_by_default() -> None:
    config = ClientConfig()
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if isinstance(value, int | float):
            assert 0 < value < float("inf")


def test_a_credential_shows_itself_nowhere() -> None:
    config = ClientConfig(token=TOKEN)
    shown = [repr(config), str(config), repr(dataclasses.asdict(config)), f"{config.token}"]
    assert all(TOKEN not in text for text in shown)
    revealed = config.read_token()
    assert revealed is not None
    assert revealed.reveal() == TOKEN


def test_a_credential_does_not_pickle() -> None:
    with pytest.raises(TypeError, match="token_file"):
        pickle.dumps(ClientConfig(token=TOKEN))


def test_a_config_without_a_credential_pickles(tmp_path: Path) -> None:
    config = ClientConfig(
        token_file=tmp_path / "token", tls=TlsConfig(root_certificates=tmp_path / "root.pem")
    )
    assert pickle.loads(pickle.dumps(config)) == config


def test_secrets_compare_and_copy() -> None:
    secret = Secret(f" {TOKEN}\n")
    assert secret == Secret(TOKEN)
    assert hash(secret) == hash(Secret(TOKEN))
    assert secret != Secret("other")
    assert secret != TOKEN
    assert copy.deepcopy(secret) is copy.copy(secret) is secret


def test_a_deadline_is_one_that_clocks_can_count() -> None:
    with socket.socket() as end:
        end.settimeout(Deadline.after(1e300).remaining_s("call"))


def test_deadline_runs_down_and_ends() -> None:
    now = [100.0]
    deadline = Deadline.after(2.0, clock=lambda: now[0])
    assert deadline.remaining_s("fetch") == 2.0
    now[0] = 101.5
    assert deadline.remaining_s("fetch") == 0.5
    now[0] = 102.0
    with pytest.raises(DeadlineError, match=r"fetch: the deadline of 2 s"):
        deadline.remaining_s("fetch")
