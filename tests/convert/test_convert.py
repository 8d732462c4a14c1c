"""Checkpoints become models that transformers loads, bit for bit what was trained; or nothing is written."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    GenerationConfig,
    Qwen2_5_VLConfig,
)

import lorakit
from lorakit.errors import (
    Conflict,
    Incomplete,
    InvalidFile,
    LorakitError,
    NotFound,
    Refused,
    UnplacedTensors,
    UsageError,
    WrongBase,
)
from lorakit.files.folders import read_json
from tests.hub import Hub
from tests.models import load, make_base
from tests.server.real import make_tiny_model
from tests.trainers.written import Trainers

State = dict[str, torch.Tensor]
TOKENS = torch.tensor([[1, 5, 9, 2, 7]])


@pytest.fixture(scope="module")
def like(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with a tokenizer and a chat template."""
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def trained(like: Path) -> State:
    """What a training made of it."""
    torch.manual_seed(1)
    return {name: tensor + torch.randn_like(tensor) for name, tensor in load(like).state_dict().items()}


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = model(TOKENS).logits
    return found


def logits_of(like: Path, state: State) -> torch.Tensor:
    model = load(like, str(next(iter(state.values())).dtype).removeprefix("torch."))
    model.load_state_dict(state)
    return logits(model)


def same(one: State, other: State) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def saved(file: Path, state: Any) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, file)
    return file


@pytest.mark.parametrize(
    "prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "model.", "state_dict.model.", "_forward_module.net."]
)
def test_what_was_trained_is_loaded_bit_for_bit(tmp_path: Path, like: Path, trained: State, prefix: str) -> None:
    file = saved(tmp_path / "step.pt", {"model": {prefix + name: one for name, one in trained.items()}, "step": 3})
    report = lorakit.convert(file, tmp_path / "out", like)
    assert torch.equal(logits(load(tmp_path / "out")), logits_of(like, trained))
    assert report.left_out
    assert not report.notes
    assert report.renamed == ({prefix + name: name for name in trained} if prefix else {})
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer("hello").input_ids == AutoTokenizer.from_pretrained(like)("hello").input_ids
    assert "assistant:" in tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False)


@pytest.mark.parametrize("family", ["llama", "tied-llama", "qwen2", "gpt2"])
@pytest.mark.parametrize("by", ["own config", "like"])
def test_every_family_is_known_by_its_config_or_by_another_model(tmp_path: Path, family: str, by: str) -> None:
    base = make_base(tmp_path / "base", family, "bfloat16")
    torch.manual_seed(3)
    state = {name: torch.randn_like(one) for name, one in load(base).state_dict().items()}
    if family in ("tied-llama", "gpt2"):
        state["lm_head.weight"] = next(iter(state.values()))
    file = saved(tmp_path / "run" / "step.pt", {f"module.{name}": one for name, one in state.items()})
    if by == "own config":
        (file.parent / "config.json").write_bytes((base / "config.json").read_bytes())
    report = lorakit.convert(file, tmp_path / "out", base if by == "like" else None)
    assert torch.equal(logits(load(tmp_path / "out")), logits_of(base, state))
    assert ("lm_head.weight" in load_file(tmp_path / "out" / "model.safetensors")) == (family in ("llama", "qwen2"))
    assert load(tmp_path / "out").dtype == torch.bfloat16
    assert report.format == "torch"


@pytest.mark.parametrize("model_type", ["qwen3_moe", "mixtral"])
def test_fused_experts_are_written_as_vllm_reads_them(tmp_path: Path, model_type: str) -> None:
    """A model in memory has all experts in one tensor; files have each alone, and so has what transformers saves."""
    config = AutoConfig.for_model(
        model_type, vocab_size=40, hidden_size=16, intermediate_size=24, moe_intermediate_size=8, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8, num_experts=3, num_local_experts=3,
        num_experts_per_tok=2, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path / "own")
    file = saved(tmp_path / "step.pt", {f"_orig_mod.{name}": one for name, one in model.state_dict().items()})
    lorakit.convert(file, tmp_path / "out", tmp_path / "own")
    own, found = (load_file(tmp_path / name / "model.safetensors") for name in ("own", "out"))
    assert same(own, found)
    again = lorakit.convert(tmp_path / "own", tmp_path / "again")
    assert same(load_file(tmp_path / "again" / "model.safetensors"), own)
    assert not again.renamed


