"""What a shell offers behind TAB: verbs, flags, choices, paths, and the names that the store or a running server knows.

The way to it is click's own (`_LORAKIT_COMPLETE`). What an argument may be, its metavar says: `ADAPTER`, `PATH|ID`,
`NAME[@ALIAS]`; so a new verb is completed as it is. Nobody who presses TAB shall see an error, or wait: what can't be
said at once is not said.
"""

from __future__ import annotations

import io
import os
import re
import signal
import sys
from collections.abc import Iterable, Mapping
from contextlib import redirect_stderr, suppress
from typing import NoReturn

import click
from click.shell_completion import (
    BashComplete,
    CompletionItem,
    FishComplete,
    ShellComplete,
    ZshComplete,
    _resolve_context,
    _resolve_incomplete,
    split_arg_string,
)

VARIABLE = "_LORAKIT_COMPLETE"
LIMIT = 1.0  # seconds for an answer
SERVER = 0.3  # of them for a running server

# Words of metavars: for names that the store has, and for paths.
STORED = frozenset({"ID", "ADAPTER", "CHECKPOINT", "RUN"})
PATHS = frozenset({"PATH", "DIR", "FILE", "BASE", "TUNED", "DEST", *STORED})
# Whoever answers as a server could else put what it likes on a command line.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:@-]*")
_CHOICE = re.compile(r"(?:^|\|)([a-z_]+)(?=$|\||\[)")

# bash takes words apart at = and @, and replaces what follows the last =, or the last @ with it: it gets no more than
# that back, and the words are read from its line.
_BASH = """\
%(complete_func)s() {
    local kind value path names=
    COMPREPLY=()
    while IFS=, read -r kind value; do
        if [[ $kind == plain ]]; then
            names=yes
            COMPREPLY+=("$value")
        elif [[ -n $kind ]]; then
            while IFS= read -r path; do
                COMPREPLY+=("${path:${value%%%%,*}}")
            done < <(compgen -A "${kind/dir/directory}" -- "${value#*,}")
        fi
    done < <(COMP_WORDS="${COMP_LINE:0:COMP_POINT}" COMP_WORDBREAKS="$COMP_WORDBREAKS" \\
        %(complete_var)s=bash_complete "$1" 2>/dev/null)
    [[ -n $names ]] || compopt -o filenames 2>/dev/null
    return 0
}

complete -o nosort -F %(complete_func)s %(prog_name)s
"""


class _Offering(ShellComplete):
    def get_completions(self, args: list[str], incomplete: str) -> list[CompletionItem]:
        items = offered(self.cli, args, incomplete)
        if incomplete.startswith("-") and "=" in incomplete:  # to a shell, --method=ties is one word
            for item in items:
                if item.type == "plain" and not item.value.startswith("-"):
                    item.value = f"{incomplete.partition('=')[0]}={item.value}"
        return items


class Bash(_Offering, BashComplete):
    source_template = _BASH

    @staticmethod
    def _check_version() -> None:
        """What is printed is for whichever bash reads it."""

    def get_completion_args(self) -> tuple[list[str], str]:
        """From the line up to the cursor."""
        line = os.environ["COMP_WORDS"]
        words = split_arg_string(line)[1:]
        return (words, "") if not words or line[-1:].isspace() else (words[:-1], words[-1])

    def format_completion(self, item: CompletionItem) -> str:
        """Without what stands already: for a name, cut off; for a path, how much it is, as bash finds the rest."""
        typed = behind = re.split(r"\s", os.environ["COMP_WORDS"])[-1]
        if typed[:1] not in ("'", '"'):
            last = max((typed.rfind(letter) for letter in os.environ.get("COMP_WORDBREAKS", "")), default=-1)
            behind = typed[last + (typed[last : last + 1] != "@") :]
        if item.type == "plain":
            return f"plain,{item.value[len(typed) - len(behind) :]}"
        return f"{item.type},{max(0, len(item.value) - len(behind))},{item.value}"


class Zsh(_Offering, ZshComplete):
    pass


class Fish(_Offering, FishComplete):
    pass


SHELLS: Mapping[str, type[ShellComplete]] = {"bash": Bash, "zsh": Zsh, "fish": Fish}


def script_for(shell: str, cli: click.Command) -> str:
    """What a shell has to read, once."""
    return SHELLS[shell](cli, {}, "lorakit", VARIABLE).source()


