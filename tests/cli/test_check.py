"""`lorakit check`: ready or not, with the reasons and what helps; the same judgement as a server's."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lorakit.checkpoints.finished import look_at
from lorakit.convert.answers import Check
from lorakit.errors import Refused
from lorakit.merge.base import read_base
from lorakit.server.following.intake import take_in
from lorakit.store.store import Store
from tests.checkpoints.written import finish, write_checkpoint
from tests.cli.commands import lorakit
from tests.convert.adapters import REFUSED, SERVED
from tests.folders import write_adapter, write_base
from tests.models import make_base

Capture = pytest.CaptureFixture[str]
KEYS = [
    "path", "kind", "writer", "ready", "verdict", "checks", "problems", "repairs", "rank", "modules", "modules_applied",
    "base",
]  # fmt: skip


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store(tmp_path / "home", "base")
    yield store
    store.close()


def checked(capsys: Capture, *arguments: str | Path, code: int) -> dict[str, Any]:
    ended = lorakit(capsys, "check", *arguments, "--json")
    assert ended.code == code, ended
    found: dict[str, Any] = json.loads(ended.out)
    assert list(found) == KEYS
    assert found["ready"] == (code == 0)
    return found


@pytest.mark.parametrize("what", SERVED)
def test_what_a_server_serves_is_ready(capsys: Capture, store: Store, base: Path, tmp_path: Path, what: str) -> None:
    folder = SERVED[what](tmp_path / "checkpoint-5")
    taken = take_in(store, read_base(base), look_at(folder), run="a", kind="step", step=5, max_rank=16).revision
    found = checked(capsys, folder, "--base", base, "--max-lora-rank", "16", code=0)
    assert found["problems"] == []
    assert "; ".join(found["repairs"]) == (taken.repaired or "")
    assert (found["rank"], found["modules_applied"]) == (taken.rank, found["modules"])


def test_tokens_of_its_own_are_refused_by_both(capsys: Capture, store: Store, base: Path, tmp_path: Path) -> None:
    folder = SERVED[next(iter(SERVED))](tmp_path / "checkpoint-5")
    for place, vocabulary in ((base, {"a": 0}), (folder, {"a": 0, "<think>": 1})):
        (place / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocabulary}}))
    with pytest.raises(Refused, match="adds 1 tokens \\('<think>'\\)"):
        take_in(store, read_base(base), look_at(folder), run="a", kind="step", step=5, max_rank=16)
    found = checked(capsys, folder, "--base", base, code=4)
    assert [check["name"] for check in found["checks"] if check["ok"] is False] == ["tokenizer"]


@pytest.mark.parametrize("what", REFUSED)
def test_what_a_server_refuses_is_not_ready_for_the_same_reasons(
    capsys: Capture, store: Store, base: Path, tmp_path: Path, what: str
) -> None:
    name, write = REFUSED[what]
    folder = write(tmp_path / "checkpoint-5")
    with pytest.raises(Refused) as refused:
        take_in(store, read_base(base), look_at(folder), run="a", kind="step", step=5, max_rank=16)
    found = checked(capsys, folder, "--base", base, "--max-lora-rank", "16", code=4)
    rest = str(refused.value)
    for problem in found["problems"]:
        assert problem in rest
        rest = rest.replace(problem, "")
    assert not rest.strip("; ")
    wrong = [check for check in found["checks"] if check["ok"] is False]
    assert name in {check["name"] for check in wrong}
    assert all(check["reason"] and check["cure"] for check in wrong)
    assert (found["repairs"], found["verdict"]) == ([], "not ready")


def test_in_words_it_is_a_short_list(capsys: Capture, base: Path, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "checkpoint-5", base_model_name_or_path=str(base))
    ended = lorakit(capsys, "check", folder)
    lines = ended.out.splitlines()
    assert (ended.code, ended.err) == (0, "")
    assert lines[0] == "ok  finished     trainer_state.json is there, its writer's last file"
    assert all(line.startswith("ok  ") for line in lines[:-1])
    assert lines[-1] == "ready: 3 of 3 modules apply"


def test_what_is_wrong_has_its_cure_below_it(capsys: Capture, base: Path, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "checkpoint-5", use_dora=True)
    ended = lorakit(capsys, "check", folder, "--base", base)
    lines = [line.strip() for line in ended.out.splitlines()]
    place = lines.index("no  features     vLLM serves no adapter with use_dora")
    assert lines[place + 1].startswith("`lorakit convert ADAPTER --base BASE --approximate` makes plain LoRA of it")
    assert lines[place + 1].endswith("or merge it into its base (lorakit merge), and serve that")
    assert (ended.code, lines[-1]) == (4, "not ready: 3 of 3 modules apply")


def test_an_exact_repair_is_said_and_refuses_nothing(capsys: Capture, base: Path, tmp_path: Path) -> None:
    folder = SERVED["another prefix"](tmp_path / "checkpoint-5")
    ended = lorakit(capsys, "check", folder, "--base", base)
    assert ended.code == 0
    assert ended.err.startswith("note: moved names (")


def test_without_a_base_the_rest_is_judged_and_it_is_not_ready(capsys: Capture, tmp_path: Path) -> None:
    found = checked(capsys, write_checkpoint(tmp_path / "checkpoint-5"), code=4)
    assert (found["verdict"], found["problems"], found["modules_applied"]) == ("unknown", [], None)
    (base,) = (check for check in found["checks"] if check["name"] == "base")
    assert (base["ok"], base["cure"]) == (None, "name it with --base")


@pytest.mark.parametrize("name", ["/no/such/base", "org/nowhere-to-be-found"])
def test_a_base_that_is_not_there_is_unknown_where_the_config_names_it_and_an_error_where_you_do(
    capsys: Capture, tmp_path: Path, name: str
) -> None:
    folder = write_checkpoint(tmp_path / "checkpoint-5", base_model_name_or_path=name)
    found = checked(capsys, folder, code=4)
    assert found["verdict"] == "unknown"
    assert name in next(check["reason"] for check in found["checks"] if check["name"] == "base")
    assert lorakit(capsys, "check", folder, "--base", name).code == 3


def test_a_run_is_its_newest_finished_checkpoint_which_is_said(capsys: Capture, base: Path, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "sql" / "checkpoint-5", base_model_name_or_path=str(base))
    (tmp_path / "sql" / "checkpoint-7").mkdir()
    ended = lorakit(capsys, "check", tmp_path / "sql", "--json")
    newer, chosen = ended.err.splitlines()
    assert newer.startswith(
        f"note: '{tmp_path / 'sql' / 'checkpoint-7'}' is newer than checkpoint-5, but is incomplete"
    )
    assert chosen == f"note: '{tmp_path / 'sql'}' is a run: its newest finished checkpoint is checkpoint-5"
    assert json.loads(ended.out)["path"] == str(tmp_path / "sql" / "checkpoint-5")


def test_one_that_is_still_being_written_is_not_ready(capsys: Capture, base: Path, tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "checkpoint-5")
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    found = checked(capsys, folder, "--base", base, code=4)
    (check,) = (check for check in found["checks"] if check["ok"] is False)
    assert check["name"] == "finished"
    assert "wait for its writer" in check["cure"]


def test_a_whole_model_needs_its_shards_its_tokenizer_and_an_architecture(capsys: Capture, tmp_path: Path) -> None:
    folder = finish(make_base(tmp_path / "checkpoint-5"))
    (missing,) = (check for check in checked(capsys, folder, code=4)["checks"] if not check["ok"])
    assert missing["name"] == "tokenizer"
    (folder / "tokenizer.json").write_text("{}")
    finish(folder)
    found = checked(capsys, folder, code=0)
    assert (found["kind"], found["modules"]) == ("regular", None)
    assert "LlamaForCausalLM" in next(check["reason"] for check in found["checks"] if check["name"] == "architecture")


def test_a_shard_that_is_missing_or_a_config_without_architectures_is_not_ready(
    capsys: Capture, tmp_path: Path
) -> None:
    folder = make_base(tmp_path / "checkpoint-5", max_shard_size="400KB")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": None}))
    finish(folder)
    wrong = {check["name"] for check in checked(capsys, folder, code=4)["checks"] if not check["ok"]}
    assert wrong == {"tokenizer", "architecture"}
    max(folder.glob("model-*.safetensors")).unlink()
    wrong = {check["name"] for check in checked(capsys, folder, code=4)["checks"] if not check["ok"]}
    assert wrong == {"finished"}


@pytest.mark.parametrize("file", ["adapter_model.bin", "pytorch_model.bin"])
def test_a_pickle_is_not_opened_and_not_ready(capsys: Capture, tmp_path: Path, file: str) -> None:
    import torch

    folder = write_adapter(tmp_path / "checkpoint-5") if file.startswith("a") else write_base(tmp_path / "checkpoint-5")
    for weights in folder.glob("*.safetensors"):
        weights.unlink()
    torch.save({"w": torch.ones(2)}, folder / file)
    finish(folder)
    found = checked(capsys, folder, code=4)
    (wrong,) = (check for check in found["checks"] if check["ok"] is False)
    assert wrong["name"] in ("pickle-free", "format")
    assert wrong["cure"]


def test_a_format_of_training_is_sent_to_convert(capsys: Capture, tmp_path: Path) -> None:
    import torch

    file = tmp_path / "epoch=1-step=7.ckpt"
    torch.save({"state_dict": {"w": torch.ones(2)}, "pytorch-lightning_version": "2.6", "global_step": 7}, file)
    found = checked(capsys, file, code=4)
    assert f"lorakit convert '{file}'" in found["problems"][0]


def test_one_file_of_a_checkpoint_is_sent_to_its_folder(capsys: Capture, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "checkpoint-5")
    (problem,) = checked(capsys, folder / "adapter_model.safetensors", code=4)["problems"]
    assert problem == f"'adapter_model.safetensors' is one file of a checkpoint: name its folder, '{folder}'"


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("setpriv"), reason="it takes root to give a file away")
@pytest.mark.parametrize("closed", ["model.safetensors", "."])
def test_what_may_not_be_read_is_said_to_be_that(tmp_path: Path, closed: str) -> None:
    folder = finish(write_base(tmp_path / "run" / "checkpoint-5"))
    (folder / closed).chmod(0o600 if closed != "." else 0o700)
    os.chown(folder / closed, 65534, 65534)
    ended = without_rights("check", folder)
    assert (ended.returncode, "finished" in ended.stdout) == (4, False)
    assert "permission denied" in ended.stdout
    assert "run both as one user, or chmod the file" in ended.stdout
    shown = without_rights("show", folder)
    assert "permission denied" in shown.stdout + shown.stderr
    shown = without_rights("show", folder.parent)
    assert (shown.returncode, "Errno" in shown.stderr) == (0, False), shown


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("setpriv"), reason="it takes root to give a file away")
def test_a_folder_that_may_not_be_read_does_not_hide_the_adapters_beside_it(tmp_path: Path) -> None:
    for name in ("a", "b", "closed"):
        write_adapter(tmp_path / "adapters" / name)
    closed = tmp_path / "adapters" / "closed"
    closed.chmod(0o700)
    os.chown(closed, 65534, 65534)
    shown = without_rights("show", closed.parent)
    assert [line.split()[0] for line in shown.stdout.splitlines()] == ["name", "a", "b"], shown


def without_rights(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """As root, but for what root may do with the files of others."""
    rights = ("setpriv", "--bounding-set", "-dac_override,-dac_read_search", "--inh-caps", "-all")
    command = (*rights, sys.executable, "-m", "lorakit", *map(str, arguments))
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_exit_codes_of_what_is_not_there_or_nothing(capsys: Capture, tmp_path: Path) -> None:
    ended = lorakit(capsys, "check", tmp_path / "nowhere")
    assert (ended.code, ended.out) == (3, "")
    (tmp_path / "empty").mkdir()
    assert lorakit(capsys, "check", tmp_path / "empty").code == 4
    (tmp_path / "sql" / "checkpoint-5").mkdir(parents=True)
    ended = lorakit(capsys, "check", tmp_path / "sql")
    assert (ended.code, "none of the 1 checkpoints" in ended.err) == (3, True)


def test_names_in_files_give_a_terminal_no_orders(capsys: Capture, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "checkpoint-5", base_model_name_or_path="org/\x1b[31m", bias="\x1b[2J")
    ended = lorakit(capsys, "check", folder)
    assert "\x1b" not in ended.out + ended.err


# --probe


def asked(monkeypatch: pytest.MonkeyPatch, answer: bool | None) -> list[tuple[Path, Path]]:
    """What an engine would have been started with; it gives this answer."""
    seen: list[tuple[Path, Path]] = []

    def probe(adapter: Path, served: Path, base: str, **_: object) -> Check:
        assert (served / "adapter_model.safetensors").is_file()
        seen.append((adapter, served))
        return Check("probe", answer, "as they say", "do this")

    monkeypatch.setattr("lorakit.server.probe.probe", probe)
    return seen


@pytest.mark.parametrize(("answer", "code"), [(True, 0), (False, 4), (None, 4)])
def test_an_engines_answer_counts_as_the_others_do(
    capsys: Capture, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: bool | None, code: int
) -> None:
    seen = asked(monkeypatch, answer)
    folder = write_checkpoint(tmp_path / "checkpoint-5")
    ended = lorakit(capsys, "check", folder, "--base", base, "--probe", "--json")
    assert ended.code == code
    assert json.loads(ended.out)["checks"][-1]["ok"] is answer
    assert seen == [(folder, folder)]


def test_an_engine_gets_what_a_server_would_make_of_it(
    capsys: Capture, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = asked(monkeypatch, True)
    folder = write_checkpoint(tmp_path / "checkpoint-5", lora_alpha=None)
    assert lorakit(capsys, "check", folder, "--base", base, "--probe").code == 0
    ((adapter, served),) = seen
    assert adapter == folder
    assert served != folder
    assert not served.exists()


def test_of_what_is_refused_no_engine_is_asked(
    capsys: Capture, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = asked(monkeypatch, True)
    folder = write_checkpoint(tmp_path / "checkpoint-5", use_dora=True)
    ended = lorakit(capsys, "check", folder, "--base", base, "--probe")
    assert (ended.code, seen) == (4, [])
    assert "not asked" in ended.out
    model = lorakit(capsys, "check", base, "--probe")
    assert "for adapters alone" in model.out
