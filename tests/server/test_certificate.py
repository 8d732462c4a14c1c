"""What https takes, and that a gateway in front of an engine speaks it."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from pathlib import Path

import httpx
import pytest

from lorakit.errors import NotFound, Refused, UsageError
from lorakit.server.certificate import Certificate
from lorakit.server.engines.front import serve_in_front
from tests.certificates import make_certificate
from tests.server.fake_engine import settings_for


def test_a_certificate_and_its_key_are_usable(tmp_path: Path) -> None:
    made = make_certificate(tmp_path, "localhost")
    certificate = Certificate(str(made.cert), str(made.key))
    certificate.ensure_usable()
    assert (certificate.scheme, Certificate().scheme) == ("https", "http")
    Certificate().ensure_usable()


def test_what_can_not_be_used_is_said_before_anything_starts(tmp_path: Path) -> None:
    made = make_certificate(tmp_path, "localhost")
    (tmp_path / "other").mkdir()
    other = make_certificate(tmp_path / "other", "localhost")
    (tmp_path / "empty.pem").touch()
    for file, key, kind in (
        (str(made.cert), "", UsageError), ("", str(made.key), UsageError), (str(tmp_path / "no"), "x", NotFound),
        (str(made.cert), str(other.key), Refused), (str(made.key), str(made.key), Refused),
        (str(tmp_path / "empty.pem"), str(made.key), Refused),
    ):  # fmt: skip
        with pytest.raises(kind):
            Certificate(file, key).ensure_usable()


@pytest.mark.anyio
async def test_a_gateway_in_front_of_an_engine_speaks_https(tmp_path: Path) -> None:
    made = make_certificate(tmp_path, "127.0.0.1")
    settings = settings_for(tmp_path, tls_cert=str(made.cert), tls_key=str(made.key))
    with socket.create_server(("127.0.0.1", 0)) as public, socket.create_server(("127.0.0.1", 0)) as nobody:
        url = f"https://127.0.0.1:{public.getsockname()[1]}"
        engine = f"http://127.0.0.1:{nobody.getsockname()[1]}"
        nobody.close()
        serving = asyncio.create_task(serve_in_front(engine, public, settings, base_path="", max_rank=16))
        async with httpx.AsyncClient(verify=made.trusted()) as client:
            assert (await client.get(f"{url}/v1/models")).status_code == 503
        os.kill(os.getpid(), signal.SIGTERM)
        assert await serving == 0
