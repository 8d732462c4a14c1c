"""A server that is asked to fetch something is not made to ask what only it can reach."""

from __future__ import annotations

import io
import socket
import ssl
import tarfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from lorakit.checkpoints.moving.download import Patience
from lorakit.errors import NotFound, Refused, UsageError
from lorakit.server.access import fetching
from lorakit.server.access.fetching import Host, address_of, allowed, is_public, parse_host
from lorakit.server.sight.logs import log
from tests.certificates import make_certificate
from tests.checkpoints.moving.web import SECRET, WORDS, Web
from tests.checkpoints.moving.web import serving as serving_web
from tests.server.conftest import numbers as numbers
from tests.server.fake_engine import Served, fingerprint_of, put_checkpoint, serving
from tests.server.test_gateway import assert_openai_error

INSIDE = [
    "0.0.0.0", "0.1.2.3", "10.0.0.1", "10.255.255.255", "100.64.0.1", "100.100.100.200", "127.0.0.1", "127.255.0.1",
    "168.63.129.16", "169.254.169.254", "169.254.170.2", "172.16.0.1", "172.31.255.255", "192.0.0.192", "192.168.0.1",
    "198.18.0.1", "203.0.113.1", "224.0.0.1", "224.0.1.129", "239.255.255.250", "240.0.0.1", "255.255.255.255",
    "::", "::1", "::127.0.0.1", "::ffff:127.0.0.1", "::ffff:10.0.0.1", "::ffff:169.254.169.254", "64:ff9b::7f00:1",
    "64:ff9b::a9fe:a9fe", "64:ff9b:1::1", "2001:db8::1", "2001::7f00:1", "2002:7f00:1::1", "2002:a9fe:a9fe::1",
    "fc00::1", "fd00:ec2::254", "fe80::1", "fe80::1%lo", "fec0::1", "ff02::1", "ff0e::1", "100::1", "::8.8.8.8",
]  # fmt: skip
OUTSIDE = ["8.8.8.8", "1.1.1.1", "172.32.0.1", "100.128.0.1", "2606:4700::1111", "64:ff9b::808:808", "2002:808:808::1"]


@pytest.mark.parametrize("address", INSIDE)
def test_what_is_inside_is_not_public(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize("address", OUTSIDE)
def test_what_is_outside_is_public(address: str) -> None:
    assert is_public(address)


@pytest.mark.parametrize(
    "meant", [["10.0.0.1"], ["8.8.8.8", "10.0.0.1"], ["8.8.8.8", "::1"], ["::ffff:169.254.169.254"], []]
)
def test_a_name_that_means_anything_inside_is_refused_whatever_else_it_means(
    meant: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = [(0, 0, 0, "", (address, 443)) for address in meant]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    with pytest.raises(Refused) as refused:
        address_of(Host("files.test"))
    assert not any(address in str(refused.value) for address in meant), "that is nobody's business"


def test_a_name_without_a_meaning_is_not_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "unknown")

    monkeypatch.setattr(socket, "getaddrinfo", fail)
    with pytest.raises(NotFound):
        address_of(Host("files.test"))


@pytest.mark.parametrize(
    "source",
    ["http://files.test/a", "https://files.test.evil.test/a", "https://evil.test/files.test", "https://evil.test?files.test",
     "https://files.test@evil.test/a", "https://evil.test#@files.test/", "https://files.test:444/a", "https://files.test.",
     "https://127.0.0.1/a", "https://[::1]/a", "https://2130706433/", "https://0x7f.1/", "https://files.test\\@evil.test/",
     "https:files.test", "https:///files.test/a", "https://", "https://files.test:x/", "https://files.test:99999/a",
     "https://fil es.test/", "https://files.test%2eevil.test/", "https://ﬁles.test.evil.test/", "https://evil。test/"],
)  # fmt: skip
def test_only_what_is_of_an_allowed_host_is_fetched(source: str) -> None:
    with pytest.raises(Refused):
        allowed(source, ("files.test",))


@pytest.mark.parametrize("source", ["https://files.test/a", "HTTPS://FILES.TEST/a?b#c", "https://u:p@files.test:443/a"])
def test_an_allowed_host_is_known_however_it_is_written(source: str) -> None:
    assert allowed(source, ("Files.Test",))[0] == Host("files.test")


@pytest.mark.parametrize("text", ["", "https://a", "a/b", "a b", "user@a", "a?b", "a:x", "a#b"])
def test_a_host_that_is_none_is_a_usage_error(text: str) -> None:
    with pytest.raises(UsageError, match="--allow-host"):
        parse_host(text)


# through the whole server


class Files:
    """An https server of the name `files.test`, and how often that name was looked up."""

    def __init__(self, web: Web) -> None:
        self.web = web
        self.looked_up: list[str] = []

    @property
    def host(self) -> str:
        return f"files.test:{self.web.port}"

    def url(self, path: str) -> str:
        return f"https://{self.host}/{path}?{SECRET}"


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Files]:
    made = make_certificate(tmp_path, "files.test")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(made.cert, made.key)
    real = socket.getaddrinfo
    with serving_web() as web:
        found = Files(web)
        web._server.socket = context.wrap_socket(web._server.socket, server_side=True)

        def look_up(host: Any, port: Any, *more: Any, **named: Any) -> Any:
            if host == "files.test":
                found.looked_up.append(host)
                return real("127.0.0.1", port, *more, **named)
            assert host in ("127.0.0.1", b"127.0.0.1"), f"{host} is looked up"
            return real(host, port, *more, **named)

        monkeypatch.setattr(socket, "getaddrinfo", look_up)
        monkeypatch.setattr(fetching, "is_public", lambda address: address == "127.0.0.1")
        monkeypatch.setenv("SSL_CERT_FILE", str(made.cert))
        monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:1")
        yield found


