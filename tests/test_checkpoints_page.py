"""docs/checkpoints.md: every command in it is run, on what a real trainer wrote, and what is said of it is checked."""

from __future__ import annotations

import io
import json
import logging
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
import yaml

from lorakit.checkpoints.described import describe
from lorakit.checkpoints.metadata import Metadata
from lorakit.checkpoints.retention import Retention
from lorakit.checkpoints.retention_file import KEYS, retention_of
from lorakit.checkpoints.writers.layout import WriterName
from lorakit.cli.main import VERBS
from lorakit.errors import Refused
from lorakit.store.kept import find_kept, keep_checkpoint, kept_in
from tests.bucket import SERVICES, client, environment, s3_server
from tests.cli.commands import Ended, lorakit
from tests.folders import stored
from tests.readme import ROOT
from tests.training.capturing.captures import files_of

PAGE = (ROOT / "docs" / "checkpoints.md").read_text(encoding="utf-8")
LOSSES = {10: 0.0, 20: 0.0, 30: 0.0}  # by step, as the trainer printed them; filled in when it trained

Capture = pytest.CaptureFixture[str]
Check = Callable[["Work"], None]


def tables() -> Iterator[list[list[str]]]:
    """The cells of each table's rows, heads first."""
    for block in re.findall(r"(?:^\|.*\n)+", PAGE, re.M):
        rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in block.splitlines()]
        yield [[cell.strip() for cell in row] for number, row in enumerate(rows) if number != 1]


def rows() -> list[tuple[str, str]]:
    """System and code of each row of the last table."""
    *_, table = tables()
    found, system = [], ""
    for name, _, code in table[1:]:
        system = name or system
        found.append((system, code.strip("`")))
    return found


def commands() -> set[str]:
    """What the text shows, beside the tables: blocks of lines, and all that is more than a verb's name."""
    text = PAGE.partition("| system | feature |")[0]
    blocks = [block for block in text.split("\n```")[1::2] if block.startswith("\n")]
    named = re.findall(r"`(lorakit (?!store \w+`)\w+ [^`]+)`", text)
    return {line for block in blocks for line in block.split("\n") if line} | set(named)


def policy_file() -> str:
    (said,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.S)
    return str(said)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, a run of adapters and one of whole models, each trained here."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaForCausalLM, TrainerCallback

    from tests.training.trainer import tiny_model, tiny_trainer

    class Printed(TrainerCallback):  # type: ignore[misc]
        def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **_: Any) -> None:
            LOSSES[state.global_step] = metrics["eval_loss"]

    folder = tmp_path_factory.mktemp("page")
    before = Path.cwd()
    os.chdir(folder)
    try:
        tiny_model(lora=False).save_pretrained("models/llama")
        model = get_peft_model(
            LlamaForCausalLM.from_pretrained("models/llama"),
            LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"]),
        )
        settings = {"save_steps": 10, "eval_strategy": "steps", "eval_steps": 10, "logging_steps": 5}
        trainer = tiny_trainer(Path("runs/sql"), steps=30, model=model, callbacks=[Printed()], **settings)
        trainer.train()
        full = LlamaForCausalLM.from_pretrained("models/llama")
        trainer = tiny_trainer(Path("runs/full"), steps=20, model=full, lora=False, save_steps=10)
        trainer.processing_class = letters()
        trainer.train()
    finally:
        os.chdir(before)
    return folder


