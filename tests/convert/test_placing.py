"""Tied weights, names of files, what is ignored or quantised: what transformers loads of the result is the measure."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import lorakit
from lorakit.convert.report import ConvertReport
from lorakit.errors import Refused, UnplacedTensors
from lorakit.files.folders import read_json
from tests.models import load, make_base

State = dict[str, torch.Tensor]
SIZES: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64,
}  # fmt: skip
SEES: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip


def gemma3() -> Any:
    """A model that sees, whose files have other names than it has in memory."""
    config = transformers.Gemma3Config(text_config=SIZES, vision_config=SEES)
    return transformers.Gemma3ForConditionalGeneration(config)


def llava() -> Any:
    text = transformers.LlamaConfig(**SIZES, tie_word_embeddings=True)
    config = transformers.LlavaConfig(
        text_config=text, vision_config=transformers.CLIPVisionConfig(**SEES), tie_word_embeddings=True
    )
    return transformers.LlavaForConditionalGeneration(config)


def bert() -> Any:
    small = {key: value for key, value in SIZES.items() if key not in ("num_key_value_heads", "head_dim")}
    return transformers.BertForMaskedLM(transformers.BertConfig(**small))


def t5() -> Any:
    config = transformers.T5Config(vocab_size=96, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4)
    return transformers.T5ForConditionalGeneration(config)


def state_of(model: Any) -> State:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def converted(folder: Path, model: Any, state: State, **settings: Any) -> ConvertReport:
    folder.mkdir(exist_ok=True)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    torch.save(state, folder / "step.pt")
    return lorakit.convert(folder / "step.pt", folder / "out", **settings)


def loaded(model: Any, folder: Path) -> State:
    found = type(model).from_pretrained(folder / "out").state_dict()
    assert isinstance(found, dict)
    return found


def same(one: State, other: State) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("make", [gemma3, llava])
def test_a_tied_head_of_a_model_that_sees_is_written_once(tmp_path: Path, make: Any) -> None:
    model = make()
    state = state_of(model)
    converted(tmp_path, model, state)
    model.save_pretrained(tmp_path / "own")
    own, found = (load_file(tmp_path / name / "model.safetensors") for name in ("own", "out"))
    assert own.keys() == found.keys()
    assert same(loaded(model, tmp_path), state)


@pytest.mark.parametrize("make", [gemma3, llava, bert])
def test_a_tied_head_that_was_trained_apart_is_that_which_is_loaded(tmp_path: Path, make: Any) -> None:
    model = make()
    state = state_of(model)
    (head,) = [name for name in state if name in ("lm_head.weight", "cls.predictions.decoder.weight")]
    state[head] = state[head] + 1
    report = converted(tmp_path, model, state)
    assert any("tie_word_embeddings false" in note for note in report.notes)
    assert same(loaded(model, tmp_path), state)


def test_a_head_under_the_name_that_files_have_is_that_which_is_loaded(tmp_path: Path) -> None:
    model = gemma3()
    state = state_of(model)
    model.save_pretrained(tmp_path / "own")
    files = load_file(tmp_path / "own" / "model.safetensors")
    assert "language_model.lm_head.weight" not in files
    files["language_model.lm_head.weight"] = files["language_model.model.embed_tokens.weight"] + 1
    save_file(files, tmp_path / "own" / "model.safetensors", metadata={"format": "pt"})
    lorakit.convert(tmp_path / "own", tmp_path / "out")
    assert same(
        loaded(model, tmp_path), state | {"lm_head.weight": state["model.language_model.embed_tokens.weight"] + 1}
    )


def test_when_one_tied_pair_differs_no_other_is_dropped(tmp_path: Path) -> None:
    """BERT's head has a bias that is tied too; config.json can only say of all that they are not."""
    model = bert()
    state = state_of(model)
    state["cls.predictions.decoder.bias"] = state["cls.predictions.decoder.bias"] + 1
    converted(tmp_path, model, state)
    assert same(loaded(model, tmp_path), state)
    del state["cls.predictions.decoder.weight"]
    (tmp_path / "second").mkdir()
    converted(tmp_path / "second", model, state)
    found = loaded(model, tmp_path / "second")
    assert torch.equal(found["cls.predictions.decoder.weight"], found["bert.embeddings.word_embeddings.weight"])


def test_a_config_in_which_untied_means_another_thing_stays_as_it_is(tmp_path: Path) -> None:
    """T5's says by it whether the decoder's output is scaled."""
    model = t5()
    state = state_of(model)
    state["lm_head.weight"] = state["lm_head.weight"] + 1
    converted(tmp_path, model, state)
    found = type(model).from_pretrained(tmp_path / "out")
    assert found.config.scale_decoder_outputs == model.config.scale_decoder_outputs
    assert same(dict(found.state_dict()), state)


