"""`lorakit convert`: a checkpoint in, the path of a model out; and what each thing that goes wrong is called."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from tests.cli.commands import lorakit
from tests.models import load, make_adapter
from tests.server.real import make_tiny_model

Capture = pytest.CaptureFixture[str]
KEYS = [
    "path", "out", "kind", "format", "dry_run", "tensors", "bytes", "dtype", "weights", "quantize", "max_shard_size",
    "only", "strict", "renamed", "left_out", "companions", "error", "seconds", "notes",
]  # fmt: skip


@pytest.fixture(scope="module")
def like(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def checkpoint(tmp_path: Path, like: Path) -> Path:
    """As torch.save leaves a compiled model in a training of one's own."""
    state = {f"_orig_mod.{name}": one + 1 for name, one in load(like).state_dict().items()}
    file = tmp_path / "run" / "step-5.pt"
    file.parent.mkdir()
    torch.save({"model": state, "optimizer": {"state": {}}, "step": 5}, file)
    return file


def test_it_prints_the_path_and_says_the_rest_aside(
    capsys: Capture, checkpoint: Path, like: Path, tmp_path: Path
) -> None:
    ended = lorakit(capsys, "convert", checkpoint, "--like", like, "--out", tmp_path / "out")
    assert (ended.code, ended.out) == (0, f"{tmp_path / 'out'}\n")
    assert "left out: optimizer, step (what a training resumes with" in ended.err
    assert "converted 21 tensors (torch)" in ended.err
    model = load(tmp_path / "out")
    assert all(torch.equal(one, load(like).state_dict()[name] + 1) for name, one in model.state_dict().items())
    assert len(AutoTokenizer.from_pretrained(tmp_path / "out")) == 259