def letters() -> Any:
    """A tokenizer: whoever serves a whole model needs the one that it was trained with."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {chr(48 + number): number for number in range(48)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="0")), unk_token="0")


class Work:
    """One row: the folder that it is run in, and what it printed."""

    def __init__(self, folder: Path, home: Path, capsys: Capture) -> None:
        self.folder = folder
        self.home = home
        self.capsys = capsys
        self.ended = Ended(0, "", "")

    def run(self, line: str) -> Ended:
        self.ended = lorakit(self.capsys, *shlex.split(line)[1:])
        return self.ended

    @property
    def json(self) -> Any:
        return json.loads(self.ended.out)

    @property
    def lines(self) -> list[list[str]]:
        return [re.split(r"  +", line) for line in self.ended.out.splitlines() if line]

    def step(self, step: int) -> Path:
        return Path(f"runs/sql/checkpoint-{step}")

    def keep(self) -> None:
        """What `lorakit capture` does with a run that is there."""
        for step in (10, 20, 30):
            described = describe(self.step(step), "sql")
            keep_checkpoint(self.home, self.step(step), described, run="sql", unchanged=lambda: True)


@pytest.fixture
def work(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> Work:
    folder = tmp_path / "work"
    shutil.copytree(world, folder)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("LORAKIT_HOME", str(tmp_path / "home"))
    return Work(folder, tmp_path / "home", capsys)


# The commands, each with what is to be there before, and what has to hold after.


def explained(work: Work) -> None:
    said = {line[0]: line[3:] for line in work.lines}
    reasons = {step: said[f"checkpoint-{step}"][-1] for step in (10, 20, 30)}
    assert all("of the last 3" in why and "younger than 7 d" in why for why in reasons.values()), reasons
    assert sum("of the best 2 by eval_loss" in why for why in reasons.values()) == 2, reasons


def verified(work: Work) -> None:
    assert "all as they were kept" in work.ended.err
    weights = kept_in(work.home)[0].folder / "adapter_model.safetensors"
    weights.chmod(0o600)
    weights.write_bytes(b"x" + weights.read_bytes()[1:])
    assert work.run("lorakit store verify").code == 4


def kinds(work: Work) -> None:
    head, *lines = work.lines
    assert head == ["ID", "STEP", "TRAIN LOSS", "EVAL LOSS", "KIND", "BASE", "SIZE", "STATE", "ALIASES"]
    assert {(line[0].partition("@")[0], line[4]) for line in lines} == {("sql", "adapter"), ("full", "regular")}


def sorted_by_loss(work: Work) -> None:
    assert [int(line[1]) for line in work.lines[1:]] == sorted(LOSSES, key=LOSSES.__getitem__)
    assert [line[3] for line in work.lines[1:]] == [f"{LOSSES[step]:.4g}" for step in sorted(LOSSES, key=LOSSES.get)]  # type: ignore[arg-type]


def best(work: Work) -> None:
    assert work.ended.out == f"runs/sql/checkpoint-{min(LOSSES, key=LOSSES.__getitem__)}\n"


def latest(work: Work) -> None:
    assert work.ended.out == "runs/sql/checkpoint-30\n"


def ready(work: Work) -> None:
    assert work.ended.code == 0
    assert work.ended.out.splitlines()[-1].startswith("ready")


def merged(folder: str, step: int) -> Check:
    def check(work: Work) -> None:
        """W + B A α / r, in float64."""
        adapter, base, made = (stored(Path(path)) for path in (f"runs/sql/checkpoint-{step}", "models/llama", folder))
        for name, value in base.items():
            stem = f"base_model.model.{name.removesuffix('.weight')}.lora_"
            if f"{stem}A.weight" in adapter:
                a, b = (adapter[f"{stem}{letter}.weight"].astype("float64") for letter in "AB")
                value = (value.astype("float64") + b @ a * 8 / 4).astype("float32")
            assert np.allclose(made[name], value, rtol=0, atol=1e-7), name

    return check


def converted(work: Work) -> None:
    import torch
    from transformers import LlamaForCausalLM

    saved, made = (LlamaForCausalLM.from_pretrained(path) for path in ("runs/full/checkpoint-20", "model"))
    assert made.config.dtype == torch.bfloat16
    for name, value in saved.state_dict().items():
        assert torch.equal(made.state_dict()[name], value.to(torch.bfloat16)), name


def mixed(work: Work) -> None:
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    made, ten, thirty = (stored(path) for path in (Path("mixed"), work.step(10), work.step(30)))
    deltas = [one[f"{name}B.weight"].astype("float64") @ one[f"{name}A.weight"] for one in (made, ten, thirty)]
    config = json.loads(Path("mixed/adapter_config.json").read_text())
    exact = 2 * (0.7 * deltas[1] + 0.3 * deltas[2])
    assert np.allclose(deltas[0] * config["lora_alpha"] / config["r"], exact, atol=1e-6)


def served(work: Work) -> None:
    assert "--enable-lora" in work.ended.out


def shows_parts(work: Work) -> None:
    said = {line[0]: line[1] for line in work.lines if len(line) > 1}
    assert said["holds"] == "model, optimizer, scheduler, rng, trainer_state"
    assert said["step"] == "20"


def stages(work: Work) -> None:
    for step in (10, 20, 30):
        assert f"checkpoint-{step}" in work.ended.out


def plotted(work: Work) -> None:
    assert Path("losses.png").read_bytes().startswith(b"\x89PNG")


def newest_is_meant(work: Work) -> None:
    ready(work)
    assert "runs/sql' is a run: its newest finished checkpoint is checkpoint-30" in work.ended.err


def pruned(work: Work) -> None:
    assert sorted(os.listdir("runs/sql")) == ["checkpoint-20", "checkpoint-30"]


def listed(work: Work) -> None:
    assert [row["step"] for row in work.json] == [10, 20, 30]
    assert {row["step"]: row["eval_loss"] for row in work.json} == LOSSES
    assert [row["eval_step"] for row in work.json] == [10, 20, 30]
    assert all(row["base"] == "models/llama" and row["rank"] == 4 and row["digest"] for row in work.json)
    assert set(work.json[0]) == {field.name for field in fields(Metadata)}


def exported(folder: str, step: int) -> Check:
    def check(work: Work) -> None:
        copied = files_of(Path(folder))
        copied.pop("lorakit.sha256")
        assert copied == files_of(work.step(step))
        checked = subprocess.run(["sha256sum", "--check", "--quiet", "lorakit.sha256"], cwd=folder, capture_output=True)
        assert checked.returncode == 0
        assert work.run(f"lorakit export runs/sql {folder}").code == 5

    return check


def two_versions(work: Work) -> None:
    kept = [one for one in kept_in(work.home) if one.run == "twice"]
    assert [one.step for one in kept] == [10, 10], work.ended.err
    assert kept[0].digest != kept[1].digest


def versions(work: Work) -> None:
    import peft

    assert work.json["peft_version"] == peft.__version__
    assert work.json["writer"] == "transformers"
    assert work.json["eval_loss"] == LOSSES[20]


def removed(work: Work) -> None:
    assert not work.step(10).exists()


def taken_back(work: Work) -> None:
    assert files_of(work.step(10)).keys() >= {"adapter_model.safetensors", "optimizer.pt", "trainer_state.json"}


def models_differ(work: Work) -> None:
    assert work.ended.code == 0
    assert "different" in work.ended.out


def captured(work: Work) -> None:
    kept = kept_in(work.home)
    assert {(one.run, one.step) for one in kept} == {("train", 10), ("train", 20)}
    assert {one.step: files_of(one.folder) for one in kept} == {step: files_of(work.step(step)) for step in (10, 20)}
    assert len({one.uid for one in kept}) == 2
    assert all(abs(one.created - time.time()) < 600 for one in kept)


def all_habits_captured(work: Work) -> None:
    """A folder, one in a run, a single file, and the root; a file that is cut short is none."""
    kept = {one.label: one for one in kept_in(work.home)}
    assert kept.keys() == {"step-10", "step-20", "step-7", "final"}, work.ended.err
    assert files_of(kept["step-20"].folder) == files_of(work.step(20))
    assert files_of(kept["final"].folder).keys() == {"adapter_config.json", "adapter_model.safetensors"}
    assert "left cut.pt where it is" in work.ended.err


def root_is_final(work: Work) -> None:
    kept = find_kept("last@final", work.home)
    assert kept is not None
    weights = files_of(work.step(30))["adapter_model.safetensors"]
    assert files_of(kept.folder)["adapter_model.safetensors"] == weights


def each_file_captured(work: Work) -> None:
    kept = kept_in(work.home)
    assert {one.step: files_of(one.folder) for one in kept} == {
        step: {f"ckpt_{step}.pt": files_of(Path())[f"ckpt_{step}.pt"]} for step in (10, 20)
    }


def started_from(work: Work) -> None:
    at = min(LOSSES, key=LOSSES.__getitem__)
    assert files_of(Path("found")) == files_of(work.step(at))


def listed_from_store(work: Work) -> None:
    assert [line[1] for line in work.lines[1:]] == ["10", "20", "30"]
    assert all(re.fullmatch(r"sql@step-\d+-[0-9a-f]{8}", line[0]) for line in work.lines[1:])


def pushed(work: Work) -> None:
    (kept,) = kept_in(work.home)
    assert (kept.run, kept.step, files_of(kept.folder)) == ("mine", 10, files_of(work.step(10)))
    assert work.ended.out == f"{kept.id}\n"


def fetched(work: Work) -> None:
    at = min(LOSSES, key=LOSSES.__getitem__)
    assert files_of(Path("best")).items() >= files_of(work.step(at)).items()


def archived(work: Work) -> None:
    with tarfile.open("backup/best.tar.gz") as archive:
        names = {Path(name).name for name in archive.getnames()}
    assert {"adapter_model.safetensors", "lorakit.sha256"} <= names


def inspected(work: Work) -> None:
    at = min(LOSSES, key=LOSSES.__getitem__)
    assert (work.json["step"], work.json["eval_loss"], work.json["kind"]) == (at, LOSSES[at], "adapter")


def removed_from_store(work: Work) -> None:
    assert {one.step for one in kept_in(work.home)} == {20, 30}
    gone = re.findall(r"sql@step-10-[0-9a-f]{8}", work.ended.out + work.ended.err)[0]
    assert work.run(f"lorakit undelete {gone}").code == 0
    assert {one.step for one in kept_in(work.home)} == {10, 20, 30}


def scripts(work: Work) -> None:
    copy = 'cp -r runs/sql/checkpoint-{} "$FLEXAI_OUTPUT_CHECKPOINT_DIR"\n'
    Path("train.sh").write_text(copy.format(10) + copy.format(20))
    Path("resume.sh").write_text('cp -r "$FLEXAI_INPUT_CHECKPOINT_DIR" found\n')
    over = 'cp runs/sql/checkpoint-20/adapter_model.safetensors "$FLEXAI_OUTPUT_CHECKPOINT_DIR/checkpoint-10/"\n'
    state = 'cp runs/sql/checkpoint-10/trainer_state.json "$FLEXAI_OUTPUT_CHECKPOINT_DIR/checkpoint-10/"\n'
    Path("twice.sh").write_text(copy.format(10) + "sleep 2.5\n" + over + state)
    adapter = "runs/sql/checkpoint-30/adapter_config.json runs/sql/checkpoint-30/adapter_model.safetensors"
    Path("root.sh").write_text(f'cp {adapter} "$FLEXAI_OUTPUT_CHECKPOINT_DIR"\n')
    for step in (10, 20):
        torch.save({"model": {"weight": torch.full((4, 4), float(step))}, "step": step}, f"ckpt_{step}.pt")
    Path("flat.sh").write_text('cp ckpt_10.pt ckpt_20.pt "$FLEXAI_OUTPUT_CHECKPOINT_DIR"\n')


def every_habit(work: Work) -> None:
    torch.save({"model": {"weight": torch.ones(4, 4)}, "step": 7}, "ckpt_7.pt")
    Path("train.py").write_text("""
