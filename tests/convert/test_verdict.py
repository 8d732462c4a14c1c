"""Is a checkpoint ready? What only time can tell, and what a look finds in whole models."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from lorakit.convert import verdict
from lorakit.convert.check import Check
from lorakit.convert.verdict import Judgement, judge
from lorakit.files.provenance import write_provenance
from tests.checkpoints.written import write_checkpoint
from tests.folders import base_tensors, factors, linear_modules, write_adapter, write_base


def answers(judged: Judgement) -> dict[str, bool | None]:
    return {check.name: check.ok for check in judged.checks}


def judgement(*answers: bool | None) -> Judgement:
    return Judgement(Path("a"), None, None, tuple(Check("x", ok, "r", "c") for ok in answers))


def test_what_is_unknown_is_not_ready() -> None:
    assert (judgement(True, True).word, judgement(True, True).ready) == ("ready", True)
    assert (judgement(True, None).word, judgement(True, None).ready) == ("unknown", False)
    assert (judgement(False, None).word, judgement(False, None).ready) == ("not ready", False)
    assert judgement(True, None, False).problems == ("r: c",)
    assert judgement(True, None, False).open_questions == ("r: c",)


def test_what_nothing_vouches_for_counts_when_it_stays_as_it_is(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "a")
    assert answers(judge(folder, quiet=0.01))["finished"] is True
    assert answers(judge(folder, quiet=0))["finished"] is None


def test_what_is_written_to_meanwhile_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_adapter(tmp_path / "a")

    def written_to(_: float) -> None:
        (folder / "adapter_config.json").write_text((folder / "adapter_config.json").read_text() + " ")

    monkeypatch.setattr(verdict.time, "sleep", written_to)
    judged = judge(folder)
    assert answers(judged)["finished"] is False
    assert "it was written to just now" in judged.problems[0]


def test_what_lorakit_wrote_needs_no_waiting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_adapter(tmp_path / "a")
    write_provenance(folder, "mix", parents=[], settings={})
    monkeypatch.setattr(verdict.time, "sleep", lambda _: pytest.fail("it waits"))
    assert answers(judge(folder))["finished"] is True


def test_a_lorakit_json_that_can_not_be_read_does_not_vouch_for_it(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "a")
    (folder / "lorakit.json").write_text("")
    os.utime(folder / "lorakit.json", (1, 1))
    assert answers(judge(folder, quiet=0))["finished"] is not True


def test_what_the_store_keeps_needs_no_waiting_and_what_is_captured_beside_it_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "home")
    monkeypatch.setenv("LORAKIT_HOME", str(tmp_path / "link"))
    assert answers(judge(write_adapter(tmp_path / "home" / "revisions" / "abc"), quiet=0))["finished"] is True
    assert answers(judge(write_adapter(tmp_path / "home" / "captures" / "abc"), quiet=0))["finished"] is None


def test_zeros_that_nothing_vouches_for_may_still_be_filled(tmp_path: Path) -> None:
    zeros = {name: np.zeros_like(value) for name, value in factors(linear_modules()).items()}
    assert answers(judge(write_adapter(tmp_path / "a", zeros), quiet=0.01))["filled"] is None


def test_a_base_beside_the_adapter_is_found_as_its_config_names_it(tmp_path: Path) -> None:
    write_base(tmp_path / "base")
    folder = write_checkpoint(tmp_path / "run" / "checkpoint-5", base_model_name_or_path="../../base")
    assert judge(folder).ready


def test_a_base_on_the_hub_that_is_not_in_the_cache_is_unknown_without_asking(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verdict, "open_base", lambda _: pytest.fail("it asks the hub"))
    folder = write_checkpoint(tmp_path / "checkpoint-5", base_model_name_or_path="org/model")
    judged = judge(folder, ask_hub=False)
    assert judged.word == "unknown"
    assert judged.open_questions == ("its base 'org/model' is not here: name it with --base",)


def test_a_model_that_diverged_is_told_by_a_sample_of_each_tensor(tmp_path: Path) -> None:
    tensors = base_tensors()
    tensors["lm_head.weight"][:] = np.nan
    judged = judge(write_base(tmp_path / "base", tensors), quiet=0.01)
    assert answers(judged)["finite"] is False
    assert "'lm_head.weight' holds NaN" in judged.problems[0]


def test_a_folder_that_goes_away_meanwhile_is_not_ready(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "checkpoint-5")
    for file in folder.iterdir():
        file.unlink()
    judged = judge(folder, quiet=0)
    assert not judged.ready


@pytest.mark.parametrize("use_dora", [False, True])
def test_of_what_peft_saved_every_module_that_peft_applies_is_counted(tmp_path: Path, use_dora: bool) -> None:
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer

    from tests.models import LINEARS, load, make_adapter, make_base

    base = make_base(tmp_path / "base", max_shard_size="100KB")
    folder = make_adapter(tmp_path / "a", base, target_modules=LINEARS["llama"], use_dora=use_dora)
    judged = judge(folder, str(base), quiet=0.01)
    layers = [each for each in PeftModel.from_pretrained(load(base), folder).modules() if isinstance(each, LoraLayer)]
    assert judged.ready is not use_dora
    assert (judged.modules_applied, judged.modules, judged.rank) == (len(layers), len(layers), 8)
