"""An adapter's config gives ranks and scales as PEFT does, or is refused."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorakit.adapters.config import AdapterConfig, beyond_plain_lora, parse_config, read_config
from lorakit.errors import InvalidFile

FILE = Path("adapter_config.json")
PLAIN = {"peft_type": "LORA", "r": 8, "lora_alpha": 16}
MODULES = [
    "model.layers.0.self_attn.q_proj",
    "model.layers.10.self_attn.q_proj",
    "model.layers.1.mlp.up_proj",
    "lm_head",
]


def config(**fields: Any) -> AdapterConfig:
    return parse_config({**PLAIN, **fields}, FILE)


@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys:RuntimeWarning")
@pytest.mark.parametrize(
    "patterns",
    [
        {},
        {"rank_pattern": {"q_proj": 3}, "alpha_pattern": {"q_proj": 5}},
        {"rank_pattern": {"layers.1.mlp.up_proj": 3}, "alpha_pattern": {r"layers\.(0|1)\..*": 5}},
        {"rank_pattern": {"proj": 3, ".*_proj": 4, "up_proj": 5}, "use_rslora": True},
        {"rank_pattern": {"^lm_head": 3, "lm_head": 2}, "alpha_pattern": {"model.lm_head": 1}},
        {"rank_pattern": {"layers.1": 3, "model": 2}},
    ],
)
def test_ranks_and_scales_are_those_of_peft(patterns: dict[str, Any]) -> None:
    import torch
    from peft import LoraConfig, get_peft_model

    class Tree(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for path in MODULES:
                place: torch.nn.Module = self
                *parents, leaf = path.split(".")
                for part in parents:
                    if not hasattr(place, part):
                        place.add_module(part, torch.nn.Module())
                    place = getattr(place, part)
                place.add_module(leaf, torch.nn.Linear(4, 4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    peft = get_peft_model(Tree(), LoraConfig(r=8, lora_alpha=16, target_modules=MODULES, **patterns))  # type: ignore[arg-type]
    mine = config(**patterns)
    for module in MODULES:
        layer = peft.base_model.model.get_submodule(module)
        assert mine.rank_of(module) == layer.r["default"]
        assert mine.scale_of(module) == layer.scaling["default"]


@pytest.mark.parametrize(
    "fields",
    [
        {"peft_type": None}, {"peft_type": ""}, {"peft_type": 3}, {"r": 0}, {"r": -1}, {"r": 2.5}, {"r": True},
        {"r": "8"},
        {"lora_alpha": "x"}, {"lora_alpha": float("nan")}, {"lora_alpha": True}, {"use_rslora": 1},
        {"rank_pattern": []}, {"rank_pattern": {"q": 0}}, {"rank_pattern": {"q": 1.5}}, {"rank_pattern": {"q": True}},
        {"alpha_pattern": {"q": float("inf")}}, {"alpha_pattern": {"q": "1"}}, {"base_model_name_or_path": 3},
    ],
)  # fmt: skip
def test_a_field_of_the_wrong_kind_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(InvalidFile, match=r"adapter_config\.json"):
        config(**fields)


@given(
    st.dictionaries(
        st.sampled_from([*PLAIN, "rank_pattern", "alpha_pattern", "use_rslora", "base_model_name_or_path"]),
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | st.just({"q": 10**400}),
    )
)
def test_any_config_is_read_or_refused(fields: dict[str, Any]) -> None:
    with suppress(InvalidFile):
        parse_config({**PLAIN, **fields}, FILE)


def test_a_folder_without_a_config_is_no_adapter(tmp_path: Path) -> None:
    with pytest.raises(InvalidFile, match=r"has no adapter_config\.json"):
        read_config(tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps(PLAIN))
    assert read_config(tmp_path).rank == 8


@pytest.mark.parametrize("init", [True, False, None, "gaussian", "eva", "orthogonal", "True"])
def test_inits_that_leave_the_base_alone_are_plain(init: Any) -> None:
    assert beyond_plain_lora(config(init_lora_weights=init)) == {}


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora", "loftq", "corda"])
def test_inits_that_change_the_base_are_not(init: str) -> None:
    assert beyond_plain_lora(config(init_lora_weights=init)) == {"init_lora_weights": f"init_lora_weights '{init}'"}
