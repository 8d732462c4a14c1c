"""Start from some states of a checkpoint: exactly those, into exactly their places, or a refusal that says why."""

from __future__ import annotations

import json
import logging
import os
import pickle
import random
import shutil
from contextlib import suppress
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from lorakit.errors import Incomplete, NotFound, Refused, UsageError
from lorakit.training import LoadStates, resume
from lorakit.training.loading import prepare_state
from lorakit.training.prepared import Into
from tests.training.trainer import At, same, tiny_model, tiny_trainer, weights


@pytest.fixture(scope="module")
def earlier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 6 steps of an adapter, saved at 4 and 6."""
    run = tmp_path_factory.mktemp("earlier")
    tiny_trainer(run, save_steps=4).train()
    return run


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("whole")
    tiny_trainer(run, save_steps=4, lora=False).train()
    return run / "checkpoint-6"


def begun(run: Path, callback: LoadStates, **arguments: Any) -> tuple[Any, dict[str, Any]]:
    """A trainer with what it has when its first step begins."""
    found: dict[str, Any] = {}
    trainer = tiny_trainer(run, steps=8, callbacks=[callback], **arguments)

    def look() -> None:
        found.update(
            weights=weights(trainer), step=trainer.state.global_step, rate=trainer.optimizer.param_groups[0]["lr"],
            moments=deepcopy(trainer.optimizer.state_dict()["state"]), epoch=trainer.lr_scheduler.last_epoch,
            random=(random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state()),
        )  # fmt: skip
        trainer.control.should_training_stop = True

    trainer.add_callback(At(None, look, "on_train_begin"))
    trainer.train()
    return trainer, found


def test_the_models_weights_alone_with_a_fresh_optimizer_and_step_0(
    earlier: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        _, found = begun(tmp_path, LoadStates("model", checkpoint=earlier / "checkpoint-4"), model=tiny_model(seed=5))
    by_peft = PeftModel.from_pretrained(tiny_model(lora=False, seed=5), earlier / "checkpoint-4")
    assert same(found["weights"], dict(by_peft.state_dict()))
    assert (found["step"], found["moments"], found["epoch"], found["rate"]) == (0, {}, 0, 1e-2)
    assert "loaded model (8 tensors of the adapter 'default')" in caplog.text
    assert "skipped optimizer, scheduler, rng, trainer_state" in caplog.text


def test_a_run_means_its_newest_finished_checkpoint_and_latest_this_trainings_own(
    earlier: Path, tmp_path: Path
) -> None:
    newest = load_file(earlier / "checkpoint-6" / "adapter_model.safetensors")
    for callback, output in ((LoadStates(checkpoint=earlier), tmp_path), (LoadStates(), earlier)):
        _, found = begun(output, callback, save_strategy="no", model=tiny_model(seed=5))
        key = "base_model.model.model.layers.1.self_attn.v_proj.lora_B"
        assert torch.equal(found["weights"][f"{key}.default.weight"], newest[f"{key}.weight"])


@pytest.mark.parametrize("beside", ["README.md", "trainer_state.json"])
def test_a_run_with_other_files_in_its_own_folder_is_still_a_run(earlier: Path, tmp_path: Path, beside: str) -> None:
    """TRL writes its card there, and Trainer.save_state the log."""
    run = shutil.copytree(earlier, tmp_path / "earlier")
    (run / beside).write_text("{}")
    callback = LoadStates(checkpoint=run)
    begun(tmp_path / "run", callback, model=tiny_model(seed=5))
    assert [one.state for one in callback.loaded] == ["model"]


def test_a_training_that_is_resumed_keeps_what_it_had(
    earlier: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def start() -> list[LoadStates]:
        return [LoadStates(checkpoint=earlier)]

    tiny_trainer(tmp_path, steps=4, callbacks=start()).train()
    again = tiny_trainer(tmp_path, steps=6, callbacks=start())
    with caplog.at_level(logging.WARNING):
        again.train(resume_from_checkpoint=resume(tmp_path))
    assert "training is resumed at step 4" in caplog.text
    alone = tiny_trainer(tmp_path, steps=6)
    alone.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert same(weights(again), weights(alone))


def test_a_second_training_of_the_same_trainer_begins_where_the_first_ended(earlier: Path, tmp_path: Path) -> None:
    found: list[dict[str, torch.Tensor]] = []
    trainer = tiny_trainer(tmp_path, steps=2, callbacks=[LoadStates(checkpoint=earlier)], save_strategy="no")
    trainer.add_callback(At(None, lambda: found.append(weights(trainer)), "on_train_begin"))
    trainer.train()
    end = weights(trainer)
    trainer.train()
    assert same(found[1], end)


def test_weights_of_another_model_into_the_same_seed_train_on_as_when_set_by_hand(
    earlier: Path, tmp_path: Path
) -> None:
    """What counts is the training that follows: the oracle gets PEFT's own load before its Trainer is made."""
    mine = tiny_trainer(tmp_path / "mine", callbacks=[LoadStates(checkpoint=earlier)])
    mine.train()
    model = tiny_model()
    model.load_adapter(str(earlier / "checkpoint-6"), "default", is_trainable=True)
    theirs = tiny_trainer(tmp_path / "theirs", model=model)
    theirs.train()
    assert same(weights(mine), weights(theirs))