@pytest.mark.parametrize("tied", [True, False])
def test_a_model_that_sees_keeps_the_names_that_its_files_have(tmp_path: Path, tied: bool) -> None:
    text = {
        "vocab_size": 40, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": tied,
    }  # fmt: skip
    sees = {"depth": 1, "hidden_size": 32, "intermediate_size": 24, "num_heads": 2, "out_hidden_size": 32}
    config = Qwen2_5_VLConfig(text_config=text, vision_config=sees, tie_word_embeddings=tied)
    model = AutoModelForImageTextToText.from_config(config)
    model.save_pretrained(tmp_path / "own")
    own = load_file(tmp_path / "own" / "model.safetensors")
    file = saved(tmp_path / "step.pt", {f"module.{name}": one for name, one in model.state_dict().items()})
    lorakit.convert(file, tmp_path / "out", tmp_path / "own")
    both = own | ({"lm_head.weight": own["model.embed_tokens.weight"]} if tied else {})
    file = saved(tmp_path / "files.pt", {f"module.{name}": one for name, one in both.items()})
    lorakit.convert(file, tmp_path / "again", tmp_path / "own")
    for name in ("out", "again"):
        assert same(load_file(tmp_path / name / "model.safetensors"), own)
    found = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    assert same(dict(found.state_dict()), dict(model.state_dict()))


def test_shards_are_cut_to_size_and_indexed(tmp_path: Path, like: Path, trained: State) -> None:
    file = saved(tmp_path / "step.pt", trained)
    lorakit.convert(file, tmp_path / "out", like, max_shard_size="60KB")
    index = read_json(tmp_path / "out" / "model.safetensors.index.json")
    shards = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(shards) > 2
    assert sorted(set(index["weight_map"].values())) == shards
    assert index["metadata"]["total_size"] == sum(one.nbytes for one in trained.values())
    assert torch.equal(logits(load(tmp_path / "out")), logits_of(like, trained))


@pytest.mark.parametrize(("dtype", "name"), [("bf16", "bfloat16"), ("fp16", "float16"), ("fp32", "float32")])
def test_a_dtype_is_written_and_said(tmp_path: Path, like: Path, trained: State, dtype: str, name: str) -> None:
    lorakit.convert(saved(tmp_path / "step.pt", trained), tmp_path / "out", like, dtype=dtype)
    model = load(tmp_path / "out")
    assert str(model.dtype) == f"torch.{name}"
    rounded = {key: one.to(model.dtype) for key, one in trained.items()}
    assert torch.equal(logits(model), logits_of(like, rounded))


def test_the_config_says_the_dtype_that_the_weights_have(tmp_path: Path, like: Path, trained: State) -> None:
    """Master weights are wider than the model that was loaded at first."""
    half = {name: one.bfloat16() for name, one in trained.items()}
    report = lorakit.convert(saved(tmp_path / "step.pt", half), tmp_path / "out", like)
    assert report.notes == ("config.json says bfloat16 for its dtype, as the weights are; it said float32",)
    assert load(tmp_path / "out").dtype == torch.bfloat16


def test_tied_weights_that_differ_become_two(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "tied-llama")
    state = load(base).state_dict() | {"lm_head.weight": torch.randn(101, 96)}
    report = lorakit.convert(saved(tmp_path / "step.pt", state), tmp_path / "out", base)
    assert any("tie_word_embeddings false" in note for note in report.notes)
    found = load(tmp_path / "out")
    assert torch.equal(found.lm_head.weight, state["lm_head.weight"])
    assert torch.equal(found.model.embed_tokens.weight, state["model.embed_tokens.weight"])


def test_a_tied_weight_that_is_stored_as_the_head_alone_is_the_embedding(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "tied-llama")
    state = load(base).state_dict()
    del state["model.embed_tokens.weight"]
    lorakit.convert(saved(tmp_path / "step.pt", state), tmp_path / "out", base)
    assert torch.equal(logits(load(tmp_path / "out")), logits(load(base)))


