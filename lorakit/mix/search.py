"""`lorakit.search`: the weights of a mix, found against a score of the user's own, without gradients.

LoRAHub's idea (arXiv:2307.13269): a few dozen evaluations, and a penalty on large weights. Found by lq-CMA-ES (Hansen,
"A Global Surrogate Assisted CMA-ES", GECCO 2019), which fits a quadratic to what it has seen: near its optimum, a loss
is one in the weights of a mix.
"""

from __future__ import annotations

import os
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from math import isfinite
from pathlib import Path
from typing import Any, cast

from lorakit.adapters.adapter import Adapter
from lorakit.adapters.source import Stage
from lorakit.errors import LorakitError, NotFound, UsageError
from lorakit.merge.base import read_base
from lorakit.mix.candidates import Candidate, Places
from lorakit.mix.methods.registry import method_named
from lorakit.mix.mix import mix
from lorakit.mix.opened import AdapterLike, BaseLike, opened

Weights = tuple[float, ...]
Score = Callable[[Candidate], float]


@dataclass(frozen=True, slots=True)
class Trial:
    """One choice of weights and its score; None, and the reason, where there is none."""

    weights: Weights
    score: float | None
    seconds: float
    error: str | None = None

    def as_dict(self) -> dict[str, Any]:
        return {"weights": list(self.weights), "score": self.score, "seconds": self.seconds, "error": self.error}


Progress = Callable[[Trial, Trial | None], None]


