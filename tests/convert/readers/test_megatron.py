"""Megatron's checkpoints: the refusal where Megatron-Bridge is missing, and the call where a stand-in takes its place.

The bridge itself needs a GPU and Megatron-Core, and has not been run here.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from lorakit.convert.readers import megatron, read_source
from lorakit.errors import LorakitError, Refused, UsageError
from tests.convert.readers.state import state_of

BRIDGE = """
import json, pathlib
import torch
from safetensors.torch import save_file
class AutoBridge:
    @classmethod
    def from_hf_pretrained(cls, name):
        self = cls()
        self.name = name
        return self
    def export_ckpt(self, megatron_path, hf_path):
        if "broken" in megatron_path:
            raise RuntimeError("no such layout")
        out = pathlib.Path(hf_path)
        out.mkdir()
        save_file({"model.norm.weight": torch.ones(4)}, out / "model.safetensors")
        (out / "config.json").write_text(json.dumps([self.name, megatron_path]))
"""


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run's folder as Megatron leaves it."""
    for step in (100, 20):
        (tmp_path / "run" / f"iter_{step:07}").mkdir(parents=True)
    (tmp_path / "run" / "latest_checkpointed_iteration.txt").write_text("100")
    return tmp_path / "run"


@pytest.fixture
def bridge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package of the bridge's name with its two calls."""
    (tmp_path / "site" / "megatron" / "bridge").mkdir(parents=True)
    (tmp_path / "site" / "megatron" / "bridge" / "__init__.py").write_text(BRIDGE)
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    for name in [name for name in sys.modules if name.startswith("megatron")]:
        monkeypatch.delitem(sys.modules, name)


def say_base(run: Path) -> None:
    (run / "iter_0000100" / "run_config.yaml").write_text("model:\n  provider: {hf_model_id: org/base}\n")


def test_without_the_bridge_it_says_what_to_install_and_what_to_run(run: Path) -> None:
    with pytest.raises(Refused, match=r"pip install 'lorakit\[megatron\]'.*from_hf_pretrained\('BASE'\).export_ckpt\("):
        read_source(run)
    say_base(run)
    with pytest.raises(Refused, match=r"from_hf_pretrained\('org/base'\).export_ckpt\('.*iter_0000100', 'exported'\)"):
        read_source(run)


@pytest.mark.usefixtures("bridge")
def test_the_newest_iteration_is_exported_and_read(run: Path) -> None:
    say_base(run)
    source = megatron.read(run)
    assert torch.equal(state_of(source)["model.norm.weight"], torch.ones(4))
    assert source.beside is not None
    assert json.loads((source.beside / "config.json").read_text()) == ["org/base", str(run / "iter_0000100")]


@pytest.mark.usefixtures("bridge")
def test_a_config_beside_the_checkpoint_names_the_model(run: Path) -> None:
    (run / "config.json").write_text('{"model_type": "llama"}')
    source = megatron.read(run)
    assert source.beside is not None
    assert json.loads((source.beside / "config.json").read_text())[0] == str(run)


@pytest.mark.usefixtures("bridge")
def test_a_base_that_nothing_names_is_asked_for(run: Path) -> None:
    with pytest.raises(Refused, match="does not say which model of Hugging Face's it is"):
        megatron.read(run)


@pytest.mark.usefixtures("bridge")
def test_a_failed_export_says_why(run: Path) -> None:
    run = run.rename(run.parent / "broken")
    say_base(run)
    with pytest.raises(LorakitError, match=r"could not export .* as org/base: .*RuntimeError: no such layout"):
        megatron.read(run)


def test_there_is_no_moving_average(run: Path) -> None:
    with pytest.raises(UsageError, match="leave out --weights ema"):
        megatron.read(run, weights="ema")
