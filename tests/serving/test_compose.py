"""The compose file is one, mounts what is there, and each of its services is closed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from compose_spec import PyOptions

from lorakit.cli.configured import settings_of, variable_of
from lorakit.cli.serve import command
from tests.serving.programs import SERVING

FOLDER = SERVING / "compose"
GIVEN = {
    "LORAKIT_BASE": "/models/llama", "LORAKIT_KEY_FILE": "/srv/key", "LORAKIT_MODELS": "/srv/models",
    "LORAKIT_RUNS": "/srv/runs",
}  # fmt: skip


def text_of(name: str) -> str:
    """With its variables filled in; each has to be given, and says what it is where it is not."""
    text = (FOLDER / name).read_text(encoding="utf-8")
    return re.sub(r"\$\{(\w+):\?[^}]+\}", lambda found: GIVEN[found[1]], text)


@pytest.fixture(scope="module")
def services() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(text_of("compose.yaml"))["services"]
    return found


@pytest.mark.parametrize("name", ["compose.yaml", "compose.gpu.yaml"])
def test_it_is_what_compose_reads(name: str) -> None:
    options = PyOptions()
    options.apply_merge = True
    text = text_of(name)
    assert "$" not in text
    options.from_yaml(text).validate()
    with pytest.raises(ValueError, match="shm_sice"):
        options.from_yaml(text.replace("shm_size", "shm_sice"))


def test_each_service_has_a_root_that_nothing_writes_to_and_no_rights(services: dict[str, Any]) -> None:
    for service in services.values():
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert "privileged" not in service


def test_nothing_is_reached_from_other_machines(services: dict[str, Any]) -> None:
    ports = [port for service in services.values() for port in service["ports"]]
    assert len(ports) == 3
    assert all(port.startswith("127.0.0.1:") for port in ports)


def test_each_image_has_a_version(services: dict[str, Any]) -> None:
    for name, service in services.items():
        assert re.search(r":(v?\d+\.\d+\.\d+|cpu)$", service["image"]), name


def test_what_it_mounts_from_the_tree_is_there(services: dict[str, Any]) -> None:
    mounted = [volume.split(":") for service in services.values() for volume in service["volumes"]]
    of_tree = [(FOLDER / place[0], place) for place in mounted if place[0].startswith(".")]
    assert of_tree
    for path, place in of_tree:
        assert path.exists(), path
        assert place[2] == "ro"
    build = services["lorakit"]["build"]
    assert (FOLDER / build["context"] / build["dockerfile"]).is_file()
    gpu = yaml.safe_load(text_of("compose.gpu.yaml"))["services"]["lorakit"]["build"]
    assert (FOLDER / build["context"] / gpu["dockerfile"]).is_file()


def test_its_variables_are_such_of_lorakit(services: dict[str, Any]) -> None:
    known = {variable_of(parameter) for parameter in settings_of(command).values()}
    assert services["lorakit"]["environment"].keys() <= known


def test_prometheus_finds_the_server_its_rules_and_the_key(services: dict[str, Any]) -> None:
    config = yaml.safe_load((SERVING / "prometheus" / "prometheus.yml").read_text(encoding="utf-8"))
    job = config["scrape_configs"][0]
    assert job["static_configs"][0]["targets"] == ["lorakit:8000"], "the service's name"
    assert job["job_name"] == "lorakit", "by which the alerts know it"
    prometheus = services["prometheus"]
    there = [volume.split(":")[1] for volume in prometheus["volumes"]]
    assert set(config["rule_files"]) <= set(there)
    key = services["lorakit"]["environment"]["LORAKIT_API_KEY_FILE"]
    assert job["authorization"]["credentials_file"] == key == f"/run/secrets/{prometheus['secrets'][0]}"


def test_grafana_finds_prometheus_and_the_dashboard(services: dict[str, Any]) -> None:
    folder = SERVING / "grafana" / "provisioning"
    source = yaml.safe_load((folder / "datasources" / "prometheus.yaml").read_text(encoding="utf-8"))["datasources"][0]
    assert source["url"] == "http://prometheus:9090"
    provider = yaml.safe_load((folder / "dashboards" / "lorakit.yaml").read_text(encoding="utf-8"))["providers"][0]
    mounted = dict(volume.split(":")[:2][::-1] for volume in services["grafana"]["volumes"])
    dashboards = FOLDER / Path(mounted[provider["options"]["path"]])
    assert [path.name for path in dashboards.iterdir()] == ["lorakit.json"]
