"""What the text of a mix says, and what is no mix."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorakit.errors import Refused
from lorakit.server.mixes.text import LONGEST, MOST_ADAPTERS, MixText, parse_mix


@pytest.mark.parametrize(
    ("text", "adapters"),
    [
        ("mix(sql@best=0.7,chat=0.3)", [("sql@best", 0.7), ("chat", 0.3)]),
        ("mix( sql = 0.7 , chat = .3 )", [("sql", 0.7), ("chat", 0.3)]),
        ("mix(sql,chat)", [("sql", 1.0), ("chat", 1.0)]),
        ("mix(sql)", [("sql", 1.0)]),
        ("mix(sql=-1e-2,chat=+2.)", [("sql", -0.01), ("chat", 2.0)]),
        ("mix(sql=0.5,chat,sql=0.25)", [("sql", 0.75), ("chat", 1.0)]),
        ("mix(sql@step-500-3fa9c1d2=1,chat@3fa9=0)", [("sql@step-500-3fa9c1d2", 1.0), ("chat@3fa9", 0.0)]),
        ("mix(rank@latest=0.5,method@best=0.5)", [("rank@latest", 0.5), ("method@best", 0.5)]),
    ],
)
def test_adapters_have_weights_and_those_without_have_one(text: str, adapters: list[tuple[str, float]]) -> None:
    assert parse_mix(text) == MixText(tuple(adapters))


def test_the_method_and_its_options_stand_among_the_adapters() -> None:
    found = parse_mix("mix(sql=0.5,method=dare_ties,density=0.2,chat,seed=7,rank=8)")
    assert found.adapters == (("sql", 0.5), ("chat", 1.0))
    assert (found.method, found.rank) == ("dare_ties", 8)
    assert found.options == {"density": 0.2, "seed": 7, "majority_sign": "total"}
    assert parse_mix("mix(sql,rank=exact)").rank == "exact"


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("mix(", "no end"), ("mix(sql=0.5", "no end"), ("mix(sql) ", "no end"), ("mix()", "empty place"),
        ("mix(,)", "empty place"), ("mix(sql,,chat)", "empty place"), ("mix(sql@best=0.7,)", "empty place"),
        ("mix(=0.5)", "weight of ''"), ("mix(sql=)", "weight of 'sql'"), ("mix(sql=nan)", "finite"),
        ("mix(sql=inf)", "finite"), ("mix(sql=1e999)", "finite"), ("mix(sql=1_0)", "finite"),
        ("mix(sql=0x1)", "finite"), ("mix(sql=\u0661)", "finite"), ("mix(sql=0.5=0.5)", "finite"),
        ("mix(sql,mix(chat))", "not of mixes"), ("mix(mix(sql=1)=1)", "not of mixes"),
        ("mix(method=ties)", "0 adapters"), ("mix(sql,method=linear,method=ties)", "stands twice"),
        ("mix(sql,rank)", "no value"), ("mix(sql,rank=0)", "rank=0"), ("mix(sql,rank=513)", "rank=513"),
        ("mix(sql,rank=-1)", "rank=-1"), ("mix(sql,rank=8.0)", "rank=8.0"), ("mix(sql,method=nothing)", "no method"),
        ("mix(sql,density=0.5)", "takes no density"), ("mix(sql,method=ties,density=2)", "density=2"),
        ("mix(sql,method=dare_ties,seed=x)", "seed='x'"), ("mix(sql,method=ties,seed=1)", "takes no seed"),
    ],
)  # fmt: skip
def test_what_can_not_be_read_is_refused_with_what_is_wrong_with_it(text: str, word: str) -> None:
    with pytest.raises(Refused, match=word):
        parse_mix(text)


def test_a_mix_has_an_end_to_its_length() -> None:
    many = ",".join(f"a{number}" for number in range(MOST_ADAPTERS))
    assert len(parse_mix(f"mix({many})").adapters) == MOST_ADAPTERS
    with pytest.raises(Refused, match="33 adapters"):
        parse_mix(f"mix({many},one-more)")
    with pytest.raises(Refused, match="give it a name"):
        parse_mix(f"mix({'a' * LONGEST})")


names = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,12}(@[a-z0-9-]{1,8})?", fullmatch=True)
options = {"method", "rank", "density", "seed", "epsilon", "gamma", "majority_sign"}
weights = st.floats(allow_nan=False, allow_infinity=False)


@given(adapters=st.dictionaries(names.filter(lambda name: name not in options), weights, min_size=1, max_size=5))
def test_what_is_written_reads_as_what_it_was(adapters: dict[str, float]) -> None:
    asked = MixText(tuple(adapters.items()), "dare_linear", 12, {"density": 0.25, "seed": 3})
    assert parse_mix(str(asked)) == asked


@given(inner=st.one_of(st.text(), st.text("mix()=,.@0123abc ")))
def test_any_text_is_a_mix_or_refused(inner: str) -> None:
    with contextlib.suppress(Refused):
        parse_mix(f"mix({inner}")
