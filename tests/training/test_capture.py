"""A trainer with its checkpoints kept: whatever becomes of the trainer, the capture, or the disk."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lorakit.errors import Incomplete
from lorakit.store.kept import find_kept
from lorakit.store.verify import verify_store
from lorakit.training.capture import adopt, capture, lay_out, run_named_for
from lorakit.training.capturing.captured import new_capture
from lorakit.training.capturing.keeping import Event, Keeping
from tests.checkpoints.written import write_checkpoint
from tests.disks import small_disk_at
from tests.readme import ROOT
from tests.training.capturing.captures import (
    captured,
    capturing,
    files_of,
    kept_of,
    kept_steps,
    said,
    template,
    writer,
)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


def left_behind(home: Path) -> list[Path]:
    return list((home / "captures").iterdir()) if (home / "captures").is_dir() else []


def test_every_checkpoint_is_kept_as_it_was_written_though_the_trainer_rotates(tmp_path: Path, home: Path) -> None:
    ended = captured(home, "--", *writer(template(tmp_path), steps=12, pause=0.05, limit=1))
    assert ended.returncode == 0, ended.stderr
    wrote = said(ended.stdout)
    assert len(wrote) == 12
    kept = kept_steps(home)
    lost = {step for step in wrote if f"lost checkpoint-{step}:" in ended.stderr}
    assert kept.keys() | lost == wrote.keys()
    assert not kept.keys() & lost
    assert {step: wrote[step] for step in kept} == kept
    assert left_behind(home) == []


def test_a_line_says_what_was_kept(tmp_path: Path, home: Path) -> None:
    ended = captured(home, "--run", "sql", "--", *writer(template(tmp_path), steps=1))
    (kept,) = kept_of(home, "sql")
    assert ended.stderr.startswith(f"lorakit: kept {kept.id}: step 1, train loss 2.5, eval loss 1.5, ")
    assert (kept.label, kept.kind, kept.writer, kept.facts.eval_loss) == ("step-1", "adapter", "transformers", 1.5)


def test_the_exit_code_and_the_streams_are_the_programs(tmp_path: Path, home: Path) -> None:
    script = "import os, sys; print(sys.stdin.read()); print('err', file=sys.stderr); sys.exit(3)"
    ended = captured(home, "--", sys.executable, "-c", script, input="hello")
    assert (ended.returncode, ended.stdout, ended.stderr) == (3, "hello\n", "err\n")
    assert captured(home, "--", *writer(template(tmp_path), steps=2, code=3)).returncode == 3
    assert len(kept_of(home)) == 2


def test_one_file_that_is_written_over_gives_its_versions(tmp_path: Path, home: Path) -> None:
    script = """
import os, time, torch
path = os.path.join(os.environ["FLEXAI_OUTPUT_CHECKPOINT_DIR"], "model.pt")
for step in range(4):
    torch.save({"model": {"weight": torch.full((8,), float(step))}, "global_step": step}, path)
    time.sleep(0.6 if step < 3 else 0)
"""
    (tmp_path / "loop.py").write_text(script)
    ended = captured(home, "--", sys.executable, str(tmp_path / "loop.py"))
    assert ended.returncode == 0, ended.stderr
    import torch

    kept = {one.step: torch.load(one.folder / "model.pt", weights_only=True) for one in kept_of(home, "loop")}
    assert {step: float(state["model"]["weight"][0]) for step, state in kept.items()} == {0: 0, 1: 1, 2: 2, 3: 3}
    assert left_behind(home) == []


def test_a_real_trainer_writes_where_it_is_told_and_resumes_from_what_was_kept(tmp_path: Path, home: Path) -> None:
    script = """
import hashlib, json, os
from pathlib import Path
from transformers import TrainerCallback
from tests.training.trainer import tiny_trainer

class Said(TrainerCallback):
    def on_save(self, args, state, control, **others):
        folder = Path(args.output_dir, f"checkpoint-{state.global_step}")
        files = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}
        print(json.dumps({"step": state.global_step, "files": files}), flush=True)

