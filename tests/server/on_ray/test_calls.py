"""What becomes of Ray's own errors: a lost answer is asked for elsewhere, and what a replica says is passed on."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.server.on_ray.real import environment

ASKS = """
import asyncio, json
from ray import exceptions as known
from lorakit.server.on_ray.calls import RayReplicas
from lorakit.server.on_ray.messages import Question

class Handle:
    def __init__(self, error):
        self.error = error
        self.call = self.answer = self

    def options(self, **_):
        return self

    def remote(self, *_):
        return self._answer() if self.streams else self._call()

    async def _call(self):
        raise self.error

    async def _answer(self):
        raise self.error
        yield

async def said(error):
    handle, found = Handle(error), []
    for handle.streams in (False, True):
        try:
            if handle.streams:
                async for _ in RayReplicas(handle).answer(Question("GET", "/", b"", (), b""), None, 1.0): pass
            else:
                await RayReplicas(handle).call("GET", "/", None, None, 1.0)
        except Exception as error:
            found.append(type(error).__name__)
    return found

errors = {
    "lost": known.ObjectLostError("ab", None, ""), "owner": known.OwnerDiedError("ab", None, ""),
    "actor": known.ActorDiedError(), "cancelled": known.TaskCancelledError(),
    "own": known.RayTaskError("answer", "", ValueError("wrong")),
    "within": known.RayTaskError("answer", "", known.ActorDiedError()),
}
print(json.dumps({name: asyncio.run(said(error)) for name, error in errors.items()}))
"""


@pytest.mark.timeout(90)
def test_an_answer_that_is_lost_counts_as_a_replica_that_is_gone() -> None:
    ended = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", ASKS], text=True, capture_output=True, env=environment(), timeout=80,
        check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    found = json.loads(ended.stdout)
    for name in ("lost", "owner", "actor", "within"):
        assert found[name] == ["ReplicaDied"] * 2, name
    assert found["cancelled"] == ["TaskCancelledError"] * 2
    assert found["own"] == ["RayTaskError"] * 2
