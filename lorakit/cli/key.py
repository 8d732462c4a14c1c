"""`lorakit key`."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lorakit.cli.shared import count, dry_run_option, json_option, note, print_json
from lorakit.cli.tables import print_table
from lorakit.errors import NotFound, UsageError

if TYPE_CHECKING:
    from lorakit.store.keys import Allowance, Key

HEAD = ("ID", "NAME", "ADAPTERS", "ADMIN", "RATE", "TOKENS", "CREATED", "USED")


@click.group("key")
def command() -> None:
    """Make, list and revoke the API keys of a server: who may call which adapters, and how much.

    They are kept, as digests, in the store that the server uses, and count on a running server within a second. The
    first key turns authentication on; from then on nobody comes in without one, also when it is revoked.

    \b
    lorakit key create --adapters 'sql*'
    lorakit key ls
    lorakit key revoke 3fa9c1d2
    """


def home_option(function: Callable[..., Any]) -> Callable[..., Any]:
    return click.option("--home", type=click.Path(file_okay=False), help="The server's store. Default: $LORAKIT_HOME.")(
        function
    )


@command.command("create")
@click.option("--adapters", multiple=True, metavar="PATTERN",
              help="Names that it may call, with * for anything: 'sql*'; several with commas, or each with a flag of "
              "its own. Default with --admin: all.")  # fmt: skip
@click.option("--admin", is_flag=True, help="It may also change what is served under these names; with all of them, "
              "all that there is.")  # fmt: skip
@click.option("--base/--no-base", default=True, show_default=True, help="Whether it may call the base by itself.")
@click.option("--rate", metavar="N/TIME", help="Requests that each server takes of it: 10/s, 600/min, 5000/h.")
@click.option("--tokens", metavar="N/day", help="Tokens, of prompts and answers, that it may use a day: 500k/day, "
              "1M/day.")  # fmt: skip
@click.option("--name", default="", metavar="WORD", help="To know it by, in the list.")
@home_option
@dry_run_option
@json_option
def create(
    adapters: tuple[str, ...], admin: bool, base: bool, rate: str | None, tokens: str | None, name: str,
    home: str | None, dry_run: bool, as_json: bool,
) -> None:  # fmt: skip
    """Make a key, and print it, and nothing else: it is shown this once.

    A key sees and calls the adapters whose names fit, under all their aliases and revisions, and mixes of these alone;
    the others do not exist for it.

    \b
    lorakit key create --adapters 'sql*,chat' --rate 10/s --tokens 1M/day --name team-a
    lorakit key create --admin --json
    """
    from lorakit.store.keys import EVERY, Allowance, KeyStore, checked_patterns, parse_rate

    patterns = checked_patterns(adapters) or ((EVERY,) if admin else ())
    if not patterns:
        raise UsageError("say which adapters it is for: --adapters 'sql*', or --adapters '*' for all of them")
    if len(name) > 200:
        raise UsageError("--name may have 200 letters")
    allowance = Allowance(patterns, admin, base, parse_rate(rate) if rate else None, _tokens(tokens))
    said = _in_words(allowance)
    if dry_run:
        note(f"a key would be made: {said}")
        if as_json:
            print_json({"dry_run": True, "key": None, "name": name, **_as_dict(allowance)})
        return
    store = KeyStore(_home(home))
    try:
        text, key = store.create(allowance, name)
    finally:
        store.close()
    note(f"key {key.id}: {said}; it is shown this once, and ends with: lorakit key revoke {key.id}")
    if as_json:
        print_json({"key": text, "id": key.id, "name": name, **_as_dict(allowance)})
    else:
        print(text)


@command.command("ls")
@click.option("--all", "every", is_flag=True, help="Also those that were revoked.")
@home_option
@json_option
def ls(every: bool, home: str | None, as_json: bool) -> None:
    """List the keys, never what they are; USED is when a server saw one last, by a few seconds.

    \b
    lorakit key ls
    lorakit key ls --all --json
    """
    from lorakit.store.database import is_store
    from lorakit.store.keys import KeyStore

    place, keys, spent = _home(home), list["Key"](), dict[str, int]()
    if is_store(place):
        store = KeyStore(place)
        try:
            keys, spent = store.all(), store.tokens_on(time.strftime("%Y-%m-%d", time.gmtime()))
        finally:
            store.close()
    shown = [key for key in keys if every or key.revoked is None]
    if as_json:
        print_json([_row(key, spent) for key in shown])
    elif shown:
        print_table(HEAD, [_cells(key) for key in shown])
    elif keys:
        note("every key is revoked: only LORAKIT_API_KEY, where a server has one, lets anybody in")
    else:
        note("there is no key, so whoever reaches a server of this store may do all: lorakit key create makes one")


@command.command("revoke")
@click.argument("id", metavar="ID")
@home_option
@dry_run_option
@json_option
def revoke(id: str, home: str | None, dry_run: bool, as_json: bool) -> None:
    """Let a key count no more, from within a second on, and for good. What it asked before is answered.

    \b
    lorakit key revoke 3fa9c1d2
    """
    from lorakit.store.database import is_store
    from lorakit.store.keys import KeyStore

    place = _home(home)
    if not is_store(place):
        raise NotFound(f"there is no key '{id}', as there is no store at '{place}': name it with --home")
    store = KeyStore(place)
    try:
        key = store.living(id) if dry_run else store.revoke(id)
    finally:
        store.close()
    note(f"key {key.id} ({_in_words(key.allowance)}) {'would be' if dry_run else 'is'} revoked")
    if as_json:
        print_json({"dry_run": dry_run, **_row(key, {})})


def _home(given: str | None) -> Path:
    from lorakit.store.database import default_home

    return Path(given).absolute() if given else default_home()


def _tokens(said: str | None) -> int:
    """Raises UsageError for what is no number of tokens a day."""
    if said is None:
        return 0
    number, _, day = said.partition("/")
    try:
        found = count(number)
    except UsageError:
        found = None
    if found is None or day != "day":
        raise UsageError(f"--tokens '{said}': write how many a day, as in 500k/day or 1M/day")
    return found


def _in_words(allowance: Allowance) -> str:
    """As a person would say it."""
    said = [f"adapters {', '.join(allowance.adapters)}"]
    said += ["and the base"] if allowance.base else ["not the base"]
    said += ["admin"] if allowance.admin else []
    said += [f"{allowance.rate} requests"] if allowance.rate else []
    said += [f"{allowance.tokens} tokens a day"] if allowance.tokens else []
    return ", ".join(said)


def _as_dict(allowance: Allowance) -> dict[str, Any]:
    return {
        "adapters": list(allowance.adapters), "admin": allowance.admin, "base": allowance.base,
        "rate": str(allowance.rate) if allowance.rate else None, "tokens_per_day": allowance.tokens or None,
    }  # fmt: skip


def _row(key: Key, spent: Mapping[str, int]) -> dict[str, Any]:
    times = {"created": key.created, "used": key.used, "revoked": key.revoked}
    return {"id": key.id, "name": key.name, **_as_dict(key.allowance), "tokens_today": spent.get(key.id, 0), **times}


def _cells(key: Key) -> tuple[str, ...]:
    allowance = key.allowance
    return (
        key.id, key.name or "-", ", ".join(allowance.adapters), "yes" if allowance.admin else "-",
        str(allowance.rate or "-"), f"{allowance.tokens}/day" if allowance.tokens else "-", _when(key.created),
        "revoked" if key.revoked is not None else _when(key.used) if key.used else "never",
    )  # fmt: skip


def _when(at: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(at))
