"""OpenTelemetry, where it is configured: a span for each request, named by its revision, above vLLM's own.

Configured means: the standard `OTEL_*` variables name an exporter, or a place for one; or this process has a tracer
provider already (vLLM's `--otlp-traces-endpoint` makes one). Without, nothing of it is imported.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any

from starlette.types import Scope

from lorakit import __version__
from lorakit.server.requests.answered import Answered
from lorakit.server.requests.asking import MODEL_ROUTES
from lorakit.server.sight.logs import LONGEST_NAME, log

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

EXPORTER = "OTEL_TRACES_EXPORTER"
PLACES = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")


class Tracing:
    """Spans of requests; `answered` is told of each answer while its span is the current one.

    `own`: the provider was made here, and ends with the server.
    """

    def __init__(self, provider: TracerProvider, *, own: bool = False) -> None:
        self._tracer = provider.get_tracer("lorakit", __version__)
        self._own = provider if own else None

    @contextmanager
    def span(self, scope: Scope) -> Iterator[Scope]:
        """The same request, whose headers say that it is part of this span."""
        from opentelemetry.propagate import extract, inject
        from opentelemetry.trace import SpanKind

        given = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        attributes = {"http.request.method": scope["method"], "url.path": scope["path"]}
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        named = f"{scope['method']} {path}" if path in MODEL_ROUTES else scope["method"]  # of few names
        with self._tracer.start_as_current_span(named, extract(given), SpanKind.SERVER, attributes):
            told: dict[str, str] = {}
            inject(told)
            kept = [(name, value) for name, value in scope["headers"] if name.decode("latin-1") not in told]
            yield {**scope, "headers": [*kept, *((name.encode(), value.encode()) for name, value in told.items())]}

    def answered(self, answer: Answered) -> None:
        from opentelemetry.trace import StatusCode, get_current_span

        span = get_current_span()
        known: dict[str, Any] = {
            "http.response.status_code": answer.status,
            "gen_ai.request.model": answer.model[:LONGEST_NAME].encode(errors="backslashreplace").decode(),
            "gen_ai.response.model": answer.revision.name if answer.revision else None,
            "gen_ai.usage.input_tokens": answer.prompt_tokens,
            "gen_ai.usage.output_tokens": answer.completion_tokens,
            "lorakit.revision": answer.revision.name if answer.revision else None,
            "lorakit.digest": answer.revision.digest if answer.revision else None,
            "lorakit.request_id": answer.request_id,
            "lorakit.waited": answer.waited,
            "lorakit.first_byte": answer.first_byte,
        }
        span.set_attributes({name: value for name, value in known.items() if value is not None})
        if answer.status >= 500:
            span.set_status(StatusCode.ERROR)

    def close(self) -> None:
        """Export what is left."""
        if self._own is not None:
            self._own.shutdown()


@contextmanager
def traced(tracing: Tracing | None, scope: Scope) -> Iterator[Scope]:
    """A request in a span of its own, if it asks for something and there is anybody to tell."""
    if tracing is None or scope["method"] != "POST":
        yield scope
        return
    with tracing.span(scope) as spanned:
        yield spanned


def configured_tracing(environ: Mapping[str, str] = os.environ) -> Tracing | None:
    """What the environment asks for; None for nothing, or where its packages are not installed, which is logged."""
    asked = any(environ.get(name) for name in (EXPORTER, *PLACES))
    if environ.get(EXPORTER) == "none" or not (asked or "opentelemetry.sdk.trace" in sys.modules):
        return None
    try:
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.trace import get_tracer_provider
    except ImportError:
        log.warning("OTEL_* variables are set, but OpenTelemetry is not installed: pip install 'lorakit[otel]'")
        return None
    present = get_tracer_provider()
    if isinstance(present, TracerProvider):
        return Tracing(present)
    return _exporting(environ) if asked else None


def _exporting(environ: Mapping[str, str]) -> Tracing | None:
    from opentelemetry.sdk.resources import SERVICE_NAME, Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    wanted = environ.get(EXPORTER) or "otlp"
    if wanted == "otlp":
        protocol = next((environ[name] for name in PROTOCOLS if environ.get(name)), "http/protobuf")
        wanted = f"otlp_proto_{protocol.partition('/')[0]}"
    exporters = entry_points(group="opentelemetry_traces_exporter", name=wanted)
    if not exporters:
        log.warning("there is no OpenTelemetry exporter '%s' here: pip install 'lorakit[otel]'", wanted)
        return None
    try:
        exporter = next(iter(exporters)).load()()
    except Exception as error:  # its own word on what it was given, whatever it raises
        log.warning("the OpenTelemetry exporter '%s' can't be used, so nothing is traced: %s", wanted, error)
        return None
    resource = Resource.create()
    if str(resource.attributes[SERVICE_NAME]).startswith("unknown_service"):
        resource = resource.merge(Resource({SERVICE_NAME: "lorakit"}))
    provider = TracerProvider(resource=resource)
    provider.add_span_processor(BatchSpanProcessor(exporter))
    return Tracing(provider, own=True)
