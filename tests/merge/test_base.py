"""A base is taken as it is on disk, or refused with the reason."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file

from lorakit.adapters.reading import load_adapter
from lorakit.errors import Conflict, InvalidFile, NotFound, UsageError
from lorakit.merge.base import base_named_by, read_base
from tests.folders import base_tensors, write_adapter, write_base

INDEX = "model.safetensors.index.json"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def edit_index(base: Path, change: Callable[[dict[str, str]], object]) -> None:
    index = json.loads((base / INDEX).read_text())
    change(index["weight_map"])
    (base / INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize("shards", [1, 3])
def test_one_file_or_several_shards(tmp_path: Path, shards: int) -> None:
    base = read_base(write_base(tmp_path / "base", shards=shards))
    assert len(base.shards) == shards
    assert set(base.tensors) == set(base_tensors())
    assert base.model_type == "llama"
    assert base.quantised is None


@pytest.mark.parametrize("name", ["/no/such/base", "./nowhere", "no-such-base", "no/such-base"])
def test_a_base_that_is_nowhere_is_not_found(name: str) -> None:
    with pytest.raises(NotFound, match="there is no base"):
        read_base(name)


def test_a_base_is_fetched_from_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    there = write_base(tmp_path / "cache")
    asked = []

    def snapshot(name: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((name, revision))
        return str(there)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert read_base("someone/model@v2").folder == there
    assert asked == [("someone/model", "v2")]


def test_an_adapter_is_no_base(tmp_path: Path) -> None:
    with pytest.raises(InvalidFile, match=r"no config\.json: it holds an adapter"):
        read_base(write_adapter(tmp_path / "adapter"))


def test_pickled_weights_are_refused_with_the_cure(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    (base / "model.safetensors").unlink()
    (base / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(InvalidFile, match=r"pickles \(pytorch_model\.bin\): save it as safetensors"):
        read_base(base)


def test_no_weights_at_all(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    (base / "model.safetensors").rename(base / "other.safetensors")
    with pytest.raises(InvalidFile, match=r"holds other\.safetensors, but neither"):
        read_base(base)
    (base / "other.safetensors").unlink()
    with pytest.raises(InvalidFile, match="has no weights"):
        read_base(base)


def test_a_missing_shard(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", shards=2)
    (base / SECOND).unlink()
    with pytest.raises(InvalidFile, match=f"incomplete: its index names {SECOND}"):
        read_base(base)


def test_a_tensor_that_the_index_does_not_know(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", shards=2)
    edit_index(base, lambda names: names.pop("lm_head.weight"))
    with pytest.raises(InvalidFile, match=r"holds 'lm_head\.weight', which .* does not know"):
        read_base(base)


def test_a_tensor_that_no_shard_holds(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", shards=2)
    edit_index(base, lambda names: names.update(ghost=FIRST))
    with pytest.raises(InvalidFile, match=r"says that 'ghost' is in .*, and it isn't"):
        read_base(base)


def test_a_tensor_that_is_in_another_shard(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", shards=2)
    edit_index(base, lambda names: names.update({"lm_head.weight": FIRST}))
    with pytest.raises(InvalidFile, match=f"in {FIRST}, but it is in {SECOND}"):
        read_base(base)


def test_a_tensor_that_is_in_two_shards(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", shards=2)
    doubled = load_file(base / FIRST) | {"lm_head.weight": base_tensors()["lm_head.weight"]}
    save_file(doubled, base / FIRST)
    with pytest.raises(InvalidFile, match=f"both in {FIRST} and in {SECOND}"):
        read_base(base)


@pytest.mark.parametrize("name", ["../elsewhere.safetensors", "/etc/passwd", "model.bin"])
def test_an_index_that_leads_elsewhere(tmp_path: Path, name: str) -> None:
    base = write_base(tmp_path / "base", shards=2)
    edit_index(base, lambda names: names.update({"lm_head.weight": name}))
    with pytest.raises(InvalidFile, match="no safetensors file beside it"):
        read_base(base)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"weight_map": {}}', '{"weight_map": [1]}', '{"metadata": {}}'])
def test_an_index_that_says_nothing(tmp_path: Path, text: str) -> None:
    base = write_base(tmp_path / "base", shards=2)
    (base / INDEX).write_text(text)
    with pytest.raises(InvalidFile):
        read_base(base)


def test_a_single_file_beside_other_shards(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", shards=2)
    save_file(base_tensors(), base / "model.safetensors")
    with pytest.raises(InvalidFile, match="keep one of the two"):
        read_base(base)


def test_a_shard_that_is_written_again_is_noticed(tmp_path: Path) -> None:
    base = read_base(write_base(tmp_path / "base"))
    base.ensure_unchanged()
    save_file(base_tensors(1), base.folder / "model.safetensors")
    with pytest.raises(Conflict, match="written again"):
        base.ensure_unchanged()


def test_adapters_of_different_bases_need_a_word(tmp_path: Path) -> None:
    one = load_adapter(write_adapter(tmp_path / "one", base_model_name_or_path="org/one"))
    two = load_adapter(write_adapter(tmp_path / "two", base_model_name_or_path="org/two"))
    none = load_adapter(write_adapter(tmp_path / "none"))
    assert base_named_by([one, none, one]) == "org/one"
    with pytest.raises(UsageError, match=r"different bases .*--base"):
        base_named_by([one, two])
    with pytest.raises(UsageError, match="names no base"):
        base_named_by([none])


def test_a_base_that_went_away_is_not_found(tmp_path: Path) -> None:
    adapter = load_adapter(write_adapter(tmp_path / "one", base_model_name_or_path="/gone/base"))
    with pytest.raises(NotFound, match=r"'/gone/base', which adapter .* names: name another with --base"):
        base_named_by([adapter])


def test_a_base_is_itself_wherever_it_lies_and_another_when_it_was_trained_again(tmp_path: Path) -> None:
    one = write_base(tmp_path / "one", shards=2)
    copied = write_base(tmp_path / "copied", shards=2)
    tensors = {name: tensor + 1 for name, tensor in base_tensors().items()}
    retrained = write_base(tmp_path / "retrained", tensors, shards=2)
    identities = [read_base(folder).identity for folder in (one, copied, retrained)]
    assert identities[0] == identities[1] != identities[2]
