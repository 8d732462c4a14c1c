"""When a folder counts as finished: never before its writer is done, and always in the end."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorakit.checkpoints.finished import MARKERS, is_adapter, look_at
from tests.folders import factors, linear_modules, write_adapter

WEIGHTS, CONFIG, STATE = "adapter_model.safetensors", "adapter_config.json", "trainer_state.json"
# transformers 5.23 with PEFT 0.21, rank 0 (facts/serving-and-checkpoints.md §2.1)
TRAINER_ORDER = (
    "README.md", WEIGHTS, CONFIG, "tokenizer_config.json", "tokenizer.json", "chat_template.jinja",
    "training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth", STATE,
)  # fmt: skip


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint as the Trainer leaves it."""
    folder = write_adapter(tmp_path_factory.mktemp("done") / "checkpoint-500", factors(linear_modules(1)))
    for name in TRAINER_ORDER:
        if not (folder / name).exists():
            (folder / name).write_text(json.dumps({"global_step": 500, "log_history": []}))
    return folder


class Clock:
    """Gives each file that is written a time of its own."""

    def __init__(self) -> None:
        self.now = 10**18

    def stamp(self, file: Path) -> None:
        self.now += 1000
        os.utime(file, ns=(self.now, self.now))


def write(done: Path, folder: Path, name: str, clock: Clock, part: float = 1.0) -> None:
    content = (done / name).read_bytes()
    (folder / name).write_bytes(content[: int(len(content) * part)])
    clock.stamp(folder / name)


def state(folder: Path) -> str:
    return look_at(folder).state


def finish_by_hand(done: Path, folder: Path) -> Path:
    shutil.copytree(done, folder, dirs_exist_ok=True)
    clock = Clock()
    for name in TRAINER_ORDER:
        clock.stamp(folder / name)
    return folder


def test_the_trainers_order_is_unfinished_at_every_file_but_the_last(done: Path, tmp_path: Path) -> None:
    folder, clock = tmp_path / "checkpoint-500", Clock()
    folder.mkdir()
    for name in TRAINER_ORDER[:-1]:
        for part in (0.0, 0.3, 0.999):
            write(done, folder, name, clock, part)
            assert state(folder) != "finished"
        write(done, folder, name, clock)
        assert state(folder) != "finished"
    write(done, folder, STATE, clock, 0.5)
    assert state(folder) == "incomplete"
    write(done, folder, STATE, clock)
    assert state(folder) == "finished"


@settings(max_examples=150)
@given(data=st.data())
def test_no_order_of_writing_is_finished_before_weights_config_and_the_last_file_are_whole(
    done: Path, data: st.DataObject
) -> None:
    """Any interleaving of pieces of all files, the marker's last piece anywhere: a copy by rsync, another rank."""
    pieces = data.draw(st.permutations([(name, part) for name in (WEIGHTS, CONFIG, "tokenizer.json", STATE)
                                        for part in (0.4, 1.0)]))  # fmt: skip
    seen: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as parent:
        folder, clock = Path(parent) / "checkpoint-500", Clock()
        folder.mkdir()
        last_change: dict[str, int] = {}
        for turn, (name, part) in enumerate(pieces):
            part = max(part, seen.get(name, 0.0))  # files only grow
            seen[name] = part
            last_change[name] = turn
            write(done, folder, name, clock, part)
            whole = all(seen.get(needed) == 1.0 for needed in (WEIGHTS, CONFIG, STATE))
            newest = all(last_change.get(STATE, -1) >= at for at in last_change.values())
            found = state(folder)
            assert (found == "finished") == (whole and newest)
            if not all(seen.get(needed) == 1.0 for needed in (WEIGHTS, CONFIG)):
                assert found == "incomplete"
        assert state(folder) in ("finished", "whole")
        write(done, folder, STATE, clock)
        assert state(folder) == "finished"


def test_a_folder_written_over_in_place_is_not_finished_until_its_marker_is_new(done: Path, tmp_path: Path) -> None:
    folder = finish_by_hand(done, tmp_path / "checkpoint-500")
    assert state(folder) == "finished"
    clock = Clock()
    clock.now *= 2
    for name in (WEIGHTS, CONFIG, "tokenizer.json"):
        write(done, folder, name, clock, 0.5 if name == WEIGHTS else 1.0)
        assert state(folder) == "incomplete"
    write(done, folder, WEIGHTS, clock)
    assert state(folder) == "whole"
    write(done, folder, STATE, clock)
    assert state(folder) == "finished"


def test_the_signature_changes_with_every_rewrite_even_of_equal_size(done: Path, tmp_path: Path) -> None:
    folder = finish_by_hand(done, tmp_path / "checkpoint-500")
    before = look_at(folder)
    assert look_at(folder) == before
    for name in (WEIGHTS, CONFIG, STATE):
        content = (folder / name).read_bytes()
        (folder / name).unlink()
        (folder / name).write_bytes(content)
        after = look_at(folder)
        assert after.signature != before.signature
        assert (after.weights_signature != before.weights_signature) == (name != STATE)
        before = after


