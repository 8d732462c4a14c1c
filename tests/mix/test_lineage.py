"""A folder's ancestors, as far as they can still be found; whatever stands in lorakit.json."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lorakit
import lorakit.errors
from lorakit.mix import lineage as module
from lorakit.mix.lineage import Lineage, lineage_of
from tests.folders import factors, linear_modules, write_adapter, write_base


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    return tuple(  # type: ignore[return-value]
        write_adapter(tmp_path / name, factors(linear_modules(), seed=seed)) for seed, name in enumerate(("one", "two"))
    )


def record(folder: Path, **said: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "lorakit.json").write_text(json.dumps({"lorakit": "0.1.0", "operation": "mix", **said}))
    return folder


def every(lineage: Lineage) -> list[Lineage]:
    return [lineage, *(found for parent in lineage.parents for found in every(parent))]


def test_a_folder_that_lorakit_did_not_write_stands_alone(pair: tuple[Path, Path]) -> None:
    assert lineage_of(pair[0]) == Lineage(str(pair[0]), "there")


def test_parents_are_followed_into_their_own_folders(pair: tuple[Path, Path], tmp_path: Path) -> None:
    one, two = pair
    lorakit.mix([(one, 0.7), (two, 0.3)]).save(tmp_path / "mixed")
    lorakit.mix([(tmp_path / "mixed", 0.5), (one, 2)]).save(tmp_path / "again")
    root = lineage_of(tmp_path / "again")
    assert (root.operation, root.rank, root.error, root.settings["method"]) == ("mix", 6, 0.0, "linear")
    assert [(parent.path, parent.weight, parent.state) for parent in root.parents] == [
        (str(tmp_path / "mixed"), 0.5, "there"),
        (str(one), 2.0, "there"),
    ]
    assert [(parent.path, parent.weight) for parent in root.parents[0].parents] == [(str(one), 0.7), (str(two), 0.3)]
    assert root.version == lorakit.__version__
    json.dumps(root.as_dict(), allow_nan=False)


def test_a_parent_that_was_written_again_or_is_gone_is_told(pair: tuple[Path, Path], tmp_path: Path) -> None:
    one, two = pair
    lorakit.mix([(one, 0.7), (two, 0.3)]).save(tmp_path / "mixed")
    one.rename(tmp_path / "elsewhere")
    (two / "adapter_model.safetensors").write_bytes(b"another")
    assert [parent.state for parent in lineage_of(tmp_path / "mixed").parents] == ["gone", "changed"]
    (two / "adapter_model.safetensors").unlink()
    assert lineage_of(tmp_path / "mixed").parents[1].state == "changed"


def test_a_merged_model_has_its_base_and_adapters_as_parents(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    lorakit.merge(base, [(pair[0], 0.5)], out=tmp_path / "merged")
    root = lineage_of(tmp_path / "merged")
    assert root.operation == "merge"
    assert [(parent.role, parent.weight, parent.state) for parent in root.parents] == [
        ("base", None, "there"),
        ("adapter", 0.5, "there"),
    ]
    (base / "config.json").write_text("{}")
    assert lineage_of(tmp_path / "merged").parents[0].state == "changed"
    (base / "config.json").write_text("no config")
    assert lineage_of(tmp_path / "merged").parents[0].state == "changed"


def test_steps_that_were_never_saved_are_told_too(pair: tuple[Path, Path], tmp_path: Path) -> None:
    step = {
        "operation": "shrink", "settings": {"rank": 2}, "weight": 0.5, "parts": ["only q_proj"],
        "parents": [{"path": str(pair[0]), "weight": 1}],
    }  # fmt: skip
    (found,) = lineage_of(record(tmp_path / "made", parents=[step])).parents
    assert (found.path, found.state, found.operation, found.weight) == (None, "unsaved", "shrink", 0.5)
    assert found.parts == ("only q_proj",)
    assert [(parent.path, parent.state) for parent in found.parents] == [(str(pair[0]), "unknown")]


def test_a_folder_is_gone_into_once(tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    record(a, parents=[{"path": str(b)}, {"path": str(b)}, {"path": str(a)}])
    record(b, parents=[{"path": str(a)}])
    (first, second, itself) = lineage_of(a).parents
    assert [parent.state for parent in first.parents] == ["above"]
    assert (first.state, second.state, itself.state) == ("unknown", "above", "above")
    assert (second.parents, itself.parents) == ((), ())


def test_a_long_line_ends_somewhere(tmp_path: Path) -> None:
    for number in range(50):
        record(tmp_path / f"{number}", parents=[{"path": str(tmp_path / f"{number + 1}")}])
    found = every(lineage_of(tmp_path / "0"))
    assert len(found) == module.DEPTH + 1
    assert found[-1].state == "deeper"


def nested(depth: int) -> dict[str, Any]:
    step: dict[str, Any] = {"operation": "mix"}
    for _ in range(depth):
        step = {"operation": "mix", "parents": [step]}
    return step


@pytest.mark.parametrize(
    "content",
    [
        "", "[]", "{}", "nonsense", '{"operation": 3}', '{"operation": "mix", "parents": 3}',
        '{"operation": "mix", "settings": []}', '{"operation": "mix", "lorakit": {}}',
        '{"operation": "mix", "parents": [3]}', '{"operation": "mix", "parents": [{"path": ["/"]}]}',
        '{"operation": "mix", "parents": [{}]}', '{"operation": "mix", "rank": NaN}',
        '{"operation": "\\ud800"}', "[" * 100_000, json.dumps(nested(40)),
        json.dumps({"operation": "mix", "parents": [{"path": "/"}] * 2000}),
    ],
    ids=lambda content: content[:48],
)  # fmt: skip
def test_nonsense_is_refused_by_name(tmp_path: Path, content: str) -> None:
    (tmp_path / "lorakit.json").write_text(content)
    with pytest.raises(lorakit.errors.InvalidFile, match=r"lorakit\.json"):
        lineage_of(tmp_path)


def test_a_record_of_absurd_size_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "lorakit.json").open("wb") as stream:
        stream.truncate(1 << 40)
    with pytest.raises(lorakit.errors.InvalidFile, match="larger than 64 MiB"):
        lineage_of(tmp_path)


@pytest.mark.parametrize(
    "path", ["", "\0", "x" * 5000, "/dev/null", "https://example.com/a", "../../nowhere", "a\x1b[2J"]
)
def test_paths_that_lead_nowhere_are_gone(tmp_path: Path, path: str) -> None:
    parent = {"path": path, "sha256": "0" * 64, "weight": 10**400, "kind": [], "parts": {}}
    (found,) = lineage_of(record(tmp_path / "made", parents=[parent])).parents
    assert (found.path, found.state, found.weight, found.role, found.parts) == (path, "gone", None, None, ())


@settings(max_examples=60)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(
                    ["operation", "parents", "settings", "path", "sha256", "weight", "kind", "parts", "rank"]
                ),
                inner,
                max_size=6,
            )
        ),
        max_leaves=12,
    )
)
def test_any_json_is_told_or_refused(tmp_path: Path, content: Any) -> None:
    said = content if isinstance(content, dict) else {"operation": "mix", "parents": content}
    (tmp_path / "lorakit.json").write_text(json.dumps(said))
    with contextlib.suppress(lorakit.errors.InvalidFile):
        json.dumps(lineage_of(tmp_path).as_dict(), allow_nan=False).encode()


def test_what_is_not_there_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(lorakit.errors.NotFound, match="there is no folder"):
        lineage_of(tmp_path / "nowhere")
