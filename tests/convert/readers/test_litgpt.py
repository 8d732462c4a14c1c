"""Models as litgpt itself wrote them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lorakit.convert.readers import litgpt
from lorakit.errors import InvalidFile, NotFound, Refused, UsageError
from tests.convert.readers.state import ensure_converted, ensure_said, state_of
from tests.trainers.by_hand import kept


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return kept("litgpt_whole", tmp_path_factory.mktemp("litgpt"))


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_transformers_says_what_litgpt_said(written: Path, name: str) -> None:
    source = litgpt.read(written / name)
    ensure_said(written / name, state_of(source))
    assert (source.format, source.beside) == ("litgpt", written / name)


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_it_converts_into_a_model_folder(written: Path, tmp_path: Path, name: str) -> None:
    ensure_converted(written / name, tmp_path / "out", (written / name).with_suffix(".safetensors"))


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_any_range_of_a_tensor_is_that_of_the_whole(written: Path, name: str) -> None:
    source = litgpt.read(written / name)
    in_pieces, at_once = state_of(source, step=41), state_of(source)
    assert all(torch.equal(in_pieces[each], at_once[each]) for each in at_once)


def test_the_model_that_a_lora_was_merged_into_is_that_of_a_training(tmp_path: Path) -> None:
    folder = kept("litgpt", tmp_path) / "final"
    assert state_of(litgpt.read(folder))["model.layers.0.self_attn.v_proj.weight"].shape == (32, 32)


def test_the_fused_tensor_of_older_versions_is_taken_apart_group_by_group(written: Path, tmp_path: Path) -> None:
    said = (written / "llama" / litgpt.CONFIG).read_text()
    for old, new in {
        "n_head: 2": "n_head: 4",
        "n_query_groups: 1": "n_query_groups: 2",
        "head_size: 32": "head_size: 16",
    }.items():
        said = said.replace(old, new)
    (tmp_path / litgpt.CONFIG).write_text(said)
    q, k, v = (torch.randn(rows, 64) for rows in (64, 32, 32))
    groups = zip(q.split(32), k.split(16), v.split(16), strict=True)  # two heads of queries to each of keys
    torch.save(
        {"transformer.h.0.attn.attn.weight": torch.cat([one for group in groups for one in group])},
        tmp_path / litgpt.WEIGHTS,
    )
    found = state_of(litgpt.read(tmp_path), step=53)
    for part, rows in zip(litgpt.PARTS, (q, k, v), strict=True):
        assert torch.equal(found[f"model.layers.0.self_attn.{part}.weight"], rows)


def test_gemma_has_four_norms(written: Path) -> None:
    folder = written / "llama"
    said = (folder / litgpt.CONFIG).read_text().replace("post_attention_norm: false", "post_attention_norm: true")
    gemma = written / "gemma"
    gemma.mkdir()
    (gemma / litgpt.CONFIG).write_text(said)
    source = litgpt.torch_files.read(folder / litgpt.WEIGHTS)
    norm = source.tensors["transformer.ln_f.weight"]
    names = ("norm_1", "post_attention_norm", "norm_2", "post_mlp_norm")
    more = {**source.tensors, **{f"transformer.h.0.{name}.weight": norm for name in names}}
    found = litgpt.translated(replace(source, tensors=more, beside=gemma))
    assert {name.split(".")[3] for name in found.tensors if name.endswith("layernorm.weight")} == {
        "input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm",
    }  # fmt: skip


def test_unknown_names_are_kept_for_the_writer_to_name(written: Path) -> None:
    source = litgpt.torch_files.read(written / "llama" / litgpt.WEIGHTS)
    norm = source.tensors["transformer.ln_f.weight"]
    for name in ("transformer.h.0.surprise", "transformer.h.{}.attn.qkv.weight", "{0.x}"):
        more = replace(source, tensors={**source.tensors, name: norm}, beside=written / "llama")
        assert name in litgpt.translated(more).tensors
    twice = replace(source, tensors={**source.tensors, "model.norm.weight": norm}, beside=written / "llama")
    with pytest.raises(InvalidFile, match=r"holds 'model.norm.weight' twice"):
        litgpt.translated(twice)


@pytest.mark.parametrize(
    ("name", "value", "refusal"),
    [
        ("mlp_class_name", "GptNeoxMLP", "convert_from_litgpt"),
        ("name", "falcon-7b", "convert_from_litgpt"),
        ("n_head", "'many'", "does not say n_head"),
        ("n_query_groups", "3", "2 heads can't share 3 groups"),
        ("head_size", "9", r"is \[128, 64\], and model_config.yaml implies 36 rows"),
        ("name", "!!python/object/apply:os.abort []", "can't be read as YAML"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(
    written: Path, tmp_path: Path, name: str, value: str, refusal: str
) -> None:
    for file in (written / "llama").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    lines = (tmp_path / litgpt.CONFIG).read_text().splitlines()
    lines = [f"{name}: {value}" if line.startswith(f"{name}:") else line for line in lines]
    (tmp_path / litgpt.CONFIG).write_text("\n".join(lines))
    with pytest.raises(Refused, match=refusal):
        litgpt.read(tmp_path)


def test_without_its_config_the_heads_are_not_known(written: Path, tmp_path: Path) -> None:
    (tmp_path / litgpt.WEIGHTS).write_bytes((written / "llama" / litgpt.WEIGHTS).read_bytes())
    with pytest.raises(Refused, match=r"there is no model_config.yaml beside it: copy it there"):
        litgpt.read(tmp_path)


def test_a_folder_of_a_lora_alone_holds_no_model(tmp_path: Path) -> None:
    folder = kept("litgpt", tmp_path) / "step-000002"
    for path in (folder, folder / "lit_model.pth.lora"):
        with pytest.raises(Refused, match="holds litgpt's LoRA alone: convert it as an adapter"):
            litgpt.read(path)
    with pytest.raises(NotFound, match=r"no lit_model.pth"):
        litgpt.read(tmp_path)


def test_there_is_no_moving_average(written: Path) -> None:
    with pytest.raises(UsageError, match="leave out --weights ema"):
        litgpt.read(written / "llama", weights="ema")
