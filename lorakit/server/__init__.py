"""Gateway, engine, watcher, reconciler, supervisor: one vLLM that serves each checkpoint as it appears.

vLLM imports `lorakit.server.Gateway` by this name (`--middleware`), or, of several engines, `lorakit.server.Attended`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lorakit.server.engines.attended import Attended as Attended
    from lorakit.server.gateway import Gateway as Gateway

__all__ = ["Attended", "Gateway"]


def __getattr__(name: str) -> Any:
    if name == "Gateway":
        from lorakit.server.gateway import Gateway

        return Gateway
    if name == "Attended":
        from lorakit.server.engines.attended import Attended

        return Attended
    raise AttributeError(f"module 'lorakit.server' has no attribute '{name}'")
