"""What `lorakit serve --ray` becomes: the application on a Ray cluster, in the foreground until a signal ends it."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from typing import Any

from lorakit.cluster.joining import Where, joined
from lorakit.errors import EngineFailed, Refused
from lorakit.server.access.at_start import KEY, refuse_open_door
from lorakit.server.on_ray.plan import Plan
from lorakit.server.settings import Settings
from lorakit.server.sight.logs import own_line
from lorakit.server.supervision.supervisor import listen
from lorakit.store.store import open_store

APP = "lorakit"  # its name in Ray Serve


class _Stopped(BaseException):
    """A signal came; `code` is the exit code."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


def run_on_ray(
    plan: Plan, settings: Settings, *, where: Where, identity: str, host: str, port: int, what: str,
    allow_no_key: bool = False,
) -> int:  # fmt: skip
    """Until SIGINT or SIGTERM: the exit code. `identity` is the base's. `allow_no_key`: even where other machines reach
    the Ray Serve that the cluster has already.

    Raises:
        Conflict: the port is taken.
        Refused: the cluster's Ray Serve can be reached by other machines, and there is no key.
        EngineFailed: the engines, or the gateway, do not start.
        UsageError, LorakitError: the cluster can't be joined.
    """
    with closing(listen(host, port)) as probe:
        port = probe.getsockname()[1]
    with open_store(settings.store_home, identity):  # one that can't be used is said before vLLM is started
        pass
    url = f"{settings.certificate.scheme}://{f'[{host}]' if ':' in host else host}:{port}"
    try:
        with _stopped_by_signals(), joined(where, logs=True) as ray:
            from ray import serve

            logging.getLogger("ray.serve").setLevel(logging.ERROR)
            plan = replace(plan, cpus=_share(ray, plan))
            settings = replace(settings, home=str(settings.store_home.absolute()))
            mine = not serve.status().proxies
            if not (mine or allow_no_key):
                _refuse_open(_listens(serve), settings)
            try:
                serve.start(proxy_location="EveryNode", http_options=_http(settings, host, port))
                at = f"on {url}" if mine else "where its Ray Serve listens already, whatever --host and --port say"
                said = f"{plan.replicas} x {what}, {at}, by Ray {ray.__version__}"
                print(own_line(said, settings.log_format), file=sys.stderr, flush=True)
                _deploy(serve, plan, settings)
                while True:
                    signal.pause()
            finally:
                with _undisturbed():
                    _end(serve, mine=mine)
    except _Stopped as stopped:
        return stopped.code


def _listens(serve: Any) -> str:
    """The host of the Ray Serve that there is."""
    return str(serve.context._get_global_client().http_config.host)


def _refuse_open(host: str, settings: Settings) -> None:
    """As `refuse_open_door`, for a host that nobody asked for."""
    try:
        refuse_open_door(host, settings.store_home, has_own_key=bool(os.environ.get(KEY)))
    except Refused as error:
        raise Refused(f"the cluster's Ray Serve listens on {host} already, whatever --host says: {error}") from None


def _share(ray: Any, plan: Plan) -> float:
    """The cores that a replica takes: on one machine they share them."""
    if len(ray.nodes()) > 1:
        return plan.cpus
    cores = float(ray.cluster_resources().get("CPU", 1.0))
    return float(cores // plan.replicas) or cores / plan.replicas


def _http(settings: Settings, host: str, port: int) -> dict[str, Any]:
    found: dict[str, Any] = {"host": host, "port": port}
    if settings.tls_cert:
        found |= {"ssl_certfile": settings.tls_cert, "ssl_keyfile": settings.tls_key}
    return found


def _deploy(serve: Any, plan: Plan, settings: Settings) -> None:
    """Until all answer."""
    from lorakit.server.on_ray.app import bound

    try:
        serve.run(bound(plan, settings, os.environ.get(KEY, "")), name=APP, route_prefix="/")
    except RuntimeError as error:
        raise EngineFailed(f"the application does not start on Ray: {_why(serve) or error}") from None


def _why(serve: Any) -> str:
    """What Ray says of deployments that failed."""
    found = serve.status().applications.get(APP)
    told = [one.message for one in found.deployments.values() if one.message] if found is not None else []
    return "\n".join(told)


def _end(serve: Any, *, mine: bool) -> None:
    """On a cluster that serves other things as well, this alone."""
    if mine:
        serve.shutdown()
    else:
        serve.delete(APP)


@contextmanager
def _stopped_by_signals() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def stop(number: int, _: Any) -> None:
        raise _Stopped(130 if number == signal.SIGINT else 0)

    for number in before:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _undisturbed() -> Iterator[None]:
    """A second signal ends it without waiting."""

    def leave(number: int, _: Any) -> None:
        os._exit(130 if number == signal.SIGINT else 1)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, leave)
    yield
