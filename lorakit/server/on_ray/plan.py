"""What the application on Ray is told, in typed objects: from the arguments of `app.yaml`, or of `lorakit serve`."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from lorakit.errors import UsageError
from lorakit.server.settings import Settings, from_mapping, named_path

LISTS = ("watch", "roots", "pins", "allow_hosts", "allow_sources")
FOLDERS = ("watch", "roots")
FILES = ("home", "probe", "retention")
NOT_HERE = {
    "tls_cert": "set ssl_certfile in the http_options of Ray Serve", "tls_key": "set ssl_keyfile in its http_options",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Plan:
    """`base`: a folder that every node sees, or a hub id.

    A replica is one vLLM, which takes `gpus` (None: 1, or 0 where vLLM's build is for CPUs) and `cpus` of its node, and
    no more than `max_ongoing_requests` at once: what goes beyond goes to another. With `max_replicas` Ray adds some
    while there are more than `target_ongoing_requests` for each on the average, and takes them away again.
    `max_lora_rank` 0: 16. `vllm`: its own arguments.
    """

    base: str
    replicas: int = 1
    max_replicas: int = 0
    max_ongoing_requests: int = 256
    target_ongoing_requests: float = 0.0  # 0: half of max_ongoing_requests
    cpus: float = 1.0
    gpus: float | None = None
    max_lora_rank: int = 0
    api_key_file: str = ""
    vllm: tuple[str, ...] = ()

    @property
    def is_folder(self) -> bool:
        return Path(self.base).is_dir()

    @property
    def name(self) -> str:
        """The base's: the last part of its folder, or of its hub id without a revision."""
        if self.is_folder:
            return os.path.basename(os.path.abspath(self.base))
        return self.base.partition("@")[0].rpartition("/")[2]

    @property
    def target(self) -> float:
        return self.target_ongoing_requests or max(1.0, self.max_ongoing_requests / 2)


def read_plan(given: Mapping[str, Any]) -> tuple[Plan, Settings]:
    """A plan and settings from the arguments of an application, which may all be text.

    Raises:
        UsageError: one is unknown, and which is the nearest; is missing; or is of another type.
    """
    own = [entry.name for entry in fields(Plan)]
    known = [*own, *(entry.name for entry in fields(Settings) if entry.name not in NOT_HERE)]
    for key in given:
        if key in NOT_HERE:
            raise UsageError(f"'{key}' is no argument of the application on Ray: {NOT_HERE[key]}")
        if key not in known:
            near = get_close_matches(key, known, n=1)
            raise UsageError(f"unknown argument '{key}'" + (f"; did you mean '{near[0]}'?" if near else ""))
    if not given.get("base"):
        raise UsageError("name the base: a folder that every node sees, or a hub id")
    values = {key: value for key, value in given.items() if value is not None}
    if "vllm" in values:
        values["vllm"] = _words(values["vllm"])
    for key in LISTS:
        if key in values:
            values[key] = _parts(values[key])
    if "adapters" in values and not isinstance(values["adapters"], Mapping):
        values["adapters"] = dict(named_path(one) for one in _parts(values["adapters"]))
    plan = _typed(Plan, {key: value for key, value in values.items() if key in own})
    from_mapping({key: value for key, value in values.items() if key not in own})  # what it refuses, in its own words
    settings: Settings = _typed(Settings, {key: value for key, value in values.items() if key not in own})
    _refuse_impossible(plan)
    _refuse_relative(settings)
    return plan, settings


def _refuse_impossible(plan: Plan) -> None:
    if plan.replicas < 1 or (plan.max_replicas and plan.max_replicas < plan.replicas):
        raise UsageError(f"replicas is {plan.replicas} and max_replicas {plan.max_replicas}: 1 or more, and no fewer")
    if plan.max_ongoing_requests < 1 or plan.target > plan.max_ongoing_requests:
        raise UsageError(
            f"max_ongoing_requests is {plan.max_ongoing_requests} and target_ongoing_requests {plan.target:g}: 1 or "
            "more, and no more"
        )


def _refuse_relative(settings: Settings) -> None:
    """A process of Ray's has a working directory of its own."""
    paths = [(key, path) for key in FOLDERS for path in getattr(settings, key)]
    paths += [(key, getattr(settings, key)) for key in FILES] + [
        ("adapters", path) for path in settings.adapters.values()
    ]
    for key, path in paths:
        if path and not Path(path).is_absolute():
            raise UsageError(f"argument '{key}' is '{path}': write the whole path, which every node has to see")


def _typed(kind: Any, values: Mapping[str, Any]) -> Any:
    try:
        return TypeAdapter(kind).validate_python(values)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        raise UsageError(f"argument '{name}' is {first['input']!r}: {first['msg'].lower()}") from None


def _parts(value: str | Sequence[str]) -> list[str]:
    return [part for part in value.split(os.pathsep) if part] if isinstance(value, str) else list(value)


def _words(value: str | Sequence[str] | Mapping[str, Any]) -> list[str]:
    """Arguments for vLLM: a text, a list of words, or `{max-model-len: 4096}`."""
    if isinstance(value, str):
        return value.split()
    if isinstance(value, Mapping):
        return [word for key, one in value.items() for word in _flag(str(key), one)]
    return [str(word) for word in value]


def _flag(key: str, value: Any) -> list[str]:
    if value is False:
        return []
    return [f"--{key}"] if value is True else [f"--{key}", str(value)]