def test_the_trainers_sentinel_means_unfinished(done: Path, tmp_path: Path) -> None:
    folder = finish_by_hand(done, tmp_path / "checkpoint-500")
    (folder / "checkpoint-is-incomplete.txt").touch()
    assert state(folder) == "incomplete"


@pytest.mark.parametrize("marker", ["STABLE", ".done", "commit_success.txt"])
def test_other_trainers_markers_count_when_they_are_the_newest(done: Path, tmp_path: Path, marker: str) -> None:
    folder = write_adapter(tmp_path / "checkpoint-1", factors(linear_modules(1)))
    assert state(folder) == "whole"
    (folder / marker).touch()
    os.utime(folder / marker, ns=(10**18, 10**18))
    assert state(folder) == "whole"
    os.utime(folder / marker, ns=(10**19 // 2, 10**19 // 2))
    assert state(folder) == "finished"
    assert marker in MARKERS


def test_a_state_of_another_step_vouches_for_nothing(done: Path, tmp_path: Path) -> None:
    folder = finish_by_hand(done, tmp_path / "checkpoint-600")
    assert state(folder) == "whole"
    assert state(finish_by_hand(done, tmp_path / "sql")) == "finished"


def test_without_any_marker_a_whole_folder_is_not_finished_at_one_look(tmp_path: Path) -> None:
    assert state(write_adapter(tmp_path / "chat")) == "whole"


@pytest.mark.parametrize("name", [WEIGHTS, CONFIG])
@pytest.mark.parametrize("content", [b"", b"{", b"\0" * 100, b"[]", b"\xff" * 20])
def test_a_file_that_cant_be_read_is_incomplete_and_says_why(
    done: Path, tmp_path: Path, name: str, content: bytes
) -> None:
    folder = finish_by_hand(done, tmp_path / "checkpoint-500")
    (folder / name).write_bytes(content)
    found = look_at(folder)
    assert found.state == "incomplete"
    assert name in found.reason


def test_weights_that_grew_beyond_their_header_are_incomplete(done: Path, tmp_path: Path) -> None:
    folder = finish_by_hand(done, tmp_path / "checkpoint-500")
    with (folder / WEIGHTS).open("ab") as stream:
        stream.write(b"more")
    assert state(folder) == "incomplete"


def test_pickled_adapters_are_refused_with_the_cure_and_not_opened(done: Path, tmp_path: Path) -> None:
    for name in ("adapter_model.bin", "adapter_model.pt"):
        folder = finish_by_hand(done, tmp_path / name)
        (folder / WEIGHTS).unlink()
        (folder / name).touch(mode=0)
        found = look_at(folder)
        assert found.state == "refused"
        assert name in found.reason
        assert "safetensors" in found.reason


def test_safetensors_beside_a_pickle_are_used(done: Path, tmp_path: Path) -> None:
    folder = finish_by_hand(done, tmp_path / "checkpoint-500")
    (folder / "adapter_model.bin").touch()
    assert state(folder) == "finished"


@pytest.mark.parametrize(
    "file", ["model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", ".metadata"]
)
def test_a_regular_checkpoint_is_refused_with_the_command_that_helps(tmp_path: Path, file: str) -> None:
    folder = tmp_path / "checkpoint-500"
    folder.mkdir()
    (folder / file).touch()
    found = look_at(folder)
    assert found.state == "refused"
    assert f"lorakit extract '{folder}'" in found.reason
    assert f"lorakit convert '{folder}'" in found.reason


def test_an_adapter_with_the_models_own_files_beside_it_is_an_adapter(done: Path, tmp_path: Path) -> None:
    folder = finish_by_hand(done, tmp_path / "checkpoint-500")
    (folder / "latest").touch()  # DeepSpeed's
    assert state(folder) == "finished"


@pytest.mark.parametrize("make", ["missing", "file", "empty", "loop"])
def test_what_is_no_adapter_folder_is_incomplete_not_an_error(tmp_path: Path, make: str) -> None:
    folder = tmp_path / "checkpoint-500"
    if make == "file":
        folder.touch()
    elif make == "empty":
        folder.mkdir()
    elif make == "loop":
        folder.symlink_to(folder)
    assert state(folder) == "incomplete"
    assert not is_adapter(folder)


def test_a_dangling_link_is_incomplete(done: Path, tmp_path: Path) -> None:
    folder = finish_by_hand(done, tmp_path / "checkpoint-500")
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).symlink_to(tmp_path / "nowhere")
    assert state(folder) == "incomplete"


def test_a_weights_folder_is_incomplete(done: Path, tmp_path: Path) -> None:
    folder = finish_by_hand(done, tmp_path / "checkpoint-500")
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).mkdir()
    assert state(folder) == "incomplete"
