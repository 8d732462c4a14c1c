"""What a route is given: what is served, as whoever asks sees it; and, to change it, all of it."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, Request

from lorakit.server.access.rights import NO_ADMIN, Forbidden, rights_of
from lorakit.server.access.seen import seen_by
from lorakit.server.following.reconciler import Reconciler
from lorakit.server.following.served import Served


def _known(request: Request) -> Served:
    return seen_by(request.app.state.reconciler, rights_of(request.scope))


def _administered(request: Request) -> Reconciler:
    """Raises Forbidden where the key is no admin's."""
    if not rights_of(request.scope).allowance.admin:
        raise Forbidden(NO_ADMIN)
    found: Reconciler = request.app.state.reconciler
    return found


Known = Annotated[Served, Depends(_known)]
Administered = Annotated[Reconciler, Depends(_administered)]
