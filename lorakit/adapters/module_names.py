"""Does a pattern of `rank_pattern` or `alpha_pattern` mean a module? As `re` answers, in bounded time.

Such patterns come from files that nobody vouches for, and `re` goes back and forth over some of them for years. Here
each part of a pattern is asked where it may end for all places at once where it may begin, and nothing is tried twice.
"""

from __future__ import annotations

import re
import re._constants as ops  # type: ignore[import-not-found]  # what `re` itself parses with, which has no stubs
import re._parser as parser  # type: ignore[import-not-found]
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache, reduce
from operator import or_
from typing import Any

from lorakit.errors import InvalidFile

LONGEST_PATTERN = 4096
LONGEST_NAME = 256  # that a pattern with groups or repeats is asked about
MOST_REPEATS = 16
MOST_LOOKS = 4  # ahead or behind
_HARMLESS = re.compile(r"(?:[\w.-]|\\\.)*")  # no choice to go back to

_LETTERS = frozenset({ops.LITERAL, ops.NOT_LITERAL, ops.ANY, ops.IN})
_REPEATS = frozenset({ops.MAX_REPEAT, ops.MIN_REPEAT})
_LOOKS = frozenset({ops.ASSERT, ops.ASSERT_NOT})
_KNOWN = _LETTERS | _REPEATS | _LOOKS | {ops.AT, ops.BRANCH, ops.SUBPATTERN}

_Node = tuple[Any, Any]


def ends_with(pattern: str, module: str) -> bool:
    """Whether the path of a module, or its end behind a dot, matches (peft/utils/other.py, `get_pattern_key`).

    Raises:
        InvalidFile: the pattern is too long, or asks for what no name of a module needs (flags, backreferences).
    """
    if (plain := _harmless(pattern)) is not None:
        return plain.match(module) is not None
    nodes = _parsed(pattern)
    if nodes is None:
        return pattern == module
    if len(module) > LONGEST_NAME:
        raise InvalidFile(f"the name '{module[:40]}…' has {len(module)} characters, and no module's has")
    try:
        return bool(_Matching(module).ends(nodes, 1))
    except RecursionError:
        raise _too_deep(pattern) from None


@lru_cache(maxsize=1 << 14)
def _harmless(pattern: str) -> re.Pattern[str] | None:
    return re.compile(rf"(.*\.)?({pattern})$") if _HARMLESS.fullmatch(pattern) else None


@lru_cache(maxsize=1024)
def _parsed(pattern: str) -> Sequence[_Node] | None:
    """None where it is no pattern, as for `re`."""
    if len(pattern) > LONGEST_PATTERN:
        raise InvalidFile(f"the pattern '{pattern[:40]}…' has {len(pattern)} characters: shorten it")
    try:
        tree = parser.parse(rf"(.*\.)?({pattern})$")
        nodes = list(tree)
        every = list(_every(nodes))
    except re.error:
        return None
    except (RecursionError, OverflowError):
        raise _too_deep(pattern) from None
    repeats = sum(op in _REPEATS for op, _ in every)
    looks = sum(op in _LOOKS for op, _ in every)
    is_simple = repeats <= MOST_REPEATS and looks <= MOST_LOOKS and all(map(_is_known, every))
    if tree.state.flags & ~re.UNICODE or not is_simple:
        raise InvalidFile(
            f"the pattern '{pattern[:80]}' asks for more than names of modules need: write it more simply"
        )
    return nodes


def ensure_quick(pattern: str, where: str) -> None:
    """For what `re` is asked about by others, who go back and forth over it.

    Raises:
        InvalidFile: it may take longer than anybody waits, or is no pattern; `where` says of what it is.
    """
    try:
        nodes = _parsed(pattern) or ()
        every = list(_every(nodes))
    except InvalidFile as error:
        raise InvalidFile(f"{where}: {error}") from None
    choices = _REPEATS | {ops.BRANCH}
    repeats = [argument for op, argument in every if op in _REPEATS][2:]  # but those of the end of a path
    nested = any(op in choices for argument in repeats for op, _ in _every(argument[-1]))
    if not nodes or nested or len(repeats) > 4 or sum(op is ops.BRANCH for op, _ in every) > 8:
        raise InvalidFile(f"{where}: the pattern '{pattern[:80]}' may take for ever: write it more simply")


def _too_deep(pattern: str) -> InvalidFile:
    return InvalidFile(f"the pattern '{pattern[:40]}…' is nested too deep, or counts too far: write it more simply")


def _every(nodes: Iterable[_Node]) -> Iterator[_Node]:
    """Each part, and those within it."""
    for op, argument in nodes:
        yield op, argument
        for inner in _bodies(op, argument):
            yield from _every(inner)


