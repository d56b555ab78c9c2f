"""The cluster files: Ray's own schema accepts them, and they start what this tree builds."""

import copy
import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from membank.cli import serve

REPOSITORY = Path(__file__).resolve().parents[2]
LAUNCHER = REPOSITORY / "ray_cluster.yaml"
KUBERAY = REPOSITORY / "deploy" / "kuberay.yaml"

PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]


def _ray_pin() -> str:
    (pin,) = (r for r in PROJECT["optional-dependencies"]["service"] if r.startswith("ray=="))
    return str(pin.removeprefix("ray=="))


def _launcher() -> dict[str, Any]:
    config: dict[str, Any] = yaml.safe_load(LAUNCHER.read_text())
    return config


def _kuberay() -> dict[str, dict[str, Any]]:
    return {d["kind"]: d for d in yaml.safe_load_all(KUBERAY.read_text())}


def _up_command(text: str) -> list[str]:
    """The words of the one `membank up` command in `text`, up to its redirection."""
    (command,) = re.findall(r"membank up [^>;&']+", text)
    return shlex.split(command)


def _up_commands() -> dict[str, list[str]]:
    head = _kuberay()["RayCluster"]["spec"]["headGroupSpec"]["template"]["spec"]["containers"][0]
    return {
        "launcher": _up_command("\n".join(_launcher()["head_start_ray_commands"])),
        "kuberay": _up_command(head["lifecycle"]["postStart"]["exec"]["command"][-1]),
    }


def test_launcher_config_passes_the_schema_of_ray() -> None:
    prepared = prepare_config(_launcher())
    validate_config(prepared)
    # A key that Ray does not know must be seen, or the check above says nothing.
    broken = copy.deepcopy(prepared) | {"head_start_command": []}
    with pytest.raises(Exception, match="head_start_command"):
        validate_config(broken)


def test_launcher_starts_enough_nodes() -> None:
    config = _launcher()
    minimum = sum(t.get("min_workers", 0) for t in config["available_node_types"].values())
    assert 1 <= minimum <= config["max_workers"]
    assert config["head_node_type"] in config["available_node_types"]


def test_launcher_installs_the_wheel_that_it_mounts() -> None:
    config = _launcher()
    (mounted,) = (remote for remote, local in config["file_mounts"].items() if local == "./dist")
    (install,) = config["setup_commands"]
    assert f"{mounted}/{PROJECT['name']}-*.whl" in install
    assert install.endswith('[service]"')


def test_ray_beneath_the_service_asks_for_a_token() -> None:
    config = _launcher()
    (mounted,) = (r for r, local in config["file_mounts"].items() if local.endswith("credentials"))
    options = config["docker"]["run_options"]
    assert "--env=RAY_AUTH_MODE=token" in options
    assert f"--env=RAY_AUTH_TOKEN_PATH={mounted}/ray_token" in options
    assert _kuberay()["RayCluster"]["spec"]["authOptions"] == {"mode": "token"}


def test_launcher_starts_ray_before_the_service() -> None:
    commands = _launcher()["head_start_ray_commands"]
    starts = [i for i, c in enumerate(commands) if "ray start --head" in c]
    ups = [i for i, c in enumerate(commands) if c.startswith("membank up")]
    assert starts < ups


def test_images_carry_the_pinned_ray() -> None:
    pin = _ray_pin()
    assert _launcher()["docker"]["image"].startswith(f"rayproject/ray:{pin}-py3")
    assert f"FROM rayproject/ray:{pin}-py3" in (REPOSITORY / "deploy" / "Dockerfile").read_text()
    cluster = _kuberay()["RayCluster"]
    assert cluster["spec"]["rayVersion"] == pin
    image = f"{PROJECT['name']}:{PROJECT['version']}"
    groups = [cluster["spec"]["headGroupSpec"], *cluster["spec"]["workerGroupSpecs"]]
    images = [c["image"] for g in groups for c in g["template"]["spec"]["containers"]]
    assert images == [image] * len(images)


@pytest.mark.parametrize("file", ["launcher", "kuberay"])
def test_up_understands_every_option(file: str) -> None:
    app = typer.Typer()
    serve.register(app)
    name, *options = _up_commands()[file][1:]
    group = typer.main.get_command(app)
    assert isinstance(group, typer.core.TyperGroup)
    parsed = group.commands[name].make_context(name, options).params
    assert parsed["ray_address"] == "auto"
    assert parsed["host"] == "0.0.0.0"
    # Off loopback the service refuses to start without these.
    assert all(parsed[needed] for needed in ("tls_cert", "tls_key", "token_file"))


def test_up_waits_for_the_nodes_that_are_asked_for() -> None:
    config = _launcher()
    nodes = 1 + sum(t.get("min_workers", 0) for t in config["available_node_types"].values())
    workers = sum(g["replicas"] for g in _kuberay()["RayCluster"]["spec"]["workerGroupSpecs"])
    for words in _up_commands().values():
        assert int(words[words.index("--min-nodes") + 1]) == nodes == 1 + workers


def test_both_files_start_the_same_service() -> None:
    commands = _up_commands()
    options = {
        name: [word for word in words if word.startswith("--")] for name, words in commands.items()
    }
    assert options["launcher"] == options["kuberay"]


def test_kubernetes_service_reaches_the_endpoint() -> None:
    documents = _kuberay()
    words = _up_commands()["kuberay"]
    port = int(words[words.index("--port") + 1])
    head = documents["RayCluster"]["spec"]["headGroupSpec"]["template"]["spec"]["containers"][0]
    assert port in [p["containerPort"] for p in head["ports"]]
    assert [p["targetPort"] for p in documents["Service"]["spec"]["ports"]] == [port]
    assert documents["Service"]["spec"]["selector"]["ray.io/cluster"] == "membank"
