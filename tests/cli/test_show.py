"""`lorakit show`: what a folder holds, and the tree of what it was made of."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lorakit.store.catalog import Facts
from lorakit.store.kept import Described, keep_checkpoint
from tests.checkpoints.written import evaluated, finish, write_checkpoint
from tests.cli.commands import lorakit
from tests.folders import factors, linear_modules, stored, write_adapter, write_base

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def mixed(capsys: Capture, tmp_path: Path) -> Path:
    """again = 0.5 (0.7 one + 0.3 two) + 2 one."""
    for seed, name in enumerate(("one", "two")):
        write_adapter(tmp_path / name, factors(linear_modules(), seed=seed), base_model_name_or_path="org/base")
    one, two, made = tmp_path / "one", tmp_path / "two", tmp_path / "made"
    assert lorakit(capsys, "mix", f"{one}=0.7", f"{two}=0.3", "--out", made / "mixed").code == 0
    assert lorakit(capsys, "mix", f"{made / 'mixed'}=0.5", f"{one}=2", "--out", made / "again").code == 0
    return made / "again"


def test_an_adapter_in_words(capsys: Capture, mixed: Path, tmp_path: Path) -> None:
    ended = lorakit(capsys, "show", mixed)
    assert (ended.code, ended.err) == (0, "")
    facts, files, tree = ended.out.split("\n\n")
    said = dict(re.split(r"  +", line, maxsplit=1) for line in facts.splitlines())
    assert said["kind"].startswith("adapter (LORA), written by lorakit mix ")
    assert (said["base"], said["rank"], said["modules"]) == ("org/base", "6", "6")
    assert said["tensors"] == "12 in F32"
    assert "method=linear" in said["settings"]
    assert (said["writer"], said["holds"], said["state"]) == ("lorakit", "model", "finished")
    assert "adapter_model.safetensors" in files
    assert [line.partition("  (")[0] for line in tree.splitlines()] == [
        f"{mixed}",
        f"├── 0.5 × {tmp_path / 'made' / 'mixed'}",
        f"│   ├── 0.7 × {tmp_path / 'one'}",
        f"│   └── 0.3 × {tmp_path / 'two'}",
        f"└── 2 × {tmp_path / 'one'}",
    ]


def test_what_lorakit_did_not_write_has_no_tree(capsys: Capture, mixed: Path, tmp_path: Path) -> None:
    out = lorakit(capsys, "show", tmp_path / "one").out
    assert re.search(r"^kind +adapter \(LORA\)$", out, re.M)
    assert not {"settings", "error", "└"} & set(out.split())


def test_parents_that_are_gone_or_changed_are_marked(capsys: Capture, mixed: Path, tmp_path: Path) -> None:
    (tmp_path / "two").rename(tmp_path / "elsewhere")
    (tmp_path / "one" / "adapter_model.safetensors").write_bytes(b"")
    tree = lorakit(capsys, "show", mixed).out.split("\n\n")[2].splitlines()
    assert [line.rpartition("  ")[2] for line in tree[2:]] == ["(changed since)", "(gone)", "(changed since)"]


def test_as_data_the_tree_is_nested(capsys: Capture, mixed: Path, tmp_path: Path) -> None:
    ended = lorakit(capsys, "show", mixed, "--json")
    data = json.loads(ended.out)
    file = mixed / "adapter_model.safetensors"
    assert (data["kind"], data["peft_type"], data["rank"], data["dtypes"]) == ("adapter", "LORA", 6, ["F32"])
    assert {"path": file.name, "size": file.stat().st_size} in data["files"]
    assert [parent["weight"] for parent in data["lineage"]["parents"]] == [0.5, 2.0]
    grand = data["lineage"]["parents"][0]["parents"]
    assert [(parent["path"], parent["state"]) for parent in grand] == [
        (str(tmp_path / "one"), "there"),
        (str(tmp_path / "two"), "there"),
    ]


def test_a_merged_model(capsys: Capture, tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    adapter = write_adapter(tmp_path / "adapter", base_model_name_or_path=str(base))
    assert lorakit(capsys, "merge", f"{adapter}=0.5", "--out", tmp_path / "merged").code == 0
    out = lorakit(capsys, "show", tmp_path / "merged").out
    assert re.search(r"^kind +regular \(llama\), written by lorakit merge", out, re.M)
    assert f"├── base {base}\n└── 0.5 × {adapter}\n" in out
    assert json.loads(lorakit(capsys, "show", base, "--json").out)["tensors"] == 10


def test_a_folder_of_adapters_is_a_table(capsys: Capture, mixed: Path) -> None:
    made = mixed.parent
    write_adapter(made / "step-9")
    write_adapter(made / "step-10")
    (made / "step-10" / "adapter_model.safetensors").write_bytes(b"cut short")
    ended = lorakit(capsys, "show", made)
    rows = [line.split() for line in ended.out.splitlines()]
    assert rows[0] == ["name", "operation", "rank", "norm", "error"]
    assert [row[:3] for row in rows[1:]] == [
        ["again", "mix", "6"],
        ["mixed", "mix", "4"],
        ["step-9", "-", "2"],
        ["step-10", "-", "-"],
    ]
    assert ended.err.startswith("note: ")
    data = json.loads(lorakit(capsys, "show", made, "--json").out)
    tensors = stored(made / "step-9")
    square = sum(
        float(np.linalg.norm(2 * tensors[name.replace("_A", "_B")] @ a) ** 2)
        for name, a in tensors.items()
        if "lora_A" in name
    )
    assert data["adapters"][2]["norm"] == pytest.approx(square**0.5)
    assert data["adapters"][0]["error"] == 0


def test_names_in_files_give_a_terminal_no_orders(capsys: Capture, mixed: Path) -> None:
    record = json.loads((mixed / "lorakit.json").read_text())
    record["operation"] = "\x1b]0;owned\x07"
    record["settings"] = {"method": "\u009b2J", "a\nb": "\u202e"}
    record["parents"][1]["path"] = "/nowhere/\x1b[31m[bold]red"
    (mixed / "lorakit.json").write_text(json.dumps(record))
    for path in (mixed, mixed.parent):
        ended = lorakit(capsys, "show", path)
        assert ended.code == 0
        assert "\\x1b]0;owned\\x07" in ended.out
        assert not {"\x1b", "\x07", "\u009b", "\u202e"} & {*ended.out, *ended.err}
    assert "2 × /nowhere/\\x1b[31m[bold]red  (gone)" in lorakit(capsys, "show", mixed).out


def test_on_a_terminal_the_same_is_drawn(mixed: Path) -> None:
    outputs = []
    for path in (mixed, mixed.parent):
        master, slave = pty.openpty()
        command = [sys.executable, "-m", "lorakit", "show", str(path)]
        environment = {**os.environ, "TERM": "xterm", "COLUMNS": "120", "NO_COLOR": "1"}
        subprocess.run(command, stdout=slave, stderr=slave, check=True, env=environment, timeout=60)
        os.close(slave)
        outputs.append(os.read(master, 1 << 16).decode().replace("\r\n", "\n"))
        os.close(master)
    assert "├── 0.5 × " in outputs[0]
    assert "│   └── 0.3 × " in outputs[0]
    assert "operation" in outputs[1]
    assert "─" in outputs[1]


def test_the_exit_codes_of_what_can_not_be_shown(capsys: Capture, mixed: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    assert lorakit(capsys, "show", tmp_path / "nowhere").code == 3
    assert lorakit(capsys, "show", empty).code == 4
    assert json.loads(lorakit(capsys, "show", empty, "--json").out)["error"]["type"] == "Refused"


def test_a_lineage_that_is_unreadable_is_said_and_the_rest_is_shown(capsys: Capture, mixed: Path) -> None:
    (mixed / "lorakit.json").write_text("nonsense")
    ended = lorakit(capsys, "show", mixed)
    assert (ended.code, facts_in(ended.out)["rank"]) == (0, "6"), ended
    assert "what it was made of is unreadable: " in ended.err
    assert json.loads(lorakit(capsys, "show", mixed, "--json").out)["lineage"] is None


# checkpoints and runs


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """sql at three steps, each evaluated, of which the second is the best; a fourth is still being written."""
    base = write_base(tmp_path / "base")
    log = [{"step": 50, "loss": 3.0}]
    for step, loss in ((100, 1.5), (200, 1.25), (300, 2.0)):
        log += [{"step": step, "loss": loss / 2, "grad_norm": 0.5}, evaluated(step, loss)]
        write_checkpoint(
            tmp_path / "runs" / "sql" / f"checkpoint-{step}", log, base_model_name_or_path=str(base),
            peft_version="0.21.2",
        )  # fmt: skip
    write_adapter(tmp_path / "runs" / "sql" / "checkpoint-400")
    return tmp_path / "runs" / "sql"


def facts_in(out: str) -> dict[str, str]:
    return dict(re.split(r"  +", line, maxsplit=1) for line in out.split("\n\n")[0].splitlines())


def test_a_checkpoint_with_all_that_its_trainer_said(capsys: Capture, run: Path) -> None:
    ended = lorakit(capsys, "show", run / "checkpoint-200")
    assert (ended.code, ended.err) == (0, "")
    said = facts_in(ended.out)
    assert (said["id"], said["step"], said["epoch"]) == ("sql@step-200", "200", "2")
    assert (said["train loss"], said["eval loss"], said["metrics"]) == ("0.625", "1.25", "grad_norm=0.5")
    assert (said["writer"], said["holds"], said["versions"]) == ("transformers", "model, trainer_state", "peft 0.21.2")
    assert (said["modules"], said["state"], said["inference ready"]) == ("3", "finished", "yes")
    assert len(said["digest"]) == 64


def test_an_evaluation_of_another_step_is_said_with_it(capsys: Capture, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "checkpoint-9", [evaluated(5, 1.5)])
    assert facts_in(lorakit(capsys, "show", tmp_path / "checkpoint-9").out)["eval loss"] == "1.5 (step 5)"


def test_as_data_it_has_all_of_ls_and_more(capsys: Capture, run: Path) -> None:
    data = json.loads(lorakit(capsys, "show", run / "checkpoint-200", "--json").out)
    row = json.loads(lorakit(capsys, "ls", run, "--filter", "step=200", "--json").out)[0]
    assert row.items() <= data.items()
    assert data["inference_ready"] == {"ready": True, "verdict": "ready", "reasons": [], "repairs": []}
    assert {file["path"] for file in data["files"]} == {
        "adapter_config.json", "adapter_model.safetensors", "trainer_state.json",
    }  # fmt: skip


def test_what_is_no_number_is_null(capsys: Capture, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "checkpoint-5", [evaluated(5, float("nan"))])
    text = lorakit(capsys, "show", tmp_path / "checkpoint-5", "--json").out
    assert "NaN" not in text
    assert json.loads(text)["eval_loss"] is None


@pytest.mark.parametrize(
    ("config", "word"),
    [({}, "unknown: the adapter's config names no base: name it with --base"), ({"use_dora": True}, "no: vLLM serves")],
)
def test_whether_it_can_be_served_is_said_as_far_as_it_is_known(
    capsys: Capture, tmp_path: Path, config: dict[str, Any], word: str
) -> None:
    write_checkpoint(tmp_path / "checkpoint-5", **config)
    said = facts_in(lorakit(capsys, "show", tmp_path / "checkpoint-5").out)
    assert said["inference ready"].startswith(word)


def test_one_that_is_still_being_written_says_so(capsys: Capture, run: Path) -> None:
    (run / "checkpoint-400" / "adapter_model.safetensors").unlink()
    said = facts_in(lorakit(capsys, "show", run / "checkpoint-400").out)
    assert said["state"] == "incomplete: adapter_model.safetensors is not there yet"
    assert said["inference ready"].startswith("no: adapter_model.safetensors is not there yet: wait for its writer")


def test_a_run_has_its_latest_its_best_and_what_is_not_finished(capsys: Capture, run: Path) -> None:
    ended = lorakit(capsys, "show", run)
    said = facts_in(ended.out)
    assert said["checkpoints"] == "4 (3 finished, 1 incomplete)"
    assert (said["steps"], said["latest"]) == ("100 to 400", "sql@step-300")
    assert said["best"] == "sql@step-200, eval loss 1.25"
    assert ended.err.startswith("sql@step-400 is incomplete: nothing says yet that its writer is done; `lorakit check`")
    data = json.loads(lorakit(capsys, "show", run, "--json").out)
    assert (data["kind"], data["latest"], data["best"], data["steps"]) == (
        "run", "sql@step-300", "sql@step-200", [100, 400],
    )  # fmt: skip
    assert data["checkpoints"] == json.loads(lorakit(capsys, "ls", run, "--json").out)


def test_a_run_in_which_nothing_is_finished(capsys: Capture, tmp_path: Path) -> None:
    (tmp_path / "sql" / "checkpoint-5").mkdir(parents=True)
    ended = lorakit(capsys, "show", tmp_path / "sql")
    assert (ended.code, facts_in(ended.out)["latest"]) == (0, "none is finished")


def test_a_checkpoint_in_the_store_by_its_name(
    capsys: Capture, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORAKIT_HOME", str(tmp_path / "home"))
    facts = Facts(step=200, eval_loss=1.25, eval_step=200)
    described = Described("adapter", "transformers", 200, facts, str(tmp_path / "base"), 2)
    kept = keep_checkpoint(
        tmp_path / "home", run / "checkpoint-200", described, run="sql", unchanged=lambda: True
    )  # fmt: skip
    said = facts_in(lorakit(capsys, "show", "sql@step-200").out)
    assert (said["id"], said["path"], said["aliases"]) == (kept.id, str(kept.folder), "latest, best")
    assert (said["eval loss"], said["inference ready"], said["digest"]) == ("1.25", "yes", kept.digest)
    ended = lorakit(capsys, "show", "sql@step-300")
    assert (ended.code, kept.id in ended.err) == (3, True)


def test_a_single_file(capsys: Capture, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    torch.save({"state_dict": {"w": torch.ones(2, 2)}, "global_step": 7}, tmp_path / "model.ckpt")
    said = facts_in(lorakit(capsys, "show", tmp_path / "model.ckpt").out)
    assert (said["kind"], said["step"]) == ("regular", "7")
    assert "lorakit convert" in said["inference ready"]


@pytest.mark.parametrize("what", ["", "checkpoint-200"])
def test_the_losses_are_plotted(capsys: Capture, run: Path, tmp_path: Path, what: str) -> None:
    plot = tmp_path / "losses.png"
    ended = lorakit(capsys, "show", run / what, "--plot", plot)
    assert (ended.code, ended.err.endswith(f"plotted to {plot}\n")) == (0, True)
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert lorakit(capsys, "show", run / what, "--plot", plot).code == 5


def test_where_nothing_was_logged_there_is_nothing_to_plot(capsys: Capture, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "sql" / "checkpoint-5")
    ended = lorakit(capsys, "show", tmp_path / "sql", "--plot", tmp_path / "losses.png")
    assert (ended.code, "no losses of" in ended.err) == (4, True)
    assert not (tmp_path / "losses.png").exists()
    write_adapter(tmp_path / "stages" / "one")
    assert lorakit(capsys, "show", tmp_path / "stages", "--plot", tmp_path / "losses.png").code == 2


def test_a_run_with_its_last_save_in_its_own_folder(capsys: Capture, run: Path) -> None:
    finish(write_adapter(run.parent / "final"))
    for file in sorted((run.parent / "final").iterdir()):
        file.rename(run / file.name)
    said = facts_in(lorakit(capsys, "show", run).out)
    assert (said["latest"], said["checkpoints"]) == ("sql@final", "5 (4 finished, 1 incomplete)")


def test_a_checkpoint_that_is_only_begun_is_shown_and_a_file_that_is_none_is_not(
    capsys: Capture, tmp_path: Path
) -> None:
    (tmp_path / "checkpoint-5").mkdir()
    assert facts_in(lorakit(capsys, "show", tmp_path / "checkpoint-5").out)["state"].startswith("incomplete: ")
    (tmp_path / "notes.txt").write_text("not a checkpoint")
    assert lorakit(capsys, "show", tmp_path / "notes.txt").code == 4


def test_a_mistyped_path_is_answered_with_the_nearest(capsys: Capture, run: Path) -> None:
    ended = lorakit(capsys, "show", run.parent / "sqk")
    assert (ended.code, f"did you mean '{run}'?" in ended.err) == (3, True)
