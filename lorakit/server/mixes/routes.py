"""`/v1/mixes`: mixes by name."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, StrictBool, StrictStr

from lorakit.errors import NotFound
from lorakit.server.access.given import Administered, Known
from lorakit.server.access.rights import rights_of
from lorakit.server.access.seen import seen_by
from lorakit.server.described import EVERYWHERE, errors
from lorakit.server.following.served import Served
from lorakit.server.views import NOWHERE, place_of
from lorakit.store.catalog import Revision


class NewMix(BaseModel):
    """A name for a mix, written as a `model` is: `mix(sql@best=0.7,chat=0.3)`. With `follow` it is made again when an
    adapter in it moves."""

    model_config = ConfigDict(extra="forbid")
    name: StrictStr
    mix: StrictStr
    follow: StrictBool = True


def mix_router() -> APIRouter:
    router = APIRouter(tags=["lorakit"], responses=EVERYWHERE)
    router.add_api_route("/v1/mixes", mixes, methods=["GET"])
    router.add_api_route("/v1/mixes", name_mix, methods=["POST"], status_code=201, responses=errors(400, 404, 409, 422))
    router.add_api_route("/v1/mixes/{name}", mix, methods=["GET"], responses=errors(404))
    router.add_api_route("/v1/mixes/{name}", forget_mix, methods=["DELETE"], responses=errors(404))
    return router


async def mixes(known: Known) -> dict[str, Any]:
    """Every name, then the mixes without one that are kept, the least recently asked for first."""
    named = [mix_view(known, name) for name in sorted(known.mixes.names)]
    unnamed = [_view(known, revision) for revision in known.mixes.unnamed()]
    return {"object": "list", "data": [*named, *unnamed]}


async def name_mix(request: Request, whole: Administered, new: NewMix) -> dict[str, Any]:
    """Make a mix and give it a name; a name that exists moves, for the next request on."""
    rights_of(request.scope).refuse_name(new.name)
    await whole.mixes.name(new.name, new.mix, follow=new.follow, eyes=seen_by(whole, rights_of(request.scope)))
    return mix_view(whole, new.name)


async def mix(known: Known, name: str) -> dict[str, Any]:
    """One name."""
    if name not in known.mixes.names:
        raise _no_mix(name)
    return mix_view(known, name)


async def forget_mix(known: Known, whole: Administered, name: str) -> dict[str, Any]:
    """Serve a name no longer; what is in flight is finished."""
    if name not in known.mixes.names:
        raise _no_mix(name)
    await whole.mixes.forget_name(name)
    return {"id": name, "object": "mix", "deleted": True}


def _no_mix(name: str) -> NotFound:
    return NotFound(f"there is no mix of the name '{name}': GET /v1/mixes lists them")


def mix_view(known: Served, name: str) -> dict[str, Any]:
    """`mix` is what was asked for, `made_of` the revisions that it means now; `reason` says why it does not follow."""
    follower = known.mixes.names[name]
    view = _view(known, known.mixes.targets().get(name))
    said = {"id": name, "name": name, "mix": follower.named.mix, "follow": follower.named.follow}
    return {**view, **said, "reason": view["reason"] or follower.trouble}


def _view(known: Served, revision: Revision | None) -> dict[str, Any]:
    state, reason = known.state_of(revision) if revision else ("gone", None)
    return {
        "id": revision.name if revision else None,
        "object": "mix",
        "name": None,
        "mix": revision.source if revision else None,
        "follow": False,
        "state": state,
        "reason": reason,
        "revision": revision.name if revision else None,
        "made_of": revision.source if revision else None,
        "error": known.mixes.error_of(revision),
        "rank": revision.rank if revision else None,
        "size": revision.size if revision else None,
        "created": revision.created if revision else None,
        **(place_of(known, revision) if revision else NOWHERE),
        "requests": known.requests.get(revision.id, 0) if revision else 0,
    }
