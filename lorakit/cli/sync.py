"""`lorakit sync`: adapters kept in step on a vLLM that its clients ask themselves."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lorakit.cli.configured import Configured, Described, config_option
from lorakit.cli.following import following_options, largest_rank, refuse_unfollowable, whole_paths
from lorakit.cli.shared import print_json
from lorakit.errors import EngineFailed, NotFound, UsageError

if TYPE_CHECKING:
    from lorakit.server.engines.remote import RemoteEngine
    from lorakit.server.gateway import Gateway


@click.command("sync", cls=Configured)
@click.argument("engine", cls=Described, metavar="URL", envvar="LORAKIT_ENGINE", key="engine",
                meaning="The vLLM: http://HOST:PORT.")  # fmt: skip
@following_options
@click.option("--names", default="", metavar="FILE", type=click.Path(dir_okay=False),
              help="Keep here, as JSON, what to ask the engine for in the place of each name.")  # fmt: skip
@click.option("--linger", default=30.0, show_default=True, metavar="SECONDS", type=click.FloatRange(0),
              help="How long what a name meant before stays, for those who still ask for it.")  # fmt: skip
@click.option("--max-loras", default=8, show_default=True, type=click.IntRange(1, 4096),
              help="How many adapters it is given at most; no more than it was started with.")  # fmt: skip
@click.option("--max-lora-rank", type=click.IntRange(1), help="What it was started with. Default: the largest found.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Where lorakit's own routes are.")
@click.option("--port", default=8010, show_default=True, type=click.IntRange(0, 65535), help="0: any that is free.")
@click.option("--root", "roots", multiple=True, metavar="DIR", type=click.Path(),
              help="Adapters may be loaded from here over HTTP.")  # fmt: skip
@click.option("--api-key-file", metavar="FILE", type=click.Path(dir_okay=False),
              help="A key that may do all on lorakit's routes, as LORAKIT_API_KEY.")  # fmt: skip
@click.option("--allow-no-key", is_flag=True, help="Listen where other machines reach it, though there is no key.")
@click.option("--home", type=click.Path(file_okay=False),
              help="The store, which the engine sees at the same path. Default: $LORAKIT_HOME.")  # fmt: skip
@click.option("--log-format", type=click.Choice(["text", "json"]), default="text", show_default=True)
@config_option
@click.option("--dry-run", is_flag=True, allow_from_autoenv=False,
              help="Say what the engine offers, and change nothing.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, allow_from_autoenv=False, help="Print errors, and that, as JSON.")
def command(
    engine: str, watch: tuple[str, ...], adapters: tuple[str, ...], names: str, linger: float, max_loras: int,
    max_lora_rank: int | None, mode: str | None, probe: str, retention: str, roots: tuple[str, ...], host: str,
    port: int, api_key_file: str | None, allow_no_key: bool, home: str | None, dry_run: bool, as_json: bool,
    **more: Any,
) -> None:  # fmt: skip
    """Keep the adapters of the vLLM at URL in step with runs, for clients that ask it themselves.

    Each checkpoint is loaded under a name of its own (`sql@step-500-3fa9c1d2`), and makes place for others when nothing
    means it and no request is in flight for it. What a name means now is in the file of --names, in lorakit's own
    /v1/models, and follows `lorakit alias` and `lorakit rollback` (--url http://127.0.0.1:8010). vLLM wants
    --enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=1, and to free what it took, VLLM_SERVER_DEV_MODE=1; its key goes
    into LORAKIT_ENGINE_KEY.

    \b
    lorakit sync http://127.0.0.1:8001 --watch runs --names adapters.json
    lorakit sync http://127.0.0.1:8001 --adapter sql=runs/sql --follow best --linger 300
    """
    from lorakit.server.access.at_start import KEY, key_from_file, refuse_open_door
    from lorakit.server.engines.unattended import UnattendedEngine
    from lorakit.server.engines.vllm import allowed_rank
    from lorakit.server.settings import from_mapping
    from lorakit.server.supervision.running import run_in_front
    from lorakit.server.syncing import Syncing

    if not engine.startswith(("http://", "https://")):
        raise UsageError(f"'{engine}': write the engine's address, http://HOST:PORT")
    file = Path(names).absolute() if names else None
    if file is not None and not file.parent.is_dir():
        raise NotFound(f"--names: there is no folder '{file.parent}'")
    settings = from_mapping(
        {
            **whole_paths("", adapters, watch=watch, roots=roots, home=home, probe=probe, retention=retention),
            "mode": mode or "",
            "max_loras": max_loras,
            **more,
        }
    )
    refuse_unfollowable(settings)
    if api_key_file:
        os.environ[KEY] = key_from_file(Path(api_key_file))
    if not allow_no_key:
        refuse_open_door(host, settings.store_home, has_own_key=bool(os.environ.get(KEY)))
    rank = allowed_rank(max_lora_rank or largest_rank([*settings.watch, *settings.adapters.values()]))

    if dry_run:
        told = asyncio.run(_offered(engine, max_loras, rank))
        if as_json:
            print_json(told)
        else:
            print(
                f"{told['engine']}, base '{told['base']}': {told['slots']} adapters at once, "
                f"{'which it can let go of' if told['removes'] else 'which it keeps'}; {len(told['there'])} are there"
            )
        return

    async def beside(gateway: Gateway, connected: RemoteEngine) -> None:
        assert isinstance(connected, UnattendedEngine)
        await Syncing(gateway.reconciler, connected, linger=linger, names=file).run()

    code = run_in_front(
        engine, settings, base_path="", max_rank=rank, host=host, port=port, kind=UnattendedEngine, beside=beside
    )
    if code:
        raise click.exceptions.Exit(code)


async def _offered(url: str, slots: int, rank: int) -> dict[str, Any]:
    """What the engine says of itself.

    Raises:
        EngineFailed: it can't be used, or does not answer.
    """
    from lorakit.server.engines.front import KEY
    from lorakit.server.engines.remote import Http
    from lorakit.server.engines.vllm import message_of, offered

    http = Http(url, os.environ.get(KEY, ""))
    try:
        status, body = await http.call("GET", "/health", None)
        if status != 200:
            raise EngineFailed(message_of(body))
        found = await offered(http.call, base_path="", slots=slots, max_rank=rank)
    finally:
        await http.close()
    return {
        "engine": found.limits.engine, "base": found.limits.base, "slots": min(slots, found.limits.slots),
        "removes": found.removes, "there": sorted(found.there),
    }  # fmt: skip
