"""What vLLM makes of each kind of adapter, and what `check` says of it first; what `convert` writes is served right.

Each row is one adapter: real vLLM gets it as it is, and then as it was converted. The measure is PEFT, with the adapter
beside the base.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import httpx
import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from lorakit.convert.adapters.convert import convert_adapter
from lorakit.convert.verdict import judge
from lorakit.errors import Refused
from tests.convert.adapters.test_convert import in_one_piece, of_method, with_raw_names, without_prefix
from tests.merge.kinds import Kind, edit_config, make_kind, on_disk, open_model, rename_tensors, unmerged
from tests.server.real import PROMPTS, ask, plain_vllm

TOKENS = 4
MAX_RANK = 64  # as much as any layer of the tiny model has, so that what is near is exact
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
Q = "base_model.model.model.layers.0.self_attn.q_proj"
SETTINGS = {"r": 8, "lora_alpha": 32, "target_modules": ["q_proj", "v_proj", "down_proj"]}

Answers = tuple[float, ...]
Fate = Literal["refused", "wrong", "the base", "right"]
Verdict = Literal["ready", "repaired", "refused"]
Done = Literal["exact", "near", "nothing"]


PLAIN = Kind()


@dataclass(frozen=True)
class Row:
    """How the adapter is made; what vLLM 0.32 does with it, what `check` says, and what `convert` can do.

    `known` is what PEFT loads, where that is not the adapter itself.
    """

    vllm: Fate
    check: Verdict
    convert: Done
    kind: Kind = PLAIN
    change: Callable[[Path], None] | None = None
    make: Callable[[Path, Path], tuple[Path, torch.nn.Module]] | None = None


def lora(**settings: Any) -> Kind:
    return Kind({**SETTINGS, **settings})


def edited(**settings: Any) -> Callable[[Path], None]:
    return lambda folder: edit_config(folder, **settings)


def changed(change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    def rewrite(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})

    return rewrite


def both(*changes: Callable[[Path], None]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        for change in changes:
            change(folder)

    return apply


def without_weights(folder: Path) -> None:
    (folder / WEIGHTS).unlink()


def cut_short(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-100])


def half_a_config(folder: Path) -> None:
    text = (folder / "adapter_config.json").read_text()
    (folder / "adapter_config.json").write_text(text[: len(text) // 2])


def without_fields(*names: str) -> Callable[[Path], None]:
    def remove(folder: Path) -> None:
        file = folder / "adapter_config.json"
        config = {name: value for name, value in json.loads(file.read_text()).items() if name not in names}
        file.write_text(json.dumps(config))

    return remove


def pickled(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / "adapter_model.bin")
    (folder / WEIGHTS).unlink()


def in_another_layer(tensors: dict[str, torch.Tensor]) -> None:
    for part in ("lora_A.weight", "lora_B.weight"):
        tensors[f"{Q.replace('layers.0', 'layers.9')}.{part}"] = tensors[f"{Q}.{part}"].clone()


def smaller(tensors: dict[str, torch.Tensor]) -> None:
    """As of a base of half the width."""
    for name in tensors:
        half = [size if size == 8 else size // 2 for size in tensors[name].shape]
        tensors[name] = tensors[name][: half[0], : half[1]].clone()


def larger(tensors: dict[str, torch.Tensor]) -> None:
    tensors.update({name: torch.cat([tensor, tensor], dim=1 if "lora_A" in name else 0).contiguous()
                    for name, tensor in tensors.items()})  # fmt: skip


def longer_vocabulary(tensors: dict[str, torch.Tensor]) -> None:
    for name in tensors:
        if "lora_embedding_A" in name:
            tensors[name] = torch.nn.functional.pad(tensors[name], (0, 2))


def of_another_rank(tensors: dict[str, torch.Tensor]) -> None:
    for part in ("lora_A.weight", "lora_B.weight"):
        tensor = tensors[f"{Q}.{part}"]
        tensors[f"{Q}.{part}"] = (tensor[:4] if part.startswith("lora_A") else tensor[:, :4]).contiguous()


def with_lora_bias(tensors: dict[str, torch.Tensor]) -> None:
    tensors.update({name.replace("weight", "bias"): torch.ones(len(tensor))
                    for name, tensor in list(tensors.items()) if "lora_B" in name})  # fmt: skip


def with_magnitudes(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{Q}.lora_magnitude_vector"] = torch.ones(64)


def resized_embedding(tensors: dict[str, torch.Tensor]) -> None:
    tensors["base_model.model.model.embed_tokens.base_layer.weight"] = torch.ones(261, 64)


def by_method(config: Any) -> Callable[[Path, Path], tuple[Path, torch.nn.Module]]:
    def make(folder: Path, base: Path) -> tuple[Path, torch.nn.Module]:
        of_method(folder, base, config)
        return folder, peft.PeftModel.from_pretrained(open_model(base, "llama", "float32"), folder).eval()

    return make


SOME = ["q_proj", "down_proj"]
ROWS: Mapping[str, Row] = {
    "plain": Row("right", "ready", "exact", lora()),
    "q and v alone of what is packed": Row("right", "ready", "exact", lora(target_modules=["q_proj", "v_proj"])),
    "rslora": Row("right", "ready", "exact", lora(use_rslora=True, lora_alpha=8)),
    "patterns": Row("right", "repaired", "exact", lora(rank_pattern={"q_proj": 4}, alpha_pattern={"v_proj": 8})),
    "no prefix": Row("right", "repaired", "exact", lora(), without_prefix),
    "embedding and head": Row("right", "ready", "exact", lora(target_modules=["embed_tokens", "lm_head", "q_proj"])),
    "a pickle": Row("right", "refused", "exact", lora(), pickled),
    "no tensors": Row("refused", "refused", "nothing", lora(), without_weights),
    "an empty file": Row("refused", "refused", "nothing", lora(), changed(dict.clear)),
    "cut short": Row("refused", "refused", "nothing", lora(), cut_short),
    "half a config": Row("refused", "refused", "nothing", lora(), half_a_config),
    "no r": Row("refused", "refused", "nothing", lora(), without_fields("r")),
    "no lora_alpha": Row("refused", "repaired", "exact", lora(lora_alpha=8), without_fields("lora_alpha")),
    "no target_modules": Row("refused", "repaired", "exact", lora(), without_fields("target_modules")),
    "dora": Row("refused", "refused", "near", lora(use_dora=True)),
    "magnitudes that the config denies": Row("refused", "refused", "nothing", lora(), changed(with_magnitudes)),
    "too large a rank": Row("refused", "refused", "near", lora(r=72)),
    "another rank than its config says": Row("wrong", "refused", "nothing", lora(), changed(of_another_rank)),
    "a larger rank than its config says": Row("refused", "refused", "nothing", lora(r=72), edited(r=8)),
    "pissa": Row("refused", "refused", "near", Kind({**SETTINGS, "init_lora_weights": "pissa"}, starts_from_base=True)),
    "pissa converted": Row(
        "right", "ready", "exact",
        Kind({**SETTINGS, "init_lora_weights": "pissa"}, starts_from_base=True, convert=True),
    ),
    "bias, and none trained": Row("refused", "repaired", "exact", lora(bias="all")),
    "lora_bias": Row("refused", "refused", "nothing", lora(), both(edited(lora_bias=True), changed(with_lora_bias))),
    "alora": Row("refused", "refused", "nothing", lora(), edited(alora_invocation_tokens=[1, 2])),
    "layer_replication": Row("refused", "refused", "nothing", lora(), edited(layer_replication=[[0, 2], [1, 2]])),
    "bdlora": Row("refused", "refused", "nothing", lora(), edited(use_bdlora={"nblocks": 2})),
    "qalora": Row("refused", "repaired", "exact", Kind({**SETTINGS, "target_modules": ["q_proj", "v_proj"]}, group=4)),
    "a head to save": Row("refused", "refused", "near", lora(modules_to_save=["lm_head"])),
    "trained rows": Row("refused", "repaired", "exact", lora(trainable_token_indices=[71, 68, 108])),
    "trained rows of a head": Row(
        "refused", "repaired", "exact", lora(trainable_token_indices={"lm_head": [104, 101, 108]})
    ),
    "trained rows of both sides": Row(
        "refused", "repaired", "exact", lora(trainable_token_indices={"embed_tokens": [71, 101], "lm_head": [108, 9]})
    ),
    "trained rows alone": Row(
        "refused", "repaired", "exact",
        make=by_method(peft.TrainableTokensConfig(token_indices=[71, 68, 108], target_modules=["embed_tokens"])),
    ),
    "target_parameters of linear layers": Row(
        "right", "repaired", "exact", lora(target_modules=["v_proj"], target_parameters=["q_proj.weight"])
    ),
    "a norm to save": Row("refused", "refused", "nothing", lora(modules_to_save=["norm"])),
    "copies of the base's tables": Row("refused", "repaired", "exact", lora(), None),
    "a resized embedding": Row("wrong", "refused", "nothing", lora(), changed(resized_embedding)),
    "rows beyond the vocabulary": Row(
        "refused", "refused", "nothing", lora(target_modules=["embed_tokens"]), changed(longer_vocabulary)
    ),
    "an unknown layer": Row(
        "refused", "refused", "nothing", lora(),
        lambda folder: rename_tensors(folder, lambda name: name.replace("q_proj", "query")),
    ),
    "another prefix": Row(
        "the base", "repaired", "exact", lora(),
        lambda folder: rename_tensors(folder, lambda name: name.replace(PREFIX, PREFIX + "language_model.")),
    ),
    "a layer too many": Row("wrong", "refused", "nothing", lora(), changed(in_another_layer)),
    "a smaller base": Row("wrong", "refused", "nothing", lora(), changed(smaller)),
    "a larger base": Row("refused", "refused", "nothing", lora(), changed(larger)),
    "no lora_B": Row(
        "refused", "refused", "nothing", lora(),
        lambda folder: rename_tensors(folder, lambda name: None if name == f"{Q}.lora_B.weight" else name),
    ),
    "raw names": Row("refused", "repaired", "exact", lora(), with_raw_names),
    "fused attention": Row("refused", "repaired", "exact", lora(target_modules=["q_proj", "k_proj", "v_proj"]),
                           in_one_piece),
    "loha": Row("refused", "repaired", "exact", make=by_method(peft.LoHaConfig(r=3, alpha=6, target_modules=SOME))),
    "lokr": Row("refused", "repaired", "exact", make=by_method(peft.LoKrConfig(r=3, alpha=6, target_modules=SOME))),
    "vera": Row("refused", "repaired", "exact", make=by_method(peft.VeraConfig(r=4, target_modules=["q_proj"]))),
    "oft": Row("refused", "refused", "near",
               make=by_method(peft.OFTConfig(oft_block_size=8, target_modules=["q_proj"]))),
    "ia3": Row("refused", "refused", "near",
               make=by_method(peft.IA3Config(target_modules=SOME, feedforward_modules=["down_proj"]))),
}  # fmt: skip
NAMES = itertools.count()


@pytest.fixture(scope="module")
def engine(materials: tuple[Path, list[Path]], tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """One for all rows, with a slot for each adapter: a failed load leaves its own behind."""
    log = tmp_path_factory.mktemp("rows") / "vllm.log"
    slots = 2 * len(ROWS) + 1
    with plain_vllm(materials[0], log, "--max-cpu-loras", str(slots + 1), max_loras=slots, max_rank=MAX_RANK) as client:
        yield client


@pytest.fixture(scope="module")
def prompts(materials: tuple[Path, list[Path]]) -> list[torch.Tensor]:
    tokenizer = AutoTokenizer.from_pretrained(materials[0])
    return [tokenizer(prompt, return_tensors="pt").input_ids for prompt in PROMPTS[:2]]


@pytest.fixture(scope="module")
def of_the_base(materials: tuple[Path, list[Path]], prompts: list[torch.Tensor]) -> Answers:
    return greedy(open_model(materials[0], "llama", "float32"), prompts)


def greedy(model: Any, prompts: list[torch.Tensor]) -> Answers:
    """Logprobs of the likeliest tokens: as numbers, as vLLM joins bytes of one letter."""
    found: list[float] = []
    for prompt in prompts:
        for _ in range(TOKENS):
            with torch.inference_mode():
                scores = model(input_ids=prompt).logits[0, -1].log_softmax(-1)
            found.append(float(scores.max()))
            prompt = torch.cat([prompt, scores.argmax().reshape(1, 1)], dim=1)
    return tuple(found)


def of_vllm(engine: httpx.Client, folder: Path) -> Answers | None:
    """None where it refuses to load it."""
    name = f"a{next(NAMES)}"
    response = engine.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": str(folder)})
    if response.status_code != 200:
        return None
    answers = (ask(engine, name, prompt, max_tokens=TOKENS) for prompt in PROMPTS[:2])
    return tuple(logprob for answer in answers for logprob in answer.logprobs)


def near(one: Answers, other: Answers) -> bool:
    return one == pytest.approx(other, abs=2e-3)


def made(row: Row, folder: Path, base: Path, name: str) -> tuple[Path, torch.nn.Module]:
    """The adapter, and PEFT's model with it before anything was changed in its files."""
    if row.make is not None:
        return row.make(folder, base)
    make_kind(folder, base, "llama", row.kind)
    plain = Kind(row.kind.lora, group=row.kind.group, starts_from_base=row.kind.starts_from_base)
    model = unmerged(base, "llama", [folder], plain)
    if name.startswith("copies"):
        tables = {f"base_model.model.{table}": on_disk(base)[table] for table in ("lm_head.weight",)}
        changed(lambda tensors: tensors.update(tables))(folder)
    if row.change is not None:
        row.change(folder)
    return folder, model


