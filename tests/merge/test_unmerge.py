"""The base comes back bit for bit, from what was kept or from itself, or the command says why it can't."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from lorakit.errors import Conflict, InvalidFile, Refused, UsageError
from lorakit.merge import undo
from lorakit.merge.merge import merge
from lorakit.merge.unmerge import unmerge
from lorakit.merge.verify import verify
from tests.folders import leftovers
from tests.models import LINEARS, assert_same_bits, bits, load, make_adapter, make_base

DTYPES = ["float32", "bfloat16", "float16"]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {}
    for dtype in DTYPES:
        made[dtype] = make_base(tmp_path_factory.mktemp(dtype) / "base", dtype=dtype, max_shard_size="300KB")
        (made[dtype] / "tokenizer_config.json").write_text('{"chat_template": "base"}')
    return made


@pytest.fixture(autouse=True)
def _several_blocks_a_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(undo, "BLOCK", 10_000)


@pytest.fixture
def base(bases: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(bases["bfloat16"], tmp_path / "base"))


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    return make_adapter(tmp_path / "adapter", base, target_modules=LINEARS["llama"])


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "lorakit.json"}


SETTINGS: list[dict[str, Any]] = [
    {}, {"max_shard_size": "150KB"}, {"dtype": "fp16"}, {"rounding": "stochastic"}, {"quantize": "int8"},
]  # fmt: skip


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_file_of_the_base_comes_back_without_it(
    bases: dict[str, Path], tmp_path: Path, dtype: str, settings: dict[str, Any]
) -> None:
    base = Path(shutil.copytree(bases[dtype], tmp_path / "base"))
    adapter = make_adapter(tmp_path / "adapter", base, target_modules=LINEARS["llama"])
    (adapter / "tokenizer_config.json").write_text('{"chat_template": "the adapter\'s"}')
    report = merge(base, [adapter], out=tmp_path / "out", device="cpu", undo=True, **settings)
    assert report.undo == (tmp_path / "out" / "lorakit.undo").stat().st_size
    before = files_of(base)
    shutil.rmtree(base)
    shutil.rmtree(adapter)
    back = unmerge(tmp_path / "out", tmp_path / "back")
    assert (back.how, back.tensors) == ("undo", 21)
    assert files_of(tmp_path / "back") == before
    assert not leftovers(tmp_path)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize("family", ["gpt2", "tied-llama"])
def test_other_layouts_come_back(tmp_path: Path, family: str) -> None:
    base = make_base(tmp_path / "base", family, "bfloat16")
    fan = {"fan_in_fan_out": True} if family == "gpt2" else {}
    modules = [*LINEARS[family], "lm_head"] if family == "tied-llama" else LINEARS[family]
    adapter = make_adapter(tmp_path / "adapter", base, target_modules=modules, **fan)
    merge(base, [adapter], out=tmp_path / "out", device="cpu", undo=True)
    before = files_of(base)
    shutil.rmtree(base)
    unmerge(tmp_path / "out", tmp_path / "back")
    assert files_of(tmp_path / "back") == before


def test_the_merged_model_still_loads_and_verifies(base: Path, adapter: Path, tmp_path: Path) -> None:
    merge(base, [adapter], out=tmp_path / "out", device="cpu", undo=True)
    merge(base, [adapter], out=tmp_path / "alone", device="cpu")
    assert_same_bits(bits(tmp_path / "out"), bits(tmp_path / "alone"))
    assert verify(tmp_path / "out").ok
    assert not list((tmp_path / "out").glob("*.part"))


def test_a_small_change_takes_little_space(base: Path, tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "adapter", base, target_modules=LINEARS["llama"], lora_alpha=0.0004)
    report = merge(base, [adapter], out=tmp_path / "out", device="cpu", undo=True)
    assert report.undo is not None
    assert report.undo < 0.15 * sum(file.stat().st_size for file in base.glob("*.safetensors"))


def test_the_base_itself_is_copied_while_it_is_the_same(base: Path, adapter: Path, tmp_path: Path) -> None:
    merge(base, [adapter], out=tmp_path / "out", device="cpu")
    assert unmerge(tmp_path / "out", tmp_path / "back").how == "base"
    assert files_of(tmp_path / "back") == files_of(base)
    base.rename(tmp_path / "moved")
    unmerge(tmp_path / "out", tmp_path / "again", base=tmp_path / "moved")
    assert files_of(tmp_path / "again") == files_of(tmp_path / "moved")


def test_a_base_that_is_gone_or_another_is_refused_with_the_reason(base: Path, adapter: Path, tmp_path: Path) -> None:
    merge(base, [adapter], out=tmp_path / "out", device="cpu")
    file = next(base.glob("*.safetensors"))
    save_file({name: tensor + 1 for name, tensor in load_file(file).items()}, file, metadata={"format": "pt"})
    with pytest.raises(Refused, match=r"is not, or no longer, the one that was merged into.*rounded weights"):
        unmerge(tmp_path / "out", tmp_path / "back")
    shutil.rmtree(base)
    with pytest.raises(Refused, match=r"is gone.*was merged without --undo.*rounded weights"):
        unmerge(tmp_path / "out", tmp_path / "back")
    record = json.loads((tmp_path / "out" / "lorakit.json").read_text())
    del record["parents"][0]["identity"]
    (tmp_path / "out" / "lorakit.json").write_text(json.dumps(record))
    with pytest.raises(Refused, match="doesn't say which base it was"):
        unmerge(tmp_path / "out", tmp_path / "back", base=tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "out"]


@pytest.mark.parametrize("name", ["model.layers.1.self_attn.q_proj.weight", "model.norm.weight", "config.json"])
def test_a_merged_model_that_was_changed_is_refused(base: Path, adapter: Path, tmp_path: Path, name: str) -> None:
    out = tmp_path / "out"
    merge(base, [adapter], out=out, device="cpu", undo=True)
    if name == "config.json":
        (out / name).write_text((out / name).read_text() + " ")
    else:
        weight_map = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
        tensors = load_file(out / weight_map[name])
        tensors[name].view(-1)[-1] += 1
        save_file(tensors, out / weight_map[name], metadata={"format": "pt"})
    with pytest.raises(Refused, match=r"is not what the merge wrote|was changed since"):
        unmerge(out, tmp_path / "back")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base", "out"]


def cut(content: bytes) -> bytes:
    return content[:-10]


def garble(content: bytes) -> bytes:
    return content[:-300] + bytes(200) + content[-100:]


def escape(content: bytes) -> bytes:
    return content.replace(b'\\"generation_config.json\\"', b'\\"/../../../tmp/evil.json\\"')


def other_format(content: bytes) -> bytes:
    return content.replace(b"lorakit undo 1", b"lorakit undo 2")


@pytest.mark.parametrize("spoil", [cut, garble, escape, other_format])
def test_a_spoilt_undo_file_is_refused(
    base: Path, adapter: Path, tmp_path: Path, spoil: Callable[[bytes], bytes]
) -> None:
    (adapter / "tokenizer_config.json").write_text("{}")
    merge(base, [adapter], out=tmp_path / "out", device="cpu", undo=True)
    file = tmp_path / "out" / "lorakit.undo"
    content = file.read_bytes()
    file.write_bytes(spoil(content))
    assert file.read_bytes() != content
    with pytest.raises(Refused):
        unmerge(tmp_path / "out", tmp_path / "back")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base", "out"]


def test_a_frame_that_would_swell_is_refused_early(base: Path, adapter: Path, tmp_path: Path) -> None:
    import zlib

    merge(base, [adapter], out=tmp_path / "out", device="cpu", undo=True)
    opened = undo.read_undo(tmp_path / "out" / "lorakit.undo")
    with pytest.raises(InvalidFile, match="is not as long as it should be"):
        opened._decompressed(zlib.compress(bytes(1 << 24)), 100, "entry")


def test_a_dry_run_and_a_place_that_is_taken(base: Path, adapter: Path, tmp_path: Path) -> None:
    merge(base, [adapter], out=tmp_path / "out", device="cpu", undo=True)
    report = unmerge(tmp_path / "out", tmp_path / "back", dry_run=True)
    assert (report.how, report.dry_run) == ("undo", True)
    assert not (tmp_path / "back").exists()
    with pytest.raises(Conflict):
        unmerge(tmp_path / "out", adapter)
    with pytest.raises(UsageError):
        unmerge(tmp_path / "out")


def test_what_comes_back_says_where_from_and_loads(base: Path, adapter: Path, tmp_path: Path) -> None:
    merge(base, [adapter], out=tmp_path / "out", device="cpu", undo=True)
    seen: list[tuple[int, int]] = []
    unmerge(tmp_path / "out", tmp_path / "back", progress=lambda done, total: seen.append((done, total)))
    record = json.loads((tmp_path / "back" / "lorakit.json").read_text())
    assert (record["operation"], record["settings"]) == ("unmerge", {"how": "undo"})
    assert record["parents"] == [{"kind": "merged", "path": str(tmp_path / "out")}]
    assert seen[-1][0] == seen[-1][1] == sum(file.stat().st_size for file in base.glob("*.safetensors"))
    assert_same_bits(bits(tmp_path / "back"), dict(load(base).state_dict()))


@given(content=st.binary(max_size=4000), itemsize=st.sampled_from([1, 2, 4, 8]))
def test_sorting_bytes_is_undone(content: bytes, itemsize: int) -> None:
    whole = content[: len(content) // itemsize * itemsize]
    assert undo._joined(undo._sorted(whole, itemsize), itemsize) == whole
    assert undo.xor(undo.xor(whole, whole[::-1]), whole[::-1]) == whole
