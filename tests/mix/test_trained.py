"""What is no delta: biases of lora_B are added up, trained copies are averaged when that was asked for, or refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

import lorakit
from lorakit.errors import InvalidFile, UnsupportedAdapter, UsageError, WrongBase
from tests.folders import factors, write_adapter
from tests.models import load, make_adapter, make_base

TARGETS = ["q_proj", "v_proj"]

# PEFT takes its own bias of lora_B for a factor that ZeRO-3 left in pieces
pytestmark = pytest.mark.filterwarnings("ignore:Adapter 'default'.* have invalid shape")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("trained") / "base", "qwen2")  # its q, k and v have biases


def made(base: Path, name: str, seed: int, **lora: Any) -> Path:
    """With trained copies that are far from the base's values."""
    folder = make_adapter(base.parent / name, base, seed=seed, **{"target_modules": TARGETS, "r": 3} | lora)
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    for tensor in (tensor for name, tensor in tensors.items() if "lora_" not in name):
        tensor += torch.randn(tensor.shape)
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


def state(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    """The base's weights with the adapter in them, by PEFT, in float64."""
    model = PeftModel.from_pretrained(load(base, "float64"), adapter, autocast_adapter_dtype=False)
    return {name: tensor.double() for name, tensor in model.merge_and_unload().state_dict().items()}


def moved(base: Path, adapters: list[tuple[Path, float]]) -> dict[str, torch.Tensor]:
    """base + Σ w · (merged - base), whatever of it are deltas, biases, copies or rows."""
    plain = {name: tensor.double() for name, tensor in load(base, "float64").state_dict().items()}
    merged = [(state(base, folder), weight) for folder, weight in adapters]
    return {
        name: tensor + sum(weight * (one[name] - tensor) for one, weight in merged) for name, tensor in plain.items()
    }


def assert_peft_loads_it_as(base: Path, folder: Path, expected: dict[str, torch.Tensor]) -> None:
    found = state(base, folder)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-6, msg=name)


def test_biases_of_lora_b_are_added_up(base: Path, tmp_path: Path) -> None:
    one = made(base, "bias-one", 1, lora_bias=True, lora_alpha=7)
    two = made(base, "bias-two", 2, lora_bias=True, target_modules=["k_proj", "v_proj"], use_rslora=True)
    three = made(base, "bias-none", 3, target_modules=["q_proj", "k_proj"])
    pairs = [(one, 0.7), (two, -0.4), (three, 0.5)]
    a, b, c = (lorakit.load_adapter(folder) for folder in (one, two, three))
    (0.7 * a - 0.4 * b + 0.5 * c).save(tmp_path / "sum")
    lorakit.mix([*pairs], rank=64).save(tmp_path / "mix")
    for name in ("sum", "mix"):
        assert_peft_loads_it_as(base, tmp_path / name, moved(base, pairs))
        assert json.loads((tmp_path / name / "adapter_config.json").read_text())["lora_bias"] is True


def test_lorakit_merges_such_a_mix_as_peft_does(base: Path, tmp_path: Path) -> None:
    one = made(base, "merge-one", 1, lora_bias=True)
    two = made(base, "merge-two", 2, target_modules=["o_proj"])  # which has no bias: its zeros go nowhere
    (0.7 * lorakit.load_adapter(one) + lorakit.load_adapter(two)).save(tmp_path / "sum")
    lorakit.merge(base, tmp_path / "sum", out=tmp_path / "merged")
    merged = {name: tensor.double() for name, tensor in load_file(tmp_path / "merged" / "model.safetensors").items()}
    for name, tensor in moved(base, [(one, 0.7), (two, 1.0)]).items():
        if name in merged:
            torch.testing.assert_close(merged[name], tensor, rtol=1e-5, atol=1e-6, msg=name)


