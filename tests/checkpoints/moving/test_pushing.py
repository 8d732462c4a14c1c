"""What goes onto the Hub, what stays here, and the card that says what it is."""

from __future__ import annotations

import gzip
import json
import pickle
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from lorakit.checkpoints.moving.fetching import fetch, plan_fetch
from lorakit.checkpoints.moving.pushing import push
from lorakit.errors import Incomplete, InvalidFile, LorakitError, NotFound, Refused, UsageError
from lorakit.files.archives import Limits
from tests.checkpoints.moving.archives import files_below
from tests.checkpoints.moving.web import sha256
from tests.checkpoints.written import evaluated, write_checkpoint, write_model_checkpoint
from tests.folders import factors, linear_modules, write_adapter
from tests.hub import COMMIT, Hub


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    write_adapter(tmp_path / "origin" / "sql", base_model_name_or_path="org/llama")
    serving = Hub({"org/sql": tmp_path / "origin" / "sql"})
    serving.point_there(monkeypatch, tmp_path / "cache")
    monkeypatch.setenv("HF_TOKEN", "hf_5ec4e7")
    yield serving
    serving.close()


@pytest.fixture
def full(checkpoint: Path) -> Path:
    """With everything that a trainer leaves beside an adapter."""
    for name in ("scheduler.pt", "rng_state_0.pth", "training_args.bin", "zero_to_fp32.py", "adapter_model.bin"):
        (checkpoint / name).write_bytes(b"x")
    (checkpoint / "global_step500").mkdir()
    (checkpoint / "global_step500" / "mp_rank_00_model_states.pt").write_bytes(b"x")
    (checkpoint / "lorakit.json").write_text("{}")
    (checkpoint / "tokenizer.json").write_text("{}")
    return checkpoint


def test_weights_and_what_belongs_to_them_go_there_and_pickles_stay(hub: Hub, full: Path) -> None:
    pushed = push(str(full), "org/sql")
    stay = {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "trainer_state.json", "README.md"}
    assert set(hub.pushed) == set(pushed.files) == stay
    assert hub.pushed["adapter_model.safetensors"] == (full / "adapter_model.safetensors").read_bytes()
    assert pushed.left_out["optimizer.pt"] == "only its trainer needs it"
    assert pushed.left_out["training_args.bin"] == pushed.left_out["adapter_model.bin"] == "a pickle"
    assert pushed.left_out["lorakit.json"] == "of this machine alone"
    assert set(pushed.files) | set(pushed.left_out) == set(files_below(full)) | {"lorakit.json", "README.md"}
    assert pushed.url == f"{hub.url}/org/sql/commit/{COMMIT}"


def test_all_of_it_where_that_is_asked_for(hub: Hub, full: Path) -> None:
    push(str(full), "org/sql", everything=True)
    assert {"optimizer.pt", "training_args.bin", "global_step500/mp_rank_00_model_states.pt"} <= set(hub.pushed)
    assert "lorakit.json" not in hub.pushed


def test_a_pickle_is_known_whatever_its_name(hub: Hub, checkpoint: Path) -> None:
    import numpy
    import torch

    pickled = pickle.dumps({"a": 1})
    files = {"model.PT": pickled, "m.th": b"x", "notes.txt": pickled, "packed.gz": gzip.compress(pickled)}
    for name, data in files.items():
        (checkpoint / name).write_bytes(data)
    torch.save({"a": torch.zeros(1)}, checkpoint / "weights.dat")
    numpy.savez(checkpoint / "arrays", numpy.zeros(1))
    pushed = push(str(checkpoint), "org/sql")
    for name in (*files, "weights.dat", "arrays.npz"):
        assert pushed.left_out[name] == "a pickle"
        assert name not in hub.pushed


def test_a_folder_of_a_repository_is_pushed_to_and_its_root_stays(hub: Hub, checkpoint: Path) -> None:
    planned = push(str(checkpoint), "hf://org/sql/adapters/v2", dry_run=True)
    pushed = push(str(checkpoint), "hf://org/sql/adapters/v2")
    assert planned.files == pushed.files
    assert set(hub.pushed) == set(pushed.files)
    assert all(name.startswith("adapters/v2/") for name in pushed.files)
    assert "adapters/v2/README.md" not in pushed.files


