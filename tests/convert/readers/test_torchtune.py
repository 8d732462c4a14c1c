"""Models as torchtune itself wrote them: its own names, and Meta's."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lorakit.convert.readers import torch_files, torchtune
from lorakit.errors import Incomplete, InvalidFile, Refused, UsageError
from tests.convert.readers.state import ensure_converted, ensure_said, state_of
from tests.trainers.by_hand import kept


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return kept("torchtune_whole", tmp_path_factory.mktemp("torchtune"))


@pytest.mark.parametrize("name", ["own", "meta", "qwen2"])
def test_transformers_says_what_torchtune_said(written: Path, name: str) -> None:
    source = torchtune.read(written / name)
    ensure_said(written / name, state_of(source))
    assert source.format == "torchtune"
    assert source.beside == written / name


@pytest.mark.parametrize("name", ["own", "meta", "qwen2"])
def test_it_converts_into_a_model_folder(written: Path, tmp_path: Path, name: str) -> None:
    ensure_converted(written / name, tmp_path / "out", (written / name).with_suffix(".safetensors"))


@pytest.mark.parametrize("name", ["own", "meta", "qwen2"])
def test_any_range_of_a_tensor_is_that_of_the_whole(written: Path, name: str) -> None:
    source = torchtune.read(written / name)
    in_pieces, at_once = state_of(source, step=37), state_of(source)
    assert all(torch.equal(in_pieces[each], at_once[each]) for each in at_once)


def test_the_rows_of_queries_and_keys_are_in_the_order_of_transformers(written: Path) -> None:
    stored = state_of(torch_files.read(written / "own"))["layers.0.attn.q_proj.weight"]
    q_proj = state_of(torchtune.read(written / "own"))["model.layers.0.self_attn.q_proj.weight"]
    expected = [head * 32 + half + 2 * pair for head in range(2) for half in range(2) for pair in range(16)]
    assert torch.equal(q_proj, stored[expected])


def test_what_is_in_huggingface_names_stays_as_it_is(tmp_path: Path) -> None:
    folder = kept("torchtune", tmp_path) / "epoch_1"
    source = torchtune.read(folder)
    assert source.format == "huggingface"
    assert "model.layers.0.self_attn.q_proj.weight" in source.tensors


def test_one_file_is_read_by_itself(written: Path) -> None:
    (file,) = (written / "own").glob("*.bin")
    assert torchtune.read(file).tensors.keys() == torchtune.read(written / "own").tensors.keys()


def test_without_a_config_the_rows_of_a_head_are_not_known(written: Path, tmp_path: Path) -> None:
    (file,) = (written / "meta").glob("*.bin")
    (tmp_path / "consolidated.00.pth").write_bytes(file.read_bytes())
    with pytest.raises(Refused, match=r"Meta's names, and '.*' has no config.json: copy that of the base"):
        torchtune.read(tmp_path / "consolidated.00.pth")
    said = json.loads((written / "meta" / "config.json").read_text())
    source = torchtune.translated(torch_files.read(tmp_path / "consolidated.00.pth"), said)
    assert "model.layers.0.self_attn.q_proj.weight" in source.tensors


def test_a_model_whose_order_of_rows_is_unknown_is_refused(written: Path) -> None:
    source = torch_files.read(written / "own")
    with pytest.raises(Refused, match="names of a olmo model, whose order of rows is not known here"):
        torchtune.translated(source, {"model_type": "olmo", "head_dim": 8})


@pytest.mark.parametrize("head", [{"head_dim": 7}, {"head_dim": "8"}, {}, {"hidden_size": 8, "num_attention_heads": 0}])
def test_a_config_without_a_sensible_head_is_refused(written: Path, head: dict[str, object]) -> None:
    source = torch_files.read(written / "own")
    with pytest.raises(InvalidFile, match="does not say how large an attention head is"):
        torchtune.translated(source, {"model_type": "llama", **head})


def test_heads_that_do_not_fit_the_rows_are_refused(written: Path) -> None:
    source = torch_files.read(written / "own")
    with pytest.raises(InvalidFile, match=r"_proj.weight' is .*: these are no heads of 10 rows"):
        torchtune.translated(source, {"model_type": "llama", "head_dim": 10})


def test_tables_of_angles_are_left_out_and_unknown_names_are_kept(written: Path) -> None:
    source = torch_files.read(written / "meta")
    one = source.tensors["norm.weight"]
    more = replace(source, tensors={**source.tensors, "rope.freqs": one, "layers.0.surprise": one})
    found = torchtune.translated(more)
    assert found.left_out["rotary embeddings, which are computed"] == ("rope.freqs",)
    assert "layers.0.surprise" in found.tensors
    assert "rope.freqs" not in found.tensors


def test_phi3_has_its_parts_fused(written: Path) -> None:
    source = torch_files.read(written / "own")
    state = state_of(torchtune.translated(source, {"model_type": "phi3"}), step=101)
    stored = state_of(source)
    qkv = torch.cat([stored[f"layers.0.attn.{part}.weight"] for part in ("q_proj", "k_proj", "v_proj")])
    assert torch.equal(state["model.layers.0.self_attn.qkv_proj.weight"], qkv)
    gate_up = torch.cat([stored["layers.0.mlp.w1.weight"], stored["layers.0.mlp.w3.weight"]])
    assert torch.equal(state["model.layers.0.mlp.gate_up_proj.weight"], gate_up)
    assert not any("q_proj" in name or "up_proj" in name.replace("gate_up", "") for name in state)


def test_gemma2_has_four_norms(written: Path) -> None:
    source = torch_files.read(written / "own")
    norm = source.tensors["norm.scale"]
    names = ("sa_norm", "sa_scale", "mlp_norm", "mlp_scale")
    more = {**source.tensors, **{f"layers.0.{name}.scale": norm for name in names}}
    found = torchtune.translated(replace(source, tensors=more), {"model_type": "gemma2", "head_dim": 8})
    of_layer = {name.split(".")[3] for name in found.tensors if name.endswith("layernorm.weight")}
    assert of_layer == {
        "input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm",
    }  # fmt: skip


def test_there_is_no_moving_average(written: Path) -> None:
    with pytest.raises(UsageError, match="leave out --weights ema"):
        torchtune.read(written / "own", weights="ema")


def test_a_missing_part_is_named(written: Path, tmp_path: Path) -> None:
    (file,) = (written / "own").glob("*.bin")
    (tmp_path / "model-00001-of-00002.bin").write_bytes(file.read_bytes())
    with pytest.raises(Incomplete, match=r"has 1 of the 2 files that 'model-00001-of-00002.bin' is one of"):
        torchtune.read(tmp_path)
    (tmp_path / "model-00002-of-00002.bin").write_bytes(file.read_bytes())
    with pytest.raises(InvalidFile, match=r"is both in model-00002-of-00002.bin and in another file"):
        torchtune.read(tmp_path)


def test_two_names_of_one_tensor_are_refused(written: Path) -> None:
    source = torch_files.read(written / "own")
    for name in ("norm.rms_norm.scale", "model.norm.weight"):
        more = replace(source, tensors={**source.tensors, name: source.tensors["norm.scale"]})
        with pytest.raises(InvalidFile, match=r"holds 'model.norm.weight' twice, under two names"):
            torchtune.translated(more)


@pytest.mark.parametrize("name", ["layers.{}.attn.q_proj.weight", "{0.__class__}", "layers.0.{x}", "a{"])
def test_braces_in_a_name_mean_nothing(written: Path, name: str) -> None:
    source = torch_files.read(written / "own")
    more = replace(source, tensors={**source.tensors, name: source.tensors["norm.scale"]})
    assert name in torchtune.translated(more).tensors
