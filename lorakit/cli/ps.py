"""`lorakit ps`."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from lorakit.cli.shared import json_option, note, print_json, server_at, url_option
from lorakit.cli.tables import percent, print_table, printable, rich_table
from lorakit.errors import LorakitError, UsageError

if TYPE_CHECKING:
    from lorakit.server.client import Client

HEAD = ("NAME", "REVISION", "STATE", "ALIASES", "EVAL LOSS", "REQUESTS", "IN FLIGHT", "WHERE")
COMPARED = (
    "ALIAS", "REVISION", "SHARE", "REQUESTS", "ERRORS", "MEDIAN", "95%", "FIRST BYTE", "TOKENS", "EQUAL", "ALIKE"
)  # fmt: skip
REASONS = 10
EVERY = 1.0  # seconds between two looks


@click.command("ps")
@click.option("--all", "every", is_flag=True, help="Also the revisions that are only in the store, without an alias.")
@click.option("--watch", is_flag=True, help="Stay, and show what changes, until Ctrl+C.")
@click.option(
    "--compare",
    metavar="[NAME]",
    is_flag=False,
    flag_value="",
    help="How the revisions that share a name answer, or of late answered for it, side by side.",
)
@url_option
@json_option
def command(every: bool, watch: bool, compare: str | None, url: str, as_json: bool) -> None:
    """Say what a running server serves: each name's revisions, their state, aliases and requests, and where they are.

    WHERE is `slot` for what answers now, `memory` for what is in the engine and idle, `store` for what is loaded when a
    request asks for it. Why something is not served is said on stderr. Behind an alias that several revisions share
    stands which share of its requests each has.

    --compare shows seconds until the end of an answer, their median and what 95% stay below, and until its first byte
    at the median; tokens at the mean; and of a shadow, how often it said the same as the client was told (EQUAL), and
    how far the two begin alike (ALIKE).

    \b
    lorakit ps
    lorakit ps --watch
    lorakit ps --compare sql
    lorakit ps --json --url http://10.0.0.7:8000
    """
    server = server_at(url)
    if compare is not None:
        if watch or every:
            raise UsageError("--compare goes with neither --watch nor --all")
        _compare(server, compare, as_json=as_json)
    elif not watch:
        _show(server.served(), every, as_json)
    elif as_json:
        raise UsageError("--watch shows a table: for a program there is GET /v1/events")
    elif sys.stdout.isatty():
        _stay(server, every)
    else:
        for seen in changes(server):
            _show(seen, every, as_json)
            sys.stdout.flush()


def _show(served: list[dict[str, Any]], every: bool, as_json: bool) -> None:
    if as_json:
        print_json(served)
    elif served:
        print_table(HEAD, rows_of(served, every=every))
        _say_why(served)
    else:
        note("no adapter is served yet")


def rows_of(served: Sequence[dict[str, Any]], *, every: bool = False) -> list[tuple[str, ...]]:
    """One for each revision that an alias means, that is in the engine, or that is not served, the newest last; and for
    each mix."""
    rows = []
    for named in served:
        if named["object"] == "mix":
            selector = (named["revision"] or "").partition("@")[2]
            rows.append(_row(named["name"] or named["mix"], {**named, "revision": selector, "aliases": ()}))
            continue
        for one in named["revisions"]:
            shown = {**one, "aliases": _aliases(named["splits"], one)}
            if every or shown["aliases"] or one["state"] != "ready" or one["residency"] != "store":
                rows.append(_row(named["name"], shown))
    return rows


def _aliases(splits: Mapping[str, Any], one: Mapping[str, Any]) -> list[str]:
    """Those of a revision, with its share where it is not all."""
    parts = {
        alias: [percent(each["share"]) for each in split["shares"] if each["revision"] == one["id"]]
        or ["shadow" for revision in split["shadow"] if revision == one["id"]]
        for alias, split in splits.items()
    }
    plain = [alias for alias in one["aliases"] if alias not in parts]
    return [f"{alias} {part}" for alias, found in parts.items() for part in found] + plain


def _row(name: str, one: dict[str, Any]) -> tuple[str, ...]:
    loss = one.get("eval_loss")
    return (
        name, one["revision"] or "-", one["state"], ", ".join(one["aliases"]) or "-",
        "-" if loss is None else f"{loss:.4g}", str(one["requests"]), str(one["in_flight"]), one["residency"] or "-",
    )  # fmt: skip


def _say_why(served: Sequence[dict[str, Any]]) -> None:
    reasons = []
    for named in served:
        for one in named.get("revisions", [named]):
            shown = f"{named['name']}@{one['revision']}" if "revisions" in named else named["name"] or named["mix"]
            reasons += [f"{shown} is {one['state']}: {one['reason']}"] if one["reason"] else []
            reasons += [f"{shown} is passed over: {one['passed_over']}"] if one.get("passed_over") else []
    for reason in reasons[:REASONS]:
        note(reason)
    if len(reasons) > REASONS:
        note(f"and {len(reasons) - REASONS} more: --json has every reason")


def _compare(server: Client, name: str, *, as_json: bool) -> None:
    names = [name] if name else [one["name"] for one in server.served() if one["object"] == "adapter"]
    found = [server.comparison(each) for each in names]
    rows = [_compared(row) for each in found for row in each["revisions"]]
    if as_json:
        print_json(found[0] if name else found)
    elif rows:
        print_table(COMPARED, rows)
    else:
        note(f"nothing has answered for '{name}' yet" if name else "nothing has answered for a name yet")


def _compared(row: Mapping[str, Any]) -> tuple[str, ...]:
    seconds, agreement = row["seconds"], row["agreement"] or {}
    share = "shadow" if row["shadow"] else _or_dash(row["share"], percent)
    return (
        ", ".join(row["aliases"]), row["revision"], share, str(row["requests"]), str(row["errors"]),
        *(_or_dash(value, "{:.3f}".format) for value in (seconds["p50"], seconds["p95"], row["first_byte"]["p50"])),
        _or_dash(row["generated"]["mean"], "{:.1f}".format),
        *(_or_dash(agreement.get(key), percent) for key in ("equal", "prefix")),
    )  # fmt: skip


def _or_dash(value: float | None, shown: Callable[[float], str]) -> str:
    return "-" if value is None else shown(value)


def changes(server: Client, pause: float = EVERY) -> Iterator[list[dict[str, Any]]]:
    """What is served, at first and whenever it has changed, for ever; a server that is away is waited for.

    Raises:
        LorakitError: it does not answer at the first time.
    """
    seen = server.served()
    yield seen
    trouble = ""
    while True:
        time.sleep(pause)
        try:
            now, trouble = server.served(), ""
        except LorakitError as error:
            if str(error) != trouble:
                trouble = str(error)
                note(trouble)
            continue
        if now != seen:
            seen = now
            yield seen


def _stay(server: Client, every: bool) -> None:
    from rich.console import Group
    from rich.live import Live
    from rich.text import Text

    def looks() -> Iterator[Group]:
        while True:
            try:
                yield Group(rich_table(HEAD, rows_of(server.served(), every=every)))
            except LorakitError as error:
                yield Group(Text(printable(str(error))))
            time.sleep(EVERY)

    server.served()  # one that is not there is an error; one that goes away later is waited for
    with Live(auto_refresh=False) as live:
        for look in looks():
            live.update(look, refresh=True)
