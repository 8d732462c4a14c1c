"""The chart as Helm renders it.

python -m tests.serving.chart    lint it, and hold what it renders to Kubernetes' own schemas: `make lint` does
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from typing import Any

import yaml

from tests.serving.programs import SERVING, helm

CHART = SERVING / "helm" / "lorakit"
KUBERNETES = "1.37"
OF_PROMETHEUS = ("ServiceMonitor", "PrometheusRule")  # its operator's, of which Kubernetes has no schema

FOLDER: dict[str, Any] = {"base": "/models/llama", "apiKey": {"secret": "lorakit-key"}, "models": {"claim": "models"}}
CASES: dict[str, dict[str, Any]] = {
    "a folder": FOLDER,
    "the hub": {
        "base": "meta-llama/Llama-3.1-8B", "apiKey": {"secret": "lorakit-key"},
        "hub": {"enabled": True, "tokenSecret": "hub"}, "cache": {"claim": "cache"}, "runs": {"claim": "runs"},
    },
    "all": {
        **FOLDER, "runs": {"claim": "runs"}, "args": ["--follow", "best", "--max-loras", "16"],
        "vllmArgs": ["--max-model-len", "8192"], "store": {"size": "1Ti", "storageClass": "fast"},
        "runtimeClassName": "nvidia", "nodeSelector": {"gpu": "h100"}, "tolerations": [{"operator": "Exists"}],
        "monitoring": {"enabled": True, "labels": {"release": "prometheus"}},
    },
    "names that look like numbers": {
        "base": "/models/1", "apiKey": {"secret": "1", "key": "2"}, "models": {"claim": "3"}, "runs": {"claim": "4"},
        "store": {"claim": "5"}, "cache": {"claim": "6"}, "hub": {"tokenSecret": "7"}, "runtimeClassName": "8",
    },
    "sidecar": {
        **FOLDER, "runs": {"claim": "runs"}, "image": {"repository": "lorakit", "tag": "gateway"},
        "sidecar": {"enabled": True, "maxLoras": 4}, "vllmArgs": ["--max-model-len", "8192"],
    },
    "a bucket": {
        **FOLDER, "replicas": 3, "serviceAccountName": "lorakit", "runs": {"claim": "runs"},
        "store": {"size": "20Gi", "bucket": {"address": "s3://models/lorakit"}},
    },
    "a bucket of the cluster, and sidecars": {
        **FOLDER, "replicas": 2, "sidecar": {"enabled": True}, "image": {"repository": "lorakit", "tag": "gateway"},
        "store": {"bucket": {"address": "s3://models", "secret": "1", "endpoint": "http://minio.minio.svc:9000"}},
        "networkPolicy": {"egress": [{"namespaceSelector": {"matchLabels": {"app": "minio"}}}]},
    },
}  # fmt: skip


class NotRendered(Exception):
    """What Helm said."""


def _helm(*arguments: str, values: Mapping[str, Any]) -> str:
    ended = subprocess.run(
        [helm(), *arguments, "--values", "-"], input=json.dumps(values), capture_output=True, text=True, timeout=60,
        check=False,
    )  # fmt: skip
    if ended.returncode:
        raise NotRendered(ended.stderr + ended.stdout)
    return ended.stdout


def rendered(values: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What a release called `here` is made of, by kind. Raises NotRendered where the values are refused."""
    objects = yaml.safe_load_all(_helm("template", "here", str(CHART), values=values))
    return {each["kind"]: each for each in objects if each}


def lint() -> None:
    """Raises NotRendered, ValidationError where something is wrong."""
    import kubernetes_validate

    for name, values in CASES.items():
        _helm("lint", "--strict", "--quiet", str(CHART), values=values)
        for kind, each in rendered(values).items():
            if kind not in OF_PROMETHEUS:
                kubernetes_validate.validate(each, KUBERNETES, strict=True)
        print(f"{CHART.relative_to(SERVING)}: {name}")


if __name__ == "__main__":
    lint()
