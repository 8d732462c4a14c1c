"""Models in GGUF, written by the gguf package as llama.cpp's converter does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("gguf", reason="pip install 'lorakit[gguf]'")

from lorakit.convert.readers import gguf as reader
from lorakit.errors import Incomplete, InvalidFile, NotFound, Refused, UsageError
from tests.convert.readers.gguf_files import tiny, write_gguf
from tests.convert.readers.state import loaded, model_of, state_of


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2"])
def test_every_number_is_the_models_own(tmp_path: Path, kind: str) -> None:
    model = tiny(kind)
    source = reader.read(write_gguf(model, tmp_path / "model.gguf"))
    state = state_of(source, step=333)
    expected = model.state_dict()
    tied = {"lm_head.weight"} if kind.startswith("gemma") else set()
    assert state.keys() == expected.keys() - tied
    for name, tensor in state.items():
        if kind.startswith("gemma") and name.endswith("norm.weight"):  # 1 was added in float32
            torch.testing.assert_close(tensor, expected[name], rtol=0, atol=2**-23)
        else:
            assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("stored", ["F16", "BF16"])
def test_half_precision_stays_as_it_is(tmp_path: Path, stored: str) -> None:
    model = tiny("llama").to(getattr(torch, {"F16": "float16", "BF16": "bfloat16"}[stored]))
    source = reader.read(write_gguf(model, tmp_path / "model.gguf", stored))
    assert source.tensors["model.layers.0.mlp.up_proj.weight"].dtype == stored
    expected = model.state_dict()
    assert all(torch.equal(tensor, expected[name].to(tensor.dtype)) for name, tensor in state_of(source).items())
    assert source.notes == ()


def test_what_is_quantised_has_the_numbers_that_transformers_gives_it(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    write_gguf(tiny("llama"), tmp_path / "model.gguf", "Q8_0")
    source = reader.read(tmp_path / "model.gguf")
    tokens = torch.arange(3, 40).view(1, -1)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32).eval()
    state = state_of(source, step=1000)
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in state.items())
    loaded.config.save_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(model_of(tmp_path, state)(tokens).logits, loaded(tokens).logits)
    assert source.notes == ("its quantised tensors are written as the float32 that they stand for",)


@pytest.mark.parametrize(("stored", "dtype"), [("BF16", "keep"), ("Q8_0", "fp32")])
def test_it_converts_into_a_model_folder(tmp_path: Path, stored: str, dtype: str) -> None:
    import lorakit

    model = tiny("llama").to(torch.bfloat16)
    model.save_pretrained(tmp_path / "base")
    write_gguf(model, tmp_path / "model.gguf", stored)
    lorakit.convert(tmp_path / "model.gguf", out=tmp_path / "out", like=str(tmp_path / "base"), dtype=dtype)
    tokens = torch.arange(3, 40).view(1, -1)
    with torch.no_grad():
        expected, logits = (loaded(tmp_path / folder)(tokens).logits for folder in ("base", "out"))
    if stored == "BF16":
        assert torch.equal(logits, expected)
    else:
        assert (logits - expected).norm() < 0.02 * expected.norm()


@pytest.mark.parametrize("stored", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_any_range_of_a_quantised_tensor_is_that_of_the_whole(tmp_path: Path, stored: str) -> None:
    source = reader.read(write_gguf(tiny("qwen2"), tmp_path / "model.gguf", stored))
    in_pieces, at_once = state_of(source, step=45), state_of(source)
    assert all(torch.equal(in_pieces[name], at_once[name]) for name in at_once)


def test_tables_of_angles_are_left_out(tmp_path: Path) -> None:
    source = reader.read(write_gguf(tiny("llama"), tmp_path / "model.gguf"))
    assert source.left_out == {"rotary embeddings, which are computed": ("rope_freqs.weight",)}


def test_a_folder_with_one_model_is_that_model_and_its_config(tmp_path: Path) -> None:
    write_gguf(tiny("qwen2"), tmp_path / "model.gguf")
    assert reader.read(tmp_path).beside is None
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert reader.read(tmp_path).beside == tmp_path
    write_gguf(tiny("qwen2"), tmp_path / "other.gguf")
    with pytest.raises(Refused, match=r"holds model.gguf, other.gguf: name the file"):
        reader.read(tmp_path)


def test_all_parts_of_a_split_one_are_read(tmp_path: Path) -> None:
    import gguf

    model = tiny("qwen2")
    write_gguf(model, tmp_path / "m-00001-of-00002.gguf")
    writer = gguf.GGUFWriter(tmp_path / "m-00002-of-00002.gguf", "qwen2")
    writer.add_tensor("blk.2.attn_norm.weight", model.state_dict()["model.norm.weight"].numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    for path in (tmp_path, tmp_path / "m-00002-of-00002.gguf"):
        assert "model.layers.2.input_layernorm.weight" in reader.read(path).tensors
    (tmp_path / "m-00001-of-00002.gguf").unlink()
    with pytest.raises(Incomplete, match=r"lacks m-00001-of-00002.gguf of 00002 parts"):
        reader.read(tmp_path)


def test_a_name_of_no_table_is_kept_for_the_writer_to_name(tmp_path: Path) -> None:
    file = write_gguf(tiny("qwen2"), tmp_path / "model.gguf")
    whole = file.read_bytes()
    for name in ("blk.1.odd_up.weight", "blk.{}.f_up.weight!", "{0.__class__}......"):
        file.write_bytes(whole.replace(b"blk.1.ffn_up.weight", name.encode()))
        assert name in reader.read(file).tensors


def test_an_unknown_architecture_is_refused(tmp_path: Path) -> None:
    file = write_gguf(tiny("qwen2"), tmp_path / "model.gguf")
    file.write_bytes(file.read_bytes().replace(b"qwen2", b"mamba"))
    with pytest.raises(Refused, match="is a mamba model, whose tensors lorakit has no names for"):
        reader.read(file)


def test_there_is_no_moving_average(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="leave out --weights ema"):
        reader.read(tmp_path / "model.gguf", weights="ema")


def test_without_the_extra_a_quantised_one_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_gguf(tiny("qwen2"), tmp_path / "model.gguf", "Q8_0")
    plain = write_gguf(tiny("qwen2"), tmp_path / "plain.gguf")
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(Refused, match=r"pip install 'lorakit\[gguf\]'"):
        reader.read(file)
    assert len(state_of(reader.read(plain))) > 0


def test_every_shorter_file_is_refused(tmp_path: Path) -> None:
    whole = write_gguf(tiny("qwen2", num_hidden_layers=1), tmp_path / "model.gguf").read_bytes()
    file = tmp_path / "short.gguf"
    for length in (*range(0, 3000, 7), len(whole) // 2, len(whole) - 64):
        file.write_bytes(whole[:length])
        with pytest.raises(InvalidFile, match=r"cut short|no GGUF file"):
            reader.read(file)
    with pytest.raises(NotFound):
        reader.read(tmp_path / "none.gguf")
