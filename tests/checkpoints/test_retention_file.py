"""What stays, in YAML: every key, every mistake."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from lorakit.checkpoints.retention import KeepBest, KeepEvery, KeepFor, KeepLast, Retention
from lorakit.checkpoints.retention_file import read_retention, retention_of
from lorakit.errors import NotFound, UsageError


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "keep.yaml"


def test_every_policy_has_its_key(file: Path) -> None:
    file.write_text(
        "# what stays\nkeep_last: 3\nkeep_best: {count: 2, metric: eval_f1, mode: max}\nkeep_every: 500\n"
        "keep_for: 7d\nmax_bytes: 20GB\n"
    )
    policies = (KeepLast(3), KeepBest(2, "eval_f1", "max"), KeepEvery(500), KeepFor(7 * 86_400.0))
    assert read_retention(file) == Retention(policies, max_bytes=20 * 10**9)


@pytest.mark.parametrize(
    ("text", "retention"),
    [
        ("keep_best: 2", Retention((KeepBest(2, "eval_loss", "min"),))),
        ("keep_best: {count: 1, metric: eval_perplexity}", Retention((KeepBest(1, "eval_perplexity", "min"),))),
        ("max_bytes: 1000", Retention(max_bytes=1000)),
        ("keep_last: 0\nkeep_every: 5", Retention((KeepEvery(5),), spare_newest=False)),
        ("keep_last:\nkeep_every: 5", Retention((KeepEvery(5),))),
    ],
)
def test_what_is_left_out_is_as_with_the_options(file: Path, text: str, retention: Retention) -> None:
    file.write_text(text)
    assert read_retention(file) == retention


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "says nothing to keep"), ("- keep_last", "says nothing to keep"), ("{}", "nothing says which"),
        ("keep_lst: 3", "did you mean 'keep_last'"), ("zzz: 3", "there are keep_last, keep_best"),
        ("3: 3", "unknown key '3'"), ("keep_best: {number: 3}", "unknown key 'number'; there are count"),
        ("keep_best: {metric: eval_loss}", "says no count"), ("keep_best: {count: 1, mode: least}", "min or max"),
        ("keep_best: {count: 1, metric: eval_f1}", "is more of 'eval_f1' better"),
        ("keep_best: {count: 1, metric: 3}", "has to be a name"), ("keep_last: three", "has to be a whole number"),
        ("keep_last: true", "whole number"), ("keep_last: -1", "whole number"), ("keep_last: 1.5", "whole number"),
        ("keep_every: 0", "whole number, 1 at least"), ("keep_for: 7", "is no time"), ("max_bytes: much", "is no size"),
        ("keep_for: [1]", "is no time"), ("keep_last: 0", "nothing says which"),
        ("keep_last: 1\nkeep_last: 3", "'keep_last' stands twice"), ("keep_last: [", "can't be read as YAML"),
        ("keep_last: !!python/object/apply:os.system ['true']", "can't be read as YAML"),
        ("!!map [keep_last, 3]", "names with values"), ("keep_best: !!set [1]", "names with values"),
        ("keep_for: !!timestamp now", "can't be read as YAML"), ("keep_last: !!int ''", "can't be read as YAML"),
        ("keep_last: !!bool x", "can't be read as YAML"), ("keep_last: !!python/tuple [1]", "can't be read as YAML"),
        ("keep_last: 010", "write 010 in plain digits"), ("keep_every: 1:30", "write 1:30 in plain digits"),
        ("keep_for: 2001-99-99", "can't be read as YAML"), ("? {a: b}\n: 1", "can't be read as YAML"),
    ],
)  # fmt: skip
def test_a_mistake_is_an_error_that_names_the_file(file: Path, text: str, words: str) -> None:
    file.write_text(text)
    with pytest.raises(UsageError) as error:
        read_retention(file)
    assert str(error.value).startswith(f"'{file}'")
    assert words in str(error.value)


def test_a_file_that_is_not_there_is_not_found(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "none.yaml", tmp_path, tmp_path / "file" / "inner.yaml"):
        with pytest.raises(NotFound, match="there is no file"):
            read_retention(path)


TAGS = ("map", "set", "omap", "pairs", "seq", "int", "float", "bool", "null", "binary", "timestamp", "str", "merge")
VALUES = st.sampled_from(["x", "''", "[a, 1]", "{a: 1}", "3", "~", "0x", "9999-99-99", "[{a: 1}, 2]", "{[1]: {}}"])


@given(st.sampled_from(["", "keep_last: ", "keep_best: ", "? "]), st.sampled_from(TAGS), VALUES)
def test_whatever_a_tag_is_on_it_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, before: str, tag: str, value: str
) -> None:
    file = tmp_path_factory.getbasetemp() / "tags.yaml"
    file.write_text(f"{before}!!{tag} {value}")
    with suppress(UsageError):
        assert isinstance(read_retention(file), Retention)


@given(st.binary(max_size=40) | st.text(max_size=40).map(str.encode))
def test_whatever_a_file_holds_it_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    file = tmp_path_factory.getbasetemp() / "any.yaml"
    file.write_bytes(content)
    with suppress(UsageError):
        assert isinstance(read_retention(file), Retention)


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "keep_last": st.integers(1, 9), "keep_best": st.integers(1, 9), "keep_every": st.integers(1, 999),
            "keep_for": st.sampled_from(["1s", "2.5h", "7d"]), "max_bytes": st.sampled_from(["1B", "20GB", 77]),
        },
    ).filter(bool)
)  # fmt: skip
def test_yaml_says_the_same_as_plain_data(tmp_path_factory: pytest.TempPathFactory, said: dict[str, Any]) -> None:
    file = tmp_path_factory.getbasetemp() / "same.yaml"
    file.write_text(yaml.safe_dump(said))
    assert read_retention(file) == retention_of(said)