def packed(folder: Path) -> bytes:
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w:gz") as archive:
        for file in sorted(folder.iterdir()):
            archive.add(file, file.name)
    return raw.getvalue()


@asynccontextmanager
async def allowing(folder: Path, base: Path, *hosts: str, **more: Any) -> AsyncIterator[Served]:
    (folder / "empty").mkdir()
    async with serving(folder, base, watch=(str(folder / "empty"),), allow_hosts=hosts, **more) as served:
        yield served


async def load(served: Served, source: str) -> httpx.Response:
    return await served.client.post("/v1/adapters", json={"name": "sql", "source": source})


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.mark.anyio
async def test_an_adapter_of_an_allowed_host_is_served_and_nothing_keeps_its_secret(
    tmp_path: Path, numbers: Path, files: Files, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = put_checkpoint(tmp_path / "elsewhere", 500)
    files.web.put("checkpoint-500.tar.gz", packed(folder))
    monkeypatch.setattr(log, "propagate", True)
    caplog.set_level("DEBUG")
    async with allowing(tmp_path, numbers, files.host) as served:
        answer = await load(served, files.url("checkpoint-500.tar.gz"))
        assert answer.status_code == 201, answer.text
        assert answer.json()["step"] == 500
        (revision,) = answer.json()["revisions"]
        assert revision["source"] == f"https://{files.host}/checkpoint-500.tar.gz"
        assert (await served.ask("sql")).json()["choices"][0]["text"] == fingerprint_of(folder)
        told = [event.as_sse() for event in served.reconciler.events.kept]
        told += [(await served.client.get(path)).text for path in ("/v1/adapters", "/v1/models", "/metrics")]
    assert files.looked_up == ["files.test"], "once"
    assert files.web.asked[0][1]["host"] == files.host
    kept = [file.read_bytes() for file in (tmp_path / "home").rglob("*") if file.is_file()]
    for word in WORDS:
        assert not any(word in text for text in [*told, answer.text, caplog.text])
        assert not any(word.encode() in content for content in kept)
    assert list((tmp_path / "home" / "tmp").iterdir()) == []


@pytest.mark.anyio
async def test_without_an_allowed_host_nothing_is_asked_or_looked_up(
    tmp_path: Path, numbers: Path, files: Files
) -> None:
    files.web.put("a.tar", b"")
    async with allowing(tmp_path, numbers) as served:
        for source in (files.url("a.tar"), files.url("a.tar").replace("https", "http"), f"https://127.0.0.1/?{SECRET}"):
            answer = await load(served, source)
            assert_openai_error(answer, 400)
            assert not any(word in answer.text for word in WORDS)
    assert (files.looked_up, files.web.asked) == ([], [])


@pytest.mark.anyio
@pytest.mark.parametrize(
    "location",
    ["http://127.0.0.1/", "https://127.0.0.1/", "http://169.254.169.254/latest/meta-data/", "/elsewhere.tar.gz",
     "//evil.test/", "file:///etc/passwd"],
)  # fmt: skip
async def test_where_it_leads_is_never_asked(tmp_path: Path, numbers: Path, files: Files, location: str) -> None:
    files.web.put("a.tar.gz", b"", location=location)
    files.web.put("elsewhere.tar.gz", packed(put_checkpoint(tmp_path / "elsewhere", 500)))
    async with allowing(tmp_path, numbers, files.host) as served:
        answer = await load(served, files.url("a.tar.gz"))
        assert_openai_error(answer, 400)
        assert "leads to another place" in answer.text
        assert "sql" not in served.reconciler.runs
    assert [path for path, _ in files.web.asked] == ["a.tar.gz"]


@pytest.mark.anyio
async def test_what_means_something_inside_is_not_connected_to(
    tmp_path: Path, numbers: Path, files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetching, "is_public", is_public)
    async with allowing(tmp_path, numbers, files.host) as served:
        assert_openai_error(await load(served, files.url("a.tar")), 400)
    assert files.web.asked == []


@pytest.mark.anyio
async def test_a_connection_that_breaks_goes_on_at_the_address_that_was_found_first(
    tmp_path: Path, numbers: Path, files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetching, "PATIENCE", Patience(tries=3, timeout=10.0, pause=0.01))
    folder = put_checkpoint(tmp_path / "elsewhere", 500)
    files.web.put("a.tar.gz", packed(folder), cuts=[900, 1000])
    async with allowing(tmp_path, numbers, files.host) as served:
        answer = await load(served, files.url("a.tar.gz"))
        assert answer.status_code == 201, answer.text
    assert len(files.web.asked) > 1
    assert files.looked_up == ["files.test"]


@pytest.mark.anyio
async def test_what_has_the_certificate_of_another_is_not_taken(
    tmp_path: Path, numbers: Path, files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "other").mkdir()
    monkeypatch.setenv("SSL_CERT_FILE", str(make_certificate(tmp_path / "other", "files.test").cert))
    files.web.put("a.tar.gz", b"x")
    async with allowing(tmp_path, numbers, files.host) as served:
        answer = await load(served, files.url("a.tar.gz"))
        assert_openai_error(answer, 400, 404)
        assert "certificate" in answer.text
    assert files.web.asked == []


@pytest.mark.anyio
async def test_what_is_too_large_or_takes_too_long_is_refused_and_leaves_nothing(
    tmp_path: Path, numbers: Path, files: Files
) -> None:
    files.web.put("a.tar.gz", packed(put_checkpoint(tmp_path / "elsewhere", 500)))
    for place, setting, word in (
        ("one", {"max_source": 0}, "bytes"),
        ("two", {"source_timeout": 0.0}, "--source-timeout"),
    ):
        (tmp_path / place).mkdir()
        async with allowing(tmp_path / place, numbers, files.host, **setting) as served:
            answer = await load(served, files.url("a.tar.gz"))
            assert_openai_error(answer, 400)
            assert word in answer.json()["error"]["message"]
            assert list((tmp_path / place / "home" / "tmp").iterdir()) == []


@pytest.mark.anyio
async def test_a_server_that_fails_is_told_from_one_that_refuses(
    tmp_path: Path, numbers: Path, files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetching, "PATIENCE", Patience(tries=2, timeout=10.0, pause=0.01))
    files.web.put("ill.tar", b"x", statuses=[503] * 9)
    async with allowing(tmp_path, numbers, files.host) as served:
        assert_openai_error(await load(served, files.url("ill.tar")), 502)
        assert_openai_error(await load(served, files.url("none.tar")), 404)


@pytest.mark.anyio
async def test_folders_alone_are_loaded_by_vllms_route(tmp_path: Path, numbers: Path, files: Files) -> None:
    async with allowing(tmp_path, numbers, files.host) as served:
        body = {"lora_name": "sql", "lora_path": files.url("a.tar.gz")}
        assert_openai_error(await served.client.post("/v1/load_lora_adapter", json=body), 400)
    assert files.web.asked == []