output = Path(os.environ["FLEXAI_OUTPUT_CHECKPOINT_DIR"])
trainer = tiny_trainer(output, steps=8, callbacks=[Said()], save_strategy="steps", save_steps=1, save_total_limit=1)
trainer.train(resume_from_checkpoint=os.environ.get("FLEXAI_INPUT_CHECKPOINT_DIR"))
trainer.save_model()
"""
    (tmp_path / "train.py").write_text(script)
    train = ["--", sys.executable, str(tmp_path / "train.py")]
    ended = captured(home, *train, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
    assert ended.returncode == 0, ended.stderr
    wrote, kept = _of_trainer(ended.stdout), {one.step: one for one in kept_of(home, "train") if one.label != "final"}
    lost = {step for step in wrote if f"lost checkpoint-{step}:" in ended.stderr}
    assert kept.keys() | lost == wrote.keys() == set(range(1, 9))
    assert all(files_of(one.folder) == wrote[one.step] for one in kept.values() if one.step)
    assert all((one.writer, one.facts.step) == ("transformers", one.step) for one in kept.values())
    final = find_kept("train@final", home)
    assert final is not None
    assert (final.folder / "adapter_model.safetensors").is_file()
    middle = sorted(step for step in kept if step is not None and step < 8)[0]
    again = captured(
        home, "-C", f"train@step-{middle}", "--run", "again", *train, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1"
    )
    assert again.returncode == 0, again.stderr
    resumed = _of_trainer(again.stdout)
    assert resumed.keys() == set(range(middle + 1, 9))
    assert resumed[8]["adapter_model.safetensors"] == wrote[8]["adapter_model.safetensors"]


def _of_trainer(out: str) -> dict[int, dict[str, str]]:
    return said("\n".join(line for line in out.splitlines() if line.startswith('{"step"')))


def test_a_killed_script_keeps_what_it_finished_and_what_it_did_not_is_left_and_named(
    tmp_path: Path, home: Path
) -> None:
    finished = template(tmp_path)
    script = f"""
import os, shutil, signal
from pathlib import Path
output = Path(os.environ["LORAKIT_OUTPUT_CHECKPOINT_DIR"])
shutil.copytree({str(finished)!r}, output / "checkpoint-1")
(output / "checkpoint-2").mkdir()
content = Path({str(finished)!r}, "adapter_model.safetensors").read_bytes()
(output / "checkpoint-2" / "adapter_model.safetensors").write_bytes(content[:-50])
os.kill(os.getpid(), signal.SIGKILL)
"""
    ended = captured(home, "--run", "sql", "--", sys.executable, "-c", script)
    assert ended.returncode == 137
    assert kept_steps(home, "sql") == {1: files_of(finished)}
    assert "left checkpoint-2 where it is: adapter_" in ended.stderr
    (left,) = left_behind(home)
    assert f"what is not in the store is in '{left}/output'" in ended.stderr
    assert [path.name for path in (left / "output").iterdir()] == ["checkpoint-2"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_script_that_ignores_a_signal_goes_on_and_so_does_its_capture(
    tmp_path: Path, home: Path, number: signal.Signals
) -> None:
    script = f"""
import os, shutil, signal, time
signal.signal({int(number)}, signal.SIG_IGN)
print("ready", flush=True)
time.sleep(1.0)
shutil.copytree({str(template(tmp_path))!r}, os.environ["LORAKIT_OUTPUT_CHECKPOINT_DIR"] + "/checkpoint-1")
"""
    with capturing(home, "--run", "sql", "--", sys.executable, "-c", script) as process:
        assert process.stdout
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        process.wait(60)
    assert process.returncode == 0
    assert len(kept_of(home, "sql")) == 1


def test_from_a_kept_checkpoint_the_program_starts_with_the_same_bytes_which_it_may_change(
    tmp_path: Path, home: Path
) -> None:
    captured(home, "--", *writer(template(tmp_path), steps=3))
    script = """
import hashlib, json, os
from pathlib import Path
folder = Path(os.environ["FLEXAI_INPUT_CHECKPOINT_DIR"])
assert os.environ["LORAKIT_INPUT_CHECKPOINT_DIR"] == str(folder)
print(json.dumps({path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}))
for path in folder.iterdir():
    path.write_text("changed")
    path.unlink()
