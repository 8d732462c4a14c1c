"""The application is one that Ray takes, with as many replicas, and of such a size, as were asked for."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from tests.server.on_ray.real import environment

BUILDS = """
import json, sys
from lorakit.errors import LorakitError
from lorakit.server.on_ray.app import app

def said(args):
    try:
        gateway = app(args)._bound_deployment
    except LorakitError as error:
        return {"refused": str(error)}
    engines = gateway.init_args[-1]._bound_deployment
    scaling = engines._deployment_config.autoscaling_config
    return {
        "gateways": gateway.num_replicas, "replicas": engines.num_replicas, "options": engines.ray_actor_options,
        "at_once": engines.max_ongoing_requests, "key": gateway.init_args[2],
        "scaling": scaling.model_dump(mode="json") if scaling else None,
    }

print(json.dumps([said(args) for args in json.load(sys.stdin)]))
"""


@pytest.mark.timeout(90)
def test_ray_takes_one_gateway_with_as_many_engines_as_are_asked_for_or_needed() -> None:
    asked: list[dict[str, Any]] = [
        {"base": "org/llama", "replicas": 2, "gpus": 0.5, "cpus": 3, "max_ongoing_requests": 40},
        {"base": "org/llama", "replicas": 1, "max_replicas": 4, "target_ongoing_requests": 8},
        {"base": "org/llama", "max_lora": 3},
    ]
    ended = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", BUILDS], input=json.dumps(asked), text=True, capture_output=True,
        env=environment(), timeout=80, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    fixed, growing, wrong = json.loads(ended.stdout)
    assert (fixed["gateways"], fixed["replicas"], fixed["at_once"], fixed["key"]) == (1, 2, 40, "")
    assert fixed["options"] == {"num_cpus": 3.0, "num_gpus": 0.5}
    assert fixed["scaling"] is None
    scaling = growing["scaling"]
    assert (scaling["min_replicas"], scaling["max_replicas"], scaling["target_ongoing_requests"]) == (1, 4, 8.0)
    assert "did you mean 'max_loras'" in wrong["refused"]
