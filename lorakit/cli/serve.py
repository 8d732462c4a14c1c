"""`lorakit serve`: a base and its adapters from one vLLM."""

from __future__ import annotations

import asyncio
import os
import sys
from contextlib import closing
from pathlib import Path
from socket import socket
from typing import TYPE_CHECKING

import click

from lorakit.cli.shared import print_json
from lorakit.errors import NotFound, UsageError

if TYPE_CHECKING:
    from lorakit.server.supervisor import Command


@click.command(name="serve", context_settings={"ignore_unknown_options": False})
@click.argument("base")
@click.option("--watch", "watched", multiple=True, metavar="DIR", help="Serve every run and adapter in this folder.")
@click.option("--adapter", "named", multiple=True, metavar="NAME=PATH", help="Serve this adapter or run as NAME.")
@click.option("--follow", type=click.Choice(["latest", "best", "manual"]), default="latest", show_default=True,
              help="Which checkpoint a run's name means.")  # fmt: skip
@click.option("--host", default="127.0.0.1", show_default=True)
@click.option("--port", default=8000, show_default=True, type=click.IntRange(0, 65535))
@click.option("--max-loras", default=8, show_default=True, type=click.IntRange(1, 4096),
              help="How many adapters are in the engine at once.")  # fmt: skip
@click.option("--max-lora-rank", type=click.IntRange(1), help="Default: the largest rank found, 16 at least.")
@click.option("--root", "roots", multiple=True, metavar="DIR", help="Adapters may be loaded from here over HTTP.")
@click.option("--home", type=click.Path(file_okay=False), help="The store. Default: $LORAKIT_HOME.")
@click.option("--dry-run", is_flag=True, help="Print the command that would start vLLM, and start nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print errors and the plan as JSON.")
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED, metavar="[-- ARGS FOR VLLM]")
def command(
    base: str, watched: tuple[str, ...], named: tuple[str, ...], follow: str, host: str, port: int, max_loras: int,
    max_lora_rank: int | None, roots: tuple[str, ...], home: str | None, dry_run: bool, as_json: bool,
    arguments: tuple[str, ...],
) -> None:  # fmt: skip
    """Serve BASE, a folder or a hub id, and its adapters, each new checkpoint as it appears.

    \b
    lorakit serve models/llama --watch runs
    lorakit serve meta-llama/Llama-3.1-8B --adapter sql=runs/sql --follow best -- --gpu-memory-utilization 0.8

    A request's `model` is the base's name, a run (`sql`), an alias (`sql@best`) or a revision (`sql@step-500`).
    """
    from lorakit.merge.base import read_base
    from lorakit.server import vllm
    from lorakit.server.settings import from_mapping, named_path
    from lorakit.server.supervisor import listen
    from lorakit.store.names import check_name
    from lorakit.store.serving import serving
    from lorakit.store.store import Store

    found = vllm.installed()
    vllm.refuse_own_flags(arguments)
    model = read_base(base)
    name = base_name(base)
    adapters = dict(named_path(text) for text in named)
    if len(adapters) < len(named):
        raise UsageError("--adapter: a name stands twice")
    for adapter, path in adapters.items():
        check_name(adapter, name)
        if not Path(path).is_dir():
            raise NotFound(f"--adapter {adapter}: there is no folder '{path}'")
    for folder in (*watched, *roots):
        if not Path(folder).is_dir():
            raise NotFound(f"there is no folder '{folder}' to watch or to load from")
    settings = from_mapping(
        {
            "home": str(Path(home).absolute()) if home else os.environ.get("LORAKIT_HOME", ""),
            "watch": [str(Path(folder).absolute()) for folder in watched],
            "adapters": adapters,
            "roots": [str(Path(folder).absolute()) for folder in roots],
            "follow": follow,
            "max_loras": max_loras,
        }
    )
    rank = vllm.allowed_rank(max_lora_rank or _largest_rank([*watched, *adapters.values()]))

    def start(path: str) -> tuple[list[str], dict[str, str]]:
        line = vllm.command(
            found, base=str(model.folder.resolve()), name=name, socket=path, slots=max_loras, rank=rank,
            extra=arguments,
        )  # fmt: skip
        environ = {**os.environ, **settings.as_environment()}
        return line, vllm.environment(found, environ, offline=Path(base).is_dir())

    if dry_run:
        line, _ = start("PRIVATE-SOCKET")
        if as_json:
            print_json({"command": line, "vllm": found.text, "base": name, "max_lora_rank": rank})
        else:
            print(" ".join(line))
        return
    what = f"vLLM {found.text}, base '{name}', rank up to {rank}"
    with closing(listen(host, port)) as public:
        Store(settings.store_home, model.identity).close()  # one that can't be used is said before vLLM is started
        with serving(settings.store_home, model.identity, _url(host, public)):
            _run(start, public, host, settings.drain, what)


def base_name(base: str) -> str:
    """The last part of a folder, as it was typed, or of a hub id without its revision."""
    if Path(base).is_dir():
        return os.path.basename(os.path.abspath(base))
    return base.partition("@")[0].rpartition("/")[2]


def _run(start: Command, public: socket, host: str, drain: float, what: str) -> None:
    from lorakit.server import vllm
    from lorakit.server.supervisor import Supervisor

    print(f"lorakit: {what}, on {_url(host, public)}", file=sys.stderr, flush=True)

    async def supervise() -> int:
        supervisor = Supervisor(public, start, drain=drain, phase_of=vllm.phase_of)
        await supervisor.run()
        return supervisor.exit_code

    code = asyncio.run(supervise())
    if code:
        raise click.exceptions.Exit(code)


def _url(host: str, public: socket) -> str:
    return f"http://{f'[{host}]' if ':' in host else host}:{public.getsockname()[1]}"


def _largest_rank(folders: list[str]) -> int:
    """The largest rank that a config under these folders names, 16 at least (vLLM's own default)."""
    from lorakit.adapters.config import read_config
    from lorakit.checkpoints.runs import find_candidates
    from lorakit.errors import LorakitError

    rank = 16
    for folder in folders:
        for candidate in find_candidates(Path(folder)):
            try:
                config = read_config(candidate.folder)
            except LorakitError:
                continue
            rank = max(rank, config.rank, *config.rank_pattern.values(), 0)
    return rank
