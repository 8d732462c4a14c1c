"""`lorakit.extract`: what a full fine-tune changed, as an adapter of its base.

Both models are read tensor by tensor. Each weight's difference becomes low-rank factors by a randomised SVD; what no
factors can carry (biases, norms, convolutions, fused experts, new vocabularies) is named, and on request kept whole.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorakit.adapters.adapter import Adapter
from lorakit.adapters.config import AdapterConfig
from lorakit.adapters.delta import Delta
from lorakit.adapters.trained import Blend, Trained
from lorakit.adapters.truncation import ranks_within
from lorakit.adapters.writing import write_adapter_files
from lorakit.cluster.joining import ensure_installed
from lorakit.errors import Refused, UsageError
from lorakit.files.folders import refuse_existing, whole_folder
from lorakit.files.provenance import write_provenance
from lorakit.merge.base import BaseModel
from lorakit.mix.extraction.change import MAX_RANK, Change, Factors, Goal, change_of, uncarried_change
from lorakit.mix.extraction.plan import SHARED, ExtractPlan, Pair, plan_extract
from lorakit.mix.extraction.report import ExtractReport, UncarriedChange
from lorakit.mix.extraction.tuned import Tuned, opened, parent_of
from lorakit.mix.reduce import RankChoice

if TYPE_CHECKING:
    from lorakit.mix.extraction.spread import Crew

DEFAULT_RANK = 64
WORKERS = 4  # weights at a time: two threads do more for two weights than for one; each takes memory of its own
_FACTORS = ".factors"  # as they are computed
_CONFIG = "adapter_config.json"
# of others PEFT takes the head for a module to save, whether it is in the file or not
_TASKS = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForConditionalGeneration": "CAUSAL_LM",
}

Progress = Callable[[int, int], None]


def extract(
    tuned: str | os.PathLike[str],
    base: str | os.PathLike[str] | None = None,
    out: str | os.PathLike[str] | None = None,
    *,
    rank: int | None = None,
    energy: float | None = None,
    budget: int | None = None,
    max_rank: int | None = None,
    own_ranks: bool | None = None,
    save_rest: bool = False,
    include: Collection[str] = (),
    exclude: Collection[str] = (),
    device: str = "auto",
    seed: int = 0,
    dry_run: bool = False,
    ray: str | bool = False,
    progress: Progress | None = None,
) -> ExtractReport:
    """Write what distinguishes a fine-tuned model from its base as an adapter.

    No rank goes below the noise that rounding left in the tuned weights: it can be carried by no adapter.

    Args:
        tuned: A model folder or a hub id; or the folder or the name in the store of an adapter of any kind that can be
            merged, to approximate as LoRA.
        base: What it was trained from. None for the one that an adapter's config names.
        out: The folder to write. Appears whole or not at all. Only a dry run goes without.
        rank: Of every module, at most. 64 where neither `energy` nor `budget` is given.
        energy: The smallest rank of each module that keeps this share of its ‖Δ‖².
        budget: A number of parameters for all modules, spent where it keeps most of ‖Δ‖².
        max_rank: With `energy` or `budget`: no module gets more; 256 unless given.
        own_ranks: Each module is written with its own rank, else all are padded to one; None for yes with a budget.
        save_rest: Keep what factors can't carry as whole tensors (`modules_to_save`, biases).
        include: Only modules that one of these names: `*.mlp.*`, or the end of a path, `q_proj`.
        exclude: All modules but those.
        device: "auto", "cpu", "cuda" or "cuda:<index>".
        seed: Of the random blocks that the SVDs start from.
        dry_run: Measure, and write nothing.
        ray: The address of a Ray cluster whose nodes measure and factor, some weights a task; True for the one that
            RAY_ADDRESS names, else for a cluster of this machine. Each node has to see both models and the folder of
            `out` under the same paths.
        progress: Called with (bytes read, bytes in all) of the tuned model.

    Raises:
        UsageError: the arguments contradict each other, or there is no such device.
        NotFound: no such model, or a pattern that names nothing; or a node of the cluster does not see a file.
        Refused: a subclass says why: InvalidFile, WrongBase; or there is no change that factors could carry.
        Conflict: `out` exists, or a model was written again meanwhile.
        OutOfSpace: the disk is full.
    """
    begun = time.monotonic()
    goal = _goal(rank, energy, budget, max_rank)
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", device):
        raise UsageError(f"device '{device}' is none of auto, cpu, cuda, cuda:<index>")
    target = None if out is None else Path(out)
    if target is not None:
        refuse_existing(target)
    elif not dry_run:
        raise UsageError("no folder to write is named: give `out`, or ask for a dry run")
    settings = {
        **goal.choice.as_dict(), "max_rank": goal.max_rank, "save_rest": save_rest, "include": list(include),
        "exclude": list(exclude), "seed": seed,
    }  # fmt: skip
    if ray:
        ensure_installed()
    with opened(tuned, base, "cpu" if ray else device) as (source, model):
        plan = plan_extract(source.model, model, include=include, exclude=exclude)
        run = _Extraction(source, plan, goal, settings, device, progress)
        if dry_run or target is None:
            with _crew(ray, plan, source, None, device) as crew:
                return replace(run.measured(None, crew), out=target, seconds=time.monotonic() - begun)
        with whole_folder(target) as beside:
            with _factors(beside) as factors, _crew(ray, plan, source, beside, device) as crew:
                report = replace(run.measured(factors, crew), out=target, dry_run=False)
                deltas = {module: delta for change in run.changes for module, delta in factors.deltas(change).items()}
                own = budget is not None if own_ranks is None else own_ranks
                _write_adapter(plan, deltas, run.kept(factors), beside, own_ranks=own)
            report = replace(report, seconds=time.monotonic() - begun)
            write_provenance(
                beside, "extract", [parent_of(model, "base"), *source.parents()],
                settings | {"device": report.device}, rank=report.rank, truncation_error=report.relative_error,
                report=report.as_dict(),
            )  # fmt: skip
            source.ensure_unchanged()
            model.ensure_unchanged()
    return report


def _crew(
    ray: str | bool, plan: ExtractPlan, tuned: Tuned, folder: Path | None, device: str
) -> AbstractContextManager[Crew | None]:
    """Who measures the weights, if it is not this process."""
    if not ray:
        return nullcontext()
    import torch

    from lorakit.mix.extraction.spread import crew_on

    threads = max(1, torch.get_num_threads() // WORKERS)
    return crew_on(ray, plan, tuned, folder, device=device, threads=threads)


@contextmanager
def _factors(folder: Path) -> Iterator[Factors]:
    factors = Factors(folder / _FACTORS)
    try:
        yield factors
    finally:
        factors.close()
    factors.file.unlink()


def _goal(rank: int | None, energy: float | None, budget: int | None, max_rank: int | None) -> Goal:
    if rank is None and energy is None and budget is None:
        rank = DEFAULT_RANK
    if rank is not None and max_rank is not None:
        raise UsageError("a largest rank goes with an energy or a budget: with a rank, that is the largest")
    return Goal(RankChoice(rank, energy, budget), MAX_RANK if rank is None and max_rank is None else max_rank)


class _Extraction:
    """One run over both models, tensor by tensor."""

    def __init__(
        self,
        tuned: Tuned,
        plan: ExtractPlan,
        goal: Goal,
        settings: dict[str, Any],
        device: str,
        progress: Progress | None,
    ) -> None:
        self.tuned = tuned
        self.plan = plan
        self.goal = goal
        self.settings = settings
        self.device = device
        self.progress = progress
        self.changes: list[Change] = []
        self._read = 0

    def measured(self, factors: Factors | None, crew: Crew | None = None) -> ExtractReport:
        """Compute every change; the factors go into their file, where there is one, or into those of the crew."""
        savable = set(_savable(self.plan)) if self.settings["save_rest"] else set()
        if crew is None:
            from lorakit.merge.blocks import usable_device

            device = usable_device(self.device)
            every = self._found(device, factors, savable)
        else:
            device = crew.device
            every = crew.found(self.goal, self.settings["seed"], savable)
        uncarried: list[UncarriedChange] = []
        equal = 0
        with closing(every):
            for part, found in zip(self.plan.parts, every, strict=True):
                if found is None:
                    equal += 1
                elif isinstance(found, Change):
                    self.changes.append(found)
                else:
                    uncarried.append(found)
                self._advance(part.tuned.nbytes)
        if self.goal.choice.budget is not None:
            self._share_out(self.goal.choice.budget)
        self._uncarried = tuple(uncarried)
        return ExtractReport(
            None, str(self.plan.tuned.folder), str(self.plan.base.folder), self.settings, device, True,
            tuple(change.module for change in self.changes), self._uncarried, equal, self.plan.left_out,
        )  # fmt: skip

    def _found(
        self, device: str, factors: Factors | None, savable: set[str]
    ) -> Generator[Change | UncarriedChange | None]:
        """By the threads of this process, in the order of the plan."""
        import torch

        from lorakit.merge.blocks import exact_arithmetic

        with exact_arithmetic(device) as threads, ThreadPoolExecutor(min(threads, WORKERS)) as pool:
            torch.set_num_threads(max(1, threads // WORKERS))
            yield from pool.map(partial(self._change, device=device, factors=factors), self.plan.pairs)
        for part in self.plan.uncarried:
            yield uncarried_change(part, self.tuned, saved=part.tuned.name in savable)

    def _change(self, pair: Pair, *, device: str, factors: Factors | None) -> Change | None:
        return change_of(pair, self.goal, self.tuned, device=device, seed=self.settings["seed"], factors=factors)

    def kept(self, factors: Factors) -> Trained:
        """The tensors to save whole: all of a module's, as PEFT replaces modules whole; a bias alone by itself."""

        def blend(name: str) -> Blend:
            stored = self.plan.tuned.tensors[name]
            return Blend(
                ((stored if self.tuned.is_stored else factors.put(name, self.tuned.load(stored).float()), 1.0),)
            )

        changed = {change.tensor for change in self._uncarried if change.saved}
        parts = [part for part in self.plan.uncarried if part.tuned.name in changed]
        modules = dict.fromkeys(part.module for part in parts if not part.tuned.name.endswith(".bias"))
        tensors = {name: blend(name) for name in self.plan.tuned.tensors if name.rpartition(".")[0] in modules}
        biases = [part.tuned.name for part in parts if part.module not in modules]
        tensors |= {name: blend(name) for name in biases}
        embedding, head = self.plan.embedding, self.plan.head
        if embedding in tensors and head is not None:
            modules[head.removesuffix(".weight")] = None
            tensors[head] = tensors[embedding]
        return Trained(tensors, modules=tuple(modules), bias="all" if biases else "none")

    def _share_out(self, budget: int) -> None:
        spectra = {change.module.module: change.spectrum for change in self.changes}
        costs = {change.module.module: change.pair.cost for change in self.changes}
        if costs and budget < min(costs.values()):
            raise UsageError(
                f"a budget of {budget} parameters holds nothing: one rank of one module takes {min(costs.values())}"
            )
        if spectra:
            ranks = ranks_within(spectra, costs, budget)
            self.changes = [change.first(ranks[change.module.module]) for change in self.changes]

    def _advance(self, count: int) -> None:
        self._read += count
        if self.progress is not None:
            self.progress(self._read, self.plan.nbytes)


