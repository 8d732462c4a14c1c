"""What the application on Ray takes, and what it refuses, in words."""

from __future__ import annotations

from pathlib import Path

import pytest

from lorakit.errors import UsageError
from lorakit.server.on_ray.plan import Plan, read_plan


def test_arguments_that_are_all_text_become_what_they_mean() -> None:
    plan, settings = read_plan(
        {"base": "org/llama@main", "replicas": "3", "cpus": "0.5", "max_loras": "4", "watch": "/a:/b",
         "adapters": "sql=/runs/sql", "vllm": "--max-model-len 4096", "lorax_arithmetic": "true"}
    )  # fmt: skip
    assert plan == Plan("org/llama@main", replicas=3, cpus=0.5, vllm=("--max-model-len", "4096"))
    assert plan.name == "llama"
    assert (settings.max_loras, settings.watch, settings.adapters) == (4, ("/a", "/b"), {"sql": "/runs/sql"})
    assert settings.lorax_arithmetic is True


def test_arguments_for_vllm_may_be_a_mapping_as_in_a_file() -> None:
    plan, _ = read_plan({"base": "b", "vllm": {"max-model-len": 4096, "enforce-eager": True, "quiet": False}})
    assert plan.vllm == ("--max-model-len", "4096", "--enforce-eager")


def test_a_base_is_called_by_the_last_part_of_its_folder(tmp_path: Path) -> None:
    (tmp_path / "tiny@x").mkdir()
    assert Plan(str(tmp_path / "tiny@x")).name == "tiny@x"


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, "name the base"),
        ({"base": "b", "max_lora": 3}, "did you mean 'max_loras'"),
        ({"base": "b", "replicaz": 3}, "did you mean 'replicas'"),
        ({"base": "b", "replicas": "two"}, "'replicas' is 'two'"),
        ({"base": "b", "replicas": 0}, "1 or more"),
        ({"base": "b", "replicas": 3, "max_replicas": 2}, "no fewer"),
        ({"base": "b", "max_ongoing_requests": 4, "target_ongoing_requests": 9}, "no more"),
        ({"base": "b", "follow": "newest"}, "latest, best, manual"),
        ({"base": "b", "watch": ["runs"]}, "whole path"),
        ({"base": "b", "home": "store"}, "whole path"),
        ({"base": "b", "tls_cert": "/c"}, "ssl_certfile"),
    ],
)
def test_what_can_not_be_is_refused_with_what_to_do(given: dict[str, object], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        read_plan(given)