def test_a_plan_refuses_what_the_push_would(hub: Hub, checkpoint: Path) -> None:
    for name in ("org/sql@v1", "https://huggingface.co/org/sql"):
        with pytest.raises(UsageError):
            push(str(checkpoint), name, dry_run=True)
    (checkpoint / "adapter_model.safetensors").write_bytes(b"cut")
    with pytest.raises(Incomplete, match="is not finished"):
        push(str(checkpoint), "org/sql", dry_run=True)


def test_the_card_says_what_it_is_and_how_it_is_loaded(hub: Hub, checkpoint: Path) -> None:
    push(str(checkpoint), "org/sql")
    card = hub.pushed["README.md"].decode()
    front = card.split("---\n")[1]
    assert 'base_model: "org/llama"' in front
    assert "library_name: peft" in front
    rows = dict(re.findall(r"^\| ([^|]+) \| ([^|]+) \|$", card, re.MULTILINE))
    assert (rows["rank"], rows["step"], rows["evaluation loss"], rows["training loss"]) == ("2", "500", "1.25", "0.5")
    assert "`model.layers.0.mlp.down_proj`" in rows["modules"]
    assert 'PeftModel.from_pretrained(base, "org/sql")' in card
    assert "vllm serve org/llama --enable-lora --max-lora-rank 8 --lora-modules sql=org/sql" in card
    assert "lorakit pull org/sql" in card


def test_an_evaluation_of_another_step_is_not_passed_off_as_its_own(hub: Hub, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "r" / "checkpoint-300", [evaluated(200, 1.5)], target_modules="a|b\n| x | y |")
    push(str(tmp_path / "r"), "org/sql")
    card = hub.pushed["README.md"].decode()
    assert "| evaluation loss | 1.5 (of step 200) |" in card
    assert "\n| x |" not in card


def test_a_base_that_is_a_path_is_not_named_as_a_repository(hub: Hub, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "r" / "checkpoint-3", base_model_name_or_path="/home/me/models/llama")
    push(str(tmp_path / "r" / "checkpoint-3"), "org/sql")
    card = hub.pushed["README.md"].decode()
    assert "base_model" not in card
    assert "/home/me" not in card
    assert "adapter of `llama`" in card


def test_a_whole_model_gets_a_card_of_its_own_kind(hub: Hub, tmp_path: Path) -> None:
    write_model_checkpoint(tmp_path / "m" / "checkpoint-5")
    push(str(tmp_path / "m" / "checkpoint-5"), "org/sql")
    card = hub.pushed["README.md"].decode()
    assert "library_name: transformers" in card
    assert "vllm serve org/sql" in card


@pytest.mark.parametrize(
    ("text", "stays"), [("# Mine\nOf my own words.", True), ("# x\n[More Information Needed]", False), (" ", False)]
)
def test_a_card_that_somebody_wrote_is_left_alone(
    hub: Hub, checkpoint: Path, tmp_path: Path, text: str, stays: bool
) -> None:
    (checkpoint / "README.md").write_text(text)
    pushed = push(str(checkpoint), "org/sql")
    assert (hub.pushed["README.md"].decode() == text) == stays
    assert pushed.card == ("own" if stays else "made")
    hub.pushed.clear()
    (checkpoint / "README.md").unlink()
    (tmp_path / "origin" / "sql" / "README.md").write_text(text)
    pushed = push(str(checkpoint), "org/sql")
    assert ("README.md" not in hub.pushed) == stays
    assert pushed.card == ("theirs" if stays else "made")


def test_a_repository_is_made_only_when_that_is_asked_for(hub: Hub, checkpoint: Path) -> None:
    with pytest.raises(NotFound, match="--create makes it"):
        push(str(checkpoint), "org/new")
    with pytest.raises(UsageError, match="add --create"):
        push(str(checkpoint), "org/new", private=True)
    assert (hub.made, hub.pushed) == ([], {})