def _is_known(node: _Node) -> bool:
    op, argument = node
    return op in _KNOWN and not (op is ops.SUBPATTERN and any(argument[1:3]))  # flags of its own


def _bodies(op: Any, argument: Any) -> Iterable[Sequence[_Node]]:
    if op is ops.BRANCH:
        return argument[1]  # type: ignore[no-any-return]
    if op is ops.SUBPATTERN or op in _REPEATS | _LOOKS:
        return (argument[-1],)
    return ()


class _Matching:
    """Of one name. A set of places in it is a number with a bit for each, so that all of them go on at once."""

    def __init__(self, text: str) -> None:
        self.text = text
        self._everywhere = (2 << len(text)) - 1
        self._known: dict[int, int] = {}  # of a part, where it holds: the tree lives as long as this does
        self._looked: dict[tuple[int, int], bool] = {}

    def ends(self, nodes: Sequence[_Node], starts: int) -> int:
        """Where a row of parts that begins at any of `starts` may end."""
        for node in nodes:
            if not starts:
                break
            starts = self._of(node, starts)
        return starts

    def _of(self, node: _Node, starts: int) -> int:
        op, argument = node
        if op in _LETTERS:
            return (starts & self._where(node, lambda place: _fits(op, argument, self.text[place : place + 1]))) << 1
        if op is ops.AT:
            return starts & self._where(node, lambda place: self._is_at(argument, place))
        if op is ops.BRANCH:
            return reduce(or_, (self.ends(branch, starts) for branch in argument[1]))
        if op is ops.SUBPATTERN:
            return self.ends(argument[-1], starts)
        if op in _REPEATS:
            return self._repeated(argument, starts)
        direction, body = argument
        return starts & (self._looks(direction, body, starts) ^ (0 if op is ops.ASSERT else self._everywhere))

    def _where(self, node: _Node, holds: Callable[[int], bool]) -> int:
        if id(node) not in self._known:
            self._known[id(node)] = sum(1 << place for place in range(len(self.text) + 1) if holds(place))
        return self._known[id(node)]

    def _repeated(self, argument: Any, starts: int) -> int:
        least, most, body = argument
        places, before = starts, -1
        for _ in range(least):
            if places == before:  # of a body that may be empty, or nowhere any more
                break
            places, before = self.ends(body, places), places
        found = new = places
        for _ in range(min(most - least, len(self.text) + 1)):
            new = self.ends(body, new) & ~found
            if not new:
                break
            found |= new
        return found

    def _looks(self, direction: int, body: Any, starts: int) -> int:
        """Where the body begins, or ends if that is what is asked."""
        if direction < 0:
            return self.ends(body, self._everywhere)
        found = 0
        for place in range(len(self.text) + 1):
            if starts >> place & 1:
                key = id(body), place
                if key not in self._looked:
                    self._looked[key] = bool(self.ends(body, 1 << place))
                found |= self._looked[key] << place
        return found

    def _is_at(self, where: Any, place: int) -> bool:
        if where in (ops.AT_BEGINNING, ops.AT_BEGINNING_STRING):
            return place == 0
        if where in (ops.AT_END, ops.AT_END_STRING):
            return place == len(self.text) or (where is ops.AT_END and self.text[place:] == "\n")
        beside = {place > 0 and _is_word(self.text[place - 1]), _is_word(self.text[place : place + 1])}
        return (len(beside) == 2) == (where is ops.AT_BOUNDARY)


def _is_word(letter: str) -> bool:
    return letter.isalnum() or letter == "_"


_CATEGORIES: dict[Any, Callable[[str], bool]] = {
    ops.CATEGORY_DIGIT: str.isdecimal,
    ops.CATEGORY_NOT_DIGIT: lambda letter: not letter.isdecimal(),
    ops.CATEGORY_SPACE: str.isspace,
    ops.CATEGORY_NOT_SPACE: lambda letter: not letter.isspace(),
    ops.CATEGORY_WORD: _is_word,
    ops.CATEGORY_NOT_WORD: lambda letter: not _is_word(letter),
}


def _fits(op: Any, argument: Any, letter: str) -> bool:
    if not letter:  # behind the last one
        return False
    if op is ops.ANY:
        return letter != "\n"
    if op is not ops.IN:
        return bool(argument == ord(letter)) is (op is ops.LITERAL)
    found = any(
        (kind is ops.LITERAL and one == ord(letter))
        or (kind is ops.RANGE and one[0] <= ord(letter) <= one[1])
        or (kind is ops.CATEGORY and _CATEGORIES[one](letter))
        for kind, one in argument
    )
    is_negated: bool = argument[0][0] is ops.NEGATE
    return found != is_negated