def test_added_tokens_bring_their_rows(tmp_path: Path, like: Path) -> None:
    model, tokenizer = load(like), AutoTokenizer.from_pretrained(like)
    tokenizer.add_tokens(["<one>", "<two>"])
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    tokenizer.save_pretrained(tmp_path / "run")
    file = saved(tmp_path / "run" / "step.pt", model.state_dict())
    report = lorakit.convert(file, tmp_path / "out", like)
    assert any("vocab_size in config.json becomes 261" in note for note in report.notes)
    assert torch.equal(logits(load(tmp_path / "out")), logits(model))
    assert len(AutoTokenizer.from_pretrained(tmp_path / "out")) == 261


def test_rows_that_are_padding_are_cut(tmp_path: Path, like: Path) -> None:
    model = load(like)
    want = logits(model)
    model.resize_token_embeddings(320, mean_resizing=False)
    AutoTokenizer.from_pretrained(like).save_pretrained(tmp_path / "run")
    report = lorakit.convert(saved(tmp_path / "run" / "step.pt", model.state_dict()), tmp_path / "out", like)
    assert any("cut from 320 to 259 rows" in note for note in report.notes)
    assert torch.equal(logits(load(tmp_path / "out")), want)


def test_rows_are_not_cut_on_the_word_of_another_tokenizer(tmp_path: Path, like: Path) -> None:
    """Of the tokens that were added in the training, that of the model it began with knows none."""
    model = load(like)
    model.resize_token_embeddings(320, mean_resizing=False)
    report = lorakit.convert(saved(tmp_path / "step.pt", model.state_dict()), tmp_path / "out", like)
    assert any("vocab_size in config.json becomes 320" in note for note in report.notes)
    assert torch.equal(logits(load(tmp_path / "out")), logits(model))


def test_rotary_buffers_are_left_out_and_listed(tmp_path: Path, like: Path, trained: State) -> None:
    buffer = "model.layers.0.self_attn.rotary_emb.inv_freq"
    report = lorakit.convert(saved(tmp_path / "step.pt", trained | {buffer: torch.ones(16)}), tmp_path / "out", like)
    assert (buffer,) in report.left_out.values()
    assert buffer not in load_file(tmp_path / "out" / "model.safetensors")


def test_every_end_of_an_answer_is_kept(tmp_path: Path, like: Path, trained: State) -> None:
    """The tokenizer that was trained with ends answers otherwise than the config of the base says."""
    tokenizer = AutoTokenizer.from_pretrained(like)
    tokenizer.eos_token = "<pad>"
    tokenizer.save_pretrained(tmp_path / "run")
    file = saved(tmp_path / "run" / "step.pt", trained)
    lorakit.convert(file, tmp_path / "out", like)
    assert GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id == [257, 258]


def test_a_wrappers_class_is_not_the_architecture(tmp_path: Path, like: Path, trained: State) -> None:
    file = saved(tmp_path / "run" / "step.pt", trained)
    (file.parent / "config.json").write_text(
        json.dumps(read_json(like / "config.json") | {"architectures": ["FSDPLlamaForCausalLM"]})
    )
    report = lorakit.convert(file, tmp_path / "out")
    assert read_json(tmp_path / "out" / "config.json")["architectures"] == ["LlamaForCausalLM"]
    assert any("FSDPLlamaForCausalLM" in note for note in report.notes)


def quantised_like(folder: Path, like: Path, method: str) -> Path:
    folder.mkdir()
    config = read_json(like / "config.json") | {"quantization_config": {"quant_method": method}}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_config_that_still_says_that_the_weights_are_quantised_is_put_right(
    tmp_path: Path, like: Path, trained: State
) -> None:
    file = saved(tmp_path / "step.pt", trained)
    report = lorakit.convert(file, tmp_path / "out", quantised_like(tmp_path / "like", like, "bitsandbytes"))
    assert "quantization_config" not in read_json(tmp_path / "out" / "config.json")
    assert any("by bitsandbytes" in note for note in report.notes)
    assert torch.equal(logits(load(tmp_path / "out")), logits_of(like, trained))


@pytest.mark.parametrize("strict", [True, False])
def test_weights_that_are_quantised_are_refused(tmp_path: Path, like: Path, trained: State, strict: bool) -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    eight = trained | {name: trained[name].to(torch.float8_e4m3fn), f"{name}_scale_inv": torch.ones(1, 1)}
    file = saved(tmp_path / "step.pt", eight)
    with pytest.raises(Refused, match=r"quantised \(by fp8\).*load it in vLLM as it is"):
        lorakit.convert(file, tmp_path / "out", quantised_like(tmp_path / "like", like, "fp8"), strict=strict)


