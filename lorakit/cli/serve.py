"""`lorakit serve`: a base and its adapters from one vLLM."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import click

from lorakit.cli.configured import BehindDashes, Configured, Described, Words, config_option
from lorakit.cli.following import following_options, largest_rank, refuse_unfollowable, whole_paths
from lorakit.cli.ray_option import FLAG as RAY
from lorakit.cli.ray_option import WithRay, where
from lorakit.cli.shared import print_json
from lorakit.errors import UsageError

if TYPE_CHECKING:
    from lorakit.server.settings import Settings


def _usable_store(context: click.Context, parameter: click.Parameter, address: str) -> str:
    """Raises UsageError where it is no address, before all else."""
    if address and not context.resilient_parsing:
        from lorakit.store.remote.address import parse_store

        parse_store(address)
    return address


class _Serve(WithRay, Configured):
    """With `--ray`, with a file, and with what stands behind `--`."""


@click.command(name="serve", cls=_Serve)
@click.argument("base", cls=Described, required=False, envvar="LORAKIT_BASE", key="base",
                meaning="The model to serve: a folder or a hub id.")  # fmt: skip
@following_options
@click.option("--host", default="127.0.0.1", show_default=True, help="The address to listen on; 0.0.0.0 for all.")
@click.option("--port", default=8000, show_default=True, type=click.IntRange(0, 65535), help="0: any that is free.")
@click.option("--max-loras", default=8, show_default=True, type=click.IntRange(1, 4096),
              help="How many adapters answer at once.")  # fmt: skip
@click.option("--max-cpu-loras", default=0, metavar="N", type=click.IntRange(0),
              help="How many the engine holds in memory, ready to take turns. Default: --max-loras; on a CPU, vLLM "
              "before 0.33 holds no more.")  # fmt: skip
@click.option("--pin", "pins", multiple=True, metavar="NAME", help="Never let what this name means leave the engine.")
@click.option("--load-wait", default=60.0, show_default=True, metavar="SECONDS", type=click.FloatRange(0),
              help="How long a request waits for its adapter, before it is 503.")  # fmt: skip
@click.option("--fair-wait", default=1.0, show_default=True, metavar="SECONDS", type=click.FloatRange(0),
              help="How long others wait before a busy adapter lets them have its place.")  # fmt: skip
@click.option("--max-lora-rank", type=click.IntRange(1), help="Default: the largest rank found, 16 at least.")
@click.option("--root", "roots", multiple=True, metavar="DIR", type=click.Path(),
              help="Adapters may be loaded from here over HTTP.")  # fmt: skip
@click.option("--allow-host", "allow_hosts", multiple=True, metavar="HOST[:PORT]",
              help="Fetch adapters from there, over https, when one asks for that. Default: from nowhere.")  # fmt: skip
@click.option("--allow-source", "allow_sources", multiple=True, metavar="ADDRESS",
              help="Fetch what is under hf://OWNER/ or s3://BUCKET/PATH/ when LoRAX's clients name it.")  # fmt: skip
@click.option("--lorax-arithmetic", is_flag=True,
              help="Merge what LoRAX's clients ask for as LoRAX does, on A and B apart.")  # fmt: skip
@click.option("--max-source", default=16, show_default=True, metavar="GIB", type=click.IntRange(1),
              help="The largest that is fetched so.")  # fmt: skip
@click.option("--source-timeout", default=600.0, show_default=True, metavar="SECONDS", type=click.FloatRange(1),
              help="How long that may take.")  # fmt: skip
@click.option("--api-key-file", metavar="FILE", type=click.Path(dir_okay=False),
              help="A key that may do all, as LORAKIT_API_KEY. `lorakit key create` makes others.")  # fmt: skip
@click.option("--allow-no-key", is_flag=True,
              help="Listen where other machines reach it, though there is no key.")  # fmt: skip
@click.option("--tls-cert", default="", metavar="FILE", type=click.Path(dir_okay=False),
              help="Speak https with this certificate (PEM, with those above it).")  # fmt: skip
@click.option("--tls-key", default="", metavar="FILE", type=click.Path(dir_okay=False), help="The key of --tls-cert.")
@click.option("--home", type=click.Path(file_okay=False), help="The store. Default: $LORAKIT_HOME.")
@click.option("--store", default="", metavar="s3://BUCKET/PREFIX", callback=_usable_store,
              help="Share revisions and aliases with all servers that name the same; --home is then this machine's own "
              "copy. Credentials come from the environment alone.")  # fmt: skip
@click.option("--log-format", type=click.Choice(["text", "json"]), default="text", show_default=True,
              help="Lines to read, or one JSON object each, vLLM's among them.")  # fmt: skip
@click.option("--canary", default=10.0, show_default=True, metavar="SECONDS", type=click.FloatRange(0),
              help="Ask the base for a token as often, to see that the engine answers; 0: never.")  # fmt: skip
@click.option("--hang-limit", default=60.0, show_default=True, metavar="SECONDS", type=click.FloatRange(2),
              help="An engine without a sign of life for so long is started again.")  # fmt: skip
@click.option("--start-limit", default=1800.0, show_default=True, metavar="SECONDS", type=click.FloatRange(1),
              help="So is one that starts, and logs nothing for so long.")  # fmt: skip
@click.option("--max-body", default=256, show_default=True, metavar="MIB", type=click.IntRange(1),
              help="The largest body that a request may have.")  # fmt: skip
@click.option("--max-requests", default=0, metavar="N", type=click.IntRange(0),
              help="Answer so many at once, and 429 to the others; 0: no limit.")  # fmt: skip
@click.option("--max-requests-per-key", default=0, metavar="N", type=click.IntRange(0),
              help="So many of one API key.")  # fmt: skip
@click.option("--max-requests-per-adapter", default=0, metavar="N", type=click.IntRange(0),
              help="So many of one adapter.")  # fmt: skip
@click.option("--request-timeout", default=0.0, metavar="SECONDS", type=click.FloatRange(0),
              help="End an answer that is not complete by then, with 504.")  # fmt: skip
@click.option("--engine", multiple=True, metavar="URL",
              help="Stand in front of a vLLM that runs already, rather than start one; or of several.")  # fmt: skip
@click.option("--replicas", default=1, show_default=True, metavar="N", type=click.IntRange(1, 256),
              help="Start so many engines, one a GPU (or as many as --tensor-parallel-size says); on a CPU they share "
              "its cores.")  # fmt: skip
@click.option(RAY, "ray", metavar="[=ADDRESS]",
              help="Have Ray Serve run them: on the cluster at ADDRESS (HOST:6379) or in RAY_ADDRESS, else on this "
              "machine. All its machines need the same files under the same paths.")  # fmt: skip
@click.option("--max-ongoing-requests", default=256, show_default=True, metavar="N", type=click.IntRange(1),
              help="With --ray: what goes beyond as many in one engine goes to another.")  # fmt: skip
@click.option("--max-mix-error", default=0.1, show_default=True, metavar="SHARE", type=click.FloatRange(0),
              help="What a mix may lose of its norm when it is cut to --max-lora-rank.")  # fmt: skip
@click.option("--mixes-kept", default=64, show_default=True, metavar="N", type=click.IntRange(1),
              help="Mixes without a name that stay in the store.")  # fmt: skip
@click.option("--mixes-size", default="4GiB", show_default=True, metavar="SIZE",
              help="What they may take there together.")  # fmt: skip
@click.option("--mixes-at-once", default=2, show_default=True, metavar="N", type=click.IntRange(1),
              help="Mixes that are made at the same time.")  # fmt: skip
@click.option("--takeover", is_flag=True,
              help="Take the place of the server that runs there, without a failed request.")  # fmt: skip
@config_option
@click.option("--dry-run", is_flag=True, allow_from_autoenv=False,
              help="Print the command that would start vLLM, and start nothing.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, allow_from_autoenv=False, help="Print errors and the plan as JSON.")
@click.argument("arguments", cls=BehindDashes, nargs=-1, type=Words(), envvar="LORAKIT_VLLM",
                metavar="[-- ARGS FOR VLLM]", key="vllm",
                meaning="What vLLM is given besides: {max-model-len: 4096}, or a list of words.")  # fmt: skip
def command(
    base: str | None, watch: tuple[str, ...], adapters: tuple[str, ...], follow: str, host: str, port: int,
    max_loras: int, max_cpu_loras: int, max_lora_rank: int | None, mode: str | None, probe: str, retention: str,
    pins: tuple[str, ...], roots: tuple[str, ...], home: str | None, engine: tuple[str, ...], replicas: int,
    ray: str | None, max_ongoing_requests: int, tls_cert: str, tls_key: str,
    allow_no_key: bool, api_key_file: str | None, mixes_size: str,
    takeover: bool, dry_run: bool, as_json: bool, arguments: tuple[str, ...], **more: Any,
) -> None:  # fmt: skip
    """Serve BASE, a folder or a hub id, and its adapters, each new checkpoint as it appears.

    \b
    lorakit serve models/llama --watch runs
    lorakit serve meta-llama/Llama-3.1-8B --adapter sql=runs/sql --follow best -- --gpu-memory-utilization 0.8
    lorakit serve models/llama --watch runs --follow best --min-delta 0.01 --min-steps 200 --probe prompts.jsonl
    lorakit serve models/llama --replicas 2 --watch runs
    lorakit serve models/llama --ray --replicas 2 --watch runs
    lorakit serve models/llama --engine http://127.0.0.1:8001 --port 8000 --watch runs
    lorakit serve --config serve.yaml

    A request's `model` is the base's name, a run (`sql`), an alias (`sql@best`), a revision (`sql@step-500`) or a mix
    (`mix(sql@best=0.7,chat=0.3)`). What is no flag may be a variable (LORAKIT_MAX_LORAS) or stand in a file (`lorakit
    config example`); `lorakit config show --origin` says what holds.
    """
    from lorakit.checkpoints.amounts import bytes_of
    from lorakit.merge.base import read_base
    from lorakit.server.access.at_start import KEY, key_from_file, refuse_open_door
    from lorakit.server.engines import vllm
    from lorakit.server.settings import from_mapping
    from lorakit.server.supervision.running import run_engine, run_in_front, run_in_front_of, run_replicas

    if engine:
        _refuse_beside_engine(engine, takeover=takeover, replicas=replicas, dry_run=dry_run, arguments=arguments)
    elif base is None:
        raise UsageError("name the BASE that vLLM is to serve, or an --engine that serves one")
    else:
        found = vllm.installed()
        vllm.refuse_own_flags(arguments)
    model = read_base(base) if base is not None else None
    name = base_name(base) if base is not None else ""
    settings = from_mapping(
        {
            **whole_paths(name, adapters, watch=watch, roots=roots, home=home, probe=probe, retention=retention),
            "follow": follow,
            "max_loras": max_loras,
            "mode": mode or "",
            "pins": pins,
            "mix_bytes": bytes_of(mixes_size),
            "tls_cert": str(Path(tls_cert).absolute()) if tls_cert else "",
            "tls_key": str(Path(tls_key).absolute()) if tls_key else "",
            "trust_request_chat_template": "--trust-request-chat-template" in arguments,
            **more,
        }
    )
    _refuse_unusable(settings)
    if api_key_file:
        os.environ[KEY] = key_from_file(Path(api_key_file))  # for the engine's process; no list of processes shows it
    if not allow_no_key:
        refuse_open_door(host, settings.store_home, has_own_key=bool(os.environ.get(KEY)))
    rank = vllm.allowed_rank(max_lora_rank or largest_rank([*settings.watch, *settings.adapters.values()]))
    if engine:
        folder = str(model.folder.resolve()) if model is not None else ""
        at: dict[str, Any] = {"base_path": folder, "max_rank": rank, "host": host, "port": port}
        _end_with(
            run_in_front_of(engine, settings, **at) if len(engine) > 1 else run_in_front(engine[0], settings, **at)
        )
        return
    assert base is not None
    assert model is not None
    folder, offline = str(model.folder.resolve()), Path(base).is_dir() and not settings.asks_hub
    middleware = vllm.ATTENDED if replicas > 1 else vllm.GATEWAY

    def command_on(path: str) -> list[str]:
        return vllm.command(
            found, base=folder, name=name, socket=path, slots=max_loras, rank=rank, memory=max_cpu_loras,
            extra=arguments, middleware=middleware,
        )  # fmt: skip

    def start(path: str) -> tuple[list[str], dict[str, str]]:
        environ = {**os.environ, **settings.as_environment()}
        return command_on(path), vllm.environment(found, environ, offline=offline)

    def start_one(number: int, path: str) -> tuple[list[str], dict[str, str]]:
        environ, gpus = {**os.environ, **settings.as_environment()}, vllm.gpus_of_each(arguments)
        return command_on(path), vllm.replica_environment(
            found, environ, number, replicas, parallel=gpus, offline=offline
        )

    if dry_run:
        line = command_on("PRIVATE-SOCKET")
        if as_json:
            print_json({"command": line, "vllm": found.text, "base": name, "max_lora_rank": rank})
        else:
            print(" ".join(line))
        return
    what = f"vLLM {found.text}, base '{name}', rank up to {rank}"
    if ray is not None:
        from lorakit.server.on_ray.plan import Plan
        from lorakit.server.on_ray.running import run_on_ray

        if takeover or max_cpu_loras:
            raise UsageError(f"{'--takeover' if takeover else '--max-cpu-loras'} can't be had with {RAY}: leave it out")
        whole = os.path.abspath(base) if Path(base).is_dir() else base
        plan = Plan(
            whole, replicas=replicas, max_ongoing_requests=max_ongoing_requests, max_lora_rank=rank, vllm=arguments
        )  # fmt: skip
        _end_with(
            run_on_ray(
                plan,
                settings,
                where=where(ray),
                identity=model.identity,
                host=host,
                port=port,
                what=what,
                allow_no_key=allow_no_key,
            )
        )
        return
    if replicas > 1:
        if takeover:
            raise UsageError("--takeover takes the place of a server with one engine: stop that one, then start this")
        start_one(replicas - 1, "")  # where there are too few GPUs, it is said now
        _end_with(
            run_replicas(
                start_one, replicas, settings, base=model.identity, base_path=folder, max_rank=rank,
                memory=0 if vllm.needs_spare(found.version, found.cpu) else max_cpu_loras, host=host, port=port,
                what=what,
            )
        )  # fmt: skip
        return
    _end_with(run_engine(start, settings, base=model.identity, host=host, port=port, takeover=takeover, what=what))


def _refuse_beside_engine(
    urls: tuple[str, ...], *, takeover: bool, replicas: int, dry_run: bool, arguments: tuple[str, ...]
) -> None:
    """Raises UsageError where something was said that only makes sense for a vLLM that is to be started."""
    for url in urls:
        if not url.startswith(("http://", "https://")):
            raise UsageError(f"--engine '{url}': write its address, http://HOST:PORT")
        if "@" in urlsplit(url).netloc:
            raise UsageError("--engine: an address is shown to many, so it holds no password: set LORAKIT_ENGINE_KEY")
        if [one.rstrip("/") for one in urls].count(url.rstrip("/")) > 1:
            raise UsageError(f"--engine '{url}' is named twice")
    said = {
        "--takeover": takeover, "--replicas": replicas > 1, "--dry-run": dry_run, "arguments for vLLM": arguments
    }  # fmt: skip
    for what, given in said.items():
        if given:
            raise UsageError(f"--engine names a vLLM that runs already, so there is nothing to do for {what}")


def _refuse_unusable(settings: Settings) -> None:
    """Raises NotFound, UsageError where a file can't be read, or what was said can't be; before vLLM is started."""
    refuse_unfollowable(settings)
    if settings.store:
        from lorakit.store.remote.objects import ensure_usable

        ensure_usable(settings.store)
    settings.certificate.ensure_usable()
    if settings.allow_hosts:
        from lorakit.server.access.fetching import parse_host

        for host in settings.allow_hosts:
            parse_host(host)
    for address in settings.allow_sources:
        if not address.startswith(("hf://", "s3://")):
            raise UsageError(f"--allow-source '{address}': write hf://OWNER/, hf://OWNER/NAME or s3://BUCKET/PATH/")
    if 0 < settings.max_loras <= len(settings.pins):
        raise UsageError(
            f"--pin: {len(settings.pins)} names leave no place for another adapter, or for their own next revision, in "
            f"--max-loras {settings.max_loras}: pin fewer, or raise it"
        )


def _end_with(code: int) -> None:
    if code:
        raise click.exceptions.Exit(code)


def base_name(base: str) -> str:
    """The last part of a folder, as it was typed, or of a hub id without its revision."""
    if Path(base).is_dir():
        return os.path.basename(os.path.abspath(base))
    return base.partition("@")[0].rpartition("/")[2]
