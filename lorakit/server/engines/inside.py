"""vLLM from inside its API process, by its own routes and its engine client: no hop, and true removal."""

from __future__ import annotations

import asyncio
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_type_hints

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lorakit.errors import EngineFailed, Refused
from lorakit.server.engines.engine import Limits, LoadFailed
from lorakit.server.engines.vllm import (
    ADAPTERS_INFO,
    COMPLETIONS,
    LOAD,
    PATTERNS_SINCE,
    UNLOAD,
    WAYS_AROUND,
    described,
    message_of,
    needs_spare,
    templated,
    wrong_with_first_token,
)


class InsideEngine:
    """vLLM seen from a middleware of its own API server.

    Loads go through vLLM's routes, called in process; only the engine client can really remove an adapter
    (`/v1/unload_lora_adapter` frees nothing in the engine). Its methods did not change from 0.24 to 0.33, and are
    asked for here, not assumed.
    """

    def __init__(self, inner: ASGIApp, app: Any, slots: int = 0) -> None:
        from vllm import __version__
        from vllm.platforms import current_platform

        self._inner, self._app = inner, app
        self._client = app.state.engine_client
        self._models = app.state.openai_serving_models
        missing = [name for name in ("remove_lora", "list_loras", "check_health") if not hasattr(self._client, name)]
        lora = app.state.vllm_config.lora_config
        if missing or lora is None:
            reason = f"its engine client lacks {', '.join(missing)}" if missing else "start it with --enable-lora"
            raise EngineFailed(f"vLLM {__version__} can't be used: {reason}")
        version = tuple(int(part) for part in re.findall(r"\d+", __version__)[:2])
        spare = needs_spare(version, current_platform.is_cpu())
        usable = lora.max_loras - (1 if spare else 0)
        if usable < 1:
            raise EngineFailed("vLLM on a CPU before 0.33 needs --max-loras 2 or more: its last slot is not usable")
        base = self._models.base_model_paths[0]
        self._limits = Limits(
            base=base.name,
            base_path=str(base.model_path),
            slots=min(usable, slots) if slots else usable,
            max_rank=lora.max_lora_rank,
            engine=f"vllm {__version__}",
            honours_patterns=version >= PATTERNS_SINCE,
            # one less than its cache holds: a last step of what was just removed may bring that back for a moment
            memory=0 if spare else (lora.max_cpu_loras or 0) - 1,
        )
        self._card: dict[str, Any] = {}
        self._paths = {getattr(route, "path", "") for route in app.routes}

    @property
    def limits(self) -> Limits:
        return self._limits

    async def load(self, name: str, folder: Path) -> None:
        _forget_names()
        await self._clear_leaked()
        reason = await self._adapters("load", {"lora_name": name, "lora_path": str(folder)})
        if reason is not None:
            await self._clear_leaked()
            raise LoadFailed(reason)

    def no_place_for(self, name: str) -> str | None:
        return None

    async def remove(self, name: str) -> None:
        request = self._models.lora_requests.get(name)
        if request is None:
            return
        await self._adapters("unload", {"lora_name": name})
        await self._client.remove_lora(request.lora_int_id)

    async def _adapters(self, verb: str, asked: dict[str, Any]) -> str | None:
        """`load` or `unload`: None, or why not. Through vLLM's route, or what stands behind it where that was not
        switched on."""
        route = LOAD if verb == "load" else UNLOAD
        if self.serves(route):
            status, body = await self.call("POST", route, asked)
            return None if status == 200 else message_of(body)
        handler = getattr(self._models, f"{verb}_lora_adapter")
        told = await handler(get_type_hints(handler)["request"](**asked))
        return None if isinstance(told, str) else str(told.error.message)

    async def _clear_leaked(self) -> None:
        """Take out what nobody knows of, as it takes a place: a failed load leaves its id behind, and a request whose
        client went away may, in its last step, have brought back an adapter that was just removed."""
        known = {request.lora_int_id for request in self._models.lora_requests.values()}
        for leaked in set(await self._client.list_loras()) - known:
            await self._client.remove_lora(leaked)

    async def try_out(self, name: str) -> str | None:
        return await wrong_with_first_token(self.call, name) if self.serves(COMPLETIONS) else None

    async def alive(self, *, now: bool = False) -> bool:
        try:
            await self._client.check_health()
        except Exception:  # whatever a dead engine raises
            return False
        return True

    async def answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        # lorakit's own app may have written itself into it, where a request came by one of its routes
        await self._inner({**scope, "app": self._app}, receive, send)

    async def read_card(self) -> None:
        """Ask vLLM once how it describes its base."""
        status, body = await self.call("GET", "/v1/models", None)
        if status == 200:
            self._card = json.loads(body)["data"][0]

    def model_card(self) -> dict[str, Any]:
        return dict(self._card)

    def serves(self, path: str) -> bool:
        return path in self._paths

    def goes_around(self, path: str) -> bool:
        return path.startswith(WAYS_AROUND)

    def templated(self, path: str, said: Mapping[str, Any], template: str) -> dict[str, Any]:
        changes, args = templated(path, said, template), self._app.state.args
        if changes and not args.trust_request_chat_template:
            raise Refused("the adapter has a chat template of its own: start vLLM with --trust-request-chat-template")
        if "chat_template_kwargs" in changes and args.chat_template:
            raise Refused(
                "the adapter has a chat template of its own, and --chat-template overrides it on this route: ask "
                "/v1/chat/completions, or start the server without it"
            )
        return changes

    async def metrics(self) -> bytes:
        _forget_names()
        return await asyncio.to_thread(_exposition)

    async def describe(self) -> dict[str, Any]:
        return await described(self.call)

    async def call(self, method: str, path: str, body: Any) -> tuple[int, bytes]:
        """One of vLLM's own routes, in process: status and body."""
        raw = b"" if body is None else json.dumps(body).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(raw)).encode())]
        keys = getattr(self._app.state.args, "api_key", None) or [os.environ.get("VLLM_API_KEY")]
        headers += [(b"authorization", f"Bearer {key}".encode()) for key in keys[:1] if key]
        scope: Scope = {
            "type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1",
            "method": method, "scheme": "http", "path": path, "raw_path": path.encode(), "query_string": b"",
            "root_path": "", "headers": headers, "client": ("lorakit", 0), "server": ("lorakit", 0), "app": self._app,
        }  # fmt: skip
        status, parts, asked = 500, [], False

        async def receive() -> Message:
            nonlocal asked
            if asked:
                await _never()
            asked = True
            return {"type": "http.request", "body": raw, "more_body": False}

        async def send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            elif message["type"] == "http.response.body":
                parts.append(message.get("body", b""))

        try:
            await self._inner(scope, receive, send)
        except Exception as error:  # its handler for these stands outside of this middleware
            return 500, json.dumps({"error": {"message": f"{type(error).__name__}: {error}"}}).encode()
        return status, b"".join(parts)


def _exposition() -> bytes:
    """What its `/metrics` would say, without its event loop."""
    from prometheus_client import REGISTRY, CollectorRegistry, generate_latest
    from prometheus_client.multiprocess import MultiProcessCollector

    if "PROMETHEUS_MULTIPROC_DIR" not in os.environ:
        return generate_latest(REGISTRY)
    registry = CollectorRegistry()
    MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
    return generate_latest(registry)


def _forget_names() -> None:
    """vLLM keeps a series for every set of adapters that ever answered at the same time."""
    from prometheus_client import REGISTRY

    gauge = getattr(REGISTRY, "_names_to_collectors", {}).get(ADAPTERS_INFO)
    if gauge is not None and "PROMETHEUS_MULTIPROC_DIR" not in os.environ:  # what is shared so can't be cleared
        gauge.clear()


async def _never() -> None:
    """A client that neither says more nor goes away."""
    await asyncio.get_running_loop().create_future()
