"""A chosen rank, energy or budget: the optimum, measured, whatever the factors are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lorakit
from lorakit.errors import UnsupportedAdapter, UsageError
from tests.folders import factors, linear_modules, stored, write_adapter, write_base

ONE = {"model.layers.0.self_attn.q_proj": (8, 8), "model.layers.0.mlp.up_proj": (12, 8), "lm_head": (16, 8)}
TWO = {"model.layers.0.mlp.up_proj": (12, 8), "model.layers.1.mlp.down_proj": (8, 12)}


def pair(folder: Path, ranks: tuple[int, int] = (3, 2), seed: int = 0) -> tuple[Path, Path]:
    one = write_adapter(folder / f"one-{seed}-{ranks}", factors(ONE, ranks[0], seed), rank=ranks[0])
    two = write_adapter(
        folder / f"two-{seed}-{ranks}", factors(TWO, ranks[1], seed + 1), rank=ranks[1], use_rslora=True
    )
    return one, two


def read_back(folder: Path) -> dict[str, np.ndarray[Any, Any]]:
    """Dense deltas as PEFT's rule says: alpha/r by the module's own patterns."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = {name: value.astype("float64") for name, value in stored(folder).items()}
    dense = {}
    for name, a in tensors.items():
        if name.endswith("lora_A.weight"):
            module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            alpha = config["alpha_pattern"].get(module, config["lora_alpha"])
            rank = config["rank_pattern"].get(module, config["r"])
            assert a.shape[0] == rank
            dense[module] = alpha / rank * (tensors[name.replace("_A", "_B")] @ a)
    return dense


def exact_sum(pairs: list[tuple[Path, float]]) -> dict[str, np.ndarray[Any, Any]]:
    total: dict[str, np.ndarray[Any, Any]] = {}
    for folder, weight in pairs:
        config = json.loads((folder / "adapter_config.json").read_text())
        scale = config["lora_alpha"] / (config["r"] ** 0.5 if config.get("use_rslora") else config["r"])
        for module, delta in read_factors(folder).items():
            total[module] = total.get(module, 0) + weight * scale * delta
    return total


def read_factors(folder: Path) -> dict[str, np.ndarray[Any, Any]]:
    tensors = {name: value.astype("float64") for name, value in stored(folder).items()}
    return {
        name.removeprefix("base_model.model.").removesuffix(".lora_A.weight"): tensors[name.replace("_A", "_B")] @ a
        for name, a in tensors.items()
        if name.endswith("lora_A.weight")
    }


def best(dense: np.ndarray[Any, Any], rank: int) -> np.ndarray[Any, Any]:
    u, s, vh = np.linalg.svd(dense, full_matrices=False)
    kept: np.ndarray[Any, Any] = (u[:, :rank] * s[:rank]) @ vh[:rank]
    return kept


@settings(max_examples=20)
@given(
    ranks=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    weights=st.tuples(st.floats(-2, 2), st.floats(-2, 2)),
    rank=st.integers(1, 9),
    seed=st.integers(0, 9),
)
def test_a_rank_gives_the_optimum_of_a_full_svd(
    tmp_path_factory: pytest.TempPathFactory,
    ranks: tuple[int, int],
    weights: tuple[float, float],
    rank: int,
    seed: int,
) -> None:
    folder = tmp_path_factory.mktemp("rank")
    pairs = list(zip(pair(folder, ranks, seed), weights, strict=True))
    mixed = lorakit.mix(pairs, rank=rank)
    found = read_back(mixed.save(folder / "mixed"))
    expected = exact_sum(pairs)
    assert found.keys() == expected.keys()
    report = mixed.report
    assert report is not None
    for module, dense in expected.items():
        error, optimum = np.linalg.norm(dense - found[module]), np.linalg.norm(dense - best(dense, rank))
        scale = max(1e-9, float(np.linalg.norm(dense)))
        assert error == pytest.approx(optimum, rel=1e-5, abs=1e-5 * scale)
        assert report.by_module[module].lost == pytest.approx(optimum, rel=1e-5, abs=1e-6 * scale)
        assert report.by_module[module].rank <= rank
    total = sum(float(np.linalg.norm(dense)) ** 2 for dense in expected.values())
    lost = sum(float(np.linalg.norm(dense - best(dense, rank))) ** 2 for dense in expected.values())
    assert report.truncation_error == pytest.approx((lost / total) ** 0.5 if total else 0, rel=1e-4, abs=1e-6)