import os, shutil
from pathlib import Path

output = Path(os.environ["LORAKIT_OUTPUT_CHECKPOINT_DIR"])
shutil.copytree("runs/sql/checkpoint-10", output / "checkpoint-10")
shutil.copytree("runs/sql/checkpoint-20", output / "sql" / "checkpoint-20")
for name in ("adapter_config.json", "adapter_model.safetensors"):
    shutil.copy(Path("runs/sql/checkpoint-30", name), output)
shutil.copy("ckpt_7.pt", output)
(output / "cut.pt").write_bytes(Path("ckpt_7.pt").read_bytes()[:-100])
""")


def policies(work: Work) -> None:
    Path("keep.yaml").write_text(policy_file())


def from_store(work: Work) -> None:
    scripts(work)
    work.keep()


def first_removed(work: Work) -> None:
    assert work.run("lorakit rm runs/sql/checkpoint-10 --yes").code == 0


def nothing(work: Work) -> None:
    Path("backup").mkdir()


COMMANDS: dict[str, tuple[Check, Check]] = {
    "lorakit store verify": (lambda work: work.keep(), verified),
    "lorakit prune runs/sql --config keep.yaml --dry-run": (policies, explained),
    "lorakit capture -- python train.py": (every_habit, all_habits_captured),
    "lorakit ls runs": (nothing, kinds),
    "lorakit ls runs/sql --sort eval_loss": (nothing, sorted_by_loss),
    "lorakit best runs/sql": (nothing, best),
    "lorakit check runs/full/checkpoint-20": (nothing, ready),
    "lorakit merge runs/sql --out merged": (nothing, merged("merged", 30)),
    "lorakit mix runs/sql/checkpoint-10=0.7 runs/sql/checkpoint-30=0.3 --out mixed": (nothing, mixed),
    "lorakit serve models/llama --watch runs --dry-run": (nothing, served),
    "lorakit show runs/sql/checkpoint-20": (nothing, shows_parts),
    "lorakit latest runs/sql": (nothing, latest),
    "lorakit diff runs/sql/checkpoint-10 runs/sql/checkpoint-20 runs/sql/checkpoint-30": (nothing, stages),
    "lorakit show runs/sql --plot losses.png": (nothing, plotted),
    "lorakit check runs/sql": (nothing, newest_is_meant),
    "lorakit prune runs/sql --keep-last 2 --yes": (nothing, pruned),
    "lorakit ls runs/sql --json": (nothing, listed),
    "lorakit export runs/sql backup/sql": (nothing, exported("backup/sql", 30)),
    "lorakit capture --run twice -- sh twice.sh": (scripts, two_versions),
    "lorakit show runs/sql/checkpoint-20 --json": (nothing, versions),
    "lorakit export runs/sql/checkpoint-10 backup/ten": (nothing, exported("backup/ten", 10)),
    "lorakit rm runs/sql/checkpoint-10 --yes": (nothing, removed),
    "lorakit undelete runs/sql/checkpoint-10": (first_removed, taken_back),
    "lorakit diff runs/full/checkpoint-10 runs/full/checkpoint-20 --op equal": (nothing, models_differ),
    "lorakit convert runs/full/checkpoint-20 --out model --dtype bf16": (nothing, converted),
    "lorakit merge runs/sql/checkpoint-20 --out folded": (nothing, merged("folded", 20)),
    "lorakit capture -- sh train.sh": (scripts, captured),
    "lorakit capture --run last -- sh root.sh": (scripts, root_is_final),
    "lorakit capture --run flat -- sh flat.sh": (scripts, each_file_captured),
    "lorakit capture -C sql@best -- sh resume.sh": (from_store, started_from),
    "lorakit ls sql": (from_store, listed_from_store),
    "lorakit check sql@latest": (from_store, ready),
    "lorakit ls --store": (from_store, listed_from_store),
    "lorakit store add runs/sql/checkpoint-10 --run mine": (nothing, pushed),
    "lorakit fetch sql@best --out best": (from_store, fetched),
    "lorakit export sql@best backup/best.tar.gz": (lambda work: (nothing(work), from_store(work))[0], archived),
    "lorakit show sql@best --json": (from_store, inspected),
    "lorakit rm sql@step-10 --yes": (from_store, removed_from_store),
}  # fmt: skip


@pytest.mark.parametrize("line", COMMANDS)
def test_a_command_does_what_the_page_says(work: Work, line: str) -> None:
    before, holds = COMMANDS[line]
    before(work)
    assert work.run(line).code == 0, work.ended.err
    holds(work)


# What has more to it than a command.


def fetches_what_a_signed_url_gives(work: Work, code: str) -> None:
    from tests.checkpoints.moving.web import SECRET, serving

    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        archive.add(work.step(20), "checkpoint-20")
    with serving() as web:
        web.put("sql.tar.gz", packed.getvalue())
        url = f"http://127.0.0.1:{web.port}/sql.tar.gz?{SECRET}"
        line = re.sub(r"'http[^']*'", f"'{url}'", code)
        assert work.run(line).code == 0, work.ended.err
    assert files_of(Path("sql")).items() >= files_of(work.step(20)).items()
    assert SECRET not in work.ended.out + work.ended.err
    assert f"{LOSSES[20]:.4g}"[:4] in work.ended.out + work.ended.err


@contextmanager
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    with s3_server() as address:
        monkeypatch.setattr(sys, "path", [*sys.path, str(SERVICES)])
        for name, value in environment(address).items():
            monkeypatch.setenv(name, value)
        with client(address) as s3:
            yield s3
        import s3fs

        s3fs.S3FileSystem.clear_instance_cache()


def exports_to_a_bucket(source: Callable[[], Path]) -> Callable[[Work, str], None]:
    def check(work: Work, code: str) -> None:
        work.keep()
        with pytest.MonkeyPatch.context() as monkeypatch, bucket(monkeypatch) as s3:
            assert work.run(code).code == 0, work.ended.err
            prefix = code.split("s3://models/")[1]
            keys = {each["Key"] for each in s3.list_objects_v2(Bucket="models")["Contents"]}
            assert keys == {f"{prefix}/{name}" for name in (*files_of(source()), "lorakit.sha256")}
            assert work.run(f"lorakit fetch s3://models/{prefix} --out back").code == 0, work.ended.err
        assert files_of(Path("back")).items() >= files_of(source()).items()

    return check


def trained(
    code: str, run: str = "runs/again", *, steps: int = 10, model: Any = None, resumed: str | None = None,
    **settings: Any,
) -> Any:  # fmt: skip
    """A training with the callback that the page writes, and the callback."""
    from lorakit import training
    from lorakit.checkpoints.retention import KeepBest, KeepLast
    from tests.training.trainer import tiny_trainer

    names = {name: getattr(training, name) for name in training.__all__} | {"KeepLast": KeepLast, "KeepBest": KeepBest}
    callback = eval(code, names)
    callbacks = [callback, *settings.pop("callbacks", [])]
    trainer = tiny_trainer(Path(run), steps=steps, callbacks=callbacks, model=model or lora_model(), **settings)
    trainer.train(resume_from_checkpoint=resumed)
    return callback


def lora_model(*modules: str) -> Any:
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaForCausalLM

    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=[*modules] or ["q_proj", "v_proj"])
    return get_peft_model(LlamaForCausalLM.from_pretrained("models/llama"), config)


def resumes(work: Work, code: str) -> None:
    from lorakit.training import resume

    assert eval(code, {"resume": resume}) == os.path.abspath("runs/sql/checkpoint-30")
    (work.step(30) / "trainer_state.json").write_text("{")
    assert eval(code, {"resume": resume}) == os.path.abspath("runs/sql/checkpoint-20")


def loads_the_model_alone(work: Work, code: str) -> None:
    with logged() as said:
        trained(code, steps=1, learning_rate=0.0, save_steps=1)
    made, source = stored(Path("runs/again/checkpoint-1")), stored(work.step(10))
    assert all(np.array_equal(made[name], value) for name, value in source.items())
    assert any("skipped optimizer, scheduler, rng, trainer_state" in line for line in said), said


def loads_what_fits(work: Work, code: str) -> None:
    """Into a model with a module less than the checkpoint has, and one more."""
    settings: dict[str, Any] = {"steps": 1, "learning_rate": 0.0, "save_steps": 1}
    with pytest.raises(Refused):
        trained(code.replace("strict=False", "strict=True"), model=lora_model("q_proj", "k_proj"), **settings)
    with logged() as said:
        trained(code, model=lora_model("q_proj", "k_proj"), **settings)
    made, source = stored(Path("runs/again/checkpoint-1")), stored(work.step(30))
    there = source.keys() & made.keys()
    assert len(there) == len(source) / 2
    assert all("q_proj" in name and np.array_equal(made[name], source[name]) for name in there)
    assert any("no place for" in line and "v_proj" in line and "k_proj" in line for line in said), said


@contextmanager
def logged() -> Iterator[list[str]]:
    """What the callbacks say."""
    said: list[str] = []
    listener = logging.Handler()
    listener.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("lorakit").addHandler(listener)
    try:
        yield said
    finally:
        logging.getLogger("lorakit").removeHandler(listener)


def keeps_copies(work: Work, code: str) -> None:
    trained(code)
    shutil.rmtree("runs/again/checkpoint-10")
    assert sorted(path.name for path in Path("runs/again").glob("model_*")) == [
        "model_checkpoint-10", "model_checkpoint-4", "model_checkpoint-8",
    ]  # fmt: skip
    assert not Path("runs/again/model_checkpoint-4/optimizer.pt").exists()
    assert work.run("lorakit prune runs/again --keep-last 1 --yes").code == 0
    assert Path("runs/again/model_checkpoint-4").is_dir()


def keeps_two(work: Work, code: str) -> None:
    trained(code, "runs/sql", steps=8)
    assert sorted(path.name for path in Path("runs/sql").glob("checkpoint-*")) == [
        "checkpoint-10", "checkpoint-20", "checkpoint-30", "checkpoint-6", "checkpoint-8",
    ]  # fmt: skip


def ends_with_a_full_save(work: Work, code: str) -> None:
    from lorakit.training import resume
    from tests.training.trainer import At

    steps: list[None] = []
    interrupt = At(5, lambda: signal.raise_signal(signal.SIGINT), "on_step_end")
    with pytest.raises(SystemExit) as ended:
        trained(code, save_strategy="no", callbacks=[interrupt])
    assert ended.value.code == 130
    (saved,) = Path("runs/again").glob("checkpoint-*")
    assert {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"} <= files_of(saved).keys()
    assert resume("runs/again") == os.path.abspath(saved)
    trained(code, save_strategy="no", callbacks=[At(None, lambda: steps.append(None))], resumed=resume("runs/again"))
    assert len(steps) == 10 - int(saved.name.removeprefix("checkpoint-"))


def live(code: str, ask: Callable[[], None]) -> None:
    """`ask` while a training in runs/live goes on; nothing but what is asked for saves."""
    from tests.training.trainer import At

    begun, done = threading.Event(), threading.Event()

    def step() -> None:
        begun.set()
        time.sleep(0.02)

    class Until(At):
        def _do(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            step()
            control.should_training_stop = control.should_training_stop or done.is_set()

    def train() -> None:
        trained(code, "runs/live", steps=5000, save_strategy="no", callbacks=[Until(None, step, "on_step_end")])

    training = threading.Thread(target=train)
    training.start()
    try:
        assert begun.wait(60)
        ask()
    finally:
        done.set()
        training.join(60)


def saves_when_asked(work: Work, code: str) -> None:
    live("SaveOnRequest(every_seconds=0.1)", lambda: work.run(code))
    assert work.ended.code == 0, work.ended.err
    saved = Path(next(line for line in work.ended.out.splitlines() if line.startswith("runs/")))  # and the trainer's
    assert saved.name.startswith("checkpoint-")
    assert (saved / "optimizer.pt").is_file()
    assert Path("runs/live/before-lr-drop").resolve() == saved.resolve()
    (receipt,) = Path("runs/live/.lorakit").glob("save-result-*.json")
    assert {"step", "path", "seconds"} <= json.loads(receipt.read_text()).keys()


def until_there(pattern: str) -> None:
    end = time.monotonic() + 60
    while not list(Path().glob(pattern)) and time.monotonic() < end:
        time.sleep(0.02)


def saves_for_the_trigger(work: Work, code: str) -> None:
    def touch() -> None:
        subprocess.run(shlex.split(code), check=True)
        until_there("runs/live/checkpoint-*/trainer_state.json")

    live("SaveOnRequest(every_seconds=0.1)", touch)
    assert len(list(Path("runs/live").glob("checkpoint-*"))) == 1
    assert not Path("runs/live/axolotl_checkpoint.save").exists()


def looks_as_often_as_it_says(work: Work, code: str) -> None:
    live(code, lambda: work.run("lorakit save runs/live --wait 60"))
    assert work.ended.code == 0, work.ended.err


OTHERS: dict[str, Callable[[Work, str], None]] = {
    "lorakit fetch 'http://127.0.0.1/sql.tar.gz?X-Amz-Signature=…' --out sql": fetches_what_a_signed_url_gives,
    'resume("runs/sql")': resumes,
    "lorakit export runs/sql s3://models/sql": exports_to_a_bucket(lambda: Path("runs/sql/checkpoint-30")),
    "lorakit export sql@best s3://models/best": exports_to_a_bucket(
        lambda: Path(f"runs/sql/checkpoint-{min(LOSSES, key=LOSSES.__getitem__)}")
    ),
    'LoadStates("model", checkpoint="runs/sql", strict=False)': loads_what_fits,
    'LoadStates("model", checkpoint="runs/sql/checkpoint-10")': loads_the_model_alone,
    'SaveState("model", every=2)': keeps_copies,
    "KeepCheckpoints(KeepLast(2))": keeps_two,
    "Interruptible()": ends_with_a_full_save,
    'lorakit save runs/live --name before-lr-drop --reason "loss is falling" --wait 100': saves_when_asked,
    "touch runs/live/axolotl_checkpoint.save": saves_for_the_trigger,
    "SaveOnRequest()": looks_as_often_as_it_says,
    "SaveOnRequest(every_steps=5, every_seconds=0.5)": looks_as_often_as_it_says,
}


@pytest.mark.parametrize("code", OTHERS)
def test_what_is_more_than_a_command_does_what_the_page_says(work: Work, code: str) -> None:
    OTHERS[code](work, code)


# The page itself.


def test_every_row_of_the_table_is_run() -> None:
    assert {code for _, code in rows()} | commands() == COMMANDS.keys() | OTHERS.keys()
    systems = ["Hosted fine-tuning (FLEX)", "Training guide", "Cerebras", "FlexAI", "axolotl"]
    assert list(dict.fromkeys(system for system, _ in rows())) == systems


def test_every_writer_and_every_field_is_told() -> None:
    writers, known, _ = tables()
    names = [name for row in writers[1:] for name in re.findall(r"`(\w+)`", row[0])]
    assert sorted(names) == sorted(get_args(WriterName))
    told = {name for row in known[1:] for name in re.findall(r"`(\w+)`", row[0])}
    assert told | {"id", "path", "run", "size", "created"} == {field.name for field in fields(Metadata)}


def test_the_file_of_policies_is_one() -> None:
    said = yaml.safe_load(policy_file())
    assert isinstance(retention_of(said), Retention)
    assert set(said) == set(KEYS)


def test_the_callbacks_are_such() -> None:
    (example,) = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    names: dict[str, Any] = {}
    exec(example, names)
    assert len(names["callbacks"]) == 4


def test_every_verb_that_is_named_is_one() -> None:
    assert set(re.findall(r"`lorakit (\w+)", PAGE)) <= set(VERBS)