"""
    kept = {one.step: one for one in kept_of(home)}
    for reference, step in (("writer@step-2", 2), ("writer", 3), (kept[1].id, 1), (kept[1].uid, 1)):
        ended = captured(home, "-C", reference, "--", sys.executable, "-c", script)
        assert json.loads(ended.stdout) == files_of(kept[step].folder), ended.stderr
        assert kept_steps(home)[step] == files_of(kept[step].folder)
    assert left_behind(home) == []


def test_from_a_run_on_disk_it_starts_from_the_newest_that_is_finished(tmp_path: Path, home: Path) -> None:
    write_checkpoint(tmp_path / "runs" / "sql" / "checkpoint-5")
    newest = write_checkpoint(tmp_path / "runs" / "sql" / "checkpoint-10", seed=2)
    (tmp_path / "runs" / "sql" / "checkpoint-15").mkdir()
    show = (
        f"cmp {newest}/adapter_model.safetensors $LORAKIT_INPUT_CHECKPOINT_DIR/adapter_model.safetensors && echo same"
    )
    assert captured(home, "-C", str(tmp_path / "runs" / "sql"), "--", "sh", "-c", show).stdout == "same\n"
    ended = captured(home, "-C", "no-such", "--", "true")
    assert ended.returncode == 3


def test_what_is_not_finished_is_not_started_from(tmp_path: Path) -> None:
    broken = write_checkpoint(tmp_path / "checkpoint-5")
    (broken / "adapter_model.safetensors").write_bytes(b"short")
    with pytest.raises(Incomplete, match=r"can't be started from: adapter_model\.safetensors"):
        lay_out(broken, tmp_path / "input")


def test_a_named_folder_is_used_and_stays_and_what_was_in_it_before_is_left_alone(tmp_path: Path, home: Path) -> None:
    write_checkpoint(tmp_path / "out" / "checkpoint-90")
    ended = captured(home, "--dir", str(tmp_path / "out"), "--", *writer(template(tmp_path), steps=2))
    assert ended.returncode == 0
    assert kept_steps(home).keys() == {1, 2}
    assert sorted(os.listdir(tmp_path / "out")) == ["checkpoint-1", "checkpoint-2", "checkpoint-90"]
    assert left_behind(home) == []


@pytest.mark.parametrize("variable", ["LORAKIT_OUTPUT_CHECKPOINT_DIR", "FLEXAI_OUTPUT_CHECKPOINT_DIR"])
def test_a_folder_that_the_environment_names_is_used(tmp_path: Path, home: Path, variable: str) -> None:
    ended = captured(home, "--", *writer(template(tmp_path), steps=1), **{variable: str(tmp_path / "out")})
    assert ended.returncode == 0, ended.stderr
    assert (tmp_path / "out" / "checkpoint-1").is_dir()
    assert kept_steps(home).keys() == {1}


def test_the_last_save_in_the_root_is_final_without_the_checkpoints_beside_it(tmp_path: Path, home: Path) -> None:
    source = template(tmp_path)
    script = f"""
import os, shutil
output = os.environ["LORAKIT_OUTPUT_CHECKPOINT_DIR"]
shutil.copytree({str(source)!r}, output + "/checkpoint-1")
for name in ("adapter_model.safetensors", "adapter_config.json"):
    shutil.copy({str(source)!r} + "/" + name, output)