@pytest.mark.parametrize("name", ROWS)
def test_check_says_first_what_vllm_would_do_and_what_convert_writes_is_served_right(
    name: str, engine: httpx.Client, materials: tuple[Path, list[Path]], prompts: list[torch.Tensor],
    of_the_base: Answers, tmp_path: Path,
) -> None:  # fmt: skip
    row, base = ROWS[name], materials[0]
    adapter, model = made(row, tmp_path / "adapter", base, name)
    wanted = greedy(model, prompts)
    assert not near(wanted, of_the_base)

    judged = judge(adapter, str(base), max_rank=MAX_RANK, quiet=0)
    wrong = [check for check in judged.checks if check.ok is False]
    assert bool(wrong) == (row.check == "refused"), judged
    assert bool(judged.repairs) == (row.check == "repaired"), judged
    assert all(check.cure for check in wrong), judged
    assert row.convert == "nothing" or not wrong or any("lorakit convert" in str(check.cure) for check in wrong)

    found = of_vllm(engine, adapter)
    if found is None:
        assert row.vllm == "refused"
    else:
        served = "right" if near(found, wanted) else "the base" if near(found, of_the_base) else "wrong"
        # what is added to a layer that isn't there, or to a vocabulary, is dropped, and the rest served
        dropped = name in ("a layer too many", "a resized embedding")
        assert served == ("right" if dropped else row.vllm)

    if row.convert != "exact":
        with pytest.raises(Refused):
            convert_adapter(adapter, tmp_path / "out", base=str(base), max_rank=MAX_RANK)
    if row.convert == "nothing":
        return
    approximate = row.convert == "near"
    convert_adapter(adapter, tmp_path / "out", base=str(base), max_rank=MAX_RANK, approximate=approximate)
    served_now = of_vllm(engine, tmp_path / "out")
    assert served_now is not None
    assert near(served_now, wanted), (served_now, wanted)


