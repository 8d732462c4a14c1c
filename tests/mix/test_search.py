"""Weights are found, nothing that is tried first beats them, and what fails is said and left behind clean."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lorakit
import lorakit.errors
from lorakit.mix.candidates import Candidate
from lorakit.mix.search import Trial
from tests.folders import factors, linear_modules, write_adapter
from tests.mix.test_compare import dense

Array = np.ndarray[Any, Any]


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("search")
    return [write_adapter(folder / f"{seed}", factors(linear_modules(), seed=seed)) for seed in range(5)]


def flat(folder: Path) -> Array:
    """All deltas of a folder as one vector, by numpy in float64."""
    return np.concatenate([delta.ravel() for _, delta in sorted(dense(folder).items())])


def nearness(target: Sequence[float]) -> Callable[[Candidate], float]:
    """A score that knows the weights it wants; highest, 0, there."""
    return lambda candidate: -sum((one - two) ** 2 for one, two in zip(candidate.weights, target, strict=True))


@pytest.mark.parametrize("target", [(0.7, -0.4), (1.2, 0.0, 0.5), (0.3, 0.9, -0.2, 0.6)], ids=str)
def test_the_weights_of_a_known_sum_are_found_from_its_deltas_alone(
    adapters: list[Path], tmp_path: Path, target: tuple[float, ...]
) -> None:
    chosen = adapters[: len(target)]
    wanted = sum(weight * flat(path) for weight, path in zip(target, chosen, strict=True))
    wanted_norm = np.linalg.norm(wanted)

    def score(candidate: Candidate) -> float:
        return -(float(np.linalg.norm(flat(candidate.folder) - wanted) / wanted_norm) ** 2)

    report = lorakit.search(chosen, score, l1=0.0, evaluations=40, share=tmp_path)
    assert report.weights == pytest.approx(target, abs=0.01)
    assert report.score == pytest.approx(0.0, abs=1e-4)
    assert len(report.trials) == 40
    report.adapter.save(tmp_path / "best")
    np.testing.assert_allclose(flat(tmp_path / "best"), wanted, atol=0.05 * abs(wanted).max())


def test_a_loss_is_minimised(adapters: list[Path]) -> None:
    distance = nearness((0.2, 0.6))
    report = lorakit.search(adapters[:2], lambda candidate: -distance(candidate), maximise=False, l1=0.0)
    assert report.weights == pytest.approx((0.2, 0.6), abs=0.01)
    assert report.score == min(trial.score for trial in report.trials if trial.score is not None)


@settings(max_examples=25)
@given(
    count=st.integers(2, 5), seed=st.integers(0, 99), maximise=st.booleans(), levels=st.integers(1, 30),
    fails=st.floats(0, 0.6), evaluations=st.integers(7, 40),
)  # fmt: skip
def test_the_result_is_never_worse_than_each_adapter_alone_the_average_and_the_start(
    adapters: list[Path], count: int, seed: int, maximise: bool, levels: int, fails: float, evaluations: int
) -> None:
    chance = random.Random(seed)
    start = tuple(chance.uniform(-1.5, 1.5) for _ in range(count))
    scores: dict[tuple[float, ...], float] = {}

    def score(candidate: Candidate) -> float:
        if chance.random() < fails and scores:
            raise RuntimeError("no luck")
        return scores.setdefault(candidate.weights, chance.randrange(levels) / levels)

    report = lorakit.search(adapters[:count], score, start=start, seed=seed, maximise=maximise, evaluations=evaluations)
    alone = [tuple(float(one == other) for other in range(count)) for one in range(count)]
    assert [trial.weights for trial in report.trials][: count + 2] == [start, (1 / count,) * count, *alone]
    assert report.score == (max if maximise else min)(scores.values())
    assert scores[report.weights] == report.score
    assert len({trial.weights for trial in report.trials}) == evaluations, "no weights are tried twice"
    assert all(-1.5 <= weight <= 1.5 for trial in report.trials for weight in trial.weights)


def test_of_equal_scores_the_smallest_weights_are_the_best(adapters: list[Path]) -> None:
    report = lorakit.search(adapters[:3], lambda _: 1.0, l1=0.05)
    assert sum(map(abs, report.weights)) == min(sum(map(abs, trial.weights)) for trial in report.trials)
    assert sum(map(abs, report.weights)) < 0.1, "with nothing to gain, the penalty leads to zero"


@pytest.mark.parametrize("bounds", [(0.0, 1.0), (-0.1, 3.0)])
def test_no_weight_leaves_its_bounds(adapters: list[Path], bounds: tuple[float, float]) -> None:
    report = lorakit.search(adapters[:3], lambda candidate: sum(candidate.weights), bounds=bounds, l1=0.0)
    assert all(bounds[0] <= weight <= bounds[1] for trial in report.trials for weight in trial.weights)
    assert sum(report.weights) > 0.9 * 3 * bounds[1]


def test_the_same_seed_tries_the_same_weights(adapters: list[Path]) -> None:
    before = np.random.get_state()[1].tolist()  # type: ignore[index, union-attr]

    def weights(seed: int) -> list[tuple[float, ...]]:
        report = lorakit.search(adapters[:3], nearness((0.1, 0.2, 0.3)), seed=seed, evaluations=20)
        return [trial.weights for trial in report.trials]

    assert weights(1) == weights(1)
    assert weights(1)[4:] != weights(2)[4:]
    assert np.random.get_state()[1].tolist() == before, "a score may draw from it"  # type: ignore[index, union-attr]


def test_a_method_that_draws_draws_alike_in_every_trial(adapters: list[Path]) -> None:
    def norm(candidate: Candidate) -> float:
        return candidate.adapter.delta("model.layers.0.mlp.up_proj").norm()

    report = lorakit.search(adapters[:2], norm, method="dare_linear", density=0.5, seed=3, evaluations=4)
    pairs = list(zip(adapters[:2], report.trials[1].weights, strict=True))
    again = lorakit.mix(pairs, "dare_linear", density=0.5, seed=3)
    assert report.trials[1].score == again.delta("model.layers.0.mlp.up_proj").norm()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (float("nan"), "the score is nan, which is no finite number"),
        (float("-inf"), "the score is -inf, which is no finite number"),
        ("0.5", "the score is '0.5', which is no finite number"),
        (None, "the score is None, which is no finite number"),
    ],
)
def test_a_score_that_is_no_number_is_a_failed_trial(adapters: list[Path], given: Any, said: str) -> None:
    report = lorakit.search(adapters[:2], lambda candidate: given if candidate.weights[0] > 0.6 else 1.0)
    failed = [trial for trial in report.trials if trial.weights[0] > 0.6]
    assert failed
    assert {(trial.score, trial.error) for trial in failed} == {(None, said)}
    assert report.score == 1.0


def test_scores_of_numpy_and_torch_are_numbers(adapters: list[Path]) -> None:
    import torch

    given = iter([np.float32(0.25), torch.tensor(0.5), True])
    report = lorakit.search(adapters[:2], lambda _: next(given), evaluations=3)
    assert [trial.score for trial in report.trials] == [0.25, 0.5, 1.0]


def test_a_score_that_raises_is_a_failed_trial_with_its_line(adapters: list[Path]) -> None:
    def deeper(weight: float) -> float:
        if weight <= 0:
            raise RuntimeError("too small")
        return weight

    report = lorakit.search(adapters[:2], lambda candidate: deeper(candidate.weights[0]), evaluations=20)
    failed = [trial for trial in report.trials if trial.score is None]
    line = deeper.__code__.co_firstlineno + 2
    assert {trial.error for trial in failed} == {f"RuntimeError: too small ('{__file__}', line {line})"}
    assert report.as_dict()["failed"] == len(failed)
    assert report.weights[0] > 1, "the search goes on, and away from there"


def test_when_nothing_has_a_score_the_first_reason_is_given_at_once(adapters: list[Path]) -> None:
    called: list[Candidate] = []

    def score(candidate: Candidate) -> float:
        called.append(candidate)
        raise KeyError(f"number {len(called)}")

    with pytest.raises(lorakit.errors.LorakitError, match=r"none of the first 4 trials has a score.*'number 1'"):
        lorakit.search(adapters[:3], score, evaluations=100)
    assert len(called) == 4


def test_each_trial_is_told_with_the_best_so_far(adapters: list[Path]) -> None:
    told: list[tuple[Trial, Trial | None]] = []
    report = lorakit.search(
        adapters[:2], nearness((0.4, 0.1)), evaluations=9, progress=lambda trial, best: told.append((trial, best))
    )
    assert [trial for trial, _ in told] == list(report.trials)
    for number, (_, best) in enumerate(told):
        assert best is not None
        assert best.score == max(trial.score for trial in report.trials[: number + 1] if trial.score is not None)


@pytest.mark.parametrize("options", [{}, {"rank": 2}, {"method": "ties", "density": 0.5, "rank": 3}], ids=str)
def test_the_result_says_how_its_weights_were_found(
    adapters: list[Path], tmp_path: Path, options: dict[str, Any]
) -> None:
    report = lorakit.search(adapters[:2], nearness((0.4, 0.1)), evaluations=8, seed=7, l1=0.0, **options)
    record = json.loads((report.adapter.save(tmp_path / "best") / "lorakit.json").read_text())
    assert record["operation"] == "mix"
    assert [parent["weight"] for parent in record["parents"]] == list(report.weights)
    assert record["settings"]["method"] == options.get("method", "linear")
    assert record["settings"]["search"] == {
        "evaluations": 8, "seed": 7, "score": report.score, "maximise": True, "bounds": [-1.5, 1.5], "l1": 0.0,
        "start": None,
    }  # fmt: skip
    json.dumps(report.as_dict())


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"adapters": 0}, "no adapter is named"),
        ({"adapters": 1}, "1 adapter is named"),
        ({"evaluations": 3}, "3 evaluations are too few: .* take 4"),
        ({"evaluations": 4, "start": [0.1, 0.2, 0.3]}, "take 5"),
        ({"start": [0.1, 0.2]}, "start has 2 weights for 3 adapters"),
        ({"start": [0.1, 0.2, 1.6]}, "outside of -1.5 to 1.5"),
        ({"bounds": (0.1, 1.5)}, "0 and 1 have to lie between"),
        ({"bounds": (-1.0, float("inf"))}, "both be finite"),
        ({"l1": -1.0}, "l1 -1"),
        ({"seed": -1}, "seed -1"),
        ({"method": "nonsense"}, "nonsense"),
        ({"density": 0.5}, "density"),
        ({"rank": "many"}, "rank 'many'"),
        ({"url": "http://127.0.0.1:1"}, "share"),
    ],
    ids=str,
)
def test_what_contradicts_itself_is_said_before_anything_is_scored(
    adapters: list[Path], changed: dict[str, Any], said: str
) -> None:
    count = changed.get("adapters", 3)
    options = {name: value for name, value in changed.items() if name != "adapters"}
    with pytest.raises(lorakit.errors.UsageError, match=said):
        lorakit.search(adapters[:count], lambda _: pytest.fail("it was scored"), **options)


def test_a_place_that_is_not_there_is_said_before_anything_is_scored(adapters: list[Path], tmp_path: Path) -> None:
    with pytest.raises(lorakit.errors.NotFound, match="there is no folder"):
        lorakit.search(adapters[:2], lambda _: pytest.fail("it was scored"), share=tmp_path / "nowhere")


def test_without_cma_the_extra_is_named(adapters: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "cma", None)
    with pytest.raises(lorakit.errors.LorakitError, match=r"pip install 'lorakit\[search\]'"):
        lorakit.search(adapters[:2], lambda _: 1.0)
