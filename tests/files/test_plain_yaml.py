"""Settings in YAML: plain values alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from lorakit.errors import InvalidFile, NotFound
from lorakit.files.plain_yaml import MAX_YAML, read_yaml


def test_a_mapping_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("a: {b: [1, 2.5, text]}\n")
    assert read_yaml(tmp_path / "a.yaml") == {"a": {"b": [1, 2.5, "text"]}}


@pytest.mark.parametrize(
    ("content", "refusal"),
    [
        ("!!python/object/apply:os.system [touch ran]", "can't be read as YAML"),
        ("a: [", "can't be read as YAML"),
        ("[" * 5000, "can't be read as YAML"),
        ("a: \x00", "can't be read as YAML"),
        ("? [1, 2]\n: 3\n? {a: 1}\n: 4", "can't be read as YAML"),
        ("- 1", "holds no mapping"),
        ("", "holds no mapping"),
        ("a: " + "b" * MAX_YAML, "longer than 4 MB"),
    ],
)
def test_anything_else_is_refused(tmp_path: Path, content: str, refusal: str) -> None:
    (tmp_path / "a.yaml").write_text(content)
    with pytest.raises(InvalidFile, match=refusal):
        read_yaml(tmp_path / "a.yaml")
    assert not (Path.cwd() / "ran").exists()


def test_what_is_not_there_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        read_yaml(tmp_path / "a.yaml")


def test_a_name_stands_for_what_it_was_given_to(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("a: &one {b: 1}\nc: *one\n")
    assert read_yaml(tmp_path / "a.yaml") == {"a": {"b": 1}, "c": {"b": 1}}


@pytest.mark.timeout(20)
def test_mappings_that_take_in_one_another_are_refused(tmp_path: Path) -> None:
    """Ten lines would be ten billion entries."""
    lines = ["a0: &a0 {x: 1}", *(f"a{n}: &a{n} {{<<: [{','.join([f'*a{n - 1}'] * 10)}]}}" for n in range(1, 10))]
    (tmp_path / "a.yaml").write_text("\n".join(lines))
    with pytest.raises(InvalidFile, match="takes in others"):
        read_yaml(tmp_path / "a.yaml")