def test_a_path_that_is_not_there_is_refused_by_both(engine: httpx.Client, tmp_path: Path) -> None:
    assert of_vllm(engine, tmp_path / "nowhere") is None
    assert judge(tmp_path / "nowhere", quiet=0).word != "ready"


# bases of other kinds, each with an engine of its own


def other_base(folder: Path, tiny: Path, model: Any) -> Path:
    """A model of another class with the tiny one's tokenizer."""
    torch.manual_seed(4)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny).save_pretrained(folder)
    return folder


def sizes_of(tiny: Path) -> dict[str, Any]:
    """What the tiny model's config has in common with those of its kin."""
    config = json.loads((tiny / "config.json").read_text())
    kept = (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id",
    )  # fmt: skip
    return {name: config[name] for name in kept}


@pytest.mark.slow
def test_both_sides_of_a_tied_base_are_served(
    materials: tuple[Path, list[Path]], prompts: list[torch.Tensor], tmp_path: Path
) -> None:
    config = transformers.LlamaConfig(**sizes_of(materials[0]), tie_word_embeddings=True)
    base = other_base(tmp_path / "tied", materials[0], transformers.LlamaForCausalLM(config))
    kinds = {
        "rows": lora(trainable_token_indices=[104, 101, 108]),
        "head": lora(target_modules=["lm_head", "q_proj"]),
        "embedding": lora(target_modules=["embed_tokens", "q_proj"]),
    }
    wanted = {}
    for name, kind in kinds.items():
        adapter = make_kind(tmp_path / name, base, "llama", kind)
        wanted[name] = greedy(unmerged(base, "llama", [adapter], kind), prompts)
        convert_adapter(adapter, tmp_path / f"{name}-out", base=str(base), max_rank=16)
    with plain_vllm(base, tmp_path / "vllm.log", max_loras=len(kinds) + 1, max_rank=16) as client:
        for name, answers in wanted.items():
            served = of_vllm(client, tmp_path / f"{name}-out")
            assert served is not None
            assert near(served, answers), name


