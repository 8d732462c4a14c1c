"""What a merge writes loads as it stands: shards, index, config, card; and is pushed as it stands."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model
from safetensors import safe_open

from lorakit.cli import main
from lorakit.errors import LorakitError, UsageError
from lorakit.merge.card import shown_name
from lorakit.merge.merge import merge, parse_size
from tests.folders import leftovers, linear_modules, stored, write_adapter, write_base
from tests.hub import Hub
from tests.models import LINEARS, assert_same_bits, bits, load, make_adapter, make_base, merged_by_peft

INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("output") / "base", "llama", "bfloat16", max_shard_size="200KB")


@pytest.fixture(scope="module")
def adapter(base: Path) -> Path:
    return make_adapter(base.parent / "adapter", base, target_modules=LINEARS["llama"])


def assert_index_is_right(folder: Path) -> list[str]:
    """The index names every tensor where it is, and nothing else; the names of the shards."""
    index = json.loads((folder / INDEX).read_text())
    found, total = {}, 0
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "np") as reader:
            found |= dict.fromkeys(reader.keys(), file.name)
            assert reader.metadata() == {"format": "pt"}
        head = int.from_bytes(file.read_bytes()[:8], "little")
        total += file.stat().st_size - 8 - head
    assert index["weight_map"] == found
    assert index["metadata"]["total_size"] == total
    return sorted(set(found.values()))


@pytest.mark.parametrize(("size", "most"), [("200KB", 200_000), ("150KiB", 153_600), (100_000, 100_000)])
def test_shards_of_a_wanted_size(base: Path, adapter: Path, tmp_path: Path, size: str | int, most: int) -> None:
    merge(base, adapter, out=tmp_path / "out", device="cpu", max_shard_size=size)
    names = assert_index_is_right(tmp_path / "out")
    assert names == [f"model-{number:05}-of-{len(names):05}.safetensors" for number in range(1, len(names) + 1)]
    for name in names:
        file = tmp_path / "out" / name
        with safe_open(file, "np") as reader:
            alone = len(list(reader.keys())) == 1
        assert alone or file.stat().st_size - 8 - int.from_bytes(file.read_bytes()[:8], "little") <= most
    assert_same_bits(bits(tmp_path / "out"), merged_by_peft(base, [(adapter, 1.0)]))


def test_one_shard_has_no_index(base: Path, adapter: Path, tmp_path: Path) -> None:
    merge(base, adapter, out=tmp_path / "out", device="cpu", max_shard_size="5GB")
    assert [file.name for file in (tmp_path / "out").glob("*.safetensors*")] == ["model.safetensors"]
    assert_same_bits(bits(tmp_path / "out"), merged_by_peft(base, [(adapter, 1.0)]))


@pytest.mark.parametrize(
    ("text", "size"), [("5GB", 5 * 10**9), ("200kb", 200_000), ("2GiB", 2 << 30), ("7", 7), ("0.5 MB", 500_000)]
)
def test_sizes_are_read_as_transformers_reads_them(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("size", ["", "GB", "-5GB", "5XB", "5GBs", "five", 0, -1, "0GB"])
def test_a_size_that_is_none(base: Path, adapter: Path, tmp_path: Path, size: Any) -> None:
    with pytest.raises(UsageError, match=r"is no size|holds nothing"):
        merge(base, adapter, out=tmp_path / "out", max_shard_size=size)


@pytest.mark.parametrize("metadata", [None, {"note": "kept"}, []])
def test_an_index_keeps_what_else_it_says(tmp_path: Path, metadata: Any) -> None:
    base = write_base(tmp_path / "base", shards=3)
    index = json.loads((base / INDEX).read_text()) | {"other": 1, "metadata": metadata}
    if metadata is None:
        index.pop("metadata")
    (base / INDEX).write_text(json.dumps(index))
    merge(base, write_adapter(tmp_path / "adapter"), out=tmp_path / "out", device="cpu")
    assert len(assert_index_is_right(tmp_path / "out")) == 3
    after = json.loads((tmp_path / "out" / INDEX).read_text())
    assert after["other"] == 1
    assert after["metadata"].get("note") == (metadata or {}).get("note")


@pytest.mark.parametrize(("dtype", "name"), [("fp32", "float32"), ("fp16", "float16")])
def test_the_config_says_the_dtype_of_the_weights(
    base: Path, adapter: Path, tmp_path: Path, dtype: str, name: str
) -> None:
    merge(base, adapter, out=tmp_path / "out", device="cpu", dtype=dtype)
    assert {str(tensor.dtype) for tensor in bits(tmp_path / "out").values()} == {f"torch.{name}"}
    assert_index_is_right(tmp_path / "out")


def test_repeated_layers_are_in_the_config(base: Path, tmp_path: Path) -> None:
    adapter = make_adapter(
        tmp_path / "adapter", base, target_modules=["q_proj"], layer_replication=[[0, 2], [1, 2]]
    )  # fmt: skip
    merge(base, adapter, out=tmp_path / "out", device="cpu", max_shard_size="200KB")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_hidden_layers"] == 3
    assert_index_is_right(tmp_path / "out")
    before, after = bits(base), bits(tmp_path / "out")
    assert after.keys() - before.keys() == {name.replace(".1.", ".2.") for name in before if ".layers.1." in name}
    assert torch.equal(after["model.layers.2.mlp.up_proj.weight"], before["model.layers.1.mlp.up_proj.weight"])


def test_an_untied_head_and_more_rows_are_in_the_config(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "tied-llama", "bfloat16", max_shard_size="200KB")
    model = load(base)
    model.resize_token_embeddings(105)
    torch.nn.init.normal_(model.get_input_embeddings().weight)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tied weights that are saved
        get_peft_model(
            model, LoraConfig(target_modules=["q_proj"], modules_to_save=["embed_tokens"], task_type="CAUSAL_LM")
        ).save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    merge(base, tmp_path / "adapter", out=tmp_path / "out", device="cpu")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["vocab_size"] == 105
    assert_index_is_right(tmp_path / "out")
    merged = load(tmp_path / "out")
    assert merged.get_input_embeddings().weight.shape == (105, 96)
    assert torch.equal(merged.get_input_embeddings().weight, model.get_input_embeddings().weight)


def test_the_card_names_what_it_was_made_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = write_base(tmp_path / "base")
    (base / "README.md").write_text("---\nlanguage: en\nlicense: other\nlicense_name: some-terms\n---\n# Base\n")
    one, two = write_adapter(tmp_path / "sql" / "checkpoint-500"), write_adapter(tmp_path / "chat")
    merge(base, [(one, 0.7), two], out=tmp_path / "results" / "mine", device="cpu", dtype="bf16", seed=3)
    file = tmp_path / "results" / "mine" / "README.md"
    card = ModelCard.load(file)
    assert card.data.to_dict() == {
        "library_name": "transformers", "tags": ["merge", "lorakit"], "license": "other", "license_name": "some-terms",
    }  # fmt: skip
    assert str(tmp_path) not in file.read_text()
    record = json.loads((file.parent / "lorakit.json").read_text())
    for parent in record["parents"][1:]:
        assert parent["sha256"] in card.text
    assert "| adapter `sql/checkpoint-500` | 0.7 |" in card.text
    assert "lorakit merge sql/checkpoint-500=0.7 chat --base base --out mine --dtype bf16 --seed 3" in card.text
    assert "of the change survived rounding" in card.text


@pytest.mark.parametrize("license_line", ["license:", "license: |", "license: [a, b]", "license: &x y", "licence: x"])
def test_a_card_is_valid_whatever_the_bases_says(tmp_path: Path, license_line: str) -> None:
    base = write_base(tmp_path / "base")
    (base / "README.md").write_text(f"---\n{license_line}\n---\n")
    merge(base, write_adapter(tmp_path / "adapter"), out=tmp_path / 'a "b" $c', device="cpu")
    assert ModelCard.load(tmp_path / 'a "b" $c' / "README.md").data.library_name == "transformers"


@pytest.mark.parametrize(
    ("folder", "reference", "name"),
    [
        ("/home/me/models/base", "/home/me/models/base", "base"),
        ("/cache/models--org--a--b/snapshots/0123", None, "org/a--b"),
        ("/cache/models--org--model/snapshots/0123", "org/model@v1", "org/model@v1"),
        ("/runs/sql/checkpoint-5", None, "sql/checkpoint-5"),
    ],
)
def test_names_are_those_that_mean_something_elsewhere(folder: str, reference: str | None, name: str) -> None:
    assert shown_name(Path(folder), reference) == name


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    serving = Hub({})
    serving.point_there(monkeypatch, tmp_path / "cache")
    monkeypatch.setenv("HF_TOKEN", "hf_of_a_test")
    yield serving
    serving.close()


@pytest.fixture
def numbers(tmp_path: Path) -> tuple[Path, Path]:
    return write_base(tmp_path / "base", shards=2), write_adapter(tmp_path / "adapter")


def test_a_whole_result_is_pushed(hub: Hub, numbers: tuple[Path, Path], tmp_path: Path) -> None:
    report = merge(*numbers, out=tmp_path / "out", device="cpu", push_to_hub="me/mine", private=True)
    there = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir() if file.name != "lorakit.json"}
    assert hub.pushed == there
    assert hub.made[0]["name"] == "mine"
    assert hub.made[0].get("private") or hub.made[0].get("visibility") == "private"
    assert report.pushed == f"{hub.url}/me/mine"
    assert hub.tokens == {"Bearer hf_of_a_test"}
    assert not any(str(tmp_path).encode() in content for content in hub.pushed.values())


def test_a_push_that_fails_leaves_the_result(
    hub: Hub, numbers: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.refuses = True
    base, adapter = map(str, numbers)
    arguments = ["merge", adapter, "--base", base, "--out", str(tmp_path / "out"), "--push-to-hub", "me/mine"]
    with pytest.raises(SystemExit, match="1"):
        main([*arguments, "--device", "cpu"])
    said = capsys.readouterr()
    assert "is whole, but was not pushed to 'me/mine': the hub: you may not write there" in said.err
    assert "hf upload me/mine" in said.err
    assert "hf_of_a_test" not in said.err + said.out
    assert set(stored(tmp_path / "out")) >= {f"{name}.weight" for name in linear_modules()}
    assert leftovers(tmp_path) == []


def test_what_can_not_be_pushed_is_said_before_the_work(
    hub: Hub, numbers: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a/b/c", "/a", "me/mine@v1"):
        with pytest.raises(UsageError, match="no name of a repository"):
            merge(*numbers, out=tmp_path / "out", push_to_hub=name)
    with pytest.raises(UsageError, match="for a repository to push to"):
        merge(*numbers, out=tmp_path / "out", private=True)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(UsageError, match="nobody is logged in"):
        merge(*numbers, out=tmp_path / "out", push_to_hub="me/mine")
    assert not (tmp_path / "out").exists()


def test_a_dry_run_pushes_nothing(hub: Hub, numbers: tuple[Path, Path]) -> None:
    merge(*numbers, dry_run=True, push_to_hub="me/mine")
    assert (hub.made, hub.pushed) == ([], {})


def test_a_failed_merge_pushes_nothing(hub: Hub, numbers: tuple[Path, Path], tmp_path: Path) -> None:
    def fail(*_: int) -> None:
        raise LorakitError("on the way")

    with pytest.raises(LorakitError, match="on the way"):
        merge(*numbers, out=tmp_path / "out", device="cpu", push_to_hub="me/mine", progress=fail)
    assert (hub.made, hub.pushed) == ([], {})
