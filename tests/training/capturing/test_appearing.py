"""What in an output folder is a checkpoint: whatever a trainer's habits are."""

from __future__ import annotations

from pathlib import Path

import pytest

from lorakit.training.capturing.appearing import Spot, is_checkpoint_name, spots_in, stamp_of


def made(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    return folder


@pytest.mark.parametrize(
    ("files", "spots"),
    [
        (["checkpoint-5/adapter_model.safetensors", "checkpoint-10/optimizer.pt"], ["checkpoint-10", "checkpoint-5"]),
        (["any_name/weights.pt", "any_name/meta.json"], ["any_name"]),
        (["checkpoint-5/x", "adapter_config.json", "README.md"], ["checkpoint-5", "."]),
        (["model.pt", "optimizer.pt", "notes.txt"], ["model.pt", "optimizer.pt"]),
        (["config.json", "model.safetensors", "last.ckpt"], [".", "last.ckpt"]),
        (["adapter_config.json", "adapter_model.safetensors", "optimizer.pt", "ckpt_5.pt"], [".", "ckpt_5.pt"]),
        (["adapter_model.safetensors"], ["."]),
        (["config.json", "optimizer.pt", "checkpoint-10/x"], ["checkpoint-10", "optimizer.pt"]),
        (["config.json", "ckpt_5.pt", "ckpt_10.pt"], ["ckpt_10.pt", "ckpt_5.pt"]),
        (["model-step5.safetensors", "model-step10.safetensors"],
         ["model-step10.safetensors", "model-step5.safetensors"]),
        (["model.safetensors"], ["model.safetensors"]),
        (["pytorch_model.bin", "optimizer.pt"], ["optimizer.pt", "pytorch_model.bin"]),
        (["config.json", "model-00001-of-00002.safetensors"], ["."]),
        ([".metadata", "__0_0.distcp"], ["."]),
        (["sql/checkpoint-5/x", "sql/checkpoint-10/x", "chat/checkpoint-5/x"],
         ["chat/checkpoint-5", "sql/checkpoint-10", "sql/checkpoint-5"]),
        (["sql/checkpoint-5/x", "sql/adapter_config.json"], ["sql/checkpoint-5", "sql"]),
        (["lightning_logs/version_0/checkpoints/epoch=0.ckpt", "lightning_logs/version_0/checkpoints/last.ckpt"],
         ["lightning_logs/version_0/checkpoints/epoch=0.ckpt", "lightning_logs/version_0/checkpoints/last.ckpt"]),
        (["epoch_0/adapter_config.json", "epoch_0/adapter_model/x"], ["epoch_0"]),
        (["checkpoint-8/pytorch_model_fsdp_0/.metadata", "checkpoint-8/optimizer_0/.metadata"], ["checkpoint-8"]),
        (["final/pytorch_model_fsdp_0/.metadata"], ["final"]),
        (["engine/global_step8/mp_rank_00_model_states.pt", "engine/latest"], ["engine/global_step8"]),
        (["best/global_step8/mp_rank_00_model_states.pt", "best/latest", "best/trainer_state.json"], ["best"]),
        (["global_step8/mp_rank_00_model_states.pt", "latest"], ["global_step8"]),
        (["dcp/.metadata", "dcp/__0_0.distcp"], ["dcp"]),
        (["tmp-checkpoint-5/x", ".hidden/x", "model.pt.tmp", "x.partial/y", ".lorakit/held/z"], []),
        ([], []),
    ],
)  # fmt: skip
def test_each_habit_has_its_spots(tmp_path: Path, files: list[str], spots: list[str]) -> None:
    assert [spot.name for spot in spots_in(made(tmp_path, *files))] == spots


def test_links_are_no_checkpoints_of_their_own(tmp_path: Path) -> None:
    made(tmp_path, "epoch=1.ckpt", "elsewhere/x.pt")
    (tmp_path / "last.ckpt").symlink_to("epoch=1.ckpt")
    (tmp_path / "best").symlink_to("elsewhere")
    assert [spot.name for spot in spots_in(tmp_path)] == ["elsewhere", "epoch=1.ckpt"]


def test_a_stamp_differs_after_any_rewrite_and_knows_what_is_only_less(tmp_path: Path) -> None:
    spot = Spot(made(tmp_path, "c/a", "c/inner/b") / "c", "c")
    before = stamp_of(spot)
    assert before is not None
    assert stamp_of(spot) == before
    (tmp_path / "c" / "inner" / "b").unlink()
    less = stamp_of(spot)
    assert less is not None
    assert less != before
    assert less.is_less_of(before)
    made(tmp_path, "c/inner/b2")
    more = stamp_of(spot)
    assert more is not None
    assert not more.is_less_of(before)
    assert stamp_of(Spot(tmp_path / "none", "none")) is None


def test_what_a_root_holds_beside_its_own_does_not_count(tmp_path: Path) -> None:
    made(tmp_path, "adapter_config.json", "checkpoint-1/x")
    *_, root = spots_in(tmp_path)
    before = stamp_of(root)
    made(tmp_path, "checkpoint-2/x", ".lorakit/x")
    assert stamp_of(root) == before


@pytest.mark.parametrize("name", ["checkpoint-5", "model_checkpoint-5", "epoch_1", "step-3", "x.ckpt", "model.pt"])
def test_what_was_gone_too_early_is_missed_by_such_names(name: str) -> None:
    assert is_checkpoint_name(Path(name))
    assert not is_checkpoint_name(Path(f".{name}"))
    assert not is_checkpoint_name(Path(f"{name}.tmp"))


def test_other_names_are_not_missed() -> None:
    assert not any(is_checkpoint_name(Path(name)) for name in ("logs", "events.out", "README.md", "tmp-checkpoint-5"))
