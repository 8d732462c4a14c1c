"""What Helm makes of the chart starts what it says, is closed where it can be, and refuses values that can't work."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from lorakit.server.engines import vllm
from tests.bucket import SERVICES
from tests.cli.commands import lorakit
from tests.folders import write_base
from tests.serving.chart import CASES, CHART, FOLDER, NotRendered, rendered
from tests.serving.programs import SERVING

CLAIMED = ("configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret")


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def objects(case: str) -> dict[str, dict[str, Any]]:
    return rendered(CASES[case])


@pytest.fixture
def pod(objects: dict[str, dict[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = objects["Deployment"]["spec"]["template"]["spec"]
    return found


def container(pod: dict[str, Any], name: str = "lorakit") -> dict[str, Any]:
    return next(each for each in pod["containers"] if each["name"] == name)


def test_its_arguments_are_such_of_lorakit(
    case: str, pod: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if any(argument.startswith("--store=") for argument in container(pod)["args"]):
        if not SERVICES.is_dir():
            pytest.skip("s3fs is not installed (requirements/services.txt)")
        monkeypatch.setattr(sys, "path", [*sys.path, str(SERVICES)])
    base = write_base(tmp_path / "models" / "llama")
    for folder in ("runs", "store"):
        (tmp_path / folder).mkdir()
    (tmp_path / "key").write_text("secret")
    (tmp_path / "key").chmod(0o400)
    places = {
        CASES[case]["base"]: str(base), "--watch=/runs": f"--watch={tmp_path}/runs",
        "--home=/var/lib/lorakit": f"--home={tmp_path}/store",
        "--api-key-file=/run/secrets/lorakit/key": f"--api-key-file={tmp_path}/key",
    }  # fmt: skip
    verb, *arguments = [places.get(argument, argument) for argument in container(pod)["args"]]
    assert verb == "serve"
    own, _, for_vllm = " ".join(arguments).partition(" -- ")
    in_front = [word for word in own.split() if not word.startswith("--engine=")]
    ended = lorakit(capsys, "serve", *in_front, "--dry-run", "--json", *(["--", *for_vllm.split()] if for_vllm else []))
    assert ended.code == 0, ended.err
    assert for_vllm in " ".join(json.loads(ended.out)["command"])


def test_it_is_as_closed_as_podsecurity_calls_restricted_and_has_a_root_that_nothing_writes_to(
    pod: dict[str, Any],
) -> None:
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["runAsUser"] > 0
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.keys()
    assert pod["automountServiceAccountToken"] is False
    for each in pod["containers"]:
        security = each["securityContext"]
        assert security["allowPrivilegeEscalation"] is False
        assert security["readOnlyRootFilesystem"] is True
        assert security["capabilities"] == {"drop": ["ALL"]}
        assert not any("hostPort" in port for port in each.get("ports", ()))
        assert each["resources"]["requests"]
        assert "memory" in each["resources"]["limits"]
    for volume in pod["volumes"]:
        assert set(volume) - {"name"} <= set(CLAIMED)


def test_a_server_that_is_told_of_as_a_service_is_not_told_so_in_its_own_variables(pod: dict[str, Any]) -> None:
    """Kubernetes would set LORAKIT_PORT=tcp://... for a service called lorakit."""
    assert pod["enableServiceLinks"] is False


def test_every_volume_is_mounted_and_every_mount_is_a_volume(pod: dict[str, Any]) -> None:
    volumes = {volume["name"] for volume in pod["volumes"]}
    assert {mount["name"] for each in pod["containers"] for mount in each["volumeMounts"]} == volumes
    for each in pod["containers"]:
        writable = {mount["mountPath"] for mount in each["volumeMounts"] if not mount.get("readOnly")}
        assert writable <= {"/var/lib/lorakit", "/var/cache/lorakit", "/tmp", "/dev/shm"}


def test_the_key_comes_from_a_secret_as_a_file_that_not_all_can_read(
    case: str, objects: dict[str, dict[str, Any]]
) -> None:
    pod = objects["Deployment"]["spec"]["template"]["spec"]
    secret = next(volume["secret"] for volume in pod["volumes"] if volume["name"] == "key")
    given = CASES[case]["apiKey"]
    items = [{"key": given.get("key", "api-key"), "path": "key"}]
    assert secret == {"secretName": given["secret"], "defaultMode": 0o400, "items": items}
    assert "Secret" not in objects, "the chart holds no key"


def test_requests_come_when_it_is_ready_and_nothing_that_mends_itself_ends_the_pod(pod: dict[str, Any]) -> None:
    server = container(pod)
    assert server["readinessProbe"]["httpGet"]["path"] == server["startupProbe"]["httpGet"]["path"] == "/ready"
    assert server["startupProbe"]["periodSeconds"] * server["startupProbe"]["failureThreshold"] >= 1800
    assert "httpGet" not in server["livenessProbe"], "an engine that starts again answers 503 meanwhile"


