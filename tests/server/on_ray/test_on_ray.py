"""`lorakit serve --ray` on a real Ray, with stand-ins for its engines: what Ray makes of it, and of a death.

The same with real engines, and with answers that are looked into, is in `test_real_on_ray`.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from tests.ray_cluster import cluster_here
from tests.server.fake_engine import fingerprint_of, put_checkpoint
from tests.server.on_ray.real import (
    asked_at_once,
    by_replica,
    engines,
    environment,
    replicas_known,
    serving_on_ray,
)
from tests.server.on_ray.stand_in import put_stand_in
from tests.server.real import Server, is_running

pytestmark = pytest.mark.timeout(120)
BUSY = {"prompt": "a"}


@dataclass
class Stood:
    server: Server
    runs: Path


@pytest.fixture(scope="module")
def there(numbers: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stood]:
    folder = tmp_path_factory.mktemp("ray")
    (folder / "runs").mkdir()
    put_checkpoint(folder / "runs" / "sql", 10, 1)
    flags = ("--replicas", "2", "--watch", str(folder / "runs"), "--max-loras", "2", "--max-ongoing-requests", "4")
    with serving_on_ray(numbers, folder, *flags, before=put_stand_in(folder / "before"), limit=60) as server:
        server.wait_until(lambda: len(replicas_known(server)) == 2, 30)
        yield Stood(server, folder / "runs")


def test_a_name_means_the_same_in_both_replicas_as_soon_as_it_has_moved(there: Stood) -> None:
    server = there.server
    for step in (20, 30):
        folder = put_checkpoint(there.runs / "sql", step, step)
        revision = server.wait_until(lambda step=step: _at(server, "sql", step))
        moved, seen = time.monotonic(), set[str]()
        while len(seen) < 2 and time.monotonic() < moved + 20:
            answers = asked_at_once(server, {**BUSY, "model": "sql"}, 16)
            assert {answer.headers["x-lorakit-revision"] for answer in answers} == {revision}
            assert {answer.json()["choices"][0]["text"] for answer in answers} == {fingerprint_of(folder)}
            seen |= set(by_replica(answers))
        assert len(seen) == 2


@pytest.mark.slow
def test_a_replica_that_is_killed_is_replaced_and_has_what_names_mean_without_a_hand(there: Stood) -> None:
    server = there.server
    before, ours = replicas_known(server), engines(server)
    revision = server.adapter("sql")["revision"]
    killed, orphan = next(iter(ours.items()))
    os.kill(killed, signal.SIGKILL)
    for _ in range(20):
        answers = asked_at_once(server, {**BUSY, "model": "sql"}, 4)
        assert {answer.status_code for answer in answers} == {200}
        assert {answer.headers["x-lorakit-revision"] for answer in answers} == {revision}
    server.wait_until(lambda: not is_running(orphan), 10)
    server.wait_until(lambda: len(replicas_known(server) - before) == 1, 60)
    (new,) = replicas_known(server) - before
    server.wait_until(lambda: adapters_of(server, new) > 0, 20)


@pytest.mark.slow
def test_on_a_cluster_that_runs_already_it_comes_and_goes_as_one_application(
    numbers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "runs").mkdir()
    folder = put_checkpoint(tmp_path / "runs" / "sql", 10, 1)
    before = put_stand_in(tmp_path / "before")
    monkeypatch.setenv("PYTHONPATH", environment(before)["PYTHONPATH"])  # of the cluster's processes
    with cluster_here() as address:
        flags = ("--watch", str(tmp_path / "runs"), "--max-loras", "2")
        with serving_on_ray(numbers, tmp_path, *flags, ray=f"--ray={address}", before=before, limit=90) as server:
            server.wait_until(lambda: _at(server, "sql", 10))
            (answer,) = asked_at_once(server, {**BUSY, "model": "sql"}, 1)
            assert answer.json()["choices"][0]["text"] == fingerprint_of(folder)
        with pytest.raises(httpx.TransportError), server.client() as client:
            client.get("/ready")


def adapters_of(server: Server, replica: str) -> int:
    with server.client() as client:
        return int(client.get("/metrics").text.partition(f'stand_in_adapters{{replica="{replica}"}} ')[2].split()[0])


def _at(server: Server, run: str, step: int) -> str | None:
    name = server.adapter(run)["revision"]
    return str(name) if name and name.startswith(f"{run}@step-{step}-") else None
