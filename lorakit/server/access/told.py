"""`/v1/key`: what the key that asks may see and do."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request

from lorakit.server.access.rights import rights_of
from lorakit.server.described import EVERYWHERE


def key_router() -> APIRouter:
    router = APIRouter(tags=["lorakit"], responses=EVERYWHERE)
    router.add_api_route("/v1/key", key, methods=["GET"])
    return router


async def key(request: Request) -> dict[str, Any]:
    """The key that came with the request: `id` is null where the server wants none."""
    rights = rights_of(request.scope)
    allowance = rights.allowance
    return {
        "object": "key",
        "id": rights.key or None,
        "adapters": list(allowance.adapters),
        "base": allowance.base,
        "admin": allowance.admin,
        "all": rights.is_whole,
        "rate": str(allowance.rate) if allowance.rate else None,
        "tokens": allowance.tokens or None,
    }