def test_the_service_and_the_policy_find_the_pod(objects: dict[str, dict[str, Any]]) -> None:
    labels = objects["Deployment"]["spec"]["template"]["metadata"]["labels"].items()
    selectors = [
        objects["Deployment"]["spec"]["selector"]["matchLabels"], objects["Service"]["spec"]["selector"],
        objects["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"],
    ]  # fmt: skip
    for selector in selectors:
        assert selector.items() <= labels
    assert objects["Service"]["spec"]["ports"][0]["targetPort"] == "http"


def test_there_is_one_writer_to_a_store(objects: dict[str, dict[str, Any]]) -> None:
    deployment = objects["Deployment"]["spec"]
    store = next(volume for volume in deployment["template"]["spec"]["volumes"] if volume["name"] == "store")
    if "emptyDir" in store:
        return  # each pod has its own
    assert deployment["replicas"] == 1
    assert deployment["strategy"] == {"type": "Recreate"}


def test_pods_that_share_a_bucket_each_have_a_copy_of_their_own_and_are_replaced_one_by_one() -> None:
    objects = rendered(CASES["a bucket"])
    assert "PersistentVolumeClaim" not in objects
    deployment = objects["Deployment"]["spec"]
    pod = deployment["template"]["spec"]
    assert deployment["replicas"] == 3
    assert deployment["strategy"] == {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 0, "maxUnavailable": 1}}
    assert {"name": "store", "emptyDir": {"sizeLimit": "20Gi"}} in pod["volumes"]
    assert "--store=s3://models/lorakit" in container(pod)["args"]
    assert pod["serviceAccountName"] == "lorakit"
    assert "envFrom" not in container(pod), "its role has the right"


def test_lorakit_alone_has_the_buckets_credentials_and_they_come_from_a_secret() -> None:
    pod = rendered(CASES["a bucket of the cluster, and sidecars"])["Deployment"]["spec"]["template"]["spec"]
    ours, theirs = container(pod), container(pod, "vllm")
    assert ours["envFrom"] == [{"secretRef": {"name": "1"}}]
    assert {"name": "AWS_ENDPOINT_URL", "value": "http://minio.minio.svc:9000"} in ours["env"]
    assert "AWS" not in json.dumps(theirs)
    assert "envFrom" not in theirs


def test_the_store_outlives_the_release() -> None:
    objects = rendered(FOLDER)
    assert objects["PersistentVolumeClaim"]["metadata"]["annotations"]["helm.sh/resource-policy"] == "keep"


def test_a_server_of_a_folder_reaches_nobody_and_one_of_the_hub_nothing_of_the_cluster_but_names() -> None:
    assert rendered(CASES["a folder"])["NetworkPolicy"]["spec"]["egress"] == []
    names, outside = rendered(CASES["the hub"])["NetworkPolicy"]["spec"]["egress"]
    assert {port["port"] for port in names["ports"]} == {53}
    assert outside["ports"] == [{"protocol": "TCP", "port": 443}]
    assert "10.0.0.0/8" in outside["to"][0]["ipBlock"]["except"]


def test_a_server_of_a_bucket_reaches_the_outside_and_whom_it_is_let_besides() -> None:
    of_the_hub = rendered(CASES["the hub"])["NetworkPolicy"]["spec"]["egress"]
    assert rendered(CASES["a bucket"])["NetworkPolicy"]["spec"]["egress"] == of_the_hub
    given = CASES["a bucket of the cluster, and sidecars"]
    peers = given["networkPolicy"]["egress"]
    assert rendered(given)["NetworkPolicy"]["spec"]["egress"] == [*of_the_hub, {"to": peers}]
    names, besides = rendered({**FOLDER, "networkPolicy": {"egress": peers}})["NetworkPolicy"]["spec"]["egress"]
    assert (names, besides) == (of_the_hub[0], {"to": peers})


def test_a_claim_that_is_there_is_used_and_none_is_made() -> None:
    objects = rendered({**FOLDER, "store": {"claim": "mine"}})
    assert "PersistentVolumeClaim" not in objects
    volumes = objects["Deployment"]["spec"]["template"]["spec"]["volumes"]
    assert {"name": "store", "persistentVolumeClaim": {"claimName": "mine"}} in volumes


