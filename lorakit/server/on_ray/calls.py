"""Calls from the gateway to a replica through Ray Serve, which chooses it: by the adapter's id, or the least busy."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any

from ray.exceptions import ActorDiedError, RayError, RayTaskError, TaskCancelledError
from ray.serve.exceptions import BackPressureError
from ray.serve.handle import DeploymentHandle

from lorakit.server.following.residency import NoSlot
from lorakit.server.on_ray.engine import ReplicaDied
from lorakit.server.on_ray.hosted import Piece
from lorakit.server.on_ray.messages import Adapter, Described, Outcome, Question


class RayReplicas:
    """`Replicas` over the handle of the deployment."""

    def __init__(self, handle: DeploymentHandle[Any]) -> None:
        self._handle = handle

    async def describe(self) -> Described:
        """What an engine is; it waits for the first."""
        found: Described = await self._handle.describe.remote()
        return found

    async def answer(self, question: Question, adapter: Adapter | None, wait: float) -> AsyncGenerator[Piece, None]:
        handle = self._handle.options(multiplexed_model_id=adapter.id if adapter else "", stream=True)
        response = handle.answer.remote(question, adapter, wait)
        ended = False
        try:
            async for pieces in response:
                yield pieces
            ended = True
        except BackPressureError as error:
            raise NoSlot(str(error)) from None
        except RayError as error:
            ended = True
            raise _died(error) from error
        finally:
            if not ended:
                response.cancel()

    async def call(
        self, method: str, path: str, body: Any, adapter: Adapter | None, wait: float
    ) -> tuple[int, bytes] | Outcome:
        handle = self._handle.options(multiplexed_model_id=adapter.id if adapter else "")
        try:
            found: tuple[int, bytes] | Outcome = await handle.call.remote(method, path, body, adapter, wait)
        except BackPressureError as error:
            raise NoSlot(str(error)) from None
        except RayError as error:
            raise _died(error) from error
        return found


def _died(error: Exception) -> Exception:
    """What to raise for an error of Ray's: what a replica itself raises says nothing of its process. All others mean
    that its answer is lost."""
    for one in (error, getattr(error, "cause", None)):
        if isinstance(one, RayError) and not isinstance(one, RayTaskError | TaskCancelledError):
            return ReplicaDied(getattr(one, "actor_id", None) if isinstance(one, ActorDiedError) else None)
    return error
