"""An engine that a gateway elsewhere asks is well for it as long as it makes tokens."""

from __future__ import annotations

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from starlette.testclient import TestClient

from lorakit.server.engines.attended import Attended


async def answer(_: Request) -> Response:
    return PlainTextResponse("vLLM")


@pytest.mark.parametrize("stuck", [False, True])
def test_one_that_hangs_says_so_where_it_is_asked_how_it_is(stuck: bool) -> None:
    attended = Attended(Starlette(routes=[Route("/health", answer), Route("/v1/models", answer)]))
    attended.stuck = stuck
    client = TestClient(attended)
    assert client.get("/health").status_code == (503 if stuck else 200)
    assert client.get("/v1/models").text == "vLLM"