def answer(cli: click.Command) -> NoReturn:
    """Say what the shell asks for by its variables, and end."""
    signal.signal(signal.SIGALRM, lambda *_: os._exit(0))
    signal.setitimer(signal.ITIMER_REAL, LIMIT)
    shell = SHELLS.get(os.environ[VARIABLE].removesuffix("_complete"))
    with suppress(BaseException), redirect_stderr(io.StringIO()):
        if shell is not None:
            sys.stdout.write(shell(cli, {}, "lorakit", VARIABLE).complete() + "\n")
            sys.stdout.flush()
    os._exit(0)


def offered(cli: click.Command, words: list[str], incomplete: str) -> list[CompletionItem]:
    """What may stand where a command line ends: `words` are those before."""
    context = _resolve_context(cli, {}, "lorakit", words)
    asked, incomplete = _resolve_incomplete(context, words, incomplete)
    items = asked.shell_complete(context, incomplete)
    if items or not isinstance(asked, click.Parameter):
        return items
    metavar = asked.metavar or (asked.type.name if asked.type.name.isupper() else str(asked.name).upper())
    kinds = set(re.findall("[A-Z]+", metavar))
    names = [*_CHOICE.findall(metavar), *_named(asked, kinds, context, incomplete)]
    fitting = (name for name in dict.fromkeys(names) if name.startswith(incomplete) and _NAME.fullmatch(name))
    items = [CompletionItem(name) for name in fitting]
    if not kinds & PATHS:
        return items
    path = incomplete.partition("=")[2] if "=PATH" in metavar else incomplete
    return [*items, CompletionItem(path, type="file")]


def _named(asked: click.Parameter, kinds: set[str], context: click.Context, incomplete: str) -> Iterable[str]:
    """Names that fit, by the words of a metavar."""
    if "METHOD" in kinds:
        from lorakit.mix.methods.registry import METHODS

        return METHODS
    if kinds & STORED and context.command_path.startswith("lorakit key "):
        return _keys()
    if kinds & STORED:
        return _told_apart(_stored(trashed=context.info_name == "undelete"), incomplete)
    if (isinstance(asked, click.Option) and not kinds & {"NAME", "REV"}) or "url" not in context.params:
        return ()
    served = _served(context) if kinds & {"NAME", "REV"} else {}
    if "ALIAS" in kinds:
        return _told_apart({run: filter(_is_alias, selectors) for run, selectors in served.items()}, incomplete)
    # behind an option that waits for its value, no argument was read yet
    alias = context.params.get("alias") or next(iter(context.args), "")
    return served if "NAME" in kinds else served.get(str(alias).partition("@")[0], ())


def _told_apart(known: Mapping[str, Iterable[str]], incomplete: str) -> list[str]:
    """Runs; what is behind their @ where one was typed, or one run alone is left."""
    runs = [run for run in known if f"{run}@".startswith(incomplete) or incomplete.startswith(f"{run}@")]
    if len(runs) > 1 and "@" not in incomplete:
        return runs
    return [name for run in runs for name in (run, *(f"{run}@{selector}" for selector in known[run]))]


def _is_alias(selector: str) -> bool:
    from lorakit.store.names import parse_selector

    return parse_selector(selector).alias is not None


def _stored(*, trashed: bool = False) -> dict[str, list[str]]:
    from lorakit.store.database import default_home
    from lorakit.store.glance import selectors_in

    return selectors_in(default_home(), trashed=trashed)


def _keys() -> list[str]:
    from lorakit.store.database import default_home
    from lorakit.store.glance import keys_in

    return [id for id, _ in keys_in(default_home())]


def _served(context: click.Context) -> dict[str, list[str]]:
    """What the running server serves; where none answers, what the store has."""
    from lorakit.errors import LorakitError
    from lorakit.server.client import Client

    try:
        cards = Client(str(context.params["url"]), os.environ.get("LORAKIT_API_KEY", ""), look=SERVER).models()
        names = [str(card["id"]) for card in cards if card.get("parent")]
    except (LorakitError, LookupError, TypeError, AttributeError):
        return _stored()
    found: dict[str, list[str]] = {}
    for name in names:
        run, _, selector = name.partition("@")
        if not run.startswith("mix(") and run != "mix":
            found.setdefault(run, []).extend([selector] if selector else [])
    return found
