"""The parts of the page: whatever they are given is text."""

from __future__ import annotations

from html.parser import HTMLParser

from hypothesis import given, settings
from hypothesis import strategies as st

from lorakit.server.page import markup
from lorakit.server.page.screens.playground import answers_cards

NASTY = "<script>alert(1)</script>\"'&`${x}"


class Read(HTMLParser):
    """Tags, and what is between them."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text = ""
        self.attributes: dict[str, str | None] = {}

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes |= dict(attrs)

    def handle_data(self, data: str) -> None:
        self.text += data


def read(shown: str) -> Read:
    found = Read()
    found.feed(shown)
    found.close()
    return found


def test_whatever_a_part_is_given_is_text() -> None:
    shown = [
        markup.pill(NASTY), markup.code(NASTY), markup.button(NASTY, NASTY, revision=NASTY), markup.card(NASTY),
        markup.table(NASTY, [NASTY], [[NASTY]]), markup.why(NASTY), markup.empty(NASTY, NASTY, NASTY),
        markup.banner(NASTY, NASTY), markup.options([(NASTY, NASTY)], NASTY), markup.run_link(NASTY),
        markup.tiles({NASTY: (NASTY, NASTY)}), answers_cards([NASTY]),
    ]  # fmt: skip
    for one in shown:
        assert "script" not in read(one).tags, one
        assert "<script" not in one


@settings(max_examples=50)
@given(st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\r\n\0"), min_size=1, max_size=20))
def test_what_a_button_says_comes_back_as_it_was(name: str) -> None:
    found = read(markup.button("Promote", "promote", revision=name))
    assert found.attributes["data-revision"] == name


def test_numbers_are_short_and_what_is_unknown_is_a_dash() -> None:
    assert [markup.seconds(value) for value in (None, 0.0004, 0.25, 12.3)] == ["–", "0.4 ms", "250 ms", "12.3 s"]
    assert [markup.size(value) for value in (None, 12, 2880, 3.4e9)] == ["–", "12 B", "2.88 kB", "3.4 GB"]
    assert [markup.count(value) for value in (None, 0, 12345)] == ["–", "0", "12\u202f345"]
    assert [markup.share(value) for value in (None, 0.05, 1.0)] == ["–", "5 %", "100 %"]
    assert [markup.short(name) for name in ("sql@step-600-3fa9c1d2", "chat@3fa9c1d2", "mix@aa", "numbers")] == [
        "step-600", "3fa9c1d2", "aa", "numbers"
    ]  # fmt: skip


def test_a_line_takes_two_points_and_passes_over_what_is_missing() -> None:
    assert markup.spark([1.0]) == markup.spark([None, 1.0, None]) == ""
    assert 'd="M0.0,2.0 L100.0,22.0"' in markup.spark([3.0, None, 1.0])
    assert 'd="M0.0,2.0 L100.0,2.0"' in markup.spark([3.0, 3.0])