def test_an_energy_is_kept_in_every_module_with_as_few_ranks_as_can_be(tmp_path: Path) -> None:
    pairs = list(zip(pair(tmp_path, (5, 4)), (0.7, 0.6), strict=True))
    mixed = lorakit.mix(pairs, energy=0.9, own_ranks=True)
    found = read_back(mixed.save(tmp_path / "mixed"))
    assert mixed.report is not None
    for module, dense in exact_sum(pairs).items():
        spectrum = np.linalg.svd(dense, compute_uv=False) ** 2
        share = np.cumsum(spectrum) / spectrum.sum()
        assert mixed.report.by_module[module].rank == int(np.argmax(share >= 0.9)) + 1
        assert np.linalg.norm(found[module]) ** 2 >= 0.9 * spectrum.sum() * (1 - 1e-6)


def test_a_budget_takes_the_strongest_directions_of_all_modules(tmp_path: Path) -> None:
    pairs = list(zip(pair(tmp_path, (5, 4)), (0.7, 0.1), strict=True))
    mixed = lorakit.mix(pairs, budget=120)
    assert mixed.report is not None
    assert mixed.report.parameters <= 120
    folder = mixed.save(tmp_path / "mixed")
    found, expected = read_back(folder), exact_sum(pairs)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["rank_pattern"] == config["alpha_pattern"]
    kept = {module: config["rank_pattern"].get(module, config["r"]) if module in found else 0 for module in expected}
    for module, delta in found.items():
        np.testing.assert_allclose(delta, best(expected[module], kept[module]), atol=1e-5)
    lost = sum(float(np.linalg.norm(expected[module] - found.get(module, 0))) ** 2 for module in expected)
    total = sum(float(np.linalg.norm(dense)) ** 2 for dense in expected.values())
    assert mixed.report.truncation_error == pytest.approx((lost / total) ** 0.5, rel=1e-4)
    # no other share-out of one more direction here for one there would have kept more for its price
    prices = {module: sum(dense.shape) for module, dense in expected.items()}
    offers = sorted(
        (sigma**2 / prices[module], module)
        for module, dense in expected.items()
        for sigma in np.linalg.svd(dense, compute_uv=False)[kept[module] :]
        if sigma > 1e-6
    )
    weakest = min(
        float(np.linalg.svd(expected[module], compute_uv=False)[rank - 1]) ** 2 / prices[module]
        for module, rank in kept.items()
        if rank
    )
    left = 120 - mixed.report.parameters
    assert all(value <= weakest + 1e-9 for value, module in offers if prices[module] <= left)


def test_one_rank_for_all_is_padded_with_zeros(tmp_path: Path) -> None:
    pairs = list(zip(pair(tmp_path, (5, 4)), (0.7, 0.1), strict=True))
    own = read_back(lorakit.mix(pairs, budget=200).save(tmp_path / "own"))
    padded = lorakit.mix(pairs, budget=200, own_ranks=False).save(tmp_path / "padded")
    config = json.loads((padded / "adapter_config.json").read_text())
    assert not config["rank_pattern"]
    assert config["lora_alpha"] == config["r"]
    for module, delta in read_back(padded).items():
        np.testing.assert_array_equal(delta, own[module])


def test_what_fits_is_left_as_it_is(tmp_path: Path) -> None:
    one, _ = pair(tmp_path, (3, 2))
    small = lorakit.shrink(one, rank=8)
    assert small.report is not None
    assert (small.report.truncation_error, small.rank) == (0.0, 3)
    np.testing.assert_array_equal(
        small.delta("lm_head").dense().numpy(), lorakit.load_adapter(one).delta("lm_head").dense().numpy()
    )


def test_shrink_is_the_mix_of_one(tmp_path: Path) -> None:
    one, _ = pair(tmp_path, (5, 2))
    small = lorakit.shrink(one, rank=2)
    folder = small.save(tmp_path / "small")
    for module, dense in exact_sum([(one, 1.0)]).items():
        np.testing.assert_allclose(read_back(folder)[module], best(dense, 2), atol=1e-5)
    record = json.loads((folder / "lorakit.json").read_text())
    assert (record["operation"], record["settings"]) == ("shrink", {"rank": 2})
    assert [parent["path"] for parent in record["parents"]] == [str(one)]
    assert record["truncation_error"] == pytest.approx(small.report.truncation_error)  # type: ignore[union-attr]
    assert record["report"]["by_module"]["lm_head"]["rank"] == 2


def test_a_result_is_a_value_as_any_other(tmp_path: Path) -> None:
    one, two = pair(tmp_path, (5, 4))
    small = lorakit.shrink(one, rank=2)
    both = 0.5 * small + lorakit.load_adapter(two) - small
    dense = both.delta("model.layers.0.mlp.up_proj").dense().numpy()
    expected = -0.5 * best(exact_sum([(one, 1.0)])["model.layers.0.mlp.up_proj"], 2)
    expected = expected + exact_sum([(two, 1.0)])["model.layers.0.mlp.up_proj"]
    np.testing.assert_allclose(dense, expected, atol=1e-5)
    record = json.loads((both.save(tmp_path / "both") / "lorakit.json").read_text())
    stage, other = record["parents"]
    assert (stage["operation"], stage["settings"], stage["weight"]) == ("shrink", {"rank": 2}, -0.5)
    assert stage["parents"][0]["path"] == str(one)
    assert other["path"] == str(two)
    assert both.name.count("one") == 1


