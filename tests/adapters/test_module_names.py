"""Patterns of an adapter's config: what `re` says of them, and of those that `re` never ends with, an answer too."""

from __future__ import annotations

import re
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorakit.adapters.module_names import LONGEST_NAME, LONGEST_PATTERN, ends_with, ensure_quick
from lorakit.errors import InvalidFile

MODULES = [
    "model.layers.0.self_attn.q_proj", "model.layers.11.mlp.down_proj", "lm_head", "a", "", "visual.blocks.3.attn.qkv",
    "q_proj\n",
]  # fmt: skip
PATTERNS = [
    "q_proj", "self_attn.q_proj", r"self_attn\.q_proj", "model.layers.0.self_attn.q_proj", "proj", ".*proj",
    "^lm_head$",
    r".*layers\.(0|1)\.self_attn\.(q|v)_proj", r"layers\.\d+\.mlp\..*", r"(?!visual).*\.qkv", r"(?:.*\.)?(?=q)\w+",
    r"[^.]+", r"[a-z_]{1,7}", r"layers\.[0-9]{2}.*", r"\bq_proj\b", r"(?<=self_attn\.)q_proj", r"(?<!x)lm_head", "(",
    "a{2",
    r".*?proj", r"(a|b)*", r"(?P<x>q)_proj", r"[\d.]+x|lm_head", r"\S+_\D+", "", "a|", r"mlp\Z", r"x{0}lm_head",
]  # fmt: skip


def said_by_re(pattern: str, module: str) -> bool:
    """PEFT's rule."""
    try:
        return re.match(rf"(.*\.)?({pattern})$", module) is not None
    except re.error:
        return pattern == module


@pytest.mark.parametrize("pattern", PATTERNS)
def test_what_a_pattern_means_is_what_re_says(pattern: str) -> None:
    for module in MODULES:
        assert ends_with(pattern, module) == said_by_re(pattern, module), module


letters = st.sampled_from(["a", "b", ".", r"\.", "[ab]", "[^a]", r"\w", "^", "$", r"\b"])
patterns = st.recursive(
    letters,
    lambda inner: st.one_of(
        st.lists(inner, min_size=1, max_size=4).map("".join),
        st.lists(inner, min_size=1, max_size=3).map(lambda parts: f"({'|'.join(parts)})"),
        st.tuples(inner, st.sampled_from(["*", "+", "?", "*?", "{2}", "{1,2}", "{0,}"])).map(
            lambda both: f"(?:{both[0]}){both[1]}"
        ),
        inner.map(lambda part: f"(?={part})"),
        inner.map(lambda part: f"(?!{part})"),
    ),
    max_leaves=6,
)


@given(patterns, st.text("ab.\n", max_size=7))
def test_whatever_is_put_together_means_what_re_says(pattern: str, module: str) -> None:
    assert ends_with(pattern, module) == said_by_re(pattern, module)


@pytest.mark.parametrize(
    "pattern",
    ["([a-z._0-9]+)+!", "(([a-z._0-9])+.?)+!", "(a|a)*!" + "|(.|[a-z])*!", "(.*)*" * 7 + "!", ".*" * 14 + "!",
     "(.|.)" * 25 + "!", "(.?){60}.{60}!", "((((((((((.*)*)*)*)*)*)*)*)*)*)*!", "(.{0,9999}){0,9999}!",
     "(){999999}!", "(.){999999}!"],
)  # fmt: skip
def test_what_re_never_ends_with_has_an_answer(pattern: str) -> None:
    assert not ends_with(pattern, "model.layers.0.self_attn.q_proj" * 2)


@pytest.mark.parametrize("pattern", [r"(a)\1", "(?i:q_proj)", "(?>a+)b", "a++b", "(a)?(?(1)b|c)", "a*" * 30])
def test_what_no_name_needs_is_refused(pattern: str) -> None:
    with pytest.raises(InvalidFile, match="write it more simply"):
        ends_with(pattern, "lm_head")


@pytest.mark.parametrize("pattern", ["([a-z]+)+!", "(ab|a)*", ".*" * 5, "(ab|a)" * 9, r"(a)\1", "("])
def test_what_re_itself_may_not_be_asked_is_refused(pattern: str) -> None:
    with pytest.raises(InvalidFile, match="target_modules of 'it'"):
        ensure_quick(pattern, "target_modules of 'it'")


WRITTEN = ["q_proj", r".*layers\.\d+\.(self_attn|mlp)\.(q|v)_proj", r"[^.]+\.(a|b|c)", "all-linear"]


@pytest.mark.parametrize("pattern", WRITTEN)
def test_what_people_write_is_not(pattern: str) -> None:
    ensure_quick(pattern, "target_modules")


def test_what_is_too_long_is_refused() -> None:
    with pytest.raises(InvalidFile, match="shorten it"):
        ends_with("(a)" * LONGEST_PATTERN, "lm_head")
    with pytest.raises(InvalidFile, match="no module's has"):
        ends_with("(a)", "a" * (LONGEST_NAME + 1))
    for depth in (100, 200, 300, 1500):
        with suppress(InvalidFile):
            assert ends_with("(" * depth + "lm_head" + ")" * depth, "lm_head")
