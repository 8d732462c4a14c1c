"""What a server was told: one typed object, from flags or `LORAKIT_*`, that the supervisor hands to the gateway."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

from lorakit.checkpoints.finished import QUIET
from lorakit.checkpoints.retention import Mode
from lorakit.checkpoints.retention_file import mode_of
from lorakit.errors import UsageError
from lorakit.server.certificate import Certificate
from lorakit.server.following.rules import EVAL_LOSS, FOLLOWS, Follow, Following
from lorakit.server.sight.logs import LOG_FORMATS, LogFormat
from lorakit.store.store import default_home

VARIABLE = "LORAKIT_SERVE"  # the whole object as JSON, from the supervisor
# What a person who starts vLLM by hand may set instead, one at a time.
SINGLE = {
    "LORAKIT_WATCH": "watch",
    "LORAKIT_ADAPTERS": "adapters",
    "LORAKIT_ROOTS": "roots",
    "LORAKIT_FOLLOW": "follow",
    "LORAKIT_LOG_FORMAT": "log_format",
    "LORAKIT_HOME": "home",
    "LORAKIT_STORE": "store",
}


@dataclass(frozen=True, slots=True)
class Settings:
    """Paths are absolute; `adapters` maps names to folders; 0 slots means: as many as the engine has."""

    home: str = ""
    store: str = ""  # s3://BUCKET/PREFIX, which several servers share; empty for none
    watch: tuple[str, ...] = ()
    adapters: Mapping[str, str] = field(default_factory=dict)
    roots: tuple[str, ...] = ()
    follow: Follow = "latest"
    metric: str = EVAL_LOSS  # what is best is best by it
    mode: Mode | Literal[""] = ""  # whether less of it is better; empty for what its name says
    min_delta: float = 0.0  # what is better by less is not followed
    min_steps: int = 0  # nor a checkpoint of fewer steps
    probe: str = ""  # a file of smoke prompts that have to pass before a name moves
    max_error_rise: float = 0.1  # share of failed answers, above those before, at which a name goes back
    keep_revisions: int = 0  # of each run, those that finished last; 0 keeps all
    retention: str = ""  # a YAML file that says what else is kept
    max_loras: int = 0
    pins: tuple[str, ...] = ()  # names whose revision never leaves the engine
    poll: float = 0.5  # seconds between two looks at the watched folders
    quiet: float = QUIET  # seconds that a folder without its writer's last file has to stay as it is
    debounce: float = 1.0  # seconds between two loads of one run that writes faster
    load_wait: float = 60.0  # seconds that a request waits for a slot in the engine
    fair_wait: float = 1.0  # seconds that others wait before a busy adapter takes no new requests
    drain: float = 10.0  # seconds that requests in flight have when the server ends
    max_mix_error: float = 0.1  # ‖Δ - Δ'‖ / ‖Δ‖: what a mix may lose when it is cut to the engine's rank
    mixes_kept: int = 64  # mixes without a name that stay in the store
    mix_bytes: int = 4 * 2**30  # that they may take together
    mixes_at_once: int = 2  # that are made
    canary: float = 10.0  # seconds between two requests of lorakit's own, by which it sees that the engine answers
    hang_limit: float = 60.0  # seconds without a sign of life, after which the engine is started again
    start_limit: float = 1800.0  # seconds in which an engine that starts may log nothing
    log_format: LogFormat = "text"
    max_body: int = 256  # MiB of a request
    max_requests: int = 0  # that are answered at once; 0 is no limit, here and below
    max_requests_per_key: int = 0
    max_requests_per_adapter: int = 0
    request_timeout: float = 0.0  # seconds until an answer has to be complete
    trust_request_chat_template: bool = False  # of any client
    tls_cert: str = ""  # PEM files: the public address speaks https
    tls_key: str = ""
    allow_hosts: tuple[str, ...] = ()  # from which adapters may be fetched when one asks over HTTP
    lorax_arithmetic: bool = False  # for what LoRAX's clients merge: its own, on each factor
    allow_sources: tuple[str, ...] = ()  # hf://, s3:// addresses under which LoRAX's clients may name them
    max_source: int = 16  # GiB of one of those
    source_timeout: float = 600.0  # seconds that it may take

    @property
    def silent_limit(self) -> float:
        """Seconds without a sign of life, after which requests are 503 at once."""
        return self.hang_limit / 4

    @property
    def store_home(self) -> Path:
        return Path(self.home) if self.home else default_home()

    @property
    def asks_hub(self) -> bool:
        """Whether somebody may name what is on the Hub."""
        return any(address.startswith("hf:") for address in self.allow_sources)

    @property
    def certificate(self) -> Certificate:
        return Certificate(self.tls_cert, self.tls_key)

    @property
    def following(self) -> Following:
        mode = self.mode or mode_of(self.metric)
        return Following(self.follow, self.metric, mode, self.min_delta, self.min_steps)

    @property
    def shared_roots(self) -> tuple[Path, ...]:
        """Where adapters lie that may be loaded over HTTP."""
        return tuple(Path(folder).resolve() for folder in self.roots)

    @property
    def served_folders(self) -> tuple[Path, ...]:
        """Where they are served from as they are."""
        return tuple(Path(folder).resolve() for folder in (*self.watch, *self.adapters.values()))

    @property
    def allowed_roots(self) -> tuple[Path, ...]:
        """Where adapters may be loaded from over HTTP."""
        return tuple(Path(folder).resolve() for folder in (*self.watch, *self.roots, *self.adapters.values()))

    def as_environment(self) -> dict[str, str]:
        return {VARIABLE: json.dumps(asdict(self))}


def from_environment(environ: Mapping[str, str] = os.environ) -> Settings:
    """The supervisor's object, or what single `LORAKIT_*` variables say.

    Raises:
        UsageError: a variable can't be read, or has a value that does not exist.
    """
    if text := environ.get(VARIABLE):
        try:
            given = json.loads(text)
        except ValueError as error:
            raise UsageError(f"{VARIABLE} can't be read: {error}") from None
        if not isinstance(given, dict):
            raise UsageError(f"{VARIABLE} has to be a JSON object, and is {text[:40]}")
        return from_mapping(given)
    given = {}
    for variable, name in SINGLE.items():
        if not (value := environ.get(variable)):
            continue
        if name in ("watch", "roots"):
            given[name] = [str(Path(part).absolute()) for part in value.split(os.pathsep) if part]
        elif name == "adapters":
            given[name] = dict(named_path(part) for part in value.split(os.pathsep) if part)
        else:
            given[name] = value
    return from_mapping(given)


def from_mapping(given: Mapping[str, Any]) -> Settings:
    """Settings from plain data; an unknown key is an error that offers the nearest known one."""
    known = [entry.name for entry in fields(Settings)]
    for key in given:
        if key not in known:
            near = get_close_matches(key, known, n=1)
            raise UsageError(f"unknown setting '{key}'" + (f"; did you mean '{near[0]}'?" if near else ""))
    values = dict(given)
    for name in ("watch", "roots", "pins", "allow_hosts", "allow_sources"):
        values[name] = tuple(values.get(name, ()))
    if values.get("follow", "latest") not in FOLLOWS:
        raise UsageError(f"follow is '{values['follow']}', and has to be one of {', '.join(FOLLOWS)}")
    if values.get("log_format", "text") not in LOG_FORMATS:
        raise UsageError(f"log_format is '{values['log_format']}', and has to be one of {', '.join(LOG_FORMATS)}")
    return Settings(**values)


def named_path(text: str) -> tuple[str, str]:
    """`sql=runs/sql` as a name and an absolute path.

    Raises:
        UsageError: there is no `=`.
    """
    name, separator, path = text.partition("=")
    if not separator or not name or not path:
        raise UsageError(f"'{text}' has to be NAME=PATH")
    return name, str(Path(path).absolute())
