"""`lorakit alias`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from math import fsum
from typing import TYPE_CHECKING, Any

import click

from lorakit.cli.shared import dry_run_option, json_option, note, print_json, server_at, url_option
from lorakit.cli.tables import percent
from lorakit.errors import NotFound, UsageError
from lorakit.store.splits import are_whole

if TYPE_CHECKING:
    from lorakit.server.client import Client

_SHARE = re.compile(r"(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)%?")


@click.command("alias")
@click.argument("alias", metavar="NAME[@ALIAS]")
@click.argument("revisions", metavar="REV[:SHARE]", nargs=-1, required=True)
@click.option("--shadow", "shadows", multiple=True, metavar="REV", help="Also answers, for nobody: to be compared.")
@click.option("--seed", type=click.IntRange(min=0), help="Another one has other users meet each revision.")
@url_option
@dry_run_option
@json_option
def command(
    alias: str, revisions: tuple[str, ...], shadows: tuple[str, ...], seed: int | None, url: str, dry_run: bool,
    as_json: bool,
) -> None:  # fmt: skip
    """Have NAME, or NAME@ALIAS, mean the revision REV from the next request on, or several, each for its share.

    REV is whatever names one: `step-500`, a digest, `best`, another alias. NAME then stays there; `latest` lets it
    follow its run again. Prints the revision, or each with its share.

    A share is `5%` or `0.05`; one REV may go without, and gets the rest. The same user, or key, meets the same revision
    each time. One whose answers fail is taken out by itself, and its share goes to the one with the largest. How they
    compare says `lorakit ps --compare`. To promote one, name it alone.

    \b
    lorakit alias sql step-500
    lorakit alias sql@prod best
    lorakit alias sql latest
    lorakit alias sql step-600:5% step-500
    lorakit alias sql step-500 --shadow step-600
    """
    name, separator, own = alias.partition("@")
    if not name or (separator and not own):
        raise UsageError(f"'{alias}' has to be NAME or NAME@ALIAS")
    own = name if own in ("", "default") else own
    shares = shares_in(revisions)
    server = server_at(url)
    if dry_run:
        _say_plan(server, alias, name, shares, shadows, as_json=as_json)
        return
    is_plain = len(shares) == 1 and not shadows
    told = server.point(name, own, shares[0][0]) if is_plain else server.split(name, own, shares, shadows, seed)
    if as_json:
        print_json(told)
    elif is_plain:
        print(told["aliases"][own])
    else:
        for line in split_lines(told["splits"][own]):
            print(line)


def shares_in(revisions: Sequence[str]) -> list[tuple[str, float]]:
    """Each REV with its share of 1.

    Raises:
        UsageError: one is no share, or they are not 1 together.
    """
    found = [_taken_apart(revision) for revision in revisions]
    names = [name for name, _ in found]
    if twice := {name for name in names if names.count(name) > 1}:
        raise UsageError(f"'{min(twice)}' is named twice: give each REV one share")
    given = [share for _, share in found if share is not None]
    if len(found) - len(given) > 1:
        raise UsageError("more than one REV has no share: write REV:5%, or REV:0.05, and leave it out once at most")
    total = fsum(given)
    if len(given) < len(found) and total < 1:
        return [(name, 1 - total if share is None else share) for name, share in found]
    if len(given) < len(found) or not are_whole(given):
        raise UsageError(f"the shares are {total:.4%} together, and have to be 100%: a REV without one gets the rest")
    return [(name, share) for name, share in found if share is not None]


def _taken_apart(revision: str) -> tuple[str, float | None]:
    name, separator, said = revision.rpartition(":")
    if not separator:
        return revision, None
    share = float(said.removesuffix("%")) / (100 if said.endswith("%") else 1) if _SHARE.fullmatch(said) else 0.0
    if not name or not 0 < share <= 1:
        raise UsageError(f"'{revision}': write REV:5%, or REV:0.05, with a share above 0 and up to 100%")
    return name, share


def split_lines(split: dict[str, Any]) -> list[str]:
    """Each revision with its share, then the shadows."""
    lines = [f"{one['revision']} {percent(one['share'])}" for one in split["shares"]]
    return lines + [f"{revision} shadow" for revision in split["shadow"]]


def _say_plan(
    server: Client, alias: str, name: str, shares: Sequence[tuple[str, float]], shadows: Sequence[str], *, as_json: bool
) -> None:
    def meant(revision: str) -> str:
        return server.meaning(f"{name}@{revision.removeprefix(f'{name}@')}")

    before = _meaning(server, alias)
    answering = [{"revision": meant(revision), "share": share} for revision, share in shares]
    is_plain = len(shares) == 1 and not shadows
    after = {"shares": answering, "shadow": [meant(revision) for revision in shadows]}
    would = answering[0]["revision"] if is_plain else ", ".join(split_lines(after))
    note(f"{alias} {f'means {before}' if before else 'means nothing yet'}, and would mean {would}")
    if as_json:
        print_json({"dry_run": True, "alias": alias, "from": before, "to": would if is_plain else after})


def _meaning(server: Client, alias: str) -> str | None:
    try:
        return server.meaning(alias)
    except NotFound:
        return None