def _savable(plan: ExtractPlan) -> Iterator[str]:
    """What PEFT can save whole: biases, and modules that hold nothing but tensors which have no factors."""
    owners = {name.rpartition(".")[0] for name in plan.tuned.tensors}
    paired = {pair.module for pair in plan.pairs}
    for part in plan.uncarried:
        if part.tuned.name == SHARED:
            continue
        is_bias = part.tuned.name.endswith(".bias")
        holds_more = part.module in paired or any(owner.startswith(f"{part.module}.") for owner in owners)
        if is_bias or (part.module and not holds_more):
            yield part.tuned.name


def _write_adapter(
    plan: ExtractPlan, deltas: dict[str, Delta], trained: Trained, folder: Path, *, own_ranks: bool
) -> None:
    if not deltas:
        raise Refused(
            f"'{plan.tuned.reference}' and base '{plan.base.reference}' differ in no weight that low-rank factors "
            f"could carry, or by no more than rounding: there is nothing to extract (--dry-run lists what differs)"
        )
    pairs = {pair.module: pair for pair in plan.pairs}
    conv1d = any(
        pairs[module].transposed and delta.kind == "linear" for module, delta in deltas.items() if module in pairs
    )
    name, _, revision = plan.base.reference.partition("@")
    is_folder = Path(plan.base.reference).is_dir()
    config = AdapterConfig(
        fan_in_fan_out=conv1d,
        base=str(plan.base.folder.absolute()) if is_folder else name,
        raw={
            "task_type": _task(plan.base),
            "revision": None if is_folder else revision or None,
            # else PEFT and `lorakit merge` would take the two sides of a tied weight for two changes
            "ensure_weight_tying": any(pair.head in deltas for pair in plan.pairs if pair.head is not None),
        },
    )
    write_adapter_files(Adapter(deltas, (), config=config, trained=trained, own_ranks=own_ranks), folder)


def _task(base: BaseModel) -> str | None:
    classes: Sequence[str] = base.config.get("architectures") or ()
    if base.config.get("is_encoder_decoder") and any("ConditionalGeneration" in str(name) for name in classes):
        return "SEQ_2_SEQ_LM"
    return next((task for name in classes for part, task in _TASKS.items() if str(name).endswith(part)), None)
