"""The files for Ray Serve and KubeRay: Ray takes them, and lorakit their arguments; no pod has rights to spare."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from lorakit.server.on_ray.plan import read_plan
from tests.server.on_ray.real import environment
from tests.serving.programs import SERVING

APP = SERVING / "ray" / "app.yaml"
SERVICE = SERVING / "ray" / "rayservice.yaml"
READS = """
import json, sys
from ray.serve.schema import ServeDeploySchema
ServeDeploySchema.model_validate(json.load(sys.stdin))
"""


def service() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(SERVICE.read_text())
    return found


def configs() -> Iterator[dict[str, Any]]:
    yield yaml.safe_load(APP.read_text())
    yield yaml.safe_load(service()["spec"]["serveConfigV2"])


def pods() -> Iterator[dict[str, Any]]:
    cluster = service()["spec"]["rayClusterConfig"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        yield group["template"]["spec"]


def test_lorakit_takes_the_arguments() -> None:
    for config in configs():
        (application,) = config["applications"]
        assert application["import_path"] == "lorakit.server.on_ray.app:app"
        plan, settings = read_plan(application["args"])
        assert plan.max_replicas >= plan.replicas
        assert settings.home


def test_ray_takes_the_configs() -> None:
    for config in configs():
        ended = subprocess.run(
            [sys.executable, "-c", READS], input=json.dumps(config), text=True, capture_output=True, env=environment(),
            timeout=60, check=False,
        )  # fmt: skip
        assert ended.returncode == 0, ended.stderr


def test_what_other_machines_reach_asks_for_a_key() -> None:
    for config in configs():
        (application,) = config["applications"]
        assert config["http_options"]["host"] == "127.0.0.1" or application["args"]["api_key_file"]


def test_the_service_is_one_of_kuberays_and_its_version_of_ray_is_the_one_that_is_tested() -> None:
    found = service()
    assert (found["apiVersion"], found["kind"]) == ("ray.io/v1", "RayService")
    assert found["spec"].keys() == {"serveConfigV2", "rayClusterConfig"}
    pins = (SERVING.parent / "requirements" / "ray.txt").read_text()
    assert f"ray=={found['spec']['rayClusterConfig']['rayVersion']}" in pins
    for group in found["spec"]["rayClusterConfig"]["workerGroupSpecs"]:
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]


def test_no_pod_has_rights_that_it_does_not_need() -> None:
    for pod in pods():
        assert pod["securityContext"]["runAsNonRoot"]
        assert not pod["automountServiceAccountToken"]
        mounted = {mount["name"] for container in pod["containers"] for mount in container["volumeMounts"]}
        assert mounted == {volume["name"] for volume in pod["volumes"]}
        for container in pod["containers"]:
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
            assert not container["securityContext"]["allowPrivilegeEscalation"]


def test_as_many_workers_may_come_as_engines() -> None:
    args = yaml.safe_load(service()["spec"]["serveConfigV2"])["applications"][0]["args"]
    (group,) = service()["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    assert group["maxReplicas"] == args["max_replicas"]


def test_the_pods_are_such_as_kubernetes_takes() -> None:
    validate = pytest.importorskip("kubernetes_validate")
    for pod in pods():
        validate.validate(
            {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p"}, "spec": pod}, "1.31", strict=True
        )
