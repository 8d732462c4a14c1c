"""Who may come in, and whose a name is."""

from __future__ import annotations

import pytest

from lorakit.errors import Refused
from lorakit.server.access.rights import ALL, NONE, Forbidden, Rights, rights_of
from lorakit.store.keys import Allowance

ONE = Rights(Allowance(("sql*",)), "a")
ADMIN = Rights(Allowance(("sql*",), admin=True), "b")
WITHOUT_BASE = Rights(Allowance(admin=True, base=False), "c")


@pytest.mark.parametrize(
    ("method", "path", "own", "asks", "who"),
    [("GET", "/v1/models", True, False, {"one", "admin", "without", "all"}),
     ("POST", "/v1/completions", False, True, {"one", "admin", "without", "all"}),
     ("POST", "/v1/adapters", True, False, {"admin", "without", "all"}),
     ("DELETE", "/v1/adapters/sql", True, False, {"admin", "without", "all"}),
     ("GET", "/metrics", True, False, {"all"}), ("POST", "/sleep", False, False, {"all"}),
     ("GET", "/of-tomorrow", False, False, {"all"}), ("POST", "/v1/of-tomorrow", False, False, {"all"})],
)  # fmt: skip
def test_what_nobody_thought_of_is_for_whoever_may_do_all(
    method: str, path: str, own: bool, asks: bool, who: set[str]
) -> None:
    everybody = {"one": ONE, "admin": ADMIN, "without": WITHOUT_BASE, "all": ALL}
    assert {name for name, rights in everybody.items() if rights.may(method, path, own=own, asks=asks)} == who


def test_a_name_outside_of_its_patterns_is_refused_whatever_there_is() -> None:
    ADMIN.refuse_name("sql-2")
    with pytest.raises(Forbidden, match=r"'sql\*'"):
        ADMIN.refuse_name("chat")


def test_a_mix_is_its_own_if_every_adapter_in_it_is() -> None:
    assert ONE.names_all_in("mix(sql@best=0.5,sql-2=1,method=ties,density=0.5)")
    assert not ONE.names_all_in("mix(sql@best=0.5,chat=1)")
    with pytest.raises(Refused):
        ONE.names_all_in("mix(")


def test_a_request_that_nobody_looked_at_has_no_rights() -> None:
    assert rights_of({}) == NONE
    assert not NONE.names("anything")
    assert not NONE.allowance.base