def test_a_repository_is_made(hub: Hub, checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "origin" / "new").mkdir()
    hub.repositories["org/new"] = tmp_path / "origin" / "new"
    push(str(checkpoint), "org/new", create=True, private=True)
    assert hub.made[0]["name"] == "new"
    assert hub.made[0].get("private") or hub.made[0].get("visibility") == "private"


def test_what_can_not_be_pushed(hub: Hub, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("org/sql@v1", "https://huggingface.co/org/sql"):
        with pytest.raises(UsageError):
            push(str(checkpoint), name)
    hub.refuses = True
    with pytest.raises(LorakitError, match="nothing was pushed to 'org/sql': the hub: you may not write there"):
        push(str(checkpoint), "org/sql")
    (checkpoint / "adapter_model.safetensors").rename(checkpoint / "adapter_model.bin")
    with pytest.raises(Refused, match="holds no safetensors: pickles are not pushed"):
        push(str(checkpoint), "org/sql")
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(UsageError, match="nobody is logged in"):
        push(str(checkpoint), "org/sql")


def test_a_plan_pushes_nothing_and_asks_nobody(hub: Hub, full: Path) -> None:
    pushed = push(str(full), "org/sql", dry_run=True)
    assert pushed.url is None
    assert "adapter_model.safetensors" in pushed.files
    assert (hub.pushed, hub.tokens) == ({}, set())


# and back again


def test_every_file_of_one_commit_comes(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "origin" / "sql" / "sub").mkdir()
    (tmp_path / "origin" / "sql" / "sub" / "a.txt").write_text("1")
    fetched = fetch("org/sql", tmp_path / "out")
    assert files_below(tmp_path / "out") == files_below(tmp_path / "origin" / "sql")
    assert not any(path.is_symlink() for path in (tmp_path / "out").rglob("*"))
    assert (fetched.checkpoint.kind, fetched.checkpoint.base, fetched.writer) == ("adapter", "org/llama", "peft")
    content = "".join(f"{sha256(data)}  {name}\n" for name, data in sorted(files_below(tmp_path / "out").items()))
    assert json.loads((tmp_path / "out" / "lorakit.json").read_text())["parents"] == [
        {"path": "org/sql", "commit": COMMIT, "content_sha256": sha256(content.encode())}
    ]
    assert set(fetch("hf://org/sql/sub", tmp_path / "sub").files) == {"a.txt"}
    plan = plan_fetch("hf://org/sql", tmp_path / "plan")
    assert set(plan.files or ()) == set(files_below(tmp_path / "origin" / "sql"))


def test_a_cache_that_was_damaged_is_found_out(hub: Hub, tmp_path: Path) -> None:
    fetch("org/sql", tmp_path / "out")
    [blob] = (tmp_path / "cache").rglob("adapter_model.safetensors")
    weights = factors(linear_modules(), seed=9)
    write_adapter(tmp_path / "other", weights)
    blob.resolve().write_bytes((tmp_path / "other" / "adapter_model.safetensors").read_bytes())
    with pytest.raises(InvalidFile, match="damaged in the hub's cache"):
        fetch("org/sql", tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_a_repository_that_is_not_there(hub: Hub, tmp_path: Path) -> None:
    for work in (fetch, plan_fetch):
        with pytest.raises(NotFound, match=r"there is no model 'org/none'"):
            work("hf://org/none", tmp_path / "out")
        with pytest.raises(NotFound, match="has no files in 'none'"):
            work("hf://org/sql/none", tmp_path / "out")


def test_a_folder_in_a_repository_may_have_any_name(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "origin" / "sql" / "ck[1]").mkdir()
    (tmp_path / "origin" / "sql" / "ck[1]" / "a.txt").write_text("1")
    assert fetch("hf://org/sql/ck[1]", tmp_path / "out").files == ("a.txt",)


def test_a_repository_larger_than_allowed_is_refused(hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(Refused, match="is larger than the 10 bytes that are allowed"):
        fetch("org/sql", tmp_path / "out", limits=Limits(max_bytes=10))
    with pytest.raises(UsageError, match="leave --sha256 out"):
        fetch("org/sql", tmp_path / "out", sha256="0" * 64)
    assert not (tmp_path / "out").exists()
