"""When a folder counts as finished: never before its writer is done, and always in the end."""

from __future__ import annotations

import json
import os
import shutil
import struct
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorakit.checkpoints.finished import MARKERS, is_adapter, look_at
from lorakit.checkpoints.whole import progress
from tests.checkpoints.writings import distributed_metadata, torch_bytes
from tests.folders import factors, linear_modules, write_adapter, write_base

LATER = 4 * 10**18  # nanoseconds
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


def test_a_whole_model_is_judged_as_an_adapter_is(tmp_path: Path) -> None:
    folder = write_base(tmp_path / "checkpoint-500")
    found = look_at(folder)
    assert (found.state, found.kind, found.writer) == ("whole", "regular", "transformers")
    (folder / STATE).write_text('{"global_step": 500}')
    os.utime(folder / STATE, ns=(LATER, LATER))
    found = look_at(folder)
    assert (found.state, found.kind, found.vouched_by) == ("finished", "regular", STATE)


def test_the_progress_of_weights_is_told_in_their_own_unit(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "checkpoint-5")
    (length,) = struct.unpack("<Q", (folder / WEIGHTS).read_bytes()[:8])
    big = json.dumps({"w": {"dtype": "U8", "shape": [83_900_000], "data_offsets": [0, 83_900_000]}}).encode()
    with (folder / WEIGHTS).open("wb") as file:
        file.write(struct.pack("<Q", len(big)) + big)
        file.truncate(4_100_000)
    assert look_at(folder).reason == "adapter_model.safetensors: 4.1 of 83.9 MB"
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", length) + b"{")
    assert look_at(folder).reason.startswith("adapter_model.safetensors: cut short: 9 bytes are there, and its header")


@pytest.mark.parametrize(
    ("there", "whole", "said"),
    [
        (0, 512, "0 of 512 bytes"),
        (999, 1000, "999 of 1000 bytes"),
        (99_999_999, 10**8, "99999999 of 100000000 bytes"),
        (10**9 - 10**6, 10**9, "999.0 of 1000.0 MB"),
        (5 * 10**8, 10**9, "0.5 of 1.0 GB"),
    ],
)
def test_progress_in_words(there: int, whole: int, said: str) -> None:
    assert progress(there, whole) == said


@pytest.mark.parametrize(
    "name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "rng_state_1.pth", "training_args.bin"]
)
def test_a_torch_file_without_its_end_is_cut_short(done: Path, tmp_path: Path, name: str) -> None:
    folder = finish_by_hand(done, tmp_path / "checkpoint-500")
    whole = torch_bytes({"state": 1})
    for content in (b"", b"P", whole[:50], whole[:-1], bytes(len(whole))):
        (folder / name).write_bytes(content)
        os.utime(folder / name, ns=(1, 1))
        found = look_at(folder)
        assert found.state == "incomplete"
        assert found.reason.startswith(f"{name}: cut short")
    (folder / name).write_bytes(whole)
    os.utime(folder / name, ns=(1, 1))
    assert state(folder) == "finished"


def test_another_ranks_file_may_come_after_the_last_of_the_first(done: Path, tmp_path: Path) -> None:
    folder = finish_by_hand(done, tmp_path / "checkpoint-500")
    before = look_at(folder).signature
    (folder / "rng_state_1.pth").write_bytes(torch_bytes({"state": 1}))
    os.utime(folder / "rng_state_1.pth", ns=(LATER, LATER))
    assert state(folder) == "finished"
    assert look_at(folder).signature != before
    os.utime(folder / "optimizer.pt", ns=(LATER, LATER))
    assert look_at(folder).reason == f"optimizer.pt is newer than {STATE}, its writer's last file"


def test_a_temporary_file_that_is_newer_than_the_last_file_says_that_somebody_writes(
    done: Path, tmp_path: Path
) -> None:
    folder = finish_by_hand(done, tmp_path / "checkpoint-500")
    (folder / ".tmpAbCdEf").touch()
    os.utime(folder / ".tmpAbCdEf", ns=(LATER, LATER))
    assert (state(folder), look_at(folder).reason) == ("incomplete", ".tmpAbCdEf is being written")
    os.utime(folder / ".tmpAbCdEf", ns=(1, 1))  # a killed writer left it, and another finished since
    assert state(folder) == "finished"


@pytest.mark.parametrize(
    "name", ["tmp-checkpoint-500", ".tmp-500", "checkpoint-500.partial", "c.orbax-checkpoint-tmp-1"]
)
def test_a_folder_with_a_temporary_name_is_incomplete(done: Path, tmp_path: Path, name: str) -> None:
    assert state(finish_by_hand(done, tmp_path / name)) == "incomplete"


def test_what_belongs_to_another_user_is_told_with_the_cure(
    done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = finish_by_hand(done, tmp_path / "checkpoint-500")
    opened = open

    def denied(file: object, *more: object, **named: object) -> object:
        if str(file).endswith(WEIGHTS):
            raise PermissionError(13, "Permission denied", str(file))
        return opened(file, *more, **named)  # type: ignore[call-overload]

    monkeypatch.setattr("builtins.open", denied)
    found = look_at(folder)
    assert (found.state, found.signature) == ("incomplete", "")
    for word in (WEIGHTS, "0600", "safetensors 0.8", "one user", "chmod"):
        assert word in found.reason


def test_what_lorakit_wrote_is_finished_whatever_its_times(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "mixed")
    (folder / "lorakit.json").write_text("{}")
    os.utime(folder / "lorakit.json", ns=(1, 1))
    found = look_at(folder)
    assert (found.state, found.writer, found.kind) == ("finished", "lorakit", "adapter")
    (folder / "lorakit.json").write_text("{")
    assert look_at(folder).state == "whole"


def test_a_distributed_checkpoint_needs_every_file_that_its_metadata_names(tmp_path: Path) -> None:
    folder = tmp_path / "step-5"
    folder.mkdir()
    (folder / "__0_0.distcp").write_bytes(bytes(64))
    assert look_at(folder).reason == ".metadata is not there yet"
    (folder / ".metadata").write_bytes(distributed_metadata(0)[:-3])
    assert (state(folder), look_at(folder).reason) == ("incomplete", ".metadata is only partly there")
    (folder / ".metadata").write_bytes(distributed_metadata(0))
    assert look_at(folder).reason == "__1_0.distcp is not there yet"
    (folder / "__1_0.distcp").write_bytes(bytes(40))
    os.utime(folder / ".metadata", ns=(LATER, LATER))
    assert look_at(folder).reason == "__1_0.distcp is cut short: 40 of 64 bytes"
    (folder / "__1_0.distcp").write_bytes(bytes(64))
    assert state(folder) == "finished"


def test_an_earlier_step_of_deepspeed_is_finished_when_latest_names_a_later_one(tmp_path: Path) -> None:
    for step in (8, 16):
        folder = tmp_path / f"global_step{step}"
        folder.mkdir()
        (folder / "mp_rank_00_model_states.pt").write_bytes(torch_bytes({"module": {}}))
    assert state(tmp_path / "global_step8") == "whole"
    (tmp_path / "latest").write_text("global_step8")
    os.utime(tmp_path / "latest", ns=(LATER, LATER))
    assert [state(tmp_path / f"global_step{step}") for step in (8, 16)] == ["finished", "whole"]
    (tmp_path / "latest").write_text("global_step16\n")
    os.utime(tmp_path / "latest", ns=(LATER, LATER))
    assert [state(tmp_path / f"global_step{step}") for step in (8, 16)] == ["finished", "finished"]


def test_links_that_go_round_are_no_error(done: Path, tmp_path: Path) -> None:
    folder = finish_by_hand(done, tmp_path / "checkpoint-500")
    (folder / "pytorch_model_fsdp_0").symlink_to(folder)
    assert look_at(folder).reason


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


def test_the_checkpoints_in_a_run_are_no_part_of_what_is_in_its_root(done: Path, tmp_path: Path) -> None:
    root = finish_by_hand(done, tmp_path / "sql")
    before = look_at(root)
    later = write_adapter(root / "checkpoint-600")
    os.utime(later / WEIGHTS, ns=(LATER, LATER))
    assert look_at(root) == before
    assert before.state == "finished"


def test_every_adapter_of_a_checkpoint_has_to_be_whole(done: Path, tmp_path: Path) -> None:
    folder = finish_by_hand(done, tmp_path / "checkpoint-500")
    second = write_adapter(folder / "second")
    for file in second.iterdir():
        os.utime(file, ns=(1, 1))
    assert state(folder) == "finished"
    (second / WEIGHTS).write_bytes(b"cut")
    assert look_at(folder).reason.startswith("second/adapter_model.safetensors: cut short")