def test_tied_weights_of_two_dtypes_are_one_when_they_are_written_as_the_same(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "tied-llama")
    state = load(base).state_dict()
    state["lm_head.weight"] = state["model.embed_tokens.weight"].bfloat16()
    torch.save(state, tmp_path / "step.pt")
    report = lorakit.convert(tmp_path / "step.pt", tmp_path / "out", base, dtype="bf16")
    assert not report.notes
    assert "lm_head.weight" not in load_file(tmp_path / "out" / "model.safetensors")


def deepseek() -> Any:
    config = transformers.DeepseekV3Config(
        **SIZES | {"num_key_value_heads": 4}, n_routed_experts=4, n_shared_experts=1, moe_intermediate_size=16,
        first_k_dense_replace=1, kv_lora_rank=8, q_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=8,
        n_group=1, topk_group=1, num_experts_per_tok=2,
    )  # fmt: skip
    return transformers.DeepseekV3ForCausalLM(config)


def test_what_the_model_ignores_is_called_as_the_rest_is(tmp_path: Path) -> None:
    """DeepSeek's files hold a further layer, which vLLM reads and transformers does not."""
    model = deepseek()
    state, extra = state_of(model), "model.layers.61.eh_proj.weight"
    prefixed = {f"_orig_mod.module.{name}": one for name, one in {**state, extra: torch.ones(2, 2)}.items()}
    report = converted(tmp_path, model, prefixed)
    assert extra in load_file(tmp_path / "out" / "model.safetensors")
    assert report.renamed[f"_orig_mod.module.{extra}"] == extra
    assert same(loaded(model, tmp_path), state)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_numbers_that_only_a_quantisation_explains_are_refused(tmp_path: Path, dtype: torch.dtype) -> None:
    base = make_base(tmp_path / "base")
    state = load(base).state_dict()
    name = "model.layers.0.self_attn.q_proj.weight"
    torch.save(state | {name: state[name].to(dtype)}, tmp_path / "step.pt")
    with pytest.raises(Refused, match=rf"'{name}' in .* says nothing of a quantisation"):
        lorakit.convert(tmp_path / "step.pt", tmp_path / "out", base)


@pytest.mark.parametrize("strict", [True, False])
def test_of_two_models_none_is_guessed(tmp_path: Path, strict: bool) -> None:
    """What is trained and what it is compared with, as DPO keeps them."""
    base = make_base(tmp_path / "base")
    state = load(base).state_dict()
    both = {f"{prefix}.{name}": one for prefix in ("policy", "ref") for name, one in state.items()}
    torch.save(both, tmp_path / "step.pt")
    with pytest.raises(UnplacedTensors, match=r"holds '(ref|policy)\..*' and '(ref|policy)\..*which of the two"):
        lorakit.convert(tmp_path / "step.pt", tmp_path / "out", base, strict=strict)


def test_of_two_models_that_which_is_whole_is_taken_when_the_rest_may_be_left_out_and_that_is_said(
    tmp_path: Path,
) -> None:
    base = make_base(tmp_path / "base")
    state = load(base).state_dict()
    both = {f"{prefix}.{name}": one for prefix in ("student", "teacher") for name, one in state.items()}
    del both["student.model.norm.weight"]
    torch.save(both, tmp_path / "step.pt")
    report = lorakit.convert(tmp_path / "step.pt", tmp_path / "out", base, strict=False)
    assert any(note.startswith("'teacher.") and "is taken and not 'student." in note for note in report.notes)


def test_a_stray_tensor_does_not_become_the_one_that_is_missing(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    state = load(base).state_dict()
    state["probe.ln.weight"] = state.pop("model.norm.weight")
    torch.save(state, tmp_path / "step.pt")
    with pytest.raises(UnplacedTensors, match=r"probe\.ln\.weight"):
        lorakit.convert(tmp_path / "step.pt", tmp_path / "out", base)
    with pytest.raises(Refused, match=r"(?s)lacks 1 of .*model\.norm\.weight"):
        lorakit.convert(tmp_path / "step.pt", tmp_path / "out", base, strict=False)


def test_a_headless_model_says_nothing_of_a_head(tmp_path: Path) -> None:
    model = bert().bert
    state = state_of(model)
    model.save_pretrained(tmp_path / "like")
    assert read_json(tmp_path / "like" / "config.json")["architectures"] == ["BertModel"]
    torch.save(
        {f"bert.{name}": one for name, one in state.items()} | {"lm_head.weight": torch.ones(96, 32)},
        tmp_path / "step.pt",
    )
    with pytest.raises(UnplacedTensors, match=r"lm_head\.weight"):
        lorakit.convert(tmp_path / "step.pt", tmp_path / "out", tmp_path / "like")
