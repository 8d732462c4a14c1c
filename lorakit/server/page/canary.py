"""A name that means several revisions by share: the form that sets it, and how they answer side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from lorakit.server.page.markup import (
    DASH,
    FOUND_BY_ITSELF,
    NOTHING,
    after_at,
    button,
    card,
    code,
    count,
    joined,
    options,
    pill,
    seconds,
    share,
    short,
    table,
)

USUAL = 10  # percent of a canary that is set anew
MOST = 4  # revisions in the form
_HEADS = ("Revision", "Share", "Requests", "Errors", "p50", "p95", "First byte", "Tokens", "Agrees", "")


def canary_card(view: Mapping[str, Any], *, admin: bool) -> Markup:
    """What the split is, and sliders to change it."""
    splits = view.get("splits") or {}
    shown = joined(_split(name, split, admin=admin) for name, split in splits.items())
    form = _form(view, splits) if admin else NOTHING
    if not (shown or form):
        return card("Canary", Markup('<p class="quiet">No name here is split between revisions.</p>'))
    return card(
        "Canary", Markup('<div class="inner stack">{}</div>').format(shown) if shown else NOTHING, form, plain=True
    )


def _split(name: str, split: Mapping[str, Any], *, admin: bool) -> Markup:
    """A bar of its shares, and who they are of."""
    shares = sorted(split["shares"], key=lambda one: one["share"])[::-1]  # of equals the last is the main one
    bar = joined(Markup('<i style="width:{}%"></i>').format(f"{one['share'] * 100:.4g}") for one in shares)
    told = joined(
        (
            Markup("<span>{} {}</span>").format(pill(share(one["share"]), "accent"), code(short(one["revision"])))
            for one in shares
        ),
        " ",
    )
    shadows = joined(
        Markup("<span>{} {}</span>").format(pill("shadow", ""), code(short(one))) for one in split.get("shadow", [])
    )
    end = NOTHING
    if admin:
        main = after_at(shares[0]["revision"])
        end = button(f"End: all to {short(shares[0]['revision'])}", "promote", "small", revision=main, alias=name)
    return Markup(
        '<div class="stack"><div class="row"><strong>{}</strong>{}{}<span class="end">{}</span></div>'
        '<div class="bar" aria-hidden="true">{}</div></div>'
    ).format(name, told, shadows, end, bar)


def _form(view: Mapping[str, Any], splits: Mapping[str, Any]) -> Markup:
    names = _candidates(view, splits)
    if len(names) < 2:
        return Markup('<p class="inner quiet">A canary takes two revisions that are ready.</p>')
    default = next(iter(splits), view["name"])
    rows = _rows(names, splits.get(default), view)
    slides = joined(
        Markup(
            '<div class="slide"><select name="revision" aria-label="Revision {n}" data-key="share-of-{n}">{options}'
            "</select>"
            '<input type="range" name="share" min="0" max="100" value="{percent}" aria-label="Share {n} in percent" '
            'data-key="share-{n}"><output>{percent} %</output></div>'
        ).format(n=number, options=options(names.items(), name), percent=percent)
        for number, (name, percent) in enumerate(rows, 1)
    )
    aliases = [alias for alias in view["aliases"] if alias not in FOUND_BY_ITSELF]
    return Markup(
        '<form class="inner stack" data-act="split">'
        '<div class="fields"><div><label for="split-alias">Name</label>'
        '<select id="split-alias" name="alias" data-key="split-alias">{}</select></div>'
        '<div><label for="shadow">Shadow, whose answers nobody gets</label>'
        '<select id="shadow" name="shadow" data-key="shadow"><option value="">none</option>{}</select></div></div>'
        "<fieldset data-shares><legend>Shares</legend>{}</fieldset>"
        '<div class="row"><button class="main" data-key="split">Split</button>'
        '<span class="quiet">One user always meets the same revision.</span></div></form>'
    ).format(
        options(((one, one) for one in aliases), default), options(names.items(), _shadow(splits.get(default))), slides
    )


def _candidates(view: Mapping[str, Any], splits: Mapping[str, Any]) -> dict[str, str]:
    """Those of this page of the table, and whatever has a name now, however old it is."""
    found = [one["id"] for one in reversed(view["revisions"]) if one["id"] and one["state"] != "refused"]
    found += view["aliases"].values()
    found += [one["revision"] for split in splits.values() for one in split["shares"]]
    found += [one for split in splits.values() for one in split.get("shadow", [])]
    return {after_at(name): short(name) for name in found}


def _rows(names: Mapping[str, str], split: Mapping[str, Any] | None, view: Mapping[str, Any]) -> list[tuple[str, int]]:
    """The split as it is; else the newest against what answers now."""
    if split and len(split["shares"]) > 1:
        return [(after_at(one["revision"]), round(one["share"] * 100)) for one in split["shares"][:MOST]]
    now = after_at(view["revision"]) if view["revision"] else next(iter(names))
    other = next((name for name in names if name != now), now)
    return [(other, USUAL), (now, 100 - USUAL)]


def _shadow(split: Mapping[str, Any] | None) -> str:
    return after_at(split["shadow"][0]) if split and split.get("shadow") else ""


def shares_of(revisions: Sequence[str], percents: Sequence[str]) -> list[dict[str, Any]]:
    """What a form says, as shares that add up to one; those of nothing are left out, those of one revision added."""
    sums: dict[str, float] = {}
    for revision, percent in zip(revisions, percents, strict=False):
        try:
            value = float(percent)
        except ValueError:
            continue
        if revision and 0 < value <= 100:
            sums[revision] = sums.get(revision, 0.0) + value
    total = sum(sums.values())
    return [{"revision": name, "share": round(value / total, 6)} for name, value in sums.items()]


def comparison_card(revisions: Sequence[Mapping[str, Any]], *, admin: bool) -> Markup:
    """`/v1/adapters/{name}/comparison`, a row a revision; nothing of one that stands alone."""
    rows = [_row(one, admin=admin) for one in revisions]
    return (
        card("Side by side", table("Side by side", _HEADS, rows, numbers=range(1, 9), acts=admin), plain=True)
        if rows[1:]
        else NOTHING
    )


def _row(one: Mapping[str, Any], *, admin: bool) -> Sequence[Markup | str]:
    took, first, made = one.get("seconds") or {}, one.get("first_byte") or {}, one.get("generated") or {}
    agreement = one.get("agreement")
    act = NOTHING
    if admin and not one.get("shadow"):
        revision = one["revision"]
        for_alias = {"alias": one["aliases"][0]} if one.get("aliases") else {}
        act = button("Promote", "promote", "small", revision=after_at(revision), **for_alias)
    errors = f"{count(one.get('errors'))}, {share(one.get('error_rate'))}" if one.get("requests") else DASH
    return (
        code(short(one["revision"])),
        pill("shadow", "") if one.get("shadow") else share(one.get("share")),
        count(one.get("requests")),
        errors,
        seconds(took.get("p50")),
        seconds(took.get("p95")),
        seconds(first.get("p50")),
        count(made.get("mean")),
        share(agreement["equal"]) if agreement else DASH,
        act,
    )
