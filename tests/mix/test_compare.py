"""What is said of two adapters from their factors is what dense float64 matrices say."""

from __future__ import annotations

import json
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lorakit
import lorakit.errors
from lorakit.mix.compare import Relation
from tests.folders import factors, linear_modules, stored, write_adapter

Array = np.ndarray[Any, Any]
UP = "model.layers.0.mlp.up_proj"


def dense(folder: Path) -> dict[str, Array]:
    """alpha/r · B A in float64, of adapters whose modules all have one rank."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = stored(folder)
    found = {}
    for name, a in tensors.items():
        for part in (".lora_A.weight", ".lora_embedding_A"):
            if name.endswith(part):
                module = name.removesuffix(part).removeprefix("base_model.model.")
                b = tensors[name.replace("_A", "_B")]
                found[module] = config["lora_alpha"] / config["r"] * (b.astype("float64") @ a.astype("float64"))
    return found


def by_the_formulas(one: Array, two: Array) -> dict[str, Any]:
    """Everything that a relation says, by full SVDs and explicit projections."""
    spaces = []
    for matrix in (one, two):
        u, s, vh = np.linalg.svd(matrix)
        rank = int((s > 1e-6 * s[0]).sum())
        spaces.append((u[:, :rank] @ u[:, :rank].T, vh[:rank].T @ vh[:rank], rank))
    (columns, rows, rank), (other_columns, other_rows, other_rank) = spaces
    norm, other_norm = np.linalg.norm(one), np.linalg.norm(two)
    smaller = min(rank, other_rank)
    return {
        "norms": [norm, other_norm],
        "cosine": float((one * two).sum() / norm / other_norm),
        # of two projections, tr(P₁P₂) is the sum of cos² of the principal angles
        "column_overlap": float(np.trace(columns @ other_columns) / smaller),
        "row_overlap": float(np.trace(rows @ other_rows) / smaller),
        "interference": [np.linalg.norm(two @ rows) / norm, np.linalg.norm(one @ other_rows) / other_norm],
    }


def assert_agrees(found: Relation, expected: dict[str, Any]) -> None:
    for name, value in found.as_dict().items():
        assert value == pytest.approx(expected[name], rel=1e-9, abs=1e-9), name


@settings(max_examples=40)
@given(
    shape=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    ranks=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    dtypes=st.tuples(*[st.sampled_from(["float64", "float32", "float16"])] * 2),
    seed=st.integers(0, 99),
)
def test_a_pair_agrees_with_dense_matrices(
    tmp_path_factory: pytest.TempPathFactory,
    shape: tuple[int, int],
    ranks: tuple[int, int],
    dtypes: tuple[str, str],
    seed: int,
) -> None:
    folder = tmp_path_factory.mktemp("pair")
    pair = [
        write_adapter(
            folder / name,
            {key: value.astype(dtype) for key, value in factors({"m": shape}, rank, seed=seed + number).items()},
            rank=rank,
        )
        for number, (name, rank, dtype) in enumerate(zip("ab", ranks, dtypes, strict=True))
    ]
    report = lorakit.compare(*pair)
    found = report.pairs[0].modules["m"]
    assert_agrees(found, by_the_formulas(*(dense(path)["m"] for path in pair)))
    assert_agrees(report.pairs[0].overall, found.as_dict())


@pytest.fixture
def three(tmp_path: Path) -> list[Path]:
    return [
        write_adapter(tmp_path / "one", factors(linear_modules(), rank=2, seed=1)),
        write_adapter(tmp_path / "two", factors(linear_modules(), rank=3, seed=2), rank=3),
        write_adapter(tmp_path / "three", factors({UP: (12, 8)}, rank=1, seed=3), rank=1),
    ]


def test_over_all_modules_the_deltas_are_one_block_diagonal_matrix(three: list[Path]) -> None:
    one, two = (dense(path) for path in three[:2])

    def in_blocks(deltas: dict[str, Array]) -> Array:
        whole = np.zeros((sum(delta.shape[0] for delta in deltas.values()), sum(d.shape[1] for d in deltas.values())))
        row = column = 0
        for module in one:
            delta = deltas[module]
            whole[row : row + delta.shape[0], column : column + delta.shape[1]] = delta
            row, column = row + delta.shape[0], column + delta.shape[1]
        return whole

    report = lorakit.compare(*three[:2])
    assert_agrees(report.pairs[0].overall, by_the_formulas(in_blocks(one), in_blocks(two)))


def test_every_pair_of_several_adapters_is_there(three: list[Path]) -> None:
    report = lorakit.compare(*three)
    whole = [dense(path) for path in three]
    norms = [sqrt(sum((delta**2).sum() for delta in deltas.values())) for deltas in whole]
    assert report.norms == pytest.approx(norms)
    for i, row in enumerate(report.cosines):
        for j, value in enumerate(row):
            inner = sum((whole[i][module] * whole[j][module]).sum() for module in whole[i].keys() & whole[j].keys())
            assert value == pytest.approx(inner / norms[i] / norms[j])
    assert [(pair.first, pair.second) for pair in report.pairs] == [(0, 1), (0, 2), (1, 2)]


def test_modules_of_one_alone_are_named_and_count_as_zero_in_the_other(three: list[Path]) -> None:
    pair = lorakit.compare(three[0], three[2]).pairs[0]
    assert tuple(pair.modules) == (UP,)
    assert (len(pair.only_first), pair.only_second) == (5, ())
    first, third = dense(three[0]), dense(three[2])[UP]
    norm = sqrt(sum((delta**2).sum() for delta in first.values()))
    assert pair.overall.cosine == pytest.approx((first[UP] * third).sum() / norm / np.linalg.norm(third))
    assert pair.overall.interference[0] == pytest.approx(
        by_the_formulas(first[UP], third)["interference"][0] * np.linalg.norm(first[UP]) / norm
    )


def test_an_adapter_lies_on_itself(three: list[Path]) -> None:
    a = lorakit.load_adapter(three[0])
    same, opposite = (lorakit.compare(a, other).pairs[0].overall for other in (a, -2 * a))
    assert (same.cosine, same.column_overlap, same.row_overlap) == pytest.approx((1, 1, 1))
    assert same.interference == pytest.approx((1, 1))
    assert opposite.cosine == pytest.approx(-1)
    assert opposite.interference == pytest.approx((2, 0.5))


def test_adapters_that_read_different_inputs_do_not_interfere(tmp_path: Path) -> None:
    tensors = [factors({"m": (6, 8)}, seed=seed) for seed in (1, 2)]
    for number, named in enumerate(tensors):
        named["base_model.model.m.lora_A.weight"][:, 4 * number : 4 * number + 4] = 0
    pair = lorakit.compare(*(write_adapter(tmp_path / f"{i}", named) for i, named in enumerate(tensors))).pairs[0]
    assert pair.overall.interference == (0, 0)
    assert (pair.overall.row_overlap, pair.overall.cosine) == pytest.approx((0, 0))
    assert pair.overall.column_overlap is not None
    assert pair.overall.column_overlap > 0.01


def test_interference_is_what_the_other_adds_to_inputs_that_one_reads(three: list[Path]) -> None:
    one, two = (dense(path)[UP] for path in three[:2])
    basis = np.linalg.svd(one)[2][:2]
    inputs = np.random.default_rng(0).standard_normal((200_000, 2)) @ basis
    noise = np.linalg.norm(inputs @ two.T) / np.linalg.norm(inputs @ one.T)
    found = lorakit.compare(*three[:2]).pairs[0].modules[UP].interference[0]
    assert found == pytest.approx(noise, rel=0.01)


def test_a_zero_adapter_has_no_angle_to_others(three: list[Path]) -> None:
    a, b = (lorakit.load_adapter(path) for path in three[:2])
    report = lorakit.compare(0 * a, b)
    found = report.pairs[0].overall
    assert (found.cosine, found.column_overlap, found.row_overlap) == (None, None, None)
    assert found.interference == (None, 0)
    assert report.cosines == ((None, None), (None, 1.0))


def test_what_cancels_is_zero_and_not_noise(three: list[Path], tmp_path: Path) -> None:
    copy = write_adapter(tmp_path / "copy", stored(three[0]))
    nothing = lorakit.load_adapter(three[0]) - lorakit.load_adapter(copy)
    report = lorakit.compare(nothing, three[1])
    assert report.norms[0] == 0
    assert report.pairs[0].overall.row_overlap is None


def test_directions_of_factors_that_lean_on_one_another_count_once(tmp_path: Path) -> None:
    tensors = factors({"m": (6, 7)}, rank=1, seed=1)
    doubled = {
        name: np.concatenate([value, value * 0.5], axis=0 if "lora_A" in name else 1) for name, value in tensors.items()
    }
    one = write_adapter(tmp_path / "one", tensors, rank=1)
    two = write_adapter(tmp_path / "two", doubled, rank=2)
    found = lorakit.compare(one, two).pairs[0].modules["m"]
    assert found.directions == 1
    assert (found.cosine, found.column_overlap, found.row_overlap) == pytest.approx((1, 1, 1))


def test_embeddings_compare_too(tmp_path: Path) -> None:
    chance = np.random.default_rng(0)
    pair = []
    for name in ("one", "two"):
        tensors = {
            "base_model.model.model.embed_tokens.lora_embedding_A": chance.standard_normal((2, 16)).astype("float32"),
            "base_model.model.model.embed_tokens.lora_embedding_B": chance.standard_normal((8, 2)).astype("float32"),
        }
        pair.append(write_adapter(tmp_path / name, tensors))
    found = lorakit.compare(*pair).pairs[0].modules["model.embed_tokens"]
    assert_agrees(found, by_the_formulas(*(dense(path)["model.embed_tokens"] for path in pair)))


@pytest.mark.parametrize(("pattern", "count"), [("*", 6), ("up_proj", 2), ("*.layers.1.*", 3), (UP, 1)])
def test_modules_can_be_picked(three: list[Path], pattern: str, count: int) -> None:
    report = lorakit.compare(*three[:2], modules=pattern)
    assert len(report.pairs[0].modules) == count
    whole = dense(three[0])
    assert report.norms[0] == pytest.approx(
        sqrt(sum((whole[module] ** 2).sum() for module in report.pairs[0].modules))
    )  # fmt: skip


def test_the_worst_modules_come_first(three: list[Path]) -> None:
    pair = lorakit.compare(*three[:2]).pairs[0]
    expected = {
        module: max(by_the_formulas(dense(three[0])[module], dense(three[1])[module])["interference"])
        for module in pair.modules
    }
    assert [name for name, _ in pair.worst_modules()] == sorted(expected, key=lambda module: -expected[module])


def test_the_report_is_data(three: list[Path]) -> None:
    data = json.loads(json.dumps(lorakit.compare(*three).as_dict(), allow_nan=False))
    assert [entry["path"] for entry in data["adapters"]] == [str(path) for path in three]
    assert data["pairs"][1]["modules"].keys() == {UP}
    assert len(data["pairs"][1]["only_first"]) == 5


def test_different_bases_are_noted(tmp_path: Path) -> None:
    pair = [write_adapter(tmp_path / name, base_model_name_or_path=f"org/{name}") for name in ("one", "two")]
    assert lorakit.compare(*pair).notes == ("the adapters name different bases: org/one, org/two",)


def test_what_can_not_be_compared_is_refused(three: list[Path], tmp_path: Path) -> None:
    other = write_adapter(tmp_path / "other", factors({UP: (12, 9)}))
    dora = write_adapter(tmp_path / "dora", use_dora=True)
    broken = factors({UP: (12, 8)})
    broken[f"base_model.model.{UP}.lora_B.weight"][3, 1] = np.nan
    with pytest.raises(lorakit.errors.WrongBase, match=r"\[12, 8\] in one adapter and linear \[12, 9\]"):
        lorakit.compare(three[0], other)
    with pytest.raises(lorakit.errors.UnsupportedAdapter, match="can't be compared exactly: it has use_dora"):
        lorakit.compare(three[0], dora)
    with pytest.raises(lorakit.errors.InvalidFile, match=f"{UP}.* holds NaN or infinity"):
        lorakit.compare(three[0], write_adapter(tmp_path / "broken", broken))
    with pytest.raises(lorakit.errors.UsageError, match="no module matches 'nothing'; there are 6"):
        lorakit.compare(*three, modules="nothing")
