"""What is held outlives its source, and says when it was written to."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import pytest

from lorakit.training.capturing.appearing import Spot, Stamp, spots_in, stamp_of
from lorakit.training.capturing.holding import Held, held_in, hold, release
from tests.checkpoints.written import write_checkpoint
from tests.training.capturing.captures import files_of


@pytest.fixture
def spot(tmp_path: Path) -> Spot:
    return Spot(write_checkpoint(tmp_path / "out" / "checkpoint-5"), "checkpoint-5")


@pytest.fixture
def held(spot: Spot, tmp_path: Path) -> Held:
    held = hold(spot, stamp(spot), tmp_path / "held")
    assert held is not None
    return held


def stamp(spot: Spot) -> Stamp:
    found = stamp_of(spot)
    assert found is not None
    return found


def test_it_outlives_its_source(spot: Spot, held: Held) -> None:
    before = files_of(spot.path)
    shutil.rmtree(spot.path)
    assert files_of(held.path) == before
    assert held.is_unchanged
    release(held)
    assert not held.folder.exists()


def test_what_is_written_over_in_place_shows_and_what_is_put_in_its_place_does_not(spot: Spot, held: Held) -> None:
    (spot.path / "new").write_text("x")
    (spot.path / "adapter_config.json").rename(spot.path / "other")
    assert held.is_unchanged
    with (spot.path / "adapter_model.safetensors").open("r+b") as file:
        file.write(b"x")
    assert not held.is_unchanged


def test_what_changed_since_the_look_is_not_held(spot: Spot, tmp_path: Path) -> None:
    seen = stamp(spot)
    (spot.path / "new").write_text("x")
    assert hold(spot, seen, tmp_path / "held") is None
    shutil.rmtree(spot.path)
    assert hold(spot, seen, tmp_path / "held") is None
    assert list((tmp_path / "held").iterdir()) == []


@pytest.mark.parametrize("code", [errno.EPERM, errno.EXDEV, errno.EOPNOTSUPP, errno.EMLINK])
def test_where_there_are_no_links_it_is_a_copy(
    spot: Spot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def no_link(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "link", no_link)
    held = hold(spot, stamp(spot), tmp_path / "held")
    assert held is not None
    (spot.path / "adapter_model.safetensors").write_bytes(b"x")
    assert held.is_unchanged
    assert held.source != held.stamp


def test_of_a_root_its_own_files_are_held_alone(tmp_path: Path) -> None:
    out = write_checkpoint(tmp_path / "out")
    write_checkpoint(out / "checkpoint-5")
    *_, root = spots_in(out)
    held = hold(root, stamp(root), tmp_path / "held")
    assert held is not None
    assert held.is_root
    assert sorted(files_of(held.path)) == ["adapter_config.json", "adapter_model.safetensors", "trainer_state.json"]


def test_the_next_process_finds_what_was_held_in_its_order_and_clears_what_was_half_held(
    spot: Spot, held: Held, tmp_path: Path
) -> None:
    file = tmp_path / "out" / "model.pt"
    file.write_bytes(b"x")
    later = hold(Spot(file, "model.pt"), stamp(Spot(file, "model.pt")), tmp_path / "held")
    (tmp_path / "held" / ".making-1" / "checkpoint-9").mkdir(parents=True)
    (tmp_path / "held" / "broken").mkdir()
    assert list(held_in(tmp_path / "held")) == [held, later]
    assert sorted(path.name for path in (tmp_path / "held").iterdir()) == sorted(
        path.name for path in (held.folder, later.folder if later else held.folder)
    )
    assert list(held_in(tmp_path / "none")) == []