def test_a_tokenizer_alone_needs_no_model_that_fits(tmp_path: Path, like: Path) -> None:
    file = saved(tmp_path / "step.pt", {"of.another.kind": torch.ones(3)})
    report = lorakit.convert(file, tmp_path / "out", like, only=["tokenizer"])
    assert (report.tensors, report.renamed) == (0, {})
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("hello").input_ids


def test_scripts_and_data_of_a_training_stay_where_they_are(tmp_path: Path, like: Path, trained: State) -> None:
    file = saved(tmp_path / "project" / "step.pt", trained)
    for path in like.iterdir():
        if path.suffix in (".json", ".jinja"):
            (file.parent / path.name).write_bytes(path.read_bytes())
    mine = ("train.py", "data.json", "notes.txt", "zero_to_fp32.py")
    for name in mine:
        (file.parent / name).write_text("{}")
    lorakit.convert(file, tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names.isdisjoint(mine)
    assert {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"} <= names


def test_code_of_the_model_comes_along_and_does_not_run(tmp_path: Path, like: Path, trained: State) -> None:
    own = tmp_path / "own"
    own.mkdir()
    auto_map = {"AutoConfig": "configuration_ours.Config", "AutoModelForCausalLM": "modeling_ours.Model"}
    said = read_json(like / "config.json") | {"model_type": "of_ours", "architectures": ["Model"], "auto_map": auto_map}
    (own / "config.json").write_text(json.dumps(said))
    for name in ("configuration_ours.py", "modeling_ours.py"):
        (own / name).write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    save_file(load(like).state_dict(), own / "model.safetensors", metadata={"format": "pt"})
    lorakit.convert(
        saved(tmp_path / "step.pt", {f"module.{key}": one for key, one in trained.items()}), tmp_path / "out", own
    )
    assert (tmp_path / "out" / "modeling_ours.py").is_file()
    assert not (tmp_path / "ran").exists()
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert same(found, trained)


def test_the_moving_average_is_a_model_too(tmp_path: Path, like: Path, trained: State) -> None:
    average = {name: one * 0.5 for name, one in trained.items()}
    file = saved(tmp_path / "step.pt", {"state_dict": trained, "ema": {"module": average}})
    lorakit.convert(file, tmp_path / "out", like, weights="ema")
    assert torch.equal(logits(load(tmp_path / "out")), logits_of(like, average))


def test_a_tokenizer_alone_has_to_be_there_and_is_written_as_it_is(tmp_path: Path, trained: State) -> None:
    base = make_base(tmp_path / "base")
    with pytest.raises(Refused, match="there is no tokenizer beside"):
        lorakit.convert(base, tmp_path / "out", only=["tokenizer"])
    for settings in ({"dtype": "bf16"}, {"quantize": "int8"}):
        with pytest.raises(UsageError, match="the tokenizer alone"):
            lorakit.convert(base, tmp_path / "out", only=["tokenizer"], **settings)  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


def test_a_file_that_is_named_is_meant_and_not_the_adapter_beside_it(
    tmp_path: Path, like: Path, trained: State
) -> None:
    file = saved(tmp_path / "run" / "full.pt", trained)
    (file.parent / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 4, "lora_alpha": 8}')
    save_file({"base_model.model.lm_head.lora_A.weight": torch.zeros(4, 64)}, file.parent / "adapter_model.safetensors")
    assert lorakit.convert(file, tmp_path / "out", like).kind == "model"
    assert torch.equal(logits(load(tmp_path / "out")), logits_of(like, trained))


def test_settings_of_other_programs_do_not_become_the_models_config(tmp_path: Path, like: Path, trained: State) -> None:
    file = saved(tmp_path / "project" / "run" / "step.pt", trained)
    for folder in (file.parent, file.parent.parent):
        (folder / "config.json").write_text('{"lr": 0.001, "model": "x"}')
    lorakit.convert(file, tmp_path / "out", like)
    assert torch.equal(logits(load(tmp_path / "out")), logits_of(like, trained))


@pytest.mark.parametrize("part", ["model", "tokenizer"])
def test_a_part_is_written_alone(tmp_path: Path, like: Path, trained: State, part: str) -> None:
    report = lorakit.convert(saved(tmp_path / "step.pt", trained), tmp_path / "out", like, only=[part])
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert ("model.safetensors" in names, "config.json" in names) == (part == "model",) * 2
    assert ("tokenizer.json" in names, "chat_template.jinja" in names) == (part == "tokenizer",) * 2
    assert (report.nbytes > 0) == (part == "model")


def test_linear_layers_are_quantised_as_merge_does(tmp_path: Path, like: Path, trained: State) -> None:
    file = saved(tmp_path / "step.pt", trained)
    lorakit.convert(file, tmp_path / "out", like, dtype="bf16", quantize="int8")
    found = load_file(tmp_path / "out" / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    assert found[name].dtype == torch.int8
    back = found[name].float() * found[f"{name}_scale"].float()
    assert torch.allclose(back, trained[name], atol=float(found[f"{name}_scale"].max()))
    assert read_json(tmp_path / "out" / "config.json")["quantization_config"]["format"] == "int-quantized"


def test_a_dry_run_says_all_and_writes_nothing(tmp_path: Path, like: Path, trained: State) -> None:
    file = saved(tmp_path / "step.pt", trained)
    planned = lorakit.convert(file, like=like, dry_run=True).as_dict()
    done = lorakit.convert(file, tmp_path / "out", like).as_dict()
    changed = {key for key in done if planned[key] != done[key]}
    assert changed <= {"out", "dry_run", "seconds"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "step.pt"]


def test_the_result_says_where_it_comes_from(tmp_path: Path, like: Path, trained: State) -> None:
    lorakit.convert(saved(tmp_path / "step.pt", trained), tmp_path / "out", like)
    record = record_of(tmp_path / "out")
    assert record["operation"] == "convert"
    assert [parent["kind"] for parent in record["parents"]] == ["checkpoint", "like"]
    assert record["parents"][0]["files"][0]["file"] == "step.pt"


def without(name: str) -> Callable[[State], State]:
    return lambda state: {key: one for key, one in state.items() if key != name}


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        (lambda state: state | {"teacher.norm.weight": torch.ones(3)}, UnplacedTensors, "teacher.norm.weight"),
        (lambda state: state | {"model.a.lora_A.weight": torch.ones(3)}, UnplacedTensors, "lorakit merge"),
        (without("model.norm.weight"), Refused, "lacks 1 of .*model.norm.weight"),
        (lambda state: state | {"model.norm.weight": torch.ones(3)}, WrongBase, r"\[3\].*\[64\]"),
        (lambda state: state | {"lm_head.weight": torch.ones(200, 64)}, WrongBase, "tables of the vocabulary differ"),
        (lambda _: {"step": 3}, Refused, "holds no model"),
    ],
    ids=["unknown", "adapter", "missing", "shape", "rows", "empty"],
)
def test_what_does_not_fit_stops_it_before_anything_is_written(
    tmp_path: Path, like: Path, trained: State, change: Any, error: type[LorakitError], said: str
) -> None:
    file = saved(tmp_path / "step.pt", change(trained))
    with pytest.raises(error, match=rf"(?s){said}"):
        lorakit.convert(file, tmp_path / "out", like)
    assert [path.name for path in tmp_path.iterdir()] == ["step.pt"]


def test_what_has_no_place_is_left_out_when_that_is_asked_for(tmp_path: Path, like: Path, trained: State) -> None:
    file = saved(tmp_path / "step.pt", trained | {"loss.weight": torch.ones(3)})
    report = lorakit.convert(file, tmp_path / "out", like, strict=False)
    assert ("loss.weight",) in report.left_out.values()
    assert torch.equal(logits(load(tmp_path / "out")), logits_of(like, trained))


@pytest.fixture
def hub(tmp_path: Path, like: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    serving = Hub({"someone/tiny": like})
    serving.point_there(monkeypatch, tmp_path / "cache")
    yield serving
    serving.close()


def test_of_a_model_on_the_hub_only_what_is_needed_comes(tmp_path: Path, hub: Hub, like: Path, trained: State) -> None:
    file = saved(tmp_path / "step.pt", {f"module.{name}": one for name, one in trained.items()})
    lorakit.convert(file, tmp_path / "out", "someone/tiny")
    assert torch.equal(logits(load(tmp_path / "out")), logits_of(like, trained))
    assert not [name for name in hub.downloads() if name.endswith(".safetensors")]
    lorakit.convert("someone/tiny", tmp_path / "own", dtype="bf16")
    assert load(tmp_path / "own").dtype == torch.bfloat16
    assert record_of(tmp_path / "own")["parents"][0]["files"][0]["file"] == "model.safetensors"


def record_of(folder: Path) -> dict[str, Any]:
    return read_json(folder / "lorakit.json")


def test_arguments_that_contradict_each_other_are_told(tmp_path: Path, like: Path, trained: State) -> None:
    file = saved(tmp_path / "step.pt", trained)
    wrong: list[dict[str, Any]] = [
        {"dtype": "int3"}, {"weights": "best"}, {"only": ["head"]}, {"only": []}, {"workers": 0}, {"rank": 3},
        {"weights": "ema"}, {"out": None}, {"max_shard_size": 0}, {"max_shard_size": "0GB"},
    ]  # fmt: skip
    for settings in wrong:
        with pytest.raises(UsageError):
            lorakit.convert(file, **{"out": tmp_path / "out", "like": like, **settings})
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(Conflict):
        lorakit.convert(file, tmp_path / "out", like)


def test_a_checkpoint_that_is_not_whole_is_not_read(tmp_path: Path, like: Path) -> None:
    folder = tmp_path / "checkpoint-5"
    load(like).save_pretrained(folder, max_shard_size="100KB")
    (next(folder.glob("model-*"))).unlink()
    with pytest.raises((Incomplete, NotFound), match="model-0000"):
        lorakit.convert(folder, tmp_path / "out")


def test_without_a_config_the_model_is_asked_for(tmp_path: Path, trained: State) -> None:
    with pytest.raises(Refused, match="--like"):
        lorakit.convert(saved(tmp_path / "run" / "step.pt", trained), tmp_path / "out")


def test_a_pickle_that_would_run_code_runs_none(tmp_path: Path, like: Path, trained: State) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return open, (str(tmp_path / "ran"), "w")

    file = saved(tmp_path / "step.pt", {"model": trained, "callback": Evil()})
    lorakit.convert(file, tmp_path / "out", like)
    assert not (tmp_path / "ran").exists()
    assert torch.equal(logits(load(tmp_path / "out")), logits_of(like, trained))


def test_a_damaged_file_leaves_nothing(tmp_path: Path, like: Path, trained: State) -> None:
    file = saved(tmp_path / "step.pt", trained)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises((InvalidFile, Incomplete)):
        lorakit.convert(file, tmp_path / "out", like)
    assert [path.name for path in tmp_path.iterdir()] == ["step.pt"]


def test_lightnings_checkpoints_are_what_was_trained(trainers: Trainers, tmp_path: Path) -> None:
    """`.ckpt` of its ModelCheckpoint, with a whole training around the weights and without."""
    written = trainers.wrote("lightning_fit")
    for run in ("best", "steps"):
        file = sorted((written.folder / run).glob("*.ckpt"))[0]
        state = torch.load(file, weights_only=False)["state_dict"]
        report = lorakit.convert(file, tmp_path / run, trainers.base)
        assert report.format == "lightning"
        own = {name.removeprefix("model."): one for name, one in state.items()}
        assert torch.equal(logits(load(tmp_path / run)), logits_of(trainers.base, own))


def test_lightnings_moving_average_is_told_from_the_model(trainers: Trainers, tmp_path: Path) -> None:
    (file,) = (trainers.wrote("lightning_fit").folder / "average").glob("*.ckpt")
    saved = torch.load(file, weights_only=False)
    places = {"model": "current_model_state", "ema": "state_dict"}
    for weights, place in places.items():
        lorakit.convert(file, tmp_path / weights, trainers.base, weights=weights)
        own = {name.removeprefix("model."): one for name, one in saved[place].items()}
        assert torch.equal(logits(load(tmp_path / weights)), logits_of(trainers.base, own))


def test_the_trainers_checkpoints_are_models_already_and_stay_the_same(trainers: Trainers, tmp_path: Path) -> None:
    written = trainers.wrote("hf_trainer")
    folder = next(path.parent for path in sorted(written.folder.rglob("model.safetensors")))
    lorakit.convert(folder, tmp_path / "out", trainers.base)
    own, found = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "out"))
    assert same(own, found)
    assert not (tmp_path / "out" / "trainer_state.json").exists()