def test_biases_and_an_embedding_do_not_fit_into_one_adapter(base: Path, tmp_path: Path) -> None:
    one = made(base, "embed-bias", 1, lora_bias=True)
    two = made(base, "embed", 2, target_modules=["embed_tokens"])
    with pytest.raises(UnsupportedAdapter, match="PEFT has no lora_bias for embeddings"):
        lorakit.mix([(one, 1.0), (two, 1.0)]).save(tmp_path / "out")


SAVED = {"modules_to_save": ["lm_head"]}
ROWS = {"trainable_token_indices": {"embed_tokens": [1, 3, 5]}}
BIASES = {"bias": "all"}


@pytest.mark.parametrize(
    ("name", "mine", "theirs"),
    [
        ("saved", SAVED, SAVED),
        ("biases", BIASES, BIASES),
        ("rows", ROWS, ROWS),
        ("all", SAVED | BIASES, SAVED | BIASES),
    ],
)
def test_trained_copies_are_averaged_when_asked_for(
    base: Path, tmp_path: Path, name: str, mine: dict[str, Any], theirs: dict[str, Any]
) -> None:
    one, two = made(base, f"{name}-one", 1, **mine), made(base, f"{name}-two", 2, r=5, **theirs)
    pairs: list[tuple[Path, float]] = [(one, 0.75), (two, 0.25)]
    with pytest.raises(UnsupportedAdapter, match=r"trained copies of the base's values.*mix --trained average"):
        lorakit.mix([*pairs])
    mixed = lorakit.mix([*pairs], trained="average")
    assert_peft_loads_it_as(base, mixed.save(tmp_path / "out"), moved(base, pairs))
    record = json.loads((tmp_path / "out" / "lorakit.json").read_text())
    assert record["settings"]["trained"] == "average"
    assert [parent["weight"] for parent in record["parents"]] == [0.75, 0.25]
    # and again: what was averaged is an adapter as any other
    again = lorakit.mix([(tmp_path / "out", 1.0)], trained="average")
    assert_peft_loads_it_as(base, again.save(tmp_path / "again"), moved(base, pairs))


def test_the_average_is_over_those_that_hold_a_tensor_and_says_so(base: Path, tmp_path: Path) -> None:
    one = made(base, "only-one", 1, **SAVED)
    two = made(base, "only-two", 2, trainable_token_indices={"embed_tokens": [3, 4]})
    mixed = lorakit.mix([(one, 3.0), (two, 1.0)], trained="average")
    folder = mixed.save(tmp_path / "out")
    written = load_file(folder / "adapter_model.safetensors")
    head = "base_model.model.lm_head.weight"
    torch.testing.assert_close(written[head], load_file(one / "adapter_model.safetensors")[head])
    assert mixed.report is not None
    assert any("'lm_head.weight': trained in 1 of 2 adapters" in note for note in mixed.report.notes)
    assert json.loads((folder / "adapter_config.json").read_text())["trainable_token_indices"] == {
        "model.embed_tokens": [3, 4]
    }
    PeftModel.from_pretrained(load(base), folder)


def test_rows_of_several_adapters_are_joined(base: Path, tmp_path: Path) -> None:
    one = made(base, "rows-a", 1, trainable_token_indices={"embed_tokens": [1, 2]})
    two = made(base, "rows-b", 2, trainable_token_indices={"embed_tokens": [2, 7]})
    folder = lorakit.mix([(one, 0.5), (two, 1.5)], trained="average").save(tmp_path / "out")
    name = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
    a, b = (load_file(path / "adapter_model.safetensors")[name] for path in (one, two))
    found = load_file(folder / "adapter_model.safetensors")[name]
    torch.testing.assert_close(found, torch.stack([a[0], 0.25 * a[1] + 0.75 * b[0], b[1]]))
    rows = state(base, folder)["model.embed_tokens.weight"][[1, 2, 7]]
    torch.testing.assert_close(rows.float(), found)


