"""Gateway, engine, watcher, reconciler, supervisor: one vLLM that serves each checkpoint as it appears.

vLLM imports `lorakit.server.Gateway` by this name (`--middleware`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lorakit.server.gateway import Gateway as Gateway

__all__ = ["Gateway"]


def __getattr__(name: str) -> Any:
    if name == "Gateway":
        from lorakit.server.gateway import Gateway

        return Gateway
    raise AttributeError(f"module 'lorakit.server' has no attribute '{name}'")
