"""Files of tasks: no two attempts write the same one, and none is left."""

from __future__ import annotations

from pathlib import Path

from lorakit.cluster.parts import drop_parts, new_part


def test_each_attempt_has_a_name_of_its_own_and_removes_the_last_ones(tmp_path: Path) -> None:
    first = new_part(tmp_path, "model[1].safetensors")
    first.touch()
    other = new_part(tmp_path, "model[2].safetensors")
    other.touch()
    (tmp_path / "model[1].safetensors").touch()
    second = new_part(tmp_path, "model[1].safetensors")
    assert second != first
    assert {path.name for path in tmp_path.iterdir()} == {"model[1].safetensors", other.name}
    second.touch()
    drop_parts(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["model[1].safetensors"]
