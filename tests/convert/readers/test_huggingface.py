"""Models in Hugging Face's layout, of safetensors or of torch.save; what transformers loads is the measure."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from huggingface_hub import split_torch_state_dict_into_shards

from lorakit.convert.readers.huggingface import read
from lorakit.convert.source import numel
from lorakit.errors import InvalidFile, LorakitError, NotFound, Refused, UsageError
from tests.models import load, make_base


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("models") / "base", dtype="bfloat16")


def as_bins(base: Path, folder: Path, *, shards: bool) -> Path:
    """As transformers wrote them before safetensors."""
    state = load(base).state_dict()
    folder.mkdir()
    (folder / "config.json").write_bytes((base / "config.json").read_bytes())
    split = split_torch_state_dict_into_shards(
        state, filename_pattern="pytorch_model{suffix}.bin", max_shard_size=100_000 if shards else "5GB"
    )
    for name, keys in split.filename_to_tensors.items():
        torch.save({key: state[key] for key in keys}, folder / name)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return folder


@pytest.mark.parametrize("form", ["safetensors", "shards", "bin", "bin-shards", "file"])
def test_every_form_holds_the_same(base: Path, tmp_path: Path, form: str) -> None:
    state = load(base).state_dict()
    if form == "shards":
        load(base).save_pretrained(tmp_path / "model", max_shard_size="100KB")
        path = tmp_path / "model"
    elif form.startswith("bin"):
        path = as_bins(base, tmp_path / "model", shards=form == "bin-shards")
    else:
        path = base / "model.safetensors" if form == "file" else base
    source = read(path)
    assert len(source.states) == (1 if "shards" not in form else len(list(path.glob("*model-*"))))
    found = {name: one.read(0, numel(one)).reshape(one.shape) for name, one in source.tensors.items()}
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], state[name]) for name in state)
    assert source.beside == (path.parent if form == "file" else path)


@pytest.mark.parametrize(
    ("broken", "error", "said"),
    [
        ("missing", NotFound, "lacks pytorch_model-00002"),
        ("elsewhere", InvalidFile, "no file beside it"),
        ("extra", InvalidFile, "does not know"),
        ("twice", InvalidFile, "is both in"),
        ("moved", InvalidFile, "and it isn't"),
        ("no tensor", InvalidFile, "is no tensor"),
    ],
)
def test_shards_and_index_have_to_agree(
    base: Path, tmp_path: Path, broken: str, error: type[LorakitError], said: str
) -> None:
    folder = as_bins(base, tmp_path / "model", shards=True)
    index = json.loads((folder / "pytorch_model.bin.index.json").read_text())
    first, second, *_ = sorted(folder.glob("pytorch_model-*"))
    held = torch.load(first)
    if broken == "missing":
        second.unlink()
    elif broken == "elsewhere":
        index["weight_map"]["lm_head.weight"] = "../other.bin"
    elif broken == "extra":
        torch.save({**held, "more": torch.ones(1)}, first)
    elif broken == "twice":
        torch.save({**held, next(iter(torch.load(second))): torch.ones(1)}, first)
    elif broken == "moved":
        index["weight_map"][next(iter(held))] = second.name
    else:
        torch.save({**held, "epoch": 3}, first)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    with pytest.raises(error, match=said):
        read(folder)


def test_it_has_no_average(base: Path) -> None:
    with pytest.raises(UsageError, match="leave out --weights ema"):
        read(base, weights="ema")


def test_files_that_may_be_another_model_are_refused(base: Path, tmp_path: Path) -> None:
    """transformers would take the one, and others the many."""
    for name, said in (
        ("model.safetensors", "model.safetensors and an index"),
        ("model-00099-of-00099.safetensors", "99"),
    ):
        folder = tmp_path / name
        load(base).save_pretrained(folder, max_shard_size="100KB")
        (folder / name).write_bytes((base / "model.safetensors").read_bytes())
        with pytest.raises(InvalidFile, match=f"{said}.*keep one of the two"):
            read(folder)


def test_pickled_weights_beside_are_not_read_and_that_is_said(base: Path, tmp_path: Path) -> None:
    load(base).save_pretrained(tmp_path)
    torch.save({}, tmp_path / "pytorch_model.bin")
    assert read(tmp_path).notes == ("the safetensors files are read, and pytorch_model.bin beside them is not",)


@pytest.mark.parametrize("name", ["weights.safetensors", "model.fp16.safetensors"])
def test_one_file_of_any_name_is_the_model(base: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes((base / "model.safetensors").read_bytes())
    assert read(tmp_path).tensors.keys() == load(base).state_dict().keys()
    (tmp_path / "other.safetensors").write_bytes((base / "model.safetensors").read_bytes())
    with pytest.raises(Refused, match="and no index that says which are the model: name the file"):
        read(tmp_path)