def test_a_whole_model_of_one_file_or_of_shards(whole: Path, tmp_path: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(whole)
    model.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    for checkpoint in (whole, tmp_path / "sharded"):
        fresh = tiny_model(lora=False, seed=5)
        _, found = begun(tmp_path / "run", LoadStates(checkpoint=checkpoint), model=fresh)
        assert same(found["weights"], dict(model.state_dict()))


def test_tied_weights_are_stored_once_and_loaded_into_both(tmp_path: Path) -> None:
    stored = tiny_model(lora=False, tied=True)
    stored.save_pretrained(tmp_path / "tied")
    fresh = tiny_model(lora=False, tied=True, seed=5)
    _, found = begun(tmp_path / "run", LoadStates(checkpoint=tmp_path / "tied"), model=fresh)
    assert same(found["weights"], dict(stored.state_dict()))


def test_all_is_what_a_resume_loads_but_for_the_place_in_the_data(earlier: Path, tmp_path: Path) -> None:
    checkpoint = earlier / "checkpoint-4"
    _, found = begun(tmp_path, LoadStates("all", checkpoint=checkpoint), model=tiny_model(seed=5))
    stored = torch.load(checkpoint / "optimizer.pt", weights_only=True)
    assert found["step"] == 4
    assert found["epoch"] == torch.load(checkpoint / "scheduler.pt", weights_only=True)["last_epoch"] == 4
    assert found["rate"] == stored["param_groups"][0]["lr"] != 1e-2
    assert all(
        torch.equal(found["moments"][index]["exp_avg"], stored["state"][index]["exp_avg"]) for index in stored["state"]
    )
    generators = torch.load(checkpoint / "rng_state.pth", weights_only=False)
    assert found["random"][0] == generators["python"]
    assert found["random"][1] == generators["numpy"][1].tolist()
    assert torch.equal(found["random"][2], generators["cpu"])


def test_steps_that_go_on_are_logged_with_the_loss_of_each(earlier: Path, tmp_path: Path) -> None:
    """A Trainer divides by the steps since it logged last."""
    trainer = tiny_trainer(tmp_path, callbacks=[LoadStates("trainer_state", checkpoint=earlier / "checkpoint-4")])
    result = trainer.train()
    losses = {entry["step"]: entry["loss"] for entry in trainer.state.log_history if "loss" in entry}
    assert (sorted(losses), result.global_step) == ([1, 2, 3, 4, 5, 6], 6)
    fresh = tiny_trainer(tmp_path / "fresh", steps=2, save_strategy="no")
    fresh.train()
    assert losses[5] == pytest.approx(fresh.state.log_history[0]["loss"])
    assert result.training_loss == pytest.approx((losses[5] + losses[6]) / 2)


def test_a_step_that_is_the_end_is_refused(earlier: Path, tmp_path: Path) -> None:
    callback = LoadStates("all", checkpoint=earlier / "checkpoint-6")
    with pytest.raises(Refused, match="it is at step 6, and this training ends at 6: raise max_steps"):
        tiny_trainer(tmp_path, callbacks=[callback]).train()


@pytest.mark.parametrize(
    ("model", "arguments", "words"),
    [
        ({"r": 8}, {}, r"exp_avg of parameter 0 is \[4, 32\] there, and the parameter is \[8, 32\] here"),
        ({"target_modules": ["q_proj"]}, {}, r"groups have \[8, 0\] parameters, and here they have \[4, 0\]"),
        ({}, {"optim": "sgd"}, "of another kind of optimizer: amsgrad"),
        ({}, {"optim": "adafactor"}, "of another kind of optimizer"),
    ],
)
def test_an_optimizers_state_that_does_not_fit_is_refused_before_a_step_crashes(
    earlier: Path, tmp_path: Path, model: dict[str, Any], arguments: dict[str, Any], words: str
) -> None:
    stored = earlier / "checkpoint-4"
    with pytest.raises(Refused, match=words):
        tiny_trainer(
            tmp_path, model=tiny_model(**model), callbacks=[LoadStates("optimizer", checkpoint=stored)], **arguments
        ).train()
    lenient = LoadStates("optimizer", checkpoint=stored, strict=False)
    tiny_trainer(tmp_path, steps=1, model=tiny_model(**model), callbacks=[lenient], **arguments).train()
    assert str(lenient.loaded[0]) == "optimizer (nothing)"


@pytest.mark.parametrize("optim", ["adafactor", "sgd", "rmsprop"])
def test_the_state_of_any_optimizer_fits_its_own_kind(tmp_path: Path, optim: str) -> None:
    tiny_trainer(tmp_path / "a", steps=2, optim=optim).train()
    callback = LoadStates("optimizer", checkpoint=tmp_path / "a")
    tiny_trainer(tmp_path / "b", steps=1, optim=optim, callbacks=[callback]).train()
    assert "nothing" not in str(callback.loaded[0])


def test_an_optimizer_without_its_scheduler_keeps_this_trainings_rates(earlier: Path, tmp_path: Path) -> None:
    callback = LoadStates(["optimizer", "model"], checkpoint=earlier / "checkpoint-4")
    _, found = begun(tmp_path, callback)
    assert (found["rate"], found["epoch"]) == (1e-2, 0)
    assert found["moments"]
    assert "with this training's learning rates" in str(callback.loaded[1])


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"r": 8, "lora_alpha": 16}, "r is 4 there and 8 here"),
        ({"lora_alpha": 16}, "lora_alpha is 8 there and 16 here"),
        ({"target_modules": ["q_proj"]}, "no place for base_model.model.model.layers.0.self_attn.v_proj.lora_A"),
        ({"target_modules": ["q_proj", "k_proj", "v_proj"]}, "not in the checkpoint"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_loaded(
    earlier: Path, tmp_path: Path, other: dict[str, Any], words: str
) -> None:
    model = tiny_model(seed=5, **other)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(Refused, match=words.replace("[", r"\[")):
        tiny_trainer(tmp_path, model=model, callbacks=[LoadStates(checkpoint=earlier)]).train()
    assert same(dict(model.state_dict()), before)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("optimizer.pt", [1]),
        ("optimizer.pt", {"state": {}, "param_groups": 5}),
        ("optimizer.pt", {"state": {0: {"exp_avg": torch.tensor([float("nan")])}}, "param_groups": None}),
        ("scheduler.pt", [1]),
        ("rng_state.pth", {"x": 1}),
        ("rng_state.pth", {"python": (3, (1, 2), None), "numpy": (), "cpu": torch.zeros(1)}),
        ("trainer_state.json", {"global_step": "six"}),
        ("adapter_model.safetensors", float("nan")),
    ],
)
def test_one_broken_state_leaves_all_others_alone(earlier: Path, tmp_path: Path, file: str, content: Any) -> None:
    checkpoint = shutil.copytree(earlier / "checkpoint-4", tmp_path / "checkpoint-4")
    if file.endswith(".json"):
        (checkpoint / file).write_text(json.dumps(content))
    elif file.endswith(".safetensors"):
        tensors = load_file(checkpoint / file)
        next(iter(tensors.values())).view(-1)[3] = content
        save_file(tensors, checkpoint / file)
    else:
        torch.save(content, checkpoint / file)
    (checkpoint / "lorakit.json").write_text("{}")
    model = tiny_model(seed=5)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(Refused):
        tiny_trainer(tmp_path / "run", model=model, callbacks=[LoadStates("all", checkpoint=checkpoint)]).train()
    assert same(dict(model.state_dict()), before)


