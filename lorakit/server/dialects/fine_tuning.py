"""`/v1/fine_tuning`: the runs that are watched, and their checkpoints, as OpenAI shows jobs of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Query
from pydantic import BaseModel

from lorakit.errors import NotFound
from lorakit.server.access.given import Known
from lorakit.server.described import EVERYWHERE, errors
from lorakit.server.following.served import Served
from lorakit.server.views import number
from lorakit.store.catalog import Revision, Run

Page = Annotated[int, Query(ge=1, le=100)]
T = TypeVar("T", bound=BaseModel)


class Hyperparameters(BaseModel):
    """What is known of them here is how long the run has trained."""

    n_epochs: int | str = "auto"


class Job(BaseModel):
    """A run. It has succeeded when its last save is there; how it fares until then, only its trainer knows."""

    id: str
    object: str = "fine_tuning.job"
    created_at: int
    finished_at: int | None
    model: str
    fine_tuned_model: str | None
    status: str
    hyperparameters: Hyperparameters = Hyperparameters()
    metadata: dict[str, str]
    organization_id: str = "lorakit"
    training_file: str = ""
    validation_file: str | None = None
    result_files: list[str] = []
    seed: int = 0
    trained_tokens: int | None = None
    error: None = None
    estimated_finish: int | None = None
    integrations: list[Any] = []


class Metrics(BaseModel):
    """`valid_loss` and `full_valid_loss` are the same: trainers evaluate on all of what they evaluate on."""

    step: int | None
    train_loss: float | None
    train_mean_token_accuracy: float | None
    valid_loss: float | None
    valid_mean_token_accuracy: float | None
    full_valid_loss: float | None
    full_valid_mean_token_accuracy: float | None


class Checkpoint(BaseModel):
    """A revision that a request may name by its `fine_tuned_model_checkpoint`."""

    id: str
    object: str = "fine_tuning.job.checkpoint"
    created_at: int
    fine_tuning_job_id: str
    fine_tuned_model_checkpoint: str
    step_number: int
    metrics: Metrics


class Jobs(BaseModel):
    object: str = "list"
    data: list[Job]
    has_more: bool


class Checkpoints(BaseModel):
    object: str = "list"
    data: list[Checkpoint]
    first_id: str | None
    last_id: str | None
    has_more: bool


def fine_tuning_router() -> APIRouter:
    answers = EVERYWHERE | errors(400, 404)
    router = APIRouter(tags=["lorakit"], prefix="/v1/fine_tuning/jobs", responses=answers)
    router.add_api_route("", jobs, methods=["GET"])
    router.add_api_route("/{job}", job, methods=["GET"])
    router.add_api_route("/{job}/checkpoints", checkpoints, methods=["GET"])
    return router


async def jobs(known: Known, after: str | None = None, limit: Page = 20) -> Jobs:
    """The runs, the one that began last first."""
    found = sorted((job_of(known, run) for run in _runs(known)), key=lambda job: (-job.created_at, job.id))
    page, more = _page(found, after, limit)
    return Jobs(data=page, has_more=more)


async def job(known: Known, job: str) -> Job:
    """One run."""
    return job_of(known, _run(known, job))


async def checkpoints(known: Known, job: str, after: str | None = None, limit: Page = 10) -> Checkpoints:
    """What a run has saved, and a request may name: the newest first."""
    run = _run(known, job)
    page, more = _page([_checkpoint(revision) for revision in reversed(_saved(known, run))], after, limit)
    first, last = (page[0].id, page[-1].id) if page else (None, None)
    return Checkpoints(data=page, first_id=first, last_id=last, has_more=more)


def _runs(known: Served) -> list[Run]:
    """Those that a trainer wrote; an adapter by itself is none."""
    return [run for run in known.runs.values() if any(one.kind != "plain" for one in run.revisions.values())]


def _run(known: Served, name: str) -> Run:
    run = known.runs.get(name)
    if run is None or run not in _runs(known):
        raise NotFound(f"there is no run '{name}': GET /v1/fine_tuning/jobs lists them")
    return run


def _saved(known: Served, run: Run) -> list[Revision]:
    """As they finished, each where it finished last."""
    order = {finish.revision: position for position, finish in enumerate(run.finishes)}
    found = [one for one in run.without(known.unusable).values() if one.kind != "plain"]
    return sorted(found, key=lambda one: order.get(one.id, -1))


def job_of(known: Served, run: Run) -> Job:
    """A run as a job."""
    saved = _saved(known, run)
    final = run.select("final", known.unusable)
    default = run.select(None, known.unusable)
    said = {"revisions": str(len(saved)), "follow": "manual" if run.pinned else known.settings.follow}
    said |= {"revision": default.name} if default is not None else {}
    return Job(
        id=run.name,
        created_at=int(min(one.created for one in run.revisions.values())),
        finished_at=int(final.created) if final is not None else None,
        model=known.engine.limits.base,
        fine_tuned_model=run.name if default is not None else None,
        status="succeeded" if final is not None else "running",
        metadata=said,
    )


def _checkpoint(revision: Revision) -> Checkpoint:
    facts = revision.facts
    loss = number(facts.eval_loss)
    accuracy = number(facts.metrics.get("eval_mean_token_accuracy"))
    return Checkpoint(
        id=revision.name,
        created_at=int(revision.created),
        fine_tuning_job_id=revision.run,
        fine_tuned_model_checkpoint=revision.name,
        step_number=facts.step or 0,
        metrics=Metrics(
            step=facts.step,
            train_loss=number(facts.train_loss),
            train_mean_token_accuracy=number(facts.metrics.get("mean_token_accuracy")),
            valid_loss=loss,
            valid_mean_token_accuracy=accuracy,
            full_valid_loss=loss,
            full_valid_mean_token_accuracy=accuracy,
        ),
    )


def _page(found: Sequence[T], after: str | None, limit: int) -> tuple[list[T], bool]:
    """What comes after an id, and whether there is more.

    Raises:
        NotFound: there is no such id.
    """
    begin = 0
    if after is not None:
        ids = [one.id for one in found]  # type: ignore[attr-defined]
        if after not in ids:
            raise NotFound(f"there is nothing of the id '{after}' to go on after")
        begin = ids.index(after) + 1
    return list(found[begin : begin + limit]), len(found) > begin + limit
