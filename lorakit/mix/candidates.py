"""One choice of weights as whatever a score wants to look at: an adapter, a folder, a merged model, a served name."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from lorakit.adapters.adapter import Adapter
from lorakit.errors import LorakitError, UsageError
from lorakit.files.folders import temporary_folder
from lorakit.merge.merge import merge
from lorakit.mix.opened import BaseLike

PATIENCE = 300  # seconds that a server has to load a candidate


@dataclass(frozen=True, slots=True)
class Places:
    """Where candidates are made for the time of their trial: under `folder`, from `base`, in the server at `url`."""

    folder: Path
    base: BaseLike | None = None
    url: str | None = None


@dataclass(frozen=True)
class Candidate:
    """One choice of weights while it is scored. What it gives is made when first asked for, and gone afterwards."""

    weights: tuple[float, ...]
    mixed: Callable[[], Adapter] = field(repr=False)
    places: Places = field(repr=False)
    made: ExitStack = field(default_factory=ExitStack, repr=False)

    @cached_property
    def adapter(self) -> Adapter:
        """Lazy: nothing of it is computed before it is asked for."""
        return self.mixed()

    @cached_property
    def folder(self) -> Path:
        """The adapter as a PEFT folder."""
        return self.adapter.save(self._place / "adapter")

    @cached_property
    def merged(self) -> Path:
        """The base with the adapter merged into it, as a model folder.

        Raises:
            UsageError: the search was given no base.
        """
        if self.places.base is None:
            raise UsageError("a merged candidate needs a base: search(..., base=...), or --base")
        merge(self.places.base, [(self.folder, 1.0)], out=self._place / "merged")
        return self._place / "merged"

    @property
    def url(self) -> str:
        """The server, without a slash at its end.

        Raises:
            UsageError: the search was given none.
        """
        if self.places.url is None:
            raise UsageError("a served candidate needs a server: search(..., url=..., share=...), or --url and --share")
        return self.places.url.rstrip("/").removesuffix("/v1")

    @cached_property
    def model(self) -> str:
        """Its name on the server, where it is loaded now: never used before, and unloaded after the trial.

        Raises:
            UsageError: the search was given no server.
            LorakitError: the server did not load it.
        """
        return self.made.enter_context(_loaded(self.url, self._place.name.lstrip("."), self.folder))

    @cached_property
    def _place(self) -> Path:
        return self.made.enter_context(temporary_folder(self.places.folder, ".lorakit-search-"))


@contextmanager
def _loaded(url: str, name: str, folder: Path) -> Iterator[str]:
    try:
        _ask(url, "load_lora_adapter", {"lora_name": name, "lora_path": str(folder)})
        yield name
    finally:  # after an error too: an answer may be lost where the adapter is not
        _ask(url, "unload_lora_adapter", {"lora_name": name}, gone=(400, 404))


def _ask(url: str, route: str, body: dict[str, str], *, gone: tuple[int, ...] = ()) -> None:
    """One of vLLM's routes. `gone` are the answers of a server that has no adapter of that name.

    Raises:
        LorakitError: no server answers, or it says no; with its own words.
    """
    key = os.environ.get("LORAKIT_API_KEY")
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    try:
        with urlopen(Request(f"{url}/v1/{route}", json.dumps(body).encode(), headers), timeout=PATIENCE):
            return
    except HTTPError as error:
        with error:
            said = error.read().decode(errors="replace")
        if error.code in gone:
            return
        raise LorakitError(
            f"'{url}' answered {error.code} to {route}: {_message(said)}{_hint(error.code, said)}"
        ) from None
    except (URLError, OSError, ValueError) as error:
        reason = error.reason if isinstance(error, URLError) else error
        raise LorakitError(f"no server answers at '{url}' ({reason}): start one, or name another --url") from None


def _hint(code: int, said: str) -> str:
    if code == 401:
        return "; set LORAKIT_API_KEY"
    if code == 404 and _message(said) == "Not Found":  # of the route, not of the adapter
        return "; vLLM has that route when it runs with --enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=True"
    return ""


def _message(said: str) -> str:
    """What an error in OpenAI's shape or FastAPI's says; else the beginning of whatever came."""
    try:
        body = json.loads(said)
        return str(body["detail"] if "detail" in body else body["error"]["message"])
    except (ValueError, LookupError, TypeError):
        return said[:200]