@dataclass(frozen=True, slots=True)
class SearchReport:
    """The best weights that were tried, the mix that they give, and all trials in their order."""

    adapters: tuple[str, ...]
    weights: Weights
    score: float
    adapter: Adapter
    trials: tuple[Trial, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        pairs = zip(self.adapters, self.weights, strict=True)
        return {
            "adapters": [{"path": path, "weight": weight} for path, weight in pairs],
            "score": self.score,
            "failed": sum(trial.score is None for trial in self.trials),
            "seconds": sum(trial.seconds for trial in self.trials),
            "settings": dict(self.settings),
            "trials": [trial.as_dict() for trial in self.trials],
        }


def search(
    adapters: Sequence[AdapterLike],
    score: Score,
    *,
    method: str = "linear",
    rank: int | str | None = None,
    evaluations: int = 40,
    bounds: tuple[float, float] = (-1.5, 1.5),
    start: Sequence[float] | None = None,
    l1: float = 0.0,
    seed: int = 0,
    maximise: bool = True,
    base: BaseLike | None = None,
    url: str | None = None,
    share: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> SearchReport:
    """Find the weights with which a mix of `adapters` scores best.

    The average (1/N each), each adapter alone, and `start` are always tried, and tried first: by its score, the result
    is never worse than the best of them. A score that raises or is no finite number is a failed trial, and the search
    goes on. The same seed tries the same weights, as long as `score` gives the same scores.

    Args:
        adapters: two or more.
        score: called with a `Candidate`: its `.weights`, `.adapter`, `.folder`, `.merged`, or `.url` and `.model`.
        method, rank, options: as for `mix`. A method that draws at random draws by `seed`, alike in every trial.
        evaluations: how often `score` is called.
        bounds: of each weight; 0 and 1 lie between them.
        start: weights to try too; the search goes on from the best of what is tried first.
        l1: what the search, not the choice of the best, takes off the score: l1 · mean |w|, in the score's unit
            (LoRAHub takes 0.05 of that off). Of equal scores the smaller weights are best anyhow.
        seed: of the search.
        maximise: a higher score is better, as an accuracy is; False for a loss.
        base: what `candidate.merged` is merged into; for `mix` as well.
        url: a running `lorakit serve`, or a vLLM with VLLM_ALLOW_RUNTIME_LORA_UPDATING=True, that loads candidates.
            LORAKIT_API_KEY is its key.
        share: a folder to make candidates in; one that the server reads too, as `lorakit serve --root` says. The
            default, for a search without a server, is the system's folder for temporary files.
        progress: called after each trial with it and the best so far.

    Raises:
        UsageError: the arguments contradict each other, or as `mix`.
        LorakitError: none of what is tried first has a score, with the first reason; or cma is not installed.
    """
    _ensure_cma()
    _check_settings(len(adapters), evaluations, bounds, start, l1, seed)
    if "seed" in method_named(method).options:
        options["seed"] = seed
    model = None if base is None else read_base(base)
    found = [opened(adapter, model) for adapter in adapters]

    def mixed(weights: Weights) -> Adapter:
        return mix(list(zip(found, weights, strict=True)), method, rank, base=base, **options)

    known = _known_weights(len(adapters), start)
    mixed(known[0])  # what can't be mixed at any weights says so before a score is called
    trials = _Trials(score, mixed, _places(base, url, share), maximise, progress)
    for weights in known:
        trials.add(weights)
    if trials.best is None:
        raise LorakitError(
            f"none of the first {len(known)} trials has a score; the first one: {trials.done[known[0]].error}"
        )
    _explore(trials, evaluations, bounds, l1, seed)
    best = trials.best
    settings = {
        "evaluations": evaluations, "seed": seed, "maximise": maximise, "bounds": list(bounds), "l1": l1,
        "start": None if start is None else list(start),
    }  # fmt: skip
    names = tuple(adapter.name for adapter in found)
    adapter = _recorded(mixed(best.weights), {**settings, "score": best.score})
    return SearchReport(names, best.weights, cast(float, best.score), adapter, tuple(trials.done.values()), settings)


@dataclass(slots=True)
class _Trials:
    """What was tried, and the best of it: the first with the best score, or of equal ones the smallest weights."""

    score: Score
    mixed: Callable[[Weights], Adapter]
    places: Places
    maximise: bool
    progress: Progress | None
    done: dict[Weights, Trial] = field(default_factory=dict)
    best: Trial | None = None

    def add(self, weights: Weights) -> None:
        trial = self._tried(weights)
        self.done[weights] = trial
        if trial.score is not None and (self.best is None or self._key(trial) < self._key(self.best)):
            self.best = trial
        if self.progress is not None:
            self.progress(trial, self.best)

    def losses(self, l1: float) -> dict[Weights, float]:
        """Lower is better, with the penalty on large weights; what failed is as bad as the worst."""
        losses = {
            weights: self._loss(trial.score) + l1 * mean_size(weights)
            for weights, trial in self.done.items()
            if trial.score is not None
        }
        worst = max(losses.values(), default=0.0)
        return {weights: losses.get(weights, worst) for weights in self.done}

    def _tried(self, weights: Weights) -> Trial:
        candidate = Candidate(weights, lambda: self.mixed(weights), self.places)
        begun = time.monotonic()
        found, error = None, None
        try:
            with candidate.made:
                found = _number(self.score(candidate))
        except (Exception, SystemExit) as raised:
            found, error = None, said_of(raised)
        return Trial(weights, found, time.monotonic() - begun, error)

    def _key(self, trial: Trial) -> tuple[float, float]:
        return self._loss(cast(float, trial.score)), mean_size(trial.weights)

    def _loss(self, score: float) -> float:
        return -score if self.maximise else score


def mean_size(weights: Weights) -> float:
    """mean |w|."""
    return sum(map(abs, weights)) / len(weights)


class _Spent(Exception):
    """As many evaluations as were asked for are done."""


def _explore(trials: _Trials, evaluations: int, bounds: tuple[float, float], l1: float, seed: int) -> None:
    """Try weights until there are as many trials as evaluations, from the best on that is known."""
    import numpy as np
    from cma.fitness_models import SurrogatePopulation

    chance = np.random.default_rng(seed)

    def loss(weights: Any) -> float:
        chosen = tuple(float(weight) for weight in weights)
        if chosen not in trials.done:
            if len(trials.done) == evaluations:
                raise _Spent
            trials.add(chosen)
        return trials.losses(l1)[chosen]

    surrogate = SurrogatePopulation(loss)
    for weights, known in trials.losses(l1).items():
        surrogate.model.add_data_row(np.array(weights), known)
    with warnings.catch_warnings(), suppress(_Spent):
        warnings.filterwarnings("ignore", module=r"cma\.")  # of its own state, which a person can do nothing about
        while True:
            strategy = _strategy(cast(Trial, trials.best).weights, bounds, chance)
            while not strategy.stop():
                before = len(trials.done)
                drawn = strategy.ask()
                strategy.tell(drawn, surrogate(drawn))
                guess = surrogate.model.xopt  # where the quadratic has its optimum
                if len(trials.done) > before and np.isfinite(guess).all():
                    strategy.inject([np.clip(guess, *bounds)])


def _strategy(start: Weights, bounds: tuple[float, float], chance: Any) -> Any:
    """CMA-ES that draws from `chance`, and leaves numpy's own generator alone, which a score may use."""
    from cma import CMAEvolutionStrategy

    lowest, highest = bounds
    settings = {
        "bounds": [lowest, highest], "randn": lambda *shape: chance.standard_normal(shape), "seed": float("nan"),
        "CMA_injections_threshold_keep_len": 1, "verbose": -9, "verb_log": 0,
    }  # fmt: skip
    return CMAEvolutionStrategy(list(start), (highest - lowest) / 10, settings)


def _known_weights(count: int, start: Sequence[float] | None) -> list[Weights]:
    """What is always tried: the start, the average, and each adapter alone."""
    alone = [tuple(float(other == index) for other in range(count)) for index in range(count)]
    first = [] if start is None else [tuple(map(float, start))]
    return list(dict.fromkeys([*first, (1 / count,) * count, *alone]))


def _check_settings(
    count: int,
    evaluations: int,
    bounds: tuple[float, float],
    start: Sequence[float] | None,
    l1: float,
    seed: int,
) -> None:
    if count < 2:
        raise UsageError(f"{count or 'no'} adapter is named: a search wants two or more to find the weights of")
    lowest, highest = bounds
    if not (isfinite(lowest) and isfinite(highest) and lowest <= 0 and highest >= 1):
        raise UsageError(f"bounds {lowest:g} and {highest:g}: 0 and 1 have to lie between them, and both be finite")
    if start is not None and len(start) != count:
        raise UsageError(f"start has {len(start)} weights for {count} adapters: give one each")
    if start is not None and not all(lowest <= weight <= highest for weight in start):
        raise UsageError(f"a weight to start with lies outside of {lowest:g} to {highest:g}: widen the bounds")
    if evaluations < (least := len(_known_weights(count, start))):
        raise UsageError(f"{evaluations} evaluations are too few: the average and each alone take {least} already")
    if not (isfinite(l1) and l1 >= 0):
        raise UsageError(f"l1 {l1:g}: it is a finite number, 0 or above")
    if seed < 0:
        raise UsageError(f"seed {seed}: it is a whole number, 0 or above")


def _places(base: BaseLike | None, url: str | None, share: str | os.PathLike[str] | None) -> Places:
    if url is not None and share is None:
        raise UsageError(
            f"'{url}' has to read the candidates somewhere: name a folder that it may load from as `share`"
        )
    folder = Path(tempfile.gettempdir() if share is None else share).resolve()
    if not folder.is_dir():
        raise NotFound(f"there is no folder '{folder}' to make candidates in")
    return Places(folder, base, url)


def _ensure_cma() -> None:
    try:
        import cma  # noqa: F401
    except ModuleNotFoundError:
        raise LorakitError("cma is not installed, which a search needs: pip install 'lorakit[search]'") from None


def _number(score: Any) -> float:
    """Raises LorakitError for what is none, or not finite."""
    try:
        value = float("nan") if isinstance(score, str | bytes) else float(score)
    except (TypeError, ValueError):
        value = float("nan")
    if not isfinite(value):
        raise LorakitError(f"the score is {score!r}, which is no finite number")
    return value


def said_of(error: BaseException, file: str | None = None) -> str:
    """What was raised, and the last line of `file`, or of what was called here, on the way to it."""
    if isinstance(error, LorakitError):
        return str(error)
    frames = traceback.extract_tb(error.__traceback__)
    theirs = file or next((frame.filename for frame in frames if frame.filename != __file__), None)
    lines = [frame.lineno for frame in frames if frame.filename == theirs]
    where = f" ('{theirs}', line {lines[-1]})" if lines else ""
    return f"{type(error).__name__}: {error}{where}"


def _recorded(adapter: Adapter, said: Mapping[str, Any]) -> Adapter:
    """The same, with how its weights were found among the settings of its making."""
    match adapter.sources:
        case (Stage(operation="mix", weight=1.0, parts=()) as stage,):
            found = replace(stage, settings={**stage.settings, "search": dict(said)})
        case _:
            found = Stage("mix", {"method": "linear", "rank": "exact", "search": dict(said)}, adapter.sources)
    return replace(adapter, sources=(found,))