"""
    ended = captured(home, "--run", "sql", "--", sys.executable, "-c", script)
    assert ended.returncode == 0
    final = find_kept("sql@final", home)
    assert final is not None, ended.stderr
    assert sorted(files_of(final.folder)) == ["adapter_config.json", "adapter_model.safetensors"]
    assert find_kept("sql", home) == final
    assert left_behind(home) == []


def test_what_a_program_leaves_running_is_said_and_the_next_capture_keeps_what_that_finished(
    tmp_path: Path, home: Path
) -> None:
    source = template(tmp_path)
    script = f"(sleep 4; cp -r {source} $LORAKIT_OUTPUT_CHECKPOINT_DIR/checkpoint-1) > /dev/null 2>&1 &"
    ended = captured(home, "--run", "sql", "--", "sh", "-c", script)
    assert ended.returncode == 0
    assert "what was started still runs" in ended.stderr
    (capture,) = _captures(home)
    while capture.trainer_lives:
        time.sleep(0.1)
    again = captured(home, "--", "true")
    assert again.stderr.startswith("lorakit: kept sql@step-1-"), again.stderr
    assert left_behind(home) == []


def test_what_was_started_and_writes_on_is_waited_for(tmp_path: Path, home: Path) -> None:
    source = template(tmp_path)
    script = f"(sleep 0.5; cp -r {source} $LORAKIT_OUTPUT_CHECKPOINT_DIR/checkpoint-1) > /dev/null 2>&1 &"
    ended = captured(home, "--run", "sql", "--", "sh", "-c", script)
    assert kept_steps(home, "sql") == {1: files_of(source)}, ended.stderr
    assert left_behind(home) == []


def test_where_a_checkpoint_came_from_is_remembered(tmp_path: Path, home: Path) -> None:
    captured(home, "--dir", str(tmp_path / "out"), "--", *writer(template(tmp_path), steps=1))
    assert [kept.source for kept in kept_of(home)] == [str(tmp_path / "out" / "checkpoint-1")]


@pytest.mark.parametrize("seed", [0, 1, 3, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(4, 24))])
def test_a_killed_capture_leaves_the_trainer_alone_and_the_next_one_keeps_what_it_finished(
    tmp_path: Path, home: Path, seed: int
) -> None:
    moment = random.Random(seed).uniform(0.1, 1.2)
    printed = tmp_path / "printed"
    with printed.open("w") as out, capturing(
        home, "--", *writer(template(tmp_path), steps=8, pause=0.1), stdout=out
    ) as process:  # fmt: skip
        time.sleep(moment)
        process.kill()
        process.wait()
    while any(other.trainer_lives for other in _captures(home)):
        time.sleep(0.05)
    wrote = said(printed.read_text())
    assert len(wrote) in (0, 8)  # it went on to its end, if it was started
    ended = captured(home, "--", "true")
    assert ended.returncode == 0, ended.stderr
    assert kept_steps(home) == wrote
    assert left_behind(home) == []
    assert not wrote or os.listdir(home / "tmp") == []
    assert verify_store(home).wrong == ()


def test_a_capture_that_is_killed_while_its_trainer_rotates_loses_nothing_that_it_held(
    tmp_path: Path, home: Path
) -> None:
    printed = tmp_path / "printed"
    with printed.open("w") as out, capturing(
        home, "--", *writer(template(tmp_path), steps=10, pause=0.15, limit=1), stdout=out
    ) as process:  # fmt: skip
        time.sleep(1.2)
        process.kill()
        process.wait()
    before = set(kept_steps(home))
    captured(home, "--", "true")  # while the trainer goes on
    while any(other.trainer_lives for other in _captures(home)):
        time.sleep(0.05)
    captured(home, "--", "true")
    wrote, kept = said(printed.read_text()), kept_steps(home)
    assert kept == {step: wrote[step] for step in kept}
    assert before <= kept.keys()
    assert max(wrote) in kept
    assert left_behind(home) == []


def test_a_full_disk_is_said_and_nothing_is_lost(tmp_path: Path) -> None:
    source, out = template(tmp_path), tmp_path / "out"
    with small_disk_at(tmp_path / "small", 400) as home:
        ended = captured(home, "--dir", str(out), "--", *writer(source, steps=60, pause=0.05, limit=2))
        assert ended.returncode == 0
        assert "no space left" in ended.stderr or "is full" in ended.stderr
        assert "could not keep checkpoint-" in ended.stderr
        held = {path.parent.name for path in out.glob(".lorakit/*/*/checkpoint-*")}
        assert held
        (tmp_path / "larger").mkdir()
        subprocess.run(["mount", "-o", "remount,size=4m", str(home)], check=True)
        again = captured(home, "--", "true")
        assert "kept writer@step-" in again.stderr, again.stderr
        wrote, kept = said(ended.stdout), kept_steps(home)
        lost = {step for step in wrote if f"lost checkpoint-{step}:" in ended.stderr}
        assert kept.keys() | lost == wrote.keys()
        assert {step: wrote[step] for step in kept} == kept
        assert not list(out.glob(".lorakit"))


@pytest.mark.parametrize(
    ("command", "name"),
    [
        ("python train.py --lr 1", "train"), ("torchrun --nproc_per_node 2 src/my_sft.py", "my_sft"),
        ("bash run.sh", "run"), ("/opt/bin/trainer --x", "trainer"), ("python -c pass", "python"),
        ("python -m sql.train --x 1", "train"), ("accelerate launch --config_file a.yaml src/sft.py", "sft"),
        ("python -m torch.distributed.run --module sql.train", "train"),
        ("python best.py", "best-run"), ("python ünder_score.py", "nder_score"), ("./_.py", "run"),
    ],
)  # fmt: skip
def test_a_run_is_called_as_its_script(command: str, name: str) -> None:
    assert run_named_for(command.split()) == name


def test_in_python_it_tells_of_each_and_gives_the_code_back(tmp_path: Path, home: Path) -> None:
    events: list[Event] = []
    ended = capture(
        ["sh", "-c", f"cp -r {template(tmp_path)} $LORAKIT_OUTPUT_CHECKPOINT_DIR/checkpoint-1; exit 4"],
        run="sql", home=home, environ=os.environ, say=events.append,
    )  # fmt: skip
    assert (ended.code, ended.left) == (4, None)
    assert [event.name for event in events] == ["checkpoint-1"]
    assert adopt(home, events.append) == []


def test_a_program_that_leaves_its_process_group_is_followed_by_the_next_capture(tmp_path: Path, home: Path) -> None:
    source = template(tmp_path)
    script = f"sleep 4; cp -r {source} $LORAKIT_OUTPUT_CHECKPOINT_DIR/checkpoint-1"
    ended = captured(home, "--run", "sql", "--", "setsid", "sh", "-c", script + " > /dev/null 2>&1 < /dev/null")
    assert "what was started still runs" in ended.stderr
    while any(other.trainer_lives for other in _captures(home)):
        time.sleep(0.1)
    captured(home, "--", "true")
    assert kept_steps(home, "sql") == {1: files_of(source)}


def test_a_note_that_can_not_be_written_ends_nothing(tmp_path: Path, home: Path) -> None:
    first, second = (write_checkpoint(tmp_path / f"checkpoint-{step}", seed=step) for step in (1, 2))
    script = f"""
