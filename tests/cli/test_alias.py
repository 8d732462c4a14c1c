"""`lorakit alias`: what a name means from the next request on."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorakit.cli.alias import shares_in
from tests.cli.commands import lorakit
from tests.server.running import Running

Capture = pytest.CaptureFixture[str]


def test_a_name_and_an_alias_of_it_mean_what_they_are_told_to(capsys: Capture, server: Running) -> None:
    for alias, revision, step in (
        ("sql", "step-500", 500), ("sql@prod", "latest", 1000), ("sql@prod", "best", 500),
        ("sql", "sql@step-1000", 1000), ("sql@old", "prod", 500),
    ):  # fmt: skip
        ended = lorakit(capsys, "alias", alias, revision)
        assert (ended.code, ended.err) == (0, "")
        assert ended.out.startswith(f"sql@step-{step}-")
        assert server.do(server.served.revision_of(alias)) == ended.out.strip()


def test_the_default_one_goes_by_that_name_too(capsys: Capture, server: Running) -> None:
    for revision in ("step-500:50%", "step-500"):
        ended = lorakit(capsys, "alias", "sql@default", revision, *["step-1000"] * (":" in revision))
        assert ended.out.startswith("sql@step-500-")
    assert server.do(server.served.revision_of("sql")) == ended.out.strip()


def test_as_data_it_is_what_the_server_knows_of_the_name(capsys: Capture, server: Running) -> None:
    told = json.loads(lorakit(capsys, "alias", "sql@prod", "step-500", "--json").out)
    assert told["name"] == "sql"
    assert told["aliases"]["prod"].startswith("sql@step-500-")


def test_a_dry_run_says_from_where_to_where_and_moves_nothing(capsys: Capture, server: Running) -> None:
    now = server.do(server.served.revision_of("sql"))
    told = json.loads(lorakit(capsys, "alias", "sql", "step-500", "--dry-run", "--json").out)
    assert (told["from"], told["to"].rpartition("-")[0]) == (now, "sql@step-500")
    ended = lorakit(capsys, "alias", "sql@prod", "sql@best", "--dry-run")
    assert ended.code == 0
    assert "means nothing yet" in ended.err
    assert server.do(server.served.revision_of("sql")) == now
    assert server.do(server.served.revision_of("sql@prod")) is None


def test_what_can_not_be_is_said_and_changes_nothing(capsys: Capture, server: Running) -> None:
    now = server.do(server.served.revision_of("sql"))
    for arguments, code, words in (
        (["sql", "step-500:5%"], 2, "5.0000% together"),
        (["sql", "step-500:0.05", "step-1000:0.9"], 2, "95.0000% together"),
        (["sql", "step-500:50%", "step-1000:50%", "best"], 2, "100.0000% together"),
        (["sql", "step-500", "step-1000"], 2, "more than one REV has no share"),
        (["sql", "step-500:5%", "step-500"], 2, "named twice"),
        (["sql", "step-500:0%", "step-1000"], 2, "above 0"),
        (["sql", "step-500:5", "step-1000"], 2, "write REV:5%"),
        (["sql", "step-500:nan", "step-1000"], 2, "write REV:5%"),
        (["sql", "step-500:5%", "sql@step-500:95%"], 4, "named twice"),
        (["sql", "step-500:5%", "step-7"], 3, "has no revision 'step-7'"),
        (["sql", "step-500", "--shadow", "step-7"], 3, "has no revision 'step-7'"),
        (["sql", "step-500", "--shadow", "step-500"], 4, "named twice"),
        (["sql@", "step-500"], 2, "NAME@ALIAS"),
        (["@prod", "step-500"], 2, "NAME@ALIAS"),
        (["sql"], 2, "REV"),
        (["sql", "step-7"], 3, "has no revision 'step-7'"),
        (["chat", "latest"], 3, "no adapter 'chat'"),
        (["sql@step-9", "latest"], 4, "would read as a step"),
        (["sql@latest", "step-500"], 4, "reserved"),
    ):
        ended = lorakit(capsys, "alias", *arguments)
        assert (ended.code, ended.out) == (code, ""), arguments
        assert words in ended.err
        assert server.do(server.served.revision_of("sql")) == now


# shares


def test_several_share_a_name_and_to_name_one_ends_that(capsys: Capture, server: Running) -> None:
    ended = lorakit(capsys, "alias", "sql", "step-500:25%", "sql@step-1000")
    assert (ended.code, ended.err) == (0, "")
    assert [line.partition(" ")[2] for line in ended.out.splitlines()] == ["25%", "75%"]
    assert ended.out.startswith("sql@step-500-")
    met = [server.do(server.served.revision_of("sql")) for _ in range(8)]
    assert sorted(str(name).partition("-")[2].partition("-")[0] for name in met) == ["1000"] * 6 + ["500"] * 2
    assert lorakit(capsys, "alias", "sql", "step-500").out.startswith("sql@step-500-")
    assert len({server.do(server.served.revision_of("sql")) for _ in range(8)}) == 1


def test_a_shadow_and_a_seed_go_with_one_or_with_several(capsys: Capture, server: Running) -> None:
    ended = lorakit(capsys, "alias", "sql@prod", "step-500", "--shadow", "latest")
    assert [line.partition(" ")[2] for line in ended.out.splitlines()] == ["100%", "shadow"]
    assert lorakit(capsys, "alias", "sql@prod", "step-500:.1", "best:90%").code == 4, "best is step 500 as well"
    told = json.loads(lorakit(capsys, "alias", "sql", "step-500:.1", "latest:90%", "--seed", "3", "--json").out)
    assert told["splits"]["sql"]["seed"] == 3
    assert [one["share"] for one in told["splits"]["sql"]["shares"]] == [0.1, 0.9]


def test_a_dry_run_of_shares_says_what_would_be_and_changes_nothing(capsys: Capture, server: Running) -> None:
    plan = ["alias", "sql", "step-500:5%", "step-1000", "--shadow", "best", "--dry-run"]
    told = json.loads(lorakit(capsys, *plan, "--json").out)
    assert [(one["revision"].rpartition("-")[0], one["share"]) for one in told["to"]["shares"]] == [
        ("sql@step-500", 0.05), ("sql@step-1000", 0.95),
    ]  # fmt: skip
    assert told["to"]["shadow"] == [told["to"]["shares"][0]["revision"]]
    assert "5%, sql@step-1000-" in lorakit(capsys, *plan).err
    assert server.served.reconciler.runs["sql"].splits == {}


@given(st.lists(st.integers(1, 1000), min_size=2, max_size=8), st.booleans(), st.data())
def test_shares_are_read_in_both_forms_and_one_may_be_left_to_be_the_rest(
    parts: list[int], percent: bool, data: st.DataObject
) -> None:
    shares = [part / sum(parts) for part in parts]
    left_out = data.draw(st.sampled_from([None, *range(len(shares))]))
    said = [f"{100 * share:.6f}%" if percent else f"{share:.8f}" for share in shares]
    written = [f"step-{number}" + f":{share}" * (number != left_out) for number, share in enumerate(said)]
    found = shares_in(written)
    assert [name for name, _ in found] == [f"step-{number}" for number in range(len(shares))]
    assert [share for _, share in found] == pytest.approx(shares, abs=1e-6)