@settings(max_examples=25)
@given(data=st.data())
def test_a_torn_torch_file_is_refused_and_nothing_else(earlier: Path, tmp_path: Path, data: st.DataObject) -> None:
    (tmp_path / "torn").mkdir(exist_ok=True)
    content = bytearray((earlier / "checkpoint-4" / "scheduler.pt").read_bytes())
    for place in data.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=30)):
        content[place] = data.draw(st.integers(0, 255))
    (tmp_path / "torn" / "scheduler.pt").write_bytes(content)
    model = torch.nn.Linear(1, 1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(torch.optim.SGD(model.parameters()), lambda step: 1.0)
    into = Into({"scheduler": scheduler}, strict=True, rank=0, ranks=1, keeps_rates=False)
    with suppress(Refused):
        prepare_state("scheduler", tmp_path / "torn", into)


def test_one_that_is_not_finished_is_refused_though_it_is_named_outright(earlier: Path, tmp_path: Path) -> None:
    checkpoint = shutil.copytree(earlier / "checkpoint-6", tmp_path / "checkpoint-6")
    (checkpoint / "checkpoint-is-incomplete.txt").touch()
    with pytest.raises(Incomplete, match="still writing it"):
        tiny_trainer(tmp_path / "run", callbacks=[LoadStates(checkpoint=checkpoint)]).train()


def test_not_strict_loads_what_fits_and_names_the_rest(
    earlier: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_model(seed=5, target_modules=["q_proj", "k_proj"])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with caplog.at_level(logging.WARNING):
        callback = LoadStates("model,scaler", checkpoint=earlier / "checkpoint-6", strict=False)
        _, found = begun(tmp_path, callback, model=model)
    stored = load_file(earlier / "checkpoint-6" / "adapter_model.safetensors")
    changed = [name for name in before if not torch.equal(before[name], found["weights"][name])]
    assert changed
    for name in changed:
        assert torch.equal(found["weights"][name], stored[name.replace(".default", "")])
    assert {name.split(".")[-4] for name in changed} == {"q_proj"}
    assert "no place for base_model.model.model.layers.0.self_attn.v_proj.lora_A.weight" in caplog.text
    assert "not in the checkpoint: base_model.model.model.layers.0.self_attn.k_proj.lora_A.weight" in caplog.text
    assert "not there: scaler" in caplog.text


def test_what_is_asked_for_and_not_there_is_refused(earlier: Path, tmp_path: Path) -> None:
    with pytest.raises(Refused, match="holds model, optimizer, scheduler, rng, trainer_state, and not scaler"):
        tiny_trainer(tmp_path, callbacks=[LoadStates("model,scaler", checkpoint=earlier / "checkpoint-6")]).train()
    with pytest.raises(UsageError, match="'modle' is no state"):
        LoadStates("modle")
    with pytest.raises(NotFound, match="no finished checkpoint"):
        tiny_trainer(tmp_path / "new", callbacks=[LoadStates()]).train()


def test_an_adapter_is_not_loaded_into_a_whole_model_nor_the_other_way_round(
    earlier: Path, whole: Path, tmp_path: Path
) -> None:
    with pytest.raises(Refused, match="lorakit merge"):
        tiny_trainer(tmp_path, lora=False, callbacks=[LoadStates(checkpoint=earlier)]).train()
    with pytest.raises(Refused, match="name the checkpoint of an adapter"):
        tiny_trainer(tmp_path, callbacks=[LoadStates(checkpoint=whole)]).train()


@pytest.mark.parametrize(("state", "file"), [("optimizer", "optimizer.pt"), ("rng", "rng_state.pth")])
def test_no_pickle_runs(earlier: Path, tmp_path: Path, state: str, file: str) -> None:
    class Attack:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "ran"),)

    checkpoint = tmp_path / "checkpoint-6"
    checkpoint.mkdir()
    for path in (earlier / "checkpoint-6").iterdir():
        (checkpoint / path.name).write_bytes(path.read_bytes())
    torch.save({"state": Attack()}, checkpoint / file)
    with pytest.raises(Refused, match="can't be read safely"):
        tiny_trainer(tmp_path / "run", callbacks=[LoadStates(state, checkpoint=checkpoint)]).train()
    (checkpoint / file).write_bytes(pickle.dumps(Attack()))
    with pytest.raises(Refused, match="can't be read safely"):
        tiny_trainer(tmp_path / "run", callbacks=[LoadStates(state, checkpoint=checkpoint)]).train()
    assert not (tmp_path / "ran").exists()


def test_an_index_that_leads_out_of_its_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    save_file({"a": torch.zeros(1)}, tmp_path / "outside.safetensors")
    save_file({"b": torch.zeros(1)}, tmp_path / "model" / "model-00001-of-00001.safetensors")
    (tmp_path / "model" / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../outside.safetensors"}}')
    (tmp_path / "model" / "lorakit.json").write_text("{}")
    with pytest.raises(Refused, match="outside of its folder"):
        tiny_trainer(tmp_path / "run", lora=False, callbacks=[LoadStates(checkpoint=tmp_path / "model")]).train()