ln -s /dev/full $LORAKIT_OUTPUT_CHECKPOINT_DIR/../taken
cp -a {first} $LORAKIT_OUTPUT_CHECKPOINT_DIR; sleep 1.5; rm -r {home}/captures
mkdir -p $LORAKIT_OUTPUT_CHECKPOINT_DIR; cp -a {second} $LORAKIT_OUTPUT_CHECKPOINT_DIR; sleep 1.5; exit 7
"""
    ended = captured(home, "--run", "sql", "--", "sh", "-c", script)
    assert ended.returncode == 7, ended.stderr
    assert kept_steps(home, "sql") == {1: files_of(first), 2: files_of(second)}, ended.stderr
    assert left_behind(home) == []


def test_a_signal_ends_the_wait_for_what_goes_on_writing(tmp_path: Path, home: Path) -> None:
    script = f"""
import os, shutil, signal, subprocess, sys, time
if sys.argv[1:]:
    for step in range(1, 100):
        target = os.environ["LORAKIT_OUTPUT_CHECKPOINT_DIR"] + f"/checkpoint-{{step}}"
        shutil.copytree({str(template(tmp_path))!r}, target)
        time.sleep(0.5)
else:
    quiet = subprocess.DEVNULL
    subprocess.Popen([sys.executable, __file__, "on"], stdin=quiet, stdout=quiet, stderr=quiet)
    print("done", flush=True)
"""
    (tmp_path / "on.py").write_text(script)
    with capturing(home, "--", sys.executable, str(tmp_path / "on.py")) as process:
        assert process.stdout
        assert process.stdout.readline() == "done\n"
        time.sleep(3.5)
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        process.wait(30)
    assert process.returncode == 0
    assert {kept.step for kept in kept_of(home, "on")} >= {1, 2, 3}


def test_what_is_no_checkpoint_is_named_once(tmp_path: Path, home: Path) -> None:
    script = f"""
