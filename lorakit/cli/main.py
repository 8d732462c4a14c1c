"""`lorakit`: finds the verb, turns errors into exit codes."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any, NoReturn

import click

from lorakit import __version__
from lorakit.errors import LorakitError

COMPLETING = "_LORAKIT_COMPLETE"  # how a shell asks what may stand behind TAB

# One line each, so that `lorakit --help` imports no verb.
VERBS = {
    "merge": "Merge adapters into their base model, streamed and exact.",
    "verify": "Merge again and compare: is a merged model what its sources give?",
    "unmerge": "Give the base of a merged model back, bit for bit.",
    "mix": "Mix adapters into one, exactly, without the base.",
    "methods": "List the methods of mixing, and what they are good for.",
    "shrink": "Give an adapter a smaller rank, and say what that lost.",
    "compare": "Say how adapters lie to one another, before they are mixed.",
    "diff": "Say what changed from one checkpoint to the next, tensor by tensor, and of adapters delta by delta.",
    "show": "Say all that is known of a checkpoint or a run, and what it was made of.",
    "extract": "Write what a full fine-tune changed as an adapter of its base.",
    "ls": "List checkpoints with step, losses, base, size and state.",
    "latest": "Print the path of a run's newest finished checkpoint.",
    "best": "Print the path of a run's best finished checkpoint.",
    "prune": "Remove the checkpoints of a run that nothing keeps, and say why.",
    "convert": "Write any trainer's checkpoint as what vLLM loads, and an adapter as one that it serves right.",
    "check": "Say whether vLLM would load it, and be right, with the reasons.",
    "fetch": "Fetch a checkpoint from a URL, the Hub, a bucket or the store, and say what it is.",
    "export": "Copy a checkpoint to a folder, an archive, a bucket or the Hub, with checksums.",
    "pull": "Fetch a repository of the Hub.",
    "push": "Put a checkpoint on the Hub, with a model card.",
    "rm": "Move checkpoints to the trash.",
    "undelete": "Take checkpoints out of the trash again.",
    "store": "Add to the store, verify it, clear it up, or say where it is.",
    "save": "Ask the run that is training to save now.",
    "capture": "Run a trainer, and keep every checkpoint that it writes.",
    "serve": "Serve a base and its adapters from one vLLM, each new checkpoint as it appears.",
    "sync": "Keep the adapters of a vLLM in step, for clients that ask it themselves.",
    "config": "Say what serve would be told, by flags, variables and a file, and which of them said it.",
    "key": "Make, list and revoke the API keys of a server: who may call which adapters.",
    "ps": "Say what a running server serves, where each revision is, and how often it was asked for.",
    "load": "Have a running server serve an adapter under a name.",
    "unload": "Have a running server forget a name and its revisions.",
    "rollback": "Have a name mean what it meant before.",
    "alias": "Have a name, or an alias of it, mean a revision.",
    "doctor": "Say what this machine can and cannot do, why, and what to do about it.",
    "completion": "Print what has a shell complete verbs, flags and names.",
}


class Verbs(click.Group):
    """Loads `lorakit.cli.<verb>` when it is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in VERBS:
            return None
        command: click.Command = import_module(f"lorakit.cli.{name}").command
        return command

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        from difflib import get_close_matches

        name = args[0]
        if not name.startswith("-") and name not in VERBS:
            near = get_close_matches(name, VERBS, n=1)
            hint = f"; did you mean '{near[0]}'?" if near else "; `lorakit --help` lists what there is"
            ctx.fail(f"no such command '{name}'{hint}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(VERBS.items()))


@click.group(cls=Verbs, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="lorakit")
def cli() -> None:
    """Get LoRA checkpoints used: merged, mixed and served.

    \b
    lorakit merge runs/sql/checkpoint-500 --out merged
    lorakit mix runs/sql/checkpoint-500=0.7 runs/chat=0.3 --out mixed
    lorakit serve BASE --watch runs
    """


def main(arguments: Sequence[str] | None = None, *, command: click.Command = cli, called: str = "lorakit") -> NoReturn:
    """Run the command line and exit: 0 done, 1 failed, 2 usage, 3 not found, 4 refused, 5 conflict, 130 interrupted.
    `called` is what a person typed to come here."""
    if COMPLETING in os.environ:
        from lorakit.cli.completing import answer

        answer(cli)
    given = list(sys.argv[1:] if arguments is None else arguments)
    as_json = "--json" in (given[: given.index("--")] if "--" in given else given)
    signal.signal(signal.SIGTERM, _interrupted)
    _show_notes()
    try:
        code = command.main(args=given, prog_name=called, standalone_mode=False)
        sys.stdout.flush()
    except LorakitError as error:
        code = _report(type(error).__name__, str(error), error.code, as_json)
    except click.UsageError as error:
        code = _report_usage(error, as_json)
    except click.ClickException as error:
        code = _report(type(error).__name__, error.format_message(), error.exit_code, as_json)
    except (click.Abort, KeyboardInterrupt):
        code = _report("Interrupted", "interrupted", 130, as_json)
    except ModuleNotFoundError as error:
        code = _report("MissingPackage", _missing(error), 1, as_json)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except OSError as error:
        code = _report(type(error).__name__, _of_system(error), 1, as_json)
    sys.exit(code if isinstance(code, int) else 0)


def script(called: str = "lorakit") -> NoReturn:
    """`main` as a program of its own, which ends at once: to take torch's modules down again, one by one, takes Python
    a quarter of a second.
    """
    try:
        main(called=called)
    except SystemExit as end:
        if "torch" not in sys.modules or not isinstance(end.code, int):
            raise
        code = end.code
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


class _Notes(logging.Handler):
    """What the library says of what it chose, on stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        from lorakit.cli.shared import note

        note(f"note: {record.getMessage()}")


def _show_notes() -> None:
    log = logging.getLogger("lorakit.checkpoints")
    log.setLevel(logging.INFO)
    if not any(isinstance(handler, _Notes) for handler in log.handlers):
        log.addHandler(_Notes())


def _interrupted(*_: object) -> NoReturn:
    raise KeyboardInterrupt


def _report(kind: str, message: str, code: int, as_json: bool) -> int:
    if as_json:
        print(json.dumps({"error": {"type": kind, "message": message, "code": code}}))
    else:
        from lorakit.cli.tables import printable

        print("\n".join(printable(line) for line in f"error: {message}".split("\n")), file=sys.stderr)
    return code


def _of_system(error: OSError) -> str:
    if isinstance(error, PermissionError) and error.filename is not None:
        return f"no permission for '{error.filename}': run as the user that it belongs to, or chmod it"
    return str(error)


def _missing(error: ModuleNotFoundError) -> str:
    package = (error.name or "").partition(".")[0]
    if package in ("aiohttp", "fastapi", "starlette", "uvicorn", "watchfiles", "pydantic"):
        return f"{package} is not installed, which serving needs: pip install 'lorakit[serve]'"
    return f"{package} is not installed, which this needs: pip install {package}"


def _report_usage(error: click.UsageError, as_json: bool) -> int:
    message = error.format_message()
    if error.ctx and not as_json:
        print(error.ctx.get_usage(), file=sys.stderr)
        message += f"\n\nTry '{error.ctx.command_path} --help'."
    return _report("UsageError", message, 2, as_json)
