"""What `lorakit serve` becomes once its arguments are understood: the supervisor of an engine, at an address."""

from __future__ import annotations

import asyncio
import sys
from contextlib import closing, nullcontext
from typing import TYPE_CHECKING

from lorakit.errors import Conflict
from lorakit.server.engines import vllm
from lorakit.server.settings import Settings
from lorakit.server.sight.logs import own_line
from lorakit.server.supervision.engine_process import Command
from lorakit.server.supervision.room import no_room_beside
from lorakit.server.supervision.supervisor import Supervisor, Times, listen
from lorakit.server.supervision.takeover import SUFFIX, take_over
from lorakit.store.serving import serving
from lorakit.store.store import open_store

if TYPE_CHECKING:
    from lorakit.server.engines.front import Beside
    from lorakit.server.engines.remote import RemoteEngine


def run_engine(
    start: Command, settings: Settings, *, base: str, host: str, port: int, takeover: bool, what: str
) -> int:
    """Until a signal ends it, or another server takes over: the exit code. `base` is the base's identity.

    Raises:
        Conflict: the port is taken; or another server is to be taken over, and two engines don't fit.
        NotFound: there is none to take over.
        EngineFailed: the engine does not start.
    """
    if takeover:
        taken = take_over(settings.store_home, base, _url(settings, host, port))
        public, end = taken.public, taken.end
        if reason := no_room_beside(taken.members):
            end.close()
            public.close()
            raise Conflict(f"there is no room for a second engine: {reason}")
    else:
        public, end = listen(host, port), None
    with closing(public):
        with open_store(settings.store_home, base) as store:  # one that can't be used is said before vLLM is started
            may_write = store.unwritable is None
        url = _url(settings, host, public.getsockname()[1])
        with serving(settings.store_home, base, url) if may_write else nullcontext() as file:
            print(own_line(f"{what}, on {url}", settings.log_format), file=sys.stderr, flush=True)
            supervisor = Supervisor(
                public, start, phase_of=vllm.phase_of, times=_times(settings), log_format=settings.log_format,
                way_in=file.with_suffix(SUFFIX) if file else None, taken=end, certificate=settings.certificate,
            )  # fmt: skip
            asyncio.run(supervisor.run())
    return supervisor.exit_code


def run_in_front(
    url: str, settings: Settings, *, base_path: str, max_rank: int, host: str, port: int,
    kind: type[RemoteEngine] | None = None, beside: Beside | None = None,
) -> int:  # fmt: skip
    """A gateway before an engine that somebody else started, until a signal ends it: the exit code.

    Raises:
        Conflict: the port is taken.
        EngineFailed: the engine can't be used.
    """
    from lorakit.server.engines.front import serve_in_front
    from lorakit.server.engines.remote import RemoteEngine

    with closing(listen(host, port)) as public:
        where = _url(settings, host, public.getsockname()[1])
        print(own_line(f"the engine at {url}, on {where}", settings.log_format), file=sys.stderr, flush=True)
        return asyncio.run(
            serve_in_front(
                url, public, settings, base_path=base_path, max_rank=max_rank, kind=kind or RemoteEngine, beside=beside
            )
        )


def _times(settings: Settings) -> Times:
    limit = settings.hang_limit
    return Times(drain=settings.drain, silent=settings.silent_limit, hung=limit, start=settings.start_limit)


def _url(settings: Settings, host: str, port: int) -> str:
    return f"{settings.certificate.scheme}://{f'[{host}]' if ':' in host else host}:{port}"
