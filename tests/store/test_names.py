"""Which names there may be, and what a `model` asks for."""

from __future__ import annotations

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorakit.errors import Refused
from lorakit.store.names import Selector, check_alias, check_name, parse_selector, revision_name, split_model

ALLOWED = string.ascii_letters + string.digits + "._-"


@given(first=st.sampled_from(string.ascii_letters + string.digits), rest=st.text(ALLOWED, max_size=127))
def test_every_name_of_the_allowed_letters_is_one(first: str, rest: str) -> None:
    name = first + rest
    if name not in ("latest", "best", "final", "mix", "llama"):
        check_name(name, "llama")


@given(st.text(max_size=200))
def test_no_other_name_is(name: str) -> None:
    right = 0 < len(name) <= 128 and set(name) <= set(ALLOWED) and name[0] not in "._-"
    if not right:
        with pytest.raises(Refused, match="rename"):
            check_name(name)


@pytest.mark.parametrize("name", ["latest", "best", "final", "mix", "llama"])
def test_words_that_mean_something_else_are_reserved(name: str) -> None:
    with pytest.raises(Refused, match="reserved"):
        check_name(name, "llama")


def test_the_name_of_another_base_is_free() -> None:
    check_name("llama", "mistral")


@pytest.mark.parametrize("name", ["a\n", "a b", "a/b", "a@b", "a:b", "é", "x" * 129, "", ".a", "-a", "a\0", "a=b"])
def test_what_would_be_read_as_something_else_is_no_name(name: str) -> None:
    with pytest.raises(Refused):
        check_name(name)


@pytest.mark.parametrize(
    "alias", ["latest", "best", "final", "mix", "step-5", "step-5-abcd", "final-abcd", "abcd", "0000"]
)
def test_an_alias_never_reads_as_a_step_or_a_digest(alias: str) -> None:
    with pytest.raises(Refused):
        check_alias(alias)


@pytest.mark.parametrize("alias", ["prod", "canary", "v1", "step-x", "abc", "a.b"])
def test_other_words_are_aliases(alias: str) -> None:
    check_alias(alias)
    assert parse_selector(alias) == Selector(alias=alias)


@given(st.text())
def test_a_model_is_a_name_and_what_follows_the_first_at(model: str) -> None:
    name, rest = split_model(model)
    assert model == name + ("" if rest is None else "@" + rest)
    assert "@" not in name


@given(st.text())
def test_anything_at_all_can_be_parsed(text: str) -> None:
    found = parse_selector(text)
    assert (found.alias is None) != (found.step is None and not found.final and found.digest is None)


@given(step=st.integers(0, 10**17), digest=st.text("0123456789abcdef", min_size=64, max_size=64))
def test_the_name_of_a_revision_selects_it(step: int, digest: str) -> None:
    stepped = revision_name("sql", f"step-{step}", digest)
    assert stepped == f"sql@step-{step}-{digest[:8]}"
    assert parse_selector(split_model(stepped)[1] or "") == Selector(step=step, digest=digest[:8])
    final = revision_name("sql", "final", digest)
    assert parse_selector(split_model(final)[1] or "") == Selector(final=True, digest=digest[:8])
    plain = revision_name("chat", "", digest)
    assert plain == f"chat@{digest[:8]}"
    assert parse_selector(split_model(plain)[1] or "") == Selector(digest=digest[:8])
