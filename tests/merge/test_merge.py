"""A merge is PEFT's merge, bit for bit; the folder it gives loads; nothing is left behind when it fails."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import lorakit
import lorakit.errors
from lorakit.merge import blocks
from lorakit.merge.merge import merge
from tests.models import LINEARS, assert_same_bits, bits, load, make_adapter, make_base, merged_by_peft

DTYPES = ["float32", "bfloat16", "float16"]
PATTERNS: dict[str, Any] = {
    "rank_pattern": {"q_proj": 3, "layers.1.mlp.up_proj": 20},
    "alpha_pattern": {r"layers\.0\..*k_proj": 5, "down_proj": 32},
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    made: dict[tuple[str, str], Path] = {}
    for family in ("llama", "qwen2", "gpt2"):
        for dtype in DTYPES:
            folder = tmp_path_factory.mktemp(f"{family}-{dtype}")
            made[family, dtype] = make_base(folder / "base", family, dtype)
    return made


@pytest.fixture(autouse=True)
def _several_blocks_a_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "CPU_BLOCK", 4000)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "lora",
    [{}, {"use_rslora": True}, PATTERNS, {**PATTERNS, "use_rslora": True}, {"r": 1, "lora_alpha": 3}],
    ids=["plain", "rslora", "patterns", "rslora and patterns", "rank 1"],
)
def test_a_merge_has_the_bits_of_peft(
    bases: dict[tuple[str, str], Path], tmp_path: Path, dtype: str, lora: dict[str, Any]
) -> None:
    base = bases["llama", dtype]
    adapter = make_adapter(tmp_path / "adapter", base, target_modules=LINEARS["llama"], **lora)
    merge(base, [adapter], out=tmp_path / "out", device="cpu")
    assert_same_bits(bits(tmp_path / "out"), merged_by_peft(base, [(adapter, 1.0)]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", ["qwen2", "gpt2"])
def test_biases_and_transposed_layers_have_the_bits_of_peft(
    bases: dict[tuple[str, str], Path], tmp_path: Path, family: str, dtype: str
) -> None:
    base = bases[family, dtype]
    transposed = {"fan_in_fan_out": True} if family == "gpt2" else {}
    adapter = make_adapter(tmp_path / "adapter", base, target_modules=LINEARS[family], **transposed)
    report = merge(base, [adapter], out=tmp_path / "out", device="cpu")
    assert_same_bits(bits(tmp_path / "out"), merged_by_peft(base, [(adapter, 1.0)]))
    assert all(step.transposed == (family == "gpt2") for tensor in report.plan.computed for step in tensor.steps)


@pytest.mark.parametrize("stored_as", ["bfloat16", "float16"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_an_adapter_in_16_bit_is_merged_in_float32(
    bases: dict[tuple[str, str], Path], tmp_path: Path, dtype: str, stored_as: str
) -> None:
    base = bases["llama", dtype]
    adapter = make_adapter(tmp_path / "adapter", base, dtype=stored_as, target_modules=LINEARS["llama"])
    merge(base, [adapter], out=tmp_path / "out", device="cpu")
    assert_same_bits(bits(tmp_path / "out"), merged_by_peft(base, [(adapter, 1.0)]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_two_weighted_adapters_are_summed_in_float32_and_rounded_once(
    bases: dict[tuple[str, str], Path], tmp_path: Path, dtype: str
) -> None:
    base = bases["llama", dtype]
    one = make_adapter(tmp_path / "one", base, seed=1, target_modules=LINEARS["llama"])
    two = make_adapter(tmp_path / "two", base, seed=2, r=5, lora_alpha=7, target_modules=["q_proj", "lm_head"])
    pairs = [(one, 0.7), (two, -0.3)]
    merge(base, pairs, out=tmp_path / "out", device="cpu")
    assert_same_bits(bits(tmp_path / "out"), merged_by_peft(base, pairs))


@pytest.mark.parametrize("dtype", DTYPES)
def test_shards_keep_their_names_and_their_bytes(tmp_path: Path, dtype: str) -> None:
    base = make_base(tmp_path / "base", dtype=dtype, max_shard_size="200KB")
    adapter = make_adapter(tmp_path / "adapter", base, target_modules=["down_proj", "v_proj"])
    out = tmp_path / "out"
    merge(base, [adapter], out=out, device="cpu")
    assert_same_bits(bits(out), merged_by_peft(base, [(adapter, 1.0)]))
    shards = sorted(base.glob("*.safetensors"))
    assert len(shards) > 2
    index = "model.safetensors.index.json"
    assert json.loads((out / index).read_text()) == json.loads((base / index).read_text())
    for shard in shards:
        _assert_only_merged_bytes_differ(shard, out / shard.name, ("down_proj", "v_proj"))


def _assert_only_merged_bytes_differ(before: Path, after: Path, merged: tuple[str, ...]) -> None:
    old, new = before.read_bytes(), after.read_bytes()
    length = int.from_bytes(old[:8], "little")
    assert new[: 8 + length] == old[: 8 + length]
    for name, entry in json.loads(old[8 : 8 + length]).items():
        if name != "__metadata__":
            begin, end = (8 + length + offset for offset in entry["data_offsets"])
            assert (old[begin:end] != new[begin:end]) == any(part in name for part in merged), name


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_tied_base_takes_deltas_on_its_other_layers(tmp_path: Path, dtype: str) -> None:
    base = make_base(tmp_path / "base", "tied-llama", dtype)
    adapter = make_adapter(tmp_path / "adapter", base, target_modules=LINEARS["llama"])
    merge(base, [adapter], out=tmp_path / "out", device="cpu")
    assert_same_bits(bits(tmp_path / "out"), merged_by_peft(base, [(adapter, 1.0)]))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has what the test wants to miss")
def test_a_device_that_is_not_there_is_said(bases: dict[tuple[str, str], Path], tmp_path: Path) -> None:
    base = bases["llama", "float32"]
    adapter = make_adapter(tmp_path / "adapter", base, target_modules=["q_proj"])
    with pytest.raises(lorakit.errors.UsageError, match="no device 'cuda:1'"):
        merge(base, [adapter], out=tmp_path / "out", device="cuda:1")
    assert merge(base, [adapter], out=tmp_path / "out").device == "cpu"


def test_a_float64_base_stays_float64(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", dtype="float64")
    adapter = make_adapter(tmp_path / "adapter", base, target_modules=["q_proj"])
    merge(base, [adapter], out=tmp_path / "out", device="cpu")
    assert_same_bits(bits(tmp_path / "out"), merged_by_peft(base, [(adapter, 1.0)]))


def test_the_merged_model_answers_as_the_adapter_does(bases: dict[tuple[str, str], Path], tmp_path: Path) -> None:
    from peft import PeftModel

    base = bases["llama", "float32"]
    adapter = make_adapter(tmp_path / "adapter", base, target_modules=LINEARS["llama"])
    merge(base, [adapter], out=tmp_path / "out", device="cpu")
    tokens = torch.arange(20)[None]
    with torch.inference_mode():
        before = load(base)(tokens).logits
        unmerged = PeftModel.from_pretrained(load(base), adapter).eval()(tokens).logits
        after = load(tmp_path / "out")(tokens).logits
    assert (before - unmerged).abs().max() > 0.1
    torch.testing.assert_close(after, unmerged, rtol=1e-4, atol=1e-4)


def test_an_adapter_given_twice_adds_up_its_weights(bases: dict[tuple[str, str], Path], tmp_path: Path) -> None:
    base = bases["llama", "bfloat16"]
    adapter = make_adapter(tmp_path / "adapter", base, target_modules=["q_proj"])
    merge(base, [adapter, (adapter, 0.5)], out=tmp_path / "twice", device="cpu")
    merge(base, [(adapter, 1.5)], out=tmp_path / "once", device="cpu")
    assert_same_bits(bits(tmp_path / "twice"), bits(tmp_path / "once"))
    assert_same_bits(bits(tmp_path / "once"), merged_by_peft(base, [(adapter, 1.5)]))


def test_a_mix_in_memory_merges_as_its_parts(bases: dict[tuple[str, str], Path], tmp_path: Path) -> None:
    base = bases["llama", "float16"]
    one = make_adapter(tmp_path / "one", base, seed=1, target_modules=LINEARS["llama"])
    two = make_adapter(tmp_path / "two", base, seed=2, r=3, target_modules=["up_proj"])
    mixed = 0.7 * lorakit.load_adapter(one) + 0.3 * lorakit.load_adapter(two)
    merge(base, mixed, out=tmp_path / "mixed", device="cpu")
    merge(base, [(one, 0.7), (two, 0.3)], out=tmp_path / "parts", device="cpu")
    assert_same_bits(bits(tmp_path / "mixed"), bits(tmp_path / "parts"))


@pytest.mark.parametrize(("flag", "dtype"), [("bf16", "bfloat16"), ("fp16", "float16"), ("fp32", "float32")])
def test_another_dtype_is_one_rounding_and_stands_in_the_config(tmp_path: Path, flag: str, dtype: str) -> None:
    base = make_base(tmp_path / "base", max_shard_size="200KB")
    adapter = make_adapter(tmp_path / "adapter", base, target_modules=["q_proj"])
    out = tmp_path / "out"
    merge(base, [adapter], out=out, device="cpu", dtype=flag)
    exact = merged_by_peft(base, [(adapter, 1.0)])
    assert_same_bits(bits(out), {name: tensor.to(getattr(torch, dtype)) for name, tensor in exact.items()})
    config = json.loads((out / "config.json").read_text())
    assert config.get("dtype", config.get("torch_dtype")) == dtype
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in exact.values()) * (
        1 if dtype == "float32" else 0.5
    )


def test_a_value_beyond_float16_is_refused_and_named(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", base, target_modules=["q_proj"], lora_alpha=10_000_000)
    with pytest.raises(lorakit.errors.Refused, match=r"q_proj\.weight' has values beyond the range of float16"):
        merge(base, [adapter], out=tmp_path / "out", device="cpu", dtype="fp16")
    assert not (tmp_path / "out").exists()


def test_the_base_is_the_one_that_the_adapter_names(
    bases: dict[tuple[str, str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = make_base(tmp_path / "models" / "base")
    adapter = make_adapter(tmp_path / "runs" / "a", base, target_modules=["q_proj"])
    config = json.loads((adapter / "adapter_config.json").read_text())
    for named in (str(base), "../../models/base"):
        (adapter / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": named}))
        report = merge(None, [adapter], out=tmp_path / "out", dry_run=True)
        assert report.plan.base.folder.resolve() == base
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "models/base"}))
    monkeypatch.chdir(tmp_path)
    assert merge(None, [adapter], out=tmp_path / "out", dry_run=True).plan.base.folder.resolve() == base


def test_the_result_says_where_it_came_from(bases: dict[tuple[str, str], Path], tmp_path: Path) -> None:
    from hashlib import sha256

    base = bases["llama", "float32"]
    adapter = make_adapter(tmp_path / "adapter", base, target_modules=["q_proj"])
    merge(base, [(adapter, 0.5)], out=tmp_path / "out", device="cpu")
    record = json.loads((tmp_path / "out" / "lorakit.json").read_text())
    digest = sha256((adapter / "adapter_model.safetensors").read_bytes()).hexdigest()
    assert record["operation"] == "merge"
    assert record["parents"][0]["path"] == str(base)
    assert record["parents"][1] == {"kind": "adapter", "path": str(adapter), "sha256": digest, "weight": 0.5}
    placed = {(entry["tensor"], entry["role"]): entry["weight"] for entry in record["report"]["placements"]}
    module = "model.layers.1.self_attn.q_proj"
    assert placed[f"base_model.model.{module}.lora_A.weight", "A"] == f"{module}.weight"
    assert len(placed) == 4


def test_progress_ends_at_the_number_of_bytes(bases: dict[tuple[str, str], Path], tmp_path: Path) -> None:
    base = bases["llama", "bfloat16"]
    adapter = make_adapter(tmp_path / "adapter", base, target_modules=["q_proj"])
    seen: list[tuple[int, int]] = []
    merge(base, [adapter], out=tmp_path / "out", device="cpu", progress=lambda done, total: seen.append((done, total)))
    size = (tmp_path / "out" / "model.safetensors").stat().st_size
    assert seen[-1] == (size, size)
    assert seen == sorted(seen)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_gpu_differs_from_the_cpu_only_at_ties(
    bases: dict[tuple[str, str], Path], tmp_path: Path, dtype: str
) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    base = bases["llama", dtype]
    adapter = make_adapter(tmp_path / "adapter", base, target_modules=LINEARS["llama"])
    merge(base, [adapter], out=tmp_path / "cpu", device="cpu")
    merge(base, [adapter], out=tmp_path / "gpu", device="cuda")
    mine, theirs = bits(tmp_path / "cpu"), bits(tmp_path / "gpu")
    for name, tensor in mine.items():
        if dtype == "float32":
            torch.testing.assert_close(theirs[name], tensor, rtol=1e-6, atol=1e-6)
        else:
            assert (theirs[name] != tensor).float().mean() <= 1e-3, name