def test_shrinking_keeps_trained_copies(base: Path, tmp_path: Path) -> None:
    one = made(base, "shrink", 1, r=4, **SAVED | BIASES)
    folder = lorakit.shrink(one, rank=2).save(tmp_path / "small")
    mine, theirs = (load_file(path / "adapter_model.safetensors") for path in (folder, one))
    copies = [name for name in theirs if "lora_" not in name]
    assert copies
    assert all(torch.equal(mine[name], theirs[name]) for name in copies)
    PeftModel.from_pretrained(load(base), folder)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_biases_of_any_dtype_are_written_as_they_are(base: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    one = made(base, f"bias-{dtype}", 1, lora_bias=True, r=4, lora_alpha=4)
    file = one / "adapter_model.safetensors"
    save_file({name: tensor.to(dtype) for name, tensor in load_file(file).items()}, file, metadata={"format": "pt"})
    lorakit.load_adapter(one).save(tmp_path / "out")
    assert_peft_loads_it_as(base, tmp_path / "out", state(base, one))


def test_a_budget_keeps_the_biases_of_modules_that_it_has_nothing_for(base: Path, tmp_path: Path) -> None:
    one = made(base, "bias-budget", 1, lora_bias=True)
    for name, small in (
        ("shrink", lorakit.shrink(one, budget=300)), ("mix", lorakit.mix([one], budget=300, own_ranks=False)),
    ):  # fmt: skip
        mine = {name: tensor for name, tensor in load_file(one / "adapter_model.safetensors").items() if "bias" in name}
        written = load_file(small.save(tmp_path / name) / "adapter_model.safetensors")
        for path, bias in mine.items():
            torch.testing.assert_close(written[path], bias * (16 / 3))
        PeftModel.from_pretrained(load(base), tmp_path / name)


def test_modules_are_saved_by_the_end_of_their_names_as_peft_does(base: Path, tmp_path: Path) -> None:
    one, two = (made(base, f"norms-{seed}", seed, modules_to_save=["norm"]) for seed in (1, 2))
    mixed = lorakit.mix([(one, 0.5), (two, 0.5)], trained="average")
    assert len(mixed.trained.tensors) == 5  # two in each layer, and the last
    assert_peft_loads_it_as(base, mixed.save(tmp_path / "out"), moved(base, [(one, 0.5), (two, 0.5)]))


def test_weights_by_pattern_go_for_trained_copies_too(base: Path, tmp_path: Path) -> None:
    one, two = made(base, "pattern-one", 1, **SAVED), made(base, "pattern-two", 2, **SAVED)
    pairs: list[Any] = [(one, {"lm_head": 0.25, "*": 1.0}), (two, {"lm_head": 0.75, "*": 1.0})]
    written = load_file(lorakit.mix(pairs, trained="average").save(tmp_path / "out") / "adapter_model.safetensors")
    name = "base_model.model.lm_head.weight"
    a, b = (load_file(path / "adapter_model.safetensors")[name] for path in (one, two))
    torch.testing.assert_close(written[name], 0.25 * a + 0.75 * b)


def test_a_weight_of_zero_gives_no_copy_away(base: Path) -> None:
    one, two = made(base, "zero-one", 1, **SAVED), made(base, "zero-two", 2)
    with pytest.raises(UsageError, match="add up to 0"):
        lorakit.mix([(one, 0.0), (two, 1.0)], trained="average")


def test_embeddings_that_were_only_saved_along_are_kept(base: Path, tmp_path: Path) -> None:
    table = {"base_model.model.model.embed_tokens.weight": factors({"x": (16, 8)})["base_model.model.x.lora_B.weight"]}
    one = write_adapter(tmp_path / "one", factors({"q_proj": (8, 8)}) | table)
    two = write_adapter(tmp_path / "two", factors({"q_proj": (8, 8)}, seed=2))
    name = next(iter(table))
    for mixed in (lorakit.mix([(one, 0.5), (two, 0.5)]), lorakit.shrink(one, rank=1), 0.5 * lorakit.load_adapter(one)):
        assert [stored.name for stored in mixed.others] == [name]
    other = write_adapter(tmp_path / "three", factors({"q_proj": (8, 8)}) | {name: 2 * table[name]})
    with pytest.raises(UnsupportedAdapter, match="hold different values"):
        lorakit.mix([one, other])


def test_a_config_that_speaks_of_what_is_not_there(tmp_path: Path) -> None:
    plain = write_adapter(tmp_path / "bias", factors({"q_proj": (8, 8)}), bias="all")
    assert lorakit.mix([plain]).rank == 2
    assert lorakit.mix([write_adapter(tmp_path / "null", factors({"q_proj": (8, 8)}), bias=None)]).rank == 2
    broken = write_adapter(tmp_path / "saved", factors({"q_proj": (8, 8)}), modules_to_save=["lm_head"])
    for trained in ("refuse", "average"):
        with pytest.raises(InvalidFile, match="is incomplete: it has modules_to_save"):
            lorakit.mix([broken], trained=trained)


def test_weights_that_cancel_have_no_average(base: Path) -> None:
    one, two = made(base, "cancel-one", 1, **SAVED), made(base, "cancel-two", 2, **SAVED)
    with pytest.raises(UsageError, match=r"'lm_head\.weight' can't be averaged: the weights .* add up to 0"):
        lorakit.mix([(one, 1.0), (two, -1.0)], trained="average")


def test_sums_of_values_refuse_trained_copies(base: Path) -> None:
    a = lorakit.load_adapter(made(base, "value-one", 1, **SAVED))
    b = lorakit.load_adapter(made(base, "value-two", 2))
    for refused in (lambda: a + b, lambda: 0.5 * a, lambda: a.only("q_proj")):
        with pytest.raises(UnsupportedAdapter, match="modules_to_save"):
            refused()
    averaged = lorakit.mix([(a, 1.0)], trained="average")
    for refused in (lambda: averaged + b, lambda: 0.5 * averaged, lambda: lorakit.mix([averaged, averaged])):
        with pytest.raises(UnsupportedAdapter, match=r"trained copies.*--trained average"):
            refused()


def test_copies_of_other_shapes_do_not_average(tmp_path: Path) -> None:
    folders = []
    for rows in (4, 6):
        head = {"base_model.model.lm_head.weight": factors({"x": (rows, 8)})["base_model.model.x.lora_B.weight"]}
        tensors = factors({"q_proj": (8, 8)}) | head
        folders.append(write_adapter(tmp_path / str(rows), tensors, modules_to_save=["lm_head"]))
    with pytest.raises(WrongBase, match=r"'lm_head\.weight' is \[4, 2\] in one adapter and \[6, 2\]"):
        lorakit.mix([(folder, 1) for folder in folders], trained="average")


def test_rows_without_indices_are_refused(tmp_path: Path) -> None:
    name = "base_model.model.embed_tokens.token_adapter.trainable_tokens_delta"
    rows = {name: next(iter(factors({"x": (4, 4)}).values()))}
    broken = write_adapter(tmp_path / "a", factors({"q_proj": (8, 8)}) | rows, trainable_token_indices=[1, 1])
    with pytest.raises(InvalidFile, match="trainable_token_indices names 1 rows"):
        lorakit.mix([(broken, 1)], trained="average")


@pytest.mark.parametrize(
    ("lora", "reason"), [({"use_dora": True}, "use_dora"), ({"init_lora_weights": "pissa"}, "pissa")]
)
def test_what_depends_on_the_base_is_refused_with_what_helps(base: Path, lora: dict[str, Any], reason: str) -> None:
    adapter = made(base, reason, 1, **lora)
    with pytest.raises(UnsupportedAdapter, match=rf"{reason}.*lorakit merge.*lorakit extract"):
        lorakit.mix([(adapter, 1.0)])
