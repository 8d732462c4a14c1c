"""The examples run as they stand, the demo first: it trains what the others merge and mix."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.readme import ROOT
from tests.server.real import write_checkpoint
from tests.world import World

pytestmark = pytest.mark.timeout(400)


def example(name: str, *arguments: object, limit: float = 60) -> str:
    """What an example prints; fails with its last words."""
    ended = subprocess.run(
        [sys.executable, ROOT / "examples" / name, *map(str, arguments)],
        capture_output=True, text=True, timeout=limit, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr[-2000:]
    return ended.stdout


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the demo leaves behind, its picture among it."""
    folder = tmp_path_factory.mktemp("demo")
    shown = example("demo.py", "--workdir", folder / "work", "--svg", folder / "demo.svg", limit=360)
    (folder / "shown.txt").write_text(shown)
    return folder / "work"


def test_the_demo_shows_each_checkpoint_and_every_answer_is_what_it_must_be(work: Path) -> None:
    shown = (work.parent / "shown.txt").read_text()
    assert "Everything answered as it must" in shown
    for checkpoint in work.glob("runs/*/checkpoint-*"):
        step = checkpoint.name.rpartition("-")[2]
        assert f"{checkpoint.parent.name}@step-{step}-" in shown
    assert "\x1b" not in shown, "no control codes where there is no terminal"
    assert "Everything" in (work.parent / "demo.svg").read_text()


def test_merging_and_mixing_as_the_examples_do(work: Path, tmp_path: Path) -> None:
    sql, shout = (max(work.glob(f"runs/{name}/checkpoint-*")) for name in ("sql", "shout"))
    assert "ranks 8 and 8 make 16, on 21 modules" in example("mix.py", sql, shout, "--out", tmp_path / "mixed")
    example("merge.py", sql, "--base", work / "base", "--out", tmp_path / "merged")
    assert json.loads((tmp_path / "merged" / "lorakit.json").read_text())["operation"] == "merge"


def test_training_with_callbacks_goes_on_where_it_was(work: Path, tmp_path: Path) -> None:
    for steps, saved in ((10, {"checkpoint-10"}), (20, {"checkpoint-10", "checkpoint-20"})):
        example("train_with_callbacks.py", "--base", work / "base", "--run", tmp_path / "sql", "--steps", steps)
        assert {found.name for found in (tmp_path / "sql").glob("checkpoint-*")} == saved
        assert (tmp_path / "sql" / f"model_checkpoint-{steps}").is_dir()  # the last step's is always kept


def test_a_search_finds_a_mix_that_is_better_than_each_alone(work: Path, tmp_path: Path) -> None:
    pair = [max(work.glob(f"runs/{name}/checkpoint-*")) for name in ("sql", "shout")]
    shown = example("search.py", *pair, "--base", work / "base", "--evaluations", 8, "--out", tmp_path / "best")
    *first, best = [float(line.partition("loss ")[2].split()[0]) for line in shown.splitlines()]
    assert best <= min(first)
    assert json.loads((tmp_path / "best" / "lorakit.json").read_text())["settings"]["search"]["evaluations"] == 8


def test_asking_a_server_as_the_example_does(world: World) -> None:
    write_checkpoint(world.watched / "asked", world.adapters[5], 9, eval_loss=0.5)
    world.server.wait_until(lambda: world.server.adapter("asked")["revision"])
    shown = example("serve_client.py", "--url", world.server.url, "--run", "asked")
    assert shown.startswith("models: base, ")
    assert "asked@best: " in shown
    assert shown.count("asked@step-9-") >= 3


def test_a_demo_that_can_not_go_on_says_why_and_ends_with_another_code(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    ended = subprocess.run(
        [sys.executable, ROOT / "examples" / "demo.py", "--workdir", tmp_path],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert ended.returncode == 1
    assert "holds something already" in ended.stdout
