"""Adapters that are served, compared over HTTP as `lorakit compare` does it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from lorakit.store.keys import Allowance, KeyStore
from tests.folders import linear_modules
from tests.server.fake_engine import put_checkpoint, serving

pytestmark = pytest.mark.anyio


def dense(folder: Path) -> np.ndarray:
    """All deltas of an adapter, end to end, in float64."""
    tensors = load_file(folder / "adapter_model.safetensors")
    parts = []
    for module in linear_modules():
        a, b = (tensors[f"base_model.model.{module}.lora_{which}.weight"].astype("float64") for which in "AB")
        parts.append((2.0 * b @ a).ravel())  # lora_alpha is twice the rank
    return np.concatenate(parts)


async def test_cosines_and_norms_are_those_of_the_deltas(tmp_path: Path, numbers: Path) -> None:
    folders = {name: put_checkpoint(tmp_path / "runs" / name, 100, seed=len(name)) for name in ("sql", "chat", "codes")}
    async with serving(tmp_path, numbers) as served:
        answer = await served.client.get("/v1/comparisons", params={"adapter": [*folders, "sql@step-100"]})
        told = answer.json()
        deltas = [dense(folders[name]) for name in (*folders, "sql")]
        norms = [float(np.linalg.norm(delta)) for delta in deltas]
        assert [one["norm"] for one in told["adapters"]] == pytest.approx(norms)
        wanted = [[float(a @ b) / m / n for b, n in zip(deltas, norms, strict=True)]
                  for a, m in zip(deltas, norms, strict=True)]  # fmt: skip
        assert np.allclose(told["cosines"], wanted)
        assert [one["name"] for one in told["adapters"]] == [*folders, "sql@step-100"]
        assert told["adapters"][0]["revision"].startswith("sql@step-100-")
        assert len(told["pairs"]) == 6
        assert {one["module"] for one in told["pairs"][0]["modules"]} == linear_modules().keys()
        assert str(tmp_path) not in answer.text


async def test_what_can_not_be_compared_is_said(tmp_path: Path, numbers: Path) -> None:
    put_checkpoint(tmp_path / "runs" / "sql", 100)
    async with serving(tmp_path, numbers) as served:

        async def refused(*names: str) -> tuple[int, str]:
            answer = await served.client.get("/v1/comparisons", params={"adapter": names})
            return answer.status_code, answer.json()["error"]["message"]

        assert (await refused())[0] == 400
        assert (await refused("sql"))[0] == 400
        assert (await refused(*["sql"] * 9))[0] == 400
        status, said = await refused("sql", "numbers")
        assert (status, "is the base" in said) == (400, True)
        status, said = await refused("sql", "nobody")
        assert (status, "does not exist" in said) == (404, True)


async def test_a_key_compares_its_own_alone_and_learns_what_it_may(tmp_path: Path, numbers: Path) -> None:
    for name in ("sql", "sql2", "chat"):
        put_checkpoint(tmp_path / "runs" / name, 100, seed=len(name))
    keys = KeyStore(tmp_path / "home")
    mine, kept = keys.create(Allowance(adapters=("sql*",), base=False))
    whole, _ = keys.create(Allowance(admin=True))
    keys.close()
    async with serving(tmp_path, numbers) as served:

        async def ask(key: str, *names: str) -> int:
            headers = {"Authorization": f"Bearer {key}"}
            return (await served.client.get("/v1/comparisons", params={"adapter": names}, headers=headers)).status_code

        assert await ask(mine, "sql", "sql2") == 200
        assert await ask(mine, "sql", "chat") == await ask(mine, "sql", "nobody") == 404
        assert await ask(whole, "sql", "chat") == 200
        assert await ask("", "sql", "chat") == 401
        told = (await served.client.get("/v1/key", headers={"Authorization": f"Bearer {mine}"})).json()
        assert told == {
            "object": "key", "id": kept.id, "adapters": ["sql*"], "base": False, "admin": False, "all": False,
            "rate": None, "tokens": None,
        }  # fmt: skip
        told = (await served.client.get("/v1/key", headers={"Authorization": f"Bearer {whole}"})).json()
        assert (told["admin"], told["all"]) == (True, True)


async def test_without_keys_whoever_asks_may_do_all(tmp_path: Path, numbers: Path) -> None:
    async with serving(tmp_path, numbers) as served:
        told = (await served.client.get("/v1/key")).json()
        assert (told["id"], told["adapters"], told["admin"], told["all"]) == (None, ["*"], True, True)