@pytest.mark.slow
def test_a_model_whose_class_takes_no_adapter_on_its_tables_is_known_as_such(
    materials: tuple[Path, list[Path]], prompts: list[torch.Tensor], tmp_path: Path
) -> None:
    config = transformers.Qwen2Config(**sizes_of(materials[0]), tie_word_embeddings=False)
    base = other_base(tmp_path / "qwen2", materials[0], transformers.Qwen2ForCausalLM(config))
    layers = make_kind(tmp_path / "layers", base, "qwen2", lora())
    wanted = greedy(unmerged(base, "qwen2", [layers], lora()), prompts)
    convert_adapter(layers, tmp_path / "out", base=str(base))
    tables = [
        make_kind(tmp_path / name, base, "qwen2", lora(target_modules=[name])) for name in ("embed_tokens", "lm_head")
    ]
    with plain_vllm(base, tmp_path / "vllm.log", max_loras=4, max_rank=16) as client:
        for adapter in tables:
            assert of_vllm(client, adapter) is None
            (problem,) = judge(adapter, str(base), quiet=0).problems
            assert "Qwen2ForCausalLM" in problem
        served = of_vllm(client, tmp_path / "out")
        assert served is not None
        assert near(served, wanted)


def make_idefics(folder: Path, tiny: Path) -> Path:
    """A model for pictures and text, whose language model is a part of it; one whose processor needs no torchvision."""
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

    tokenizer = AutoTokenizer.from_pretrained(tiny)
    marks = ["<image>", "<fake_token_around_image>", "<end_of_utterance>", "<global-img>"]
    tokenizer.add_special_tokens({"additional_special_tokens": marks})
    text = transformers.LlamaConfig(**{**sizes_of(tiny), "vocab_size": len(tokenizer)}, tie_word_embeddings=False)
    sight = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2,
             "image_size": 32, "patch_size": 8}  # fmt: skip
    config = transformers.Idefics3Config(
        text_config=text.to_dict(), vision_config=sight, image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=2, tie_word_embeddings=False, pad_token_id=258,
    )  # fmt: skip
    torch.manual_seed(4)
    transformers.Idefics3ForConditionalGeneration(config).save_pretrained(folder)
    processor = Idefics3ImageProcessorPil(size={"longest_edge": 64}, max_image_size={"longest_edge": 32})
    transformers.Idefics3Processor(image_processor=processor, tokenizer=tokenizer, image_seq_len=4).save_pretrained(
        folder
    )
    return folder


