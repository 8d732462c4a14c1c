"""What `lorakit serve` becomes once its arguments are understood: the supervisor of an engine, at an address."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import closing, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from lorakit.errors import Conflict, EngineFailed
from lorakit.files.folders import temporary_folder
from lorakit.server.engines import vllm
from lorakit.server.settings import Settings
from lorakit.server.sight.logs import own_line
from lorakit.server.spread.told import engines_told
from lorakit.server.supervision.engine_process import Command
from lorakit.server.supervision.keeper import Keeper
from lorakit.server.supervision.room import no_room_beside
from lorakit.server.supervision.supervisor import RUNTIME_PREFIX, Supervisor, Times, listen, place_for_sockets
from lorakit.server.supervision.takeover import SUFFIX, take_over
from lorakit.store.serving import serving
from lorakit.store.store import open_store

if TYPE_CHECKING:
    from lorakit.server.engines.front import Beside
    from lorakit.server.engines.remote import RemoteEngine


Start = Callable[[int, str], tuple[list[str], dict[str, str]]]  # an engine's number, its socket: arguments, variables


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


def run_replicas(
    start: Start, count: int, settings: Settings, *, base: str, base_path: str, max_rank: int, memory: int,
    host: str, port: int, what: str,
) -> int:  # fmt: skip
    """Several engines, and a gateway in front of them, each a process that is started again when it ends, until a
    signal ends it: the exit code. `base` is the base's identity, `base_path` its folder.

    Raises:
        Conflict: the port is taken.
        EngineFailed: an engine does not start.
    """
    with (
        closing(listen(host, port)) as public,
        temporary_folder(place_for_sockets(), RUNTIME_PREFIX, 0o700) as sockets,
    ):
        with open_store(settings.store_home, base) as store:  # one that can't be used is said before vLLM is started
            may_write = store.unwritable is None
        url = _url(settings, host, public.getsockname()[1])
        print(own_line(f"{count} x {what}, on {url}", settings.log_format), file=sys.stderr, flush=True)
        paths = [sockets / f"{number}.sock" for number in range(count)]
        keepers = [_keeper(start, number, path, settings) for number, path in enumerate(paths)]
        engines = {str(number): f"unix:{path}" for number, path in enumerate(paths)}
        told = engines_told(engines, base_path=base_path, max_rank=max_rank, memory=memory)

        def front(_: str) -> tuple[list[str], dict[str, str]]:
            variables = {**os.environ, **settings.as_environment(), **told, "PYTHONUNBUFFERED": "1"}
            return [sys.executable, "-m", "lorakit.server.spread.front"], variables

        supervisor = Supervisor(
            public, front, phase_of=_no_phase, times=_times(settings), log_format=settings.log_format,
            certificate=settings.certificate, what="gateway",
        )  # fmt: skip
        with serving(settings.store_home, base, url) if may_write else nullcontext():
            asyncio.run(_together(supervisor, keepers))
    return supervisor.exit_code


def _keeper(start: Start, number: int, path: Path, settings: Settings) -> Keeper:
    return Keeper(
        str(number), path, lambda socket: start(number, socket), phase_of=vllm.phase_of, times=_times(settings),
        log_format=settings.log_format,
    )  # fmt: skip


async def _together(supervisor: Supervisor, keepers: Sequence[Keeper]) -> None:
    """The gateway ends first, and then the engines that it asks."""
    serving = asyncio.create_task(supervisor.run())
    keeping = [asyncio.create_task(keeper.run()) for keeper in keepers]
    try:
        await asyncio.wait([serving, *keeping], return_when=asyncio.FIRST_COMPLETED)
        if not serving.done():
            supervisor.stop()
            with contextlib.suppress(EngineFailed):  # why an engine did not start is what is to be said
                await serving
        for task in (*keeping, serving):
            if task.done():
                task.result()
    finally:
        for task in keeping:
            task.cancel()
        ending = asyncio.gather(*keeping, return_exceptions=True)
        while not ending.done():
            if supervisor.at_once:
                for keeper in keepers:
                    keeper.end_at_once()
            await asyncio.wait([ending], timeout=0.2)


def _no_phase(_: str) -> None:
    return None


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


def run_in_front_of(
    urls: Sequence[str], settings: Settings, *, base_path: str, max_rank: int, host: str, port: int
) -> int:
    """The same before several of them."""
    from lorakit.server.spread.front import serve_in_front_of

    with closing(listen(host, port)) as public:
        where = _url(settings, host, public.getsockname()[1])
        print(
            own_line(f"the engines at {', '.join(urls)}, on {where}", settings.log_format), file=sys.stderr, flush=True
        )
        engines = {url.partition("://")[2].rstrip("/"): url for url in urls}
        return asyncio.run(serve_in_front_of(engines, public, settings, base_path=base_path, max_rank=max_rank))


def _times(settings: Settings) -> Times:
    limit = settings.hang_limit
    return Times(drain=settings.drain, silent=settings.silent_limit, hung=limit, start=settings.start_limit)


def _url(settings: Settings, host: str, port: int) -> str:
    return f"{settings.certificate.scheme}://{f'[{host}]' if ':' in host else host}:{port}"
