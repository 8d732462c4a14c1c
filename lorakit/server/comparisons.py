"""`/v1/comparisons`: how adapters that are served lie to one another, before somebody mixes them."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import APIRouter, Query, Request

from lorakit.errors import NotFound, Refused
from lorakit.server.access.given import Known
from lorakit.server.described import EVERYWHERE, errors
from lorakit.store.catalog import Revision

if TYPE_CHECKING:
    from lorakit.mix.compare import CompareReport, Pair

MOST = 8  # adapters at once
SHOWN = 20  # modules of a pair: those with the most interference
_REMEMBERED = 64

Names = Annotated[list[str], Query(min_length=2, max_length=MOST)]


class Comparisons:
    """Made one at a time in a thread, and remembered: a revision never changes."""

    def __init__(self) -> None:
        self._known: OrderedDict[tuple[str, ...], dict[str, Any]] = OrderedDict()
        self._turn = asyncio.Lock()

    async def of(self, revisions: list[Revision]) -> dict[str, Any]:
        """Raises NotFound, Refused as `lorakit compare` does."""
        key = tuple(revision.digest for revision in revisions)
        if key not in self._known:
            async with self._turn:
                if key not in self._known:  # another may have asked for the same
                    self._known[key] = await asyncio.to_thread(_compared, revisions)
                    if len(self._known) > _REMEMBERED:
                        self._known.popitem(last=False)
        return self._known[key]


def comparison_router() -> APIRouter:
    router = APIRouter(tags=["lorakit"], responses=EVERYWHERE | errors(400, 404))
    router.add_api_route("/v1/comparisons", comparison, methods=["GET"])
    return router


async def comparison(request: Request, known: Known, adapter: Names) -> dict[str, Any]:
    """Cosines, overlaps and interference of two to eight adapters, each named as a `model` is; of each pair, the
    modules with the most interference."""
    revisions = []
    for name in adapter:
        revision = known.resolve(name)
        if revision is None:
            raise Refused(f"'{name}' is the base, which every adapter is added to: compare adapters")
        revisions.append(revision)
    found = await request.app.state.comparisons.of(revisions)
    named = [
        {"name": name, "revision": revision.name, "norm": norm}
        for name, revision, norm in zip(adapter, revisions, found["norms"], strict=True)
    ]
    rest = {key: value for key, value in found.items() if key != "norms"}
    return {"object": "adapter_comparison", "adapters": named, **rest}


def _compared(revisions: list[Revision]) -> dict[str, Any]:
    from lorakit.mix.compare import compare

    folders = [revision.folder for revision in revisions]
    try:
        report = compare(folders[0], folders[1], *folders[2:])
    except NotFound:
        raise NotFound("one of these adapters was removed while they were compared") from None
    except Refused as error:
        raise Refused(_by_name(str(error), revisions)) from None
    return _view(report, revisions)


def _by_name(text: str, revisions: list[Revision]) -> str:
    """Without the folders of the store."""
    for revision in revisions:
        text = text.replace(str(revision.folder.resolve()), revision.name).replace(str(revision.folder), revision.name)
    return text


def _view(report: CompareReport, revisions: list[Revision]) -> dict[str, Any]:
    return {
        "norms": list(report.norms),
        "cosines": [list(row) for row in report.cosines],
        "pairs": [_pair_view(pair) for pair in report.pairs],
        "notes": [_by_name(note, revisions) for note in report.notes],
    }


def _pair_view(pair: Pair) -> dict[str, Any]:
    return {
        "first": pair.first,
        "second": pair.second,
        **pair.overall.as_dict(),
        "shared": len(pair.modules),
        "only_first": len(pair.only_first),
        "only_second": len(pair.only_second),
        "modules": [{"module": module, **found.as_dict()} for module, found in pair.worst_modules()[:SHOWN]],
    }