mkdir $LORAKIT_OUTPUT_CHECKPOINT_DIR/runs; echo x > $LORAKIT_OUTPUT_CHECKPOINT_DIR/runs/events
cp -r {template(tmp_path)} $LORAKIT_OUTPUT_CHECKPOINT_DIR/checkpoint-1
"""
    ended = captured(home, "--run", "sql", "--", "sh", "-c", script)
    (left,) = left_behind(home)
    *_, last = ended.stderr.splitlines()
    assert last == f"lorakit: what is not in the store is in '{left}/output'"
    assert "left " not in ended.stderr
    assert captured(home, "--", "true").stderr == ""
    assert (left / "output" / "runs" / "events").is_file()


def test_a_capture_that_nobody_can_read_is_named(tmp_path: Path, home: Path) -> None:
    write_checkpoint(home / "captures" / "0123456789ab" / "output" / "checkpoint-1")
    ended = captured(home, "--", "true")
    assert ended.stderr == (
        f"lorakit: an earlier capture left what is not in the store in '{home}/captures/0123456789ab/output'\n"
    )


def test_one_that_does_not_fit_keeps_no_other_from_the_store(tmp_path: Path) -> None:
    source = template(tmp_path)
    script = f"""
import os, shutil, time
output = os.environ["LORAKIT_OUTPUT_CHECKPOINT_DIR"]
for step in (1, 2, 3):
    shutil.copytree({str(source)!r}, output + f"/.tmp-{{step}}")
    if step == 1:
        open(output + "/.tmp-1/notes", "wb").write(bytes(10**6))
    os.rename(output + f"/.tmp-{{step}}", output + f"/checkpoint-{{step}}")
    time.sleep(0.5)
"""
    with small_disk_at(tmp_path / "small", 400) as home:
        ended = captured(home, "--dir", str(tmp_path / "out"), "--run", "sql", "--", sys.executable, "-c", script)
        assert {kept.step for kept in kept_of(home, "sql")} == {2, 3}, ended.stderr
        assert f"checkpoint-1: no space left in the store '{home}': free some, or let LORAKIT_HOME" in ended.stderr
        assert "--out" not in ended.stderr


def test_what_was_held_and_taken_away_is_lost_and_the_next_is_kept(tmp_path: Path, home: Path) -> None:
    events: list[Event] = []
    with new_capture(home, "sql", tmp_path / "out") as capture:
        keeping = Keeping(capture, home, events.append)
        write_checkpoint(tmp_path / "out" / "checkpoint-1")
        held, _ = keeping.watch.scan(0.0)
        shutil.rmtree(capture.holds)
        keeping = Keeping(capture, home, events.append, held)
        write_checkpoint(tmp_path / "out" / "checkpoint-2")
        assert keeping.end(alive=False) is None
    assert [(type(event).__name__, event.name) for event in events] == [
        ("Missed", "checkpoint-1"), ("Took", "checkpoint-2"), ("Took", "checkpoint-1")
    ]  # fmt: skip


@pytest.mark.parametrize("named", ["global_step8", "kept"])
def test_a_step_of_deepspeed_is_laid_out_as_its_engine_looks_for_it(tmp_path: Path, named: str) -> None:
    import torch

    (tmp_path / named).mkdir()
    state = {"module": {"w": torch.ones(2)}, "global_steps": 8, "dp_world_size": 1}
    torch.save(state, tmp_path / named / "mp_rank_00_model_states.pt")
    torch.save({}, tmp_path / named / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    lay_out(tmp_path / named, tmp_path / "input")
    assert (tmp_path / "input" / "latest").read_text() == "global_step8"
    assert files_of(tmp_path / "input" / "global_step8") == files_of(tmp_path / named)


def _captures(home: Path) -> list:  # type: ignore[type-arg]
    from lorakit.training.capturing.captured import abandoned_captures

    return list(abandoned_captures(home)) if (home / "captures").is_dir() else []