def on_part(folder: Path, base: Path, part: str, prompts: list[torch.Tensor]) -> tuple[Path, Answers, Answers]:
    """An adapter of one part of it; and what the base says, and the base with it."""
    torch.manual_seed(6)
    model = transformers.Idefics3ForConditionalGeneration.from_pretrained(base).eval()
    without = greedy(model, prompts)
    targets = rf".*{part}.*\.(q_proj|v_proj)"
    trained = peft.get_peft_model(model, peft.LoraConfig(r=8, lora_alpha=32, target_modules=targets))
    for name, parameter in trained.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    trained.save_pretrained(folder)
    return folder, without, greedy(trained.eval(), prompts)


@pytest.mark.slow
def test_an_adapter_of_the_language_model_alone_is_moved_into_the_model_that_it_is_a_part_of(
    materials: tuple[Path, list[Path]], prompts: list[torch.Tensor], tmp_path: Path
) -> None:
    base = make_idefics(tmp_path / "base", materials[0])
    adapter, without, wanted = on_part(tmp_path / "adapter", base, "text_model", prompts)
    rename_tensors(adapter, lambda name: name.replace("text_model.", ""))
    tower, _, _ = on_part(tmp_path / "tower", base, "vision_model", prompts)
    judged = judge(adapter, str(base), quiet=0)
    assert (judged.problems, bool(judged.repairs)) == ((), True)
    convert_adapter(adapter, tmp_path / "out", base=str(base))
    flags = ("--limit-mm-per-prompt", '{"image":0}')
    with plain_vllm(base, tmp_path / "vllm.log", *flags, max_loras=4, max_rank=16) as client:
        found, moved, lost = (of_vllm(client, folder) for folder in (adapter, tmp_path / "out", tower))
    assert found is not None
    assert near(found, without)  # a wrong prefix is no error to vLLM
    assert moved is not None
    assert near(moved, wanted)
    assert lost is not None  # which vLLM loads, and leaves out
    assert "no part of the language model" in judge(tower, str(base), quiet=0).problems[0]