def test_json_says_all(capsys: Capture, checkpoint: Path, like: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    ended = lorakit(capsys, "convert", checkpoint, "--like", like, "--out", out, "--dtype", "bf16", "--json")
    found: dict[str, Any] = json.loads(ended.out)
    assert list(found) == KEYS
    assert (found["out"], found["kind"], found["format"], found["dtype"]) == (str(out), "model", "torch", "bf16")
    assert found["renamed"]["_orig_mod.lm_head.weight"] == "lm_head.weight"
    assert found["companions"]["tokenizer.json"] == str(like / "tokenizer.json")
    assert {one.dtype for one in load_file(out / "model.safetensors").values()} == {torch.bfloat16}


def test_a_dry_run_shows_the_plan(capsys: Capture, checkpoint: Path, like: Path, tmp_path: Path) -> None:
    ended = lorakit(capsys, "convert", checkpoint, "--like", like, "--dry-run")
    assert ended.code == 0
    assert "_orig_mod.model.norm.weight  as model.norm.weight\n" in ended.out
    assert "21 tensors, 0.4 MB, 0 of them under their own name\n" in ended.out
    assert f"tokenizer.json  from {like / 'tokenizer.json'}\n" in ended.out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_parts_are_named_with_a_comma_between(capsys: Capture, checkpoint: Path, like: Path, tmp_path: Path) -> None:
    both = lorakit(capsys, "convert", checkpoint, "--like", like, "--out", tmp_path / "a", "--only", "model, tokenizer")
    one = lorakit(capsys, "convert", checkpoint, "--like", like, "--out", tmp_path / "b", "--only", "tokenizer")
    assert (both.code, one.code) == (0, 0)
    assert not (tmp_path / "b" / "model.safetensors").exists()
    assert {path.name for path in (tmp_path / "b").iterdir()} < {path.name for path in (tmp_path / "a").iterdir()}


@pytest.mark.parametrize(
    ("change", "code", "said"),
    [
        ([], 2, "--out"),
        (["--out", "out", "--weights", "ema"], 2, "leave out --weights ema"),
        (["--out", "out", "--only", "head"], 2, "name some of model, tokenizer"),
        (["--out", "out", "--rank", "4"], 2, "--rank is for adapters"),
        (["--out", "out", "--for", "lorax"], 2, "--for is for adapters"),
        (["--out", "out", "--max-shard-size", "much"], 2, "5GB"),
        (["--out", "out", "--like", "nowhere/at/all"], 3, "nowhere"),
        (["--out", "run"], 5, "exists already"),
    ],
)
def test_what_is_asked_wrongly_is_told(
    capsys: Capture, checkpoint: Path, like: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    change: list[str], code: int, said: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    named = [] if "--like" in change else ["--like", str(like)]
    ended = lorakit(capsys, "convert", checkpoint, *named, *change)
    assert (ended.code, ended.out) == (code, "")
    assert said in ended.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


@pytest.mark.parametrize(
    ("spoil", "code", "kind", "said"),
    [
        ("gone", 3, "NotFound", "no such name"),
        ("unplaced", 4, "UnplacedTensors", "1 of 22 tensors"),
        ("missing", 4, "Refused", "lacks 1 of 21 tensors"),
        ("no config", 4, "Refused", "name the model that was trained with --like"),
        ("cut short", 4, "Incomplete", "is incomplete"),
        ("nothing", 4, "Refused", "is no checkpoint of a kind that is known"),
    ],
)
def test_each_refusal_has_its_code_and_its_cure(
    capsys: Capture, checkpoint: Path, like: Path, tmp_path: Path, spoil: str, code: int, kind: str, said: str
) -> None:
    path, named = checkpoint, ["--like", str(like)]
    held = torch.load(checkpoint)
    if spoil == "gone":
        path = tmp_path / "other.pt"
    elif spoil == "no config":
        named = []
    elif spoil == "cut short":
        checkpoint.write_bytes(checkpoint.read_bytes()[:-2000])
    elif spoil == "nothing":
        path = tmp_path / "empty"
        path.mkdir()
    else:
        extra = {"_orig_mod.critic.weight": torch.ones(2)} if spoil == "unplaced" else {}
        gone = "_orig_mod.model.norm.weight" if spoil == "missing" else None
        kept = {name: one for name, one in held["model"].items() if name != gone}
        torch.save({**held, "model": kept | extra}, checkpoint)
    ended = lorakit(capsys, "convert", path, *named, "--out", tmp_path / "out", "--json")
    found = json.loads(ended.out)["error"]
    assert (ended.code, found["type"], found["code"]) == (code, kind, code), found
    assert said in found["message"]
    assert not (tmp_path / "out").exists()


def test_a_run_stands_for_its_newest_checkpoint(capsys: Capture, like: Path, tmp_path: Path) -> None:
    for step in (5, 10):
        model = load(like)
        model.model.norm.weight.data.fill_(step)
        folder = tmp_path / "run" / f"checkpoint-{step}"
        model.save_pretrained(folder)
        (folder / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    ended = lorakit(capsys, "convert", tmp_path / "run", "--out", tmp_path / "out")
    assert ended.code == 0, ended
    assert float(load(tmp_path / "out").model.norm.weight.detach()[0]) == 10


def test_an_adapter_is_written_as_vllm_serves_it(capsys: Capture, like: Path, tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "adapter", like, use_rslora=True, target_modules=["q_proj"])
    out = tmp_path / "out"
    planned = lorakit(capsys, "convert", adapter, "--base", like, "--dry-run")
    assert (planned.code, out.exists()) == (0, False)
    ended = lorakit(capsys, "convert", adapter / "adapter_model.safetensors", "--base", like, "--out", out)
    assert (ended.code, ended.out) == (0, f"{out}\n"), ended
    assert lorakit(capsys, "check", out, "--base", like).code == 0
    assert not json.loads((out / "adapter_config.json").read_text()).get("use_rslora")
    assert ended.err.endswith("; exact\n")


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (["--quantize", "fp8"], "merge it first"),
        (["--no-strict"], "--no-strict is for whole models"),
        (["--workers", "2"], "--workers is for whole models"),
        (["--max-shard-size", "1GB"], "--max-shard-size is for whole models"),
    ],
)
def test_what_is_of_models_alone_is_not_asked_of_an_adapter(
    capsys: Capture, like: Path, tmp_path: Path, asked: list[str], said: str
) -> None:
    adapter = make_adapter(tmp_path / "adapter", like, target_modules=["q_proj"])
    ended = lorakit(capsys, "convert", adapter, "--base", like, "--out", tmp_path / "out", *asked)
    assert ended.code == 2
    assert said in ended.err


@pytest.mark.parametrize("wrong", [{"r": None}, {"r": "4"}, {"lora_alpha": float("nan")}, {"lora_alpha": 10**400}])
def test_a_config_that_is_whole_and_wrong_is_not_waited_for(
    capsys: Capture, like: Path, tmp_path: Path, wrong: dict[str, Any]
) -> None:
    adapter = make_adapter(tmp_path / "adapter", like, target_modules=["q_proj"])
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | wrong))
    ended = lorakit(capsys, "convert", adapter, "--base", like, "--out", tmp_path / "out", "--json")
    found = json.loads(ended.out)["error"]
    assert (ended.code, found["type"]) == (4, "InvalidFile")
    assert f"{next(iter(wrong))} is " in found["message"]
    assert len(found["message"]) < 300


def test_help_has_an_example_and_costs_no_torch(tmp_path: Path) -> None:
    code = "import sys; from lorakit.cli import main; sys.argv = ['lorakit', 'convert', '--help']\n"
    code += "try:\n    main()\nexcept SystemExit:\n    print('torch' in sys.modules)"
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**os.environ, "COLUMNS": "120"}
    )
    assert "lorakit convert runs/full/checkpoint-500 --out servable --dtype bf16" in ended.stdout
    assert ended.stdout.endswith("False\n")