def test_beside_lorakit_runs_a_vllm_that_it_alone_reaches_and_that_sees_the_store_at_the_same_path() -> None:
    pod = rendered(CASES["sidecar"])["Deployment"]["spec"]["template"]["spec"]
    ours, theirs = container(pod), container(pod, "vllm")
    assert "--engine=http://127.0.0.1:8001" in ours["args"]
    assert {"--host=127.0.0.1", "--port=8001"} <= set(theirs["args"])
    assert "ports" not in theirs
    stores = [[mount["mountPath"] for mount in each["volumeMounts"] if mount["name"] == "store"]
              for each in (ours, theirs)]  # fmt: skip
    assert stores[0] == stores[1]
    assert "nvidia.com/gpu" in theirs["resources"]["limits"]
    assert "nvidia.com/gpu" not in ours["resources"]["limits"]
    variables = {each["name"]: each.get("value") for each in theirs["env"]}
    assert variables["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == variables["VLLM_SERVER_DEV_MODE"] == "1"
    given = {argument.partition("=")[0] for argument in theirs["args"] if argument.startswith("--")}
    found = vllm.Installed((0, 32), "0.32", False)
    by_lorakit = vllm.command(found, base="b", name="b", socket="s", slots=4, rank=8, extra=())
    assert given <= {"--host", "--port", "--max-model-len", *by_lorakit}


def test_what_prometheus_and_grafana_get_is_what_compose_gives_them() -> None:
    objects = rendered(CASES["all"])
    alerts = yaml.safe_load((SERVING / "prometheus" / "alerts.yml").read_text(encoding="utf-8"))
    assert objects["PrometheusRule"]["spec"] == alerts
    dashboard = (SERVING / "grafana" / "dashboards" / "lorakit.json").read_text(encoding="utf-8")
    assert objects["ConfigMap"]["data"]["lorakit.json"] == dashboard
    monitor = objects["ServiceMonitor"]
    assert monitor["metadata"]["labels"]["release"] == "prometheus"
    labels = objects["Service"]["metadata"]["labels"]
    assert monitor["spec"]["selector"]["matchLabels"].items() <= labels.items()
    assert labels[monitor["spec"]["jobLabel"]] == "lorakit", "the job that the alerts name"
    assert monitor["spec"]["endpoints"][0]["authorization"]["credentials"] == {"name": "lorakit-key", "key": "api-key"}
    assert not {"ServiceMonitor", "PrometheusRule", "ConfigMap"} & rendered(FOLDER).keys()


def bucket(address: str, replicas: int = 1, **more: str) -> dict[str, Any]:
    return {**FOLDER, "replicas": replicas, "store": {"bucket": {"address": address, **more}}}


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({}, "base"),
        ({**FOLDER, "apiKey": {"secret": ""}}, "secret"),
        ({**FOLDER, "base": "meta-llama/Llama-3.1-8B"}, "base"),
        ({**FOLDER, "models": {"claim": ""}}, "claim"),
        ({**FOLDER, "replicas": 2}, "'/replicas': value must be 1"),
        ({**FOLDER, "replicas": 2, "store": {"claim": "mine"}}, "'/replicas': value must be 1"),
        (bucket("s3://models/lorakit", replicas=0), "'/replicas'"),
        (bucket("models/lorakit"), "'/store/bucket/address'"),
        (bucket("s3://key:secret@models/lorakit"), "'/store/bucket/address'"),
        (bucket("", secret="s3"), "'/store/bucket/secret'"),
        (bucket("", endpoint="https://minio.example.com"), "'/store/bucket/endpoint'"),
        (bucket("s3://models", endpoint="minio:9000"), "'/store/bucket/endpoint'"),
        (bucket("s3://models", endpoint="https://key:secret@minio"), "'/store/bucket/endpoint'"),
        ({**FOLDER, "store": {"claim": "mine", "bucket": {"address": "s3://models"}}}, "'/store/claim'"),
        ({**FOLDER, "store": {"storageClass": "fast", "bucket": {"address": "s3://models"}}}, "'/store/storageClass'"),
        ({**FOLDER, "args": ["--store=s3://models"]}, "args"),
        ({**FOLDER, "image": {"tag": "latest"}}, "tag"),
        ({**FOLDER, "args": ["--host", "0.0.0.0"]}, "args"),
        ({**FOLDER, "sidecar": {"maxLoraRank": 48}}, "maxLoraRank"),
        ({**FOLDER, "store": {"size": "big"}}, "size"),
    ],
)
def test_values_that_cannot_work_are_refused(values: dict[str, Any], said: str) -> None:
    with pytest.raises(NotRendered, match=said):
        rendered(values)


def test_every_value_stands_in_the_schema() -> None:
    def check(values: dict[str, Any], schema: dict[str, Any]) -> None:
        if schema.get("additionalProperties") is not False:
            return
        assert values.keys() == schema["properties"].keys()
        for name, value in values.items():
            known = schema["properties"][name]
            known = SCHEMA["$defs"][known["$ref"].rpartition("/")[2]] if "$ref" in known else known
            if isinstance(value, dict) and name not in ("resources", "cache"):
                check(value, known)

    SCHEMA = json.loads((CHART / "values.schema.json").read_text(encoding="utf-8"))
    check(yaml.safe_load((CHART / "values.yaml").read_text(encoding="utf-8")), SCHEMA)
