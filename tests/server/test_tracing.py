"""Spans of requests, as a collector on the loopback gets them."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lorakit.server.sight.tracing import configured_tracing
from tests.loopback import running
from tests.server.fake_engine import put_checkpoint, serving

TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = "b7ad6b7169203331"


class Collector:
    """Takes what OpenTelemetry's exporter for OTLP over HTTP posts."""

    def __init__(self) -> None:
        self.spans: list[Any] = []
        self.services: set[str] = set()
        collector = self

        class Requests(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

                body = self.rfile.read(int(self.headers["content-length"]))
                if self.headers.get("content-encoding") == "gzip":
                    body = gzip.decompress(body)
                for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                    for attribute in resource.resource.attributes:
                        if attribute.key == "service.name":
                            collector.services.add(attribute.value.string_value)
                    for scope in resource.scope_spans:
                        collector.spans += scope.spans
                self.send_response(200)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                return

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Requests)
        self.url = f"http://127.0.0.1:{self.server.server_port}"


@pytest.fixture
def collector() -> Iterator[Collector]:
    found = Collector()
    with running(found.server):
        yield found


def attributes(span: Any) -> dict[str, Any]:
    return {one.key: getattr(one.value, one.value.WhichOneof("value")) for one in span.attributes}


@pytest.mark.anyio
async def test_a_request_is_a_span_with_its_revision_between_the_clients_and_vllms(
    tmp_path: Path, numbers: Path, collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
    put_checkpoint(tmp_path / "runs" / "sql", 100)
    async with serving(tmp_path, numbers) as served:
        headers = {"traceparent": f"00-{TRACE}-{PARENT}-01", "x-request-id": "r-1"}
        asked = {"model": "sql", "prompt": "what nobody may read"}
        answer = await served.client.post("/v1/completions", json=asked, headers=headers)
        told = served.engine.headers[-1][b"traceparent"].decode().split("-")
        odd = json.dumps({"model": "nobody\ud800" + "x" * 500}).encode()
        await served.client.post("/v1/completions", content=odd, headers={"content-type": "application/json"})
        await served.client.post("/v1/whatever", json={})
        await served.client.get("/v1/models")
    first, second, third = collector.spans
    assert (first.trace_id.hex(), first.parent_span_id.hex()) == (TRACE, PARENT)
    assert told[1:3] == [TRACE, first.span_id.hex()]
    said = attributes(first)
    assert first.name == "POST /v1/completions"
    assert said["lorakit.revision"] == answer.headers["x-lorakit-revision"] == said["gen_ai.response.model"]
    assert said["gen_ai.request.model"] == "sql"
    assert said["http.response.status_code"] == 200
    assert said["lorakit.request_id"] == "r-1"
    assert attributes(second)["http.response.status_code"] == 404
    assert len(attributes(second)["gen_ai.request.model"]) < 300
    assert third.name == "POST", "names of spans are few, whatever is asked for"
    assert "may read" not in str(collector.spans)
    assert collector.services == {"lorakit"}


@pytest.mark.anyio
async def test_without_its_variables_nothing_is_traced_and_a_traceparent_is_passed_on_as_it_is(
    tmp_path: Path, numbers: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("OTEL_TRACES_EXPORTER", "OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    async with serving(tmp_path, numbers) as served:
        given = f"00-{TRACE}-{PARENT}-01"
        await served.client.post(
            "/v1/completions", json={"model": "numbers", "prompt": "a"}, headers={"traceparent": given}
        )
        assert served.engine.headers[-1][b"traceparent"].decode() == given


@pytest.mark.parametrize(
    "variables",
    [{}, {"OTEL_TRACES_EXPORTER": "none", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1"}],
    ids=["nothing", "none"],
)
def test_nothing_is_asked_for_where_no_exporter_is_named(variables: dict[str, str]) -> None:
    assert configured_tracing(variables) is None


def test_an_exporter_that_is_not_there_is_said_and_the_server_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    assert configured_tracing({"OTEL_TRACES_EXPORTER": "pigeon"}) is None
    assert "lorakit[otel]" in caplog.text


def test_an_exporter_that_can_not_be_made_is_said_and_the_server_goes_on(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken() -> None:
        raise RuntimeError("no certificate")

    monkeypatch.setattr("lorakit.server.sight.tracing.entry_points", lambda **_: [SimpleNamespace(load=lambda: broken)])
    assert configured_tracing({"OTEL_TRACES_EXPORTER": "otlp"}) is None
    assert "no certificate" in caplog.text


def test_the_service_is_called_as_the_environment_says() -> None:
    program = """
import os
from lorakit.server.sight.tracing import configured_tracing
tracing = configured_tracing()
print(tracing._own.resource.attributes["service.name"])
"""
    variables = {"OTEL_TRACES_EXPORTER": "console", "OTEL_RESOURCE_ATTRIBUTES": "service.name=mine"}
    ended = subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, **variables}, capture_output=True, text=True, check=False
    )
    assert (ended.returncode, ended.stdout) == (0, "mine\n"), ended.stderr


def test_without_opentelemetry_a_server_that_is_asked_to_trace_says_so_and_goes_on() -> None:
    program = """
import sys
sys.modules["opentelemetry"] = None
from lorakit.server.sight.tracing import configured_tracing
assert configured_tracing({}) is None
assert configured_tracing({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1"}) is None
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr.count("lorakit[otel]") == 1


def test_a_provider_that_the_process_has_already_is_used() -> None:
    """As vLLM's --otlp-traces-endpoint makes one; a process has one for good, so this is a process of its own."""
    program = """
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import set_tracer_provider
from lorakit.server.sight.tracing import configured_tracing
spans, provider = InMemorySpanExporter(), TracerProvider()
provider.add_span_processor(SimpleSpanProcessor(spans))
set_tracer_provider(provider)
with configured_tracing({}).span({"headers": [], "method": "POST", "path": "/v1/completions"}) as scope:
    assert scope["headers"][0][0] == b"traceparent"
print(spans.get_finished_spans()[0].name)
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout) == (0, "POST /v1/completions\n"), ended.stderr
