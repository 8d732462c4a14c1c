"""What goes into the store, and what does not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lorakit.adapters.reading import load_adapter
from lorakit.checkpoints.finished import look_at
from lorakit.errors import Incomplete, Refused
from lorakit.files import folders
from lorakit.merge.base import BaseModel, read_base
from lorakit.server.following import intake
from lorakit.server.following.intake import Taken, take_in
from lorakit.store.store import Store
from tests.folders import base_tensors, factors, write_adapter, write_base
from tests.server.fake_engine import overwrite, put_adapter, put_checkpoint

Q = "model.layers.0.self_attn.q_proj"
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store(tmp_path / "home", "base")
    yield store
    store.close()


@pytest.fixture
def base(numbers: Path) -> BaseModel:
    return read_base(numbers)


def take(store: Store, base: BaseModel, folder: Path, step: int | None = None, **more: Any) -> Taken:
    kind = "plain" if step is None else "step"
    return take_in(store, base, look_at(folder), run="sql", kind=kind, step=step, max_rank=16, **more)


def assert_nothing_left(store: Store) -> None:
    assert store.runs() == {}
    assert not list((store.home / "revisions").iterdir())
    assert not list((store.home / "tmp").iterdir())


def test_what_is_kept_is_the_same_weights_with_word_of_where_they_came_from(
    store: Store, base: BaseModel, tmp_path: Path
) -> None:
    folder = put_checkpoint(tmp_path, 100, eval_loss=0.5)
    taken = take(store, base, folder, 100)
    revision = taken.revision
    assert taken.finish is not None
    assert (revision.folder / WEIGHTS).read_bytes() == (folder / WEIGHTS).read_bytes()
    assert (revision.folder / WEIGHTS).stat().st_ino != (folder / WEIGHTS).stat().st_ino
    assert (revision.folder / WEIGHTS).stat().st_nlink == 1
    assert sorted(file.name for file in revision.folder.iterdir()) == ["adapter_config.json", WEIGHTS, "lorakit.json"]
    assert json.loads((revision.folder / "lorakit.json").read_text())["parents"][0]["path"] == str(folder)
    assert (revision.facts.step, revision.facts.eval_loss, revision.rank) == (100, 0.5, 2)
    assert revision.repaired is None


def test_a_base_that_may_be_another_is_refused_with_what_settles_it(
    store: Store, base: BaseModel, tmp_path: Path
) -> None:
    folder = put_adapter(tmp_path / "a")
    parent = {"kind": "base", "identity": f"{base.model_type}-0123456789abcdef", "path": "/gone"}
    (folder / "lorakit.json").write_text(json.dumps({"parents": [parent]}))
    with pytest.raises(Refused, match=r"another dtype, or another model: .*lorakit convert ADAPTER --base BASE"):
        take(store, base, folder)
    assert_nothing_left(store)


def test_the_order_of_names_in_a_config_makes_no_other_content(store: Store, base: BaseModel, tmp_path: Path) -> None:
    one, two = put_adapter(tmp_path / "one"), put_adapter(tmp_path / "two")
    config = json.loads((two / "adapter_config.json").read_text())
    config["target_modules"] = config["target_modules"][::-1]
    (two / "adapter_config.json").write_text(json.dumps(dict(reversed(config.items())), indent=7))
    assert take(store, base, one).revision.digest == take(store, base, two).revision.digest


def test_other_numbers_or_another_scale_are_other_content(store: Store, base: BaseModel, tmp_path: Path) -> None:
    digests = {
        take(store, base, put_adapter(tmp_path / "a", 1)).revision.digest,
        take(store, base, put_adapter(tmp_path / "b", 2)).revision.digest,
        take(store, base, put_adapter(tmp_path / "c", 1, lora_alpha=1)).revision.digest,
    }
    assert len(digests) == 3


def test_what_is_written_again_while_it_is_copied_is_incomplete(
    store: Store, base: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = put_checkpoint(tmp_path / "runs", 100)

    def copied_then_changed(source: Path, target: Path) -> None:
        folders.copy_file(source, target)
        overwrite(folder, 9)

    monkeypatch.setattr(intake, "copy_file", copied_then_changed)
    with pytest.raises(Incomplete, match="written again"):
        take(store, base, folder, 100)
    assert_nothing_left(store)


def test_what_changed_since_it_was_looked_at_is_incomplete(store: Store, base: BaseModel, tmp_path: Path) -> None:
    folder = put_checkpoint(tmp_path / "runs", 100)
    look = look_at(folder)
    overwrite(folder, 9)
    with pytest.raises(Incomplete):
        take_in(store, base, look, run="sql", kind="step", step=100, max_rank=16)
    assert_nothing_left(store)


@pytest.mark.parametrize("what", ["folder", WEIGHTS, "adapter_config.json"])
def test_what_goes_away_while_it_is_copied_is_incomplete(
    store: Store, base: BaseModel, tmp_path: Path, what: str
) -> None:
    folder = put_checkpoint(tmp_path / "runs", 100)
    look = look_at(folder)
    if what == "folder":
        shutil.rmtree(folder)
    else:
        (folder / what).unlink()
    with pytest.raises(Incomplete):
        take_in(store, base, look, run="sql", kind="step", step=100, max_rank=16)
    assert_nothing_left(store)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_what_is_not_finite_is_refused(store: Store, base: BaseModel, tmp_path: Path, value: float, dtype: str) -> None:
    tensors = {name: array.astype(dtype) for name, array in factors({Q: (8, 8)}).items()}
    list(tensors.values())[-1][-1, -1] = value
    with pytest.raises(Refused, match="NaN or infinity"):
        take(store, base, write_adapter(tmp_path / "a", tensors))
    assert_nothing_left(store)


def test_a_file_of_zeros_is_not_believed_without_its_writers_last_file(
    store: Store, base: BaseModel, tmp_path: Path
) -> None:
    zeros = {name: np.zeros_like(array) for name, array in factors({Q: (8, 8)}).items()}
    folder = write_adapter(tmp_path / "checkpoint-5", zeros)
    with pytest.raises(Incomplete, match="zero"):
        take(store, base, folder, 5)
    assert_nothing_left(store)
    (folder / "trainer_state.json").write_text('{"global_step": 5}')
    assert take(store, base, folder, 5).revision.rank == 2


def test_everything_that_is_wrong_is_in_one_refusal(store: Store, base: BaseModel, tmp_path: Path) -> None:
    tensors = factors({Q: (4, 8)}, 32)
    tensors[next(iter(tensors))][:] = float("nan")
    with pytest.raises(Refused, match=r"(?s)rank 32.*another base.*NaN"):
        take(store, base, write_adapter(tmp_path / "a", tensors, rank=32))
    assert_nothing_left(store)


def test_what_can_be_repaired_exactly_is_and_says_so(store: Store, base: BaseModel, tmp_path: Path) -> None:
    tensors = factors({Q: (8, 8)}, 4, seed=1) | factors({"model.layers.1.mlp.up_proj": (12, 8)}, 2, seed=2)
    folder = write_adapter(
        tmp_path / "a", tensors, lora_alpha=3, rank_pattern={"q_proj": 4}, alpha_pattern={"up_proj": 5}
    )
    revision = take(store, base, folder).revision
    assert revision.repaired is not None
    assert "rank_pattern" in revision.repaired
    assert json.loads((revision.folder / "lorakit.json").read_text())["repaired"]
    config = json.loads((revision.folder / "adapter_config.json").read_text())
    assert not config.get("rank_pattern")
    assert not config.get("alpha_pattern")
    stored = load_file(revision.folder / WEIGHTS)
    for module, scale in ((Q, 3 / 4), ("model.layers.1.mlp.up_proj", 5 / 2)):
        a, b = (tensors[f"base_model.model.{module}.lora_{part}.weight"].astype("float64") for part in "AB")
        mine_a, mine_b = (stored[f"base_model.model.{module}.lora_{part}.weight"].astype("float64") for part in "AB")
        mine = config["lora_alpha"] / config["r"] * mine_b @ mine_a
        np.testing.assert_allclose(mine, scale * b @ a, rtol=1e-6, atol=1e-6)
    assert load_adapter(revision.folder).rank == revision.rank == 4


def rows(*indices: int) -> dict[str, Any]:
    values = np.random.default_rng(3).standard_normal((len(indices), 8)).astype("float32")
    return {"base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta": values}


def loha(rank: int) -> dict[str, Any]:
    chance = np.random.default_rng(2)
    shapes = {"hada_w1_a": (8, rank), "hada_w1_b": (rank, 8), "hada_w2_a": (8, rank), "hada_w2_b": (rank, 8)}
    return {f"base_model.model.{Q}.{part}": chance.standard_normal(shape).astype("float32")
            for part, shape in shapes.items()}  # fmt: skip


def test_trained_rows_are_taken_in_as_factors_of_an_embedding(store: Store, base: BaseModel, tmp_path: Path) -> None:
    tensors = factors({Q: (8, 8)}) | rows(3, 11, 5)
    folder = write_adapter(tmp_path / "a", tensors, trainable_token_indices={"embed_tokens": [3, 11, 5]})
    revision = take(store, base, folder).revision
    assert "trainable_token_indices" in str(revision.repaired)
    assert revision.rank == load_adapter(revision.folder).rank == 3
    written = load_adapter(revision.folder).deltas["model.embed_tokens"].dense().numpy()
    wanted = np.zeros((16, 8))
    (trained,) = rows(3, 11, 5).values()
    wanted[[3, 11, 5]] = trained - base_tensors()["model.embed_tokens.weight"][[3, 11, 5]]
    np.testing.assert_allclose(written, wanted, rtol=1e-5, atol=1e-6)


def test_another_method_of_low_rank_is_taken_in_as_plain_factors(store: Store, base: BaseModel, tmp_path: Path) -> None:
    tensors = loha(2)
    revision = take(store, base, write_adapter(tmp_path / "a", tensors, peft_type="LOHA", alpha=2)).revision
    assert "LOHA" in str(revision.repaired)
    w1a, w1b, w2a, w2b = (value.astype("float64") for value in tensors.values())
    written = load_adapter(revision.folder).deltas[Q]
    np.testing.assert_allclose(written.dense().numpy(), (w1a @ w1b) * (w2a @ w2b), rtol=1e-5, atol=1e-5)
    assert revision.rank == written.rank == 4


def test_what_has_too_large_a_rank_as_plain_factors_is_refused_with_the_cure(store: Store, tmp_path: Path) -> None:
    wide = {f"{Q}.weight": np.ones((64, 64), "float32"), "model.embed_tokens.weight": np.ones((16, 64), "float32")}
    base = read_base(write_base(tmp_path / "wide", wide))
    chance = np.random.default_rng(2)
    shapes = {"hada_w1_a": (64, 6), "hada_w1_b": (6, 64), "hada_w2_a": (64, 6), "hada_w2_b": (6, 64)}
    tensors = {f"base_model.model.{Q}.{part}": chance.standard_normal(shape).astype("float32")
               for part, shape in shapes.items()}  # fmt: skip
    with pytest.raises(Refused, match=r"exactly as plain LoRA it has rank 36.*lorakit convert … --rank 16"):
        take(store, base, write_adapter(tmp_path / "a", tensors, rank=6, peft_type="LOHA", alpha=2))
    assert_nothing_left(store)


def test_an_adapter_that_was_made_for_another_kind_of_base_is_refused(
    store: Store, base: BaseModel, tmp_path: Path
) -> None:
    folder = put_adapter(tmp_path / "a")
    noted = {"parents": [{"kind": "base", "identity": "qwen2-0123456789abcdef"}]}
    (folder / "lorakit.json").write_text(json.dumps(noted))
    with pytest.raises(Refused, match="qwen2-0123456789abcdef"):
        take(store, base, folder)
    assert_nothing_left(store)


def test_a_pickle_is_never_served_and_says_what_helps(tmp_path: Path) -> None:
    folder = put_adapter(tmp_path / "a")
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")
    assert "lorakit convert" in str(intake.why_never_served(look_at(folder)))


def test_the_same_broken_content_is_repaired_to_the_same_revision(
    store: Store, base: BaseModel, tmp_path: Path
) -> None:
    digests = set()
    for name in ("one", "two"):
        tensors = {key.replace(".weight", ".default.weight"): value for key, value in factors({Q: (8, 8)}).items()}
        digests.add(take(store, base, write_adapter(tmp_path / name, tensors)).revision.digest)
    assert len(digests) == 1


def test_metadata_of_a_safetensors_file_is_kept(store: Store, base: BaseModel, tmp_path: Path) -> None:
    folder = put_adapter(tmp_path / "a")
    save_file(factors({Q: (8, 8)}), folder / WEIGHTS, metadata={"format": "pt", "by": "me"})
    revision = take(store, base, folder).revision
    assert (revision.folder / WEIGHTS).read_bytes() == (folder / WEIGHTS).read_bytes()
