"""`peft:…` gives what PEFT's own `add_weighted_adapter` gives, from folder to folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

import lorakit
from tests.models import load, make_adapter, make_base

TARGETS = ["q_proj", "up_proj"]
WEIGHTS = [0.7, -0.4]
MODULE = "model.layers.1.mlp.up_proj"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("peft") / "base")


@pytest.fixture(scope="module")
def pair(base: Path) -> list[Path]:
    return [
        make_adapter(base.parent / str(seed), base, seed=seed, r=4, lora_alpha=6 * seed, target_modules=TARGETS)
        for seed in (1, 2)
    ]


@pytest.fixture
def model(base: Path, pair: list[Path]) -> PeftModel:
    opened = PeftModel.from_pretrained(load(base), pair[0], adapter_name="one")
    opened.load_adapter(pair[1], adapter_name="two")
    return opened


def by_peft(model: PeftModel, form: str, **options: Any) -> torch.Tensor:
    model.base_model.add_weighted_adapter(["one", "two"], WEIGHTS, "mixed", combination_type=form, **options)
    delta: torch.Tensor = model.base_model.model.get_submodule(MODULE).get_delta_weight("mixed")
    return delta.detach()


@pytest.mark.parametrize(
    ("form", "options"),
    [
        ("linear", {}), ("cat", {}), ("ties", {"density": 0.4}), ("magnitude_prune", {"density": 0.4}),
        ("svd", {"rank": 4}), ("ties_svd", {"rank": 4, "density": 0.4}),
        ("magnitude_prune_svd", {"rank": 4, "density": 0.3}),
    ],
)  # fmt: skip
def test_the_same_delta_as_pefts(
    model: PeftModel, pair: list[Path], base: Path, tmp_path: Path, form: str, options: dict[str, Any]
) -> None:
    theirs = by_peft(model, form, **({"density": options["density"]} if "density" in options else {}))
    mixed = lorakit.mix(zip(pair, WEIGHTS, strict=True), f"peft:{form}", **options)
    found = PeftModel.from_pretrained(load(base), mixed.save(tmp_path / "out"))
    mine = found.base_model.model.get_submodule(MODULE).get_delta_weight("default").detach()
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5 * float(theirs.abs().max()))


@pytest.mark.parametrize(
    ("form", "options"), [("dare_linear", {}), ("dare_ties", {}), ("dare_linear_svd", {"rank": 4})]
)
def test_what_peft_draws_at_random_is_drawn_by_seed(pair: list[Path], form: str, options: dict[str, Any]) -> None:
    first, again, other = (
        lorakit.mix(zip(pair, WEIGHTS, strict=True), f"peft:{form}", density=0.5, seed=seed, **options)
        for seed in (3, 3, 4)
    )
    dense = [mixed.delta(MODULE).dense() for mixed in (first, again, other)]
    assert torch.equal(dense[0], dense[1])
    assert not torch.equal(dense[0], dense[2])


def test_lorakits_own_linear_is_not_pefts(pair: list[Path]) -> None:
    own, theirs = (lorakit.mix(zip(pair, [0.5, 0.5], strict=True), name) for name in ("linear", "peft:linear"))
    exact, crossed = own.delta(MODULE).dense(), theirs.delta(MODULE).dense()
    assert float((crossed - exact).norm() / exact.norm()) > 0.3
