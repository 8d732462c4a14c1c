"""`serve run serving/ray/app.yaml`, with the paths of this machine in it."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from tests.server.on_ray.real import REPLICA, run_by_ray
from tests.server.real import ENGINE_FLAGS, ask, free_port, write_checkpoint
from tests.serving.programs import SERVING


@pytest.mark.slow
@pytest.mark.timeout(290)
def test_rays_own_command_serves_what_the_file_says(materials: tuple[Path, list[Path]], tmp_path: Path) -> None:
    base, adapters = materials
    write_checkpoint(tmp_path / "runs" / "sql", adapters[0], 3)
    port, config = free_port(), yaml.safe_load((SERVING / "ray" / "app.yaml").read_text())
    config["http_options"]["port"] = port
    config["applications"][0]["args"] |= {
        "base": str(base), "home": str(tmp_path / "home"), "watch": [str(tmp_path / "runs")], "max_loras": 2,
        "max_lora_rank": 8, "replicas": 1, "vllm": list(ENGINE_FLAGS), "cpus": 1,
    }  # fmt: skip
    file = tmp_path / "app.yaml"
    file.write_text(yaml.safe_dump(config))
    with run_by_ray(file, port, tmp_path) as server, server.client() as client:
        server.wait_until(lambda: server.adapter("sql")["state"] == "ready")
        assert str(ask(client, "sql").revision).startswith("sql@step-3-")
        assert REPLICA in client.post("/v1/completions", json={"model": "base", "prompt": "a"}).headers