def test_a_computed_adapter_is_merged_from_its_folder(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    adapter = write_adapter(tmp_path / "a", factors(linear_modules(), 4), rank=4)
    with pytest.raises(UnsupportedAdapter, match="save it, and name that folder"):
        lorakit.merge(base, lorakit.shrink(adapter, rank=1), out=tmp_path / "merged")
    lorakit.merge(base, lorakit.shrink(adapter, rank=1).save(tmp_path / "small"), out=tmp_path / "merged")


def test_nothing_is_computed_before_it_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = pair(tmp_path, (5, 4))

    def no_tensor(*_: Any) -> None:
        raise AssertionError("a tensor was read")

    monkeypatch.setattr("lorakit.adapters.delta.load_floats", no_tensor)
    mixed = 0.5 * lorakit.mix([(one, 0.7), (two, 0.3)], "ties", rank=2, density=0.5)
    assert "rank=?" in repr(mixed)
    assert "rank=?" in repr(lorakit.mix([(one, 0.7), (two, 0.3)], "tsv", rank=2))
    assert "rank=2" in repr(lorakit.mix([(one, 0.7), (two, 0.3)], rank=2))
    assert set(mixed.modules) == ONE.keys() | TWO.keys()
    with pytest.raises(AssertionError):
        mixed.delta("lm_head").dense()


@pytest.mark.parametrize(
    ("choice", "reason"),
    [
        ({"rank": 0}, "rank 0: it has to be 1 or more"),
        ({"rank": "some"}, "rank 'some': it is a whole number above 0, or 'exact'"),
        ({"rank": 3, "energy": 0.5}, "rank and energy both choose the rank"),
        ({"rank": "exact", "budget": 5}, "rank 'exact' keeps all"),
        ({"energy": 0.0}, "energy 0: it is the share"),
        ({"energy": 1.5}, "energy 1.5"),
        ({"energy": float("nan")}, "energy nan"),
        ({"budget": 0}, "budget 0"),
        ({"budget": 3}, "a budget of 3 parameters holds nothing"),
    ],
)
def test_a_choice_that_makes_no_sense(tmp_path: Path, choice: dict[str, Any], reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        lorakit.mix([(pair(tmp_path)[0], 1.0)], **choice)


def test_shrinking_needs_a_goal(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="say how far to shrink"):
        lorakit.shrink(pair(tmp_path)[0])


def test_an_adapter_of_zeros_stays_one(tmp_path: Path) -> None:
    one, _ = pair(tmp_path)
    nothing = lorakit.mix([(one, 0.0)], energy=0.9)
    folder = nothing.save(tmp_path / "nothing")
    assert not any(dense.any() for dense in read_back(folder).values())
    assert nothing.report is not None
    assert nothing.report.truncation_error == 0


def test_dense_methods_are_cut_to_the_optimum(tmp_path: Path) -> None:
    from peft.utils.merge_utils import ties

    pairs = list(zip(pair(tmp_path, (5, 4)), (0.7, 1.2), strict=True))
    mixed = lorakit.mix(pairs, "ties", rank=3, density=0.4)
    dense = [exact_sum([(folder, 1.0)])["model.layers.0.mlp.up_proj"] for folder, _ in pairs]
    merged = ties([torch.from_numpy(one).float() for one in dense], torch.tensor([0.7, 1.2]), density=0.4)
    whole = merged.double().numpy()
    found = mixed.delta("model.layers.0.mlp.up_proj").dense().numpy()
    np.testing.assert_allclose(found, best(whole, 3), atol=1e-4)
    assert mixed.report is not None
    lost = np.linalg.norm(whole - best(whole, 3)) / np.linalg.norm(whole)
    assert mixed.report.by_module["model.layers.0.mlp.up_proj"].truncation_error == pytest.approx(lost, rel=1e-4)
    # and without a rank it is exact
    exact = lorakit.mix(pairs, "ties", density=0.4)
    np.testing.assert_allclose(exact.delta("model.layers.0.mlp.up_proj").dense().numpy(), whole, atol=1e-5)


def test_a_dense_method_on_a_large_layer_wants_a_rank(tmp_path: Path) -> None:
    one = write_adapter(tmp_path / "one", factors({"big": (520, 515)}))
    two = write_adapter(tmp_path / "two", factors({"big": (520, 515)}, seed=5))
    with pytest.raises(UsageError, match=r"'big' \[520, 515\] is of full rank.*name --rank N or --energy E"):
        lorakit.mix([(one, 1), (two, 1)], "ties").save(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    mixed = lorakit.mix([(one, 1), (two, 1)], "ties", rank=4)
    assert mixed.delta("big").rank == 4
