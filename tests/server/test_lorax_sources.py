"""Adapters that LoRAX's clients name where they lie."""

from __future__ import annotations

import asyncio
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorakit.errors import Refused
from lorakit.server.access import keyring
from lorakit.server.dialects.lorax.fetched import allowed
from lorakit.server.dialects.lorax.request import MergedAdapters
from lorakit.server.dialects.lorax.sources import as_mix, name_of
from lorakit.server.mixes.text import parse_mix
from lorakit.server.settings import Settings
from lorakit.store.keys import Allowance, KeyStore
from lorakit.store.names import check_name
from tests.bucket import SERVICES, client, environment, s3_server
from tests.cli.commands import lorakit
from tests.hub import Hub
from tests.server.fake_engine import fingerprint_of, put_adapter, put_checkpoint
from tests.server.test_lorax_routes import fingerprint, generate, speaking

pytestmark = pytest.mark.anyio


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """One adapter of an owner's, and one of another's."""
    serving = Hub(
        {f"{owner}/sql": put_adapter(tmp_path / "hub" / owner, seed) for owner, seed in (("us", 7), ("other", 8))}
    )
    serving.point_there(monkeypatch, tmp_path / "cache")
    yield serving
    serving.close()


async def test_an_adapter_on_the_hub_is_fetched_once_and_only_from_where_it_may(
    tmp_path: Path, numbers: Path, hub: Hub
) -> None:
    async with speaking(tmp_path, numbers, allow_sources=("hf://us/",)) as served:

        async def ask(id: str = "us/sql", **more: Any) -> Any:
            return await generate(served, adapter_id=id, adapter_source="hub", max_new_tokens=4, **more)

        answers = await asyncio.gather(*(ask(api_token="hf_secret") for _ in range(4)))
        assert {answer.json()["generated_text"] for answer in answers} == {fingerprint_of(tmp_path / "hub" / "us")[:4]}
        assert {answer.headers["x-adapter-id"] for answer in answers} == {"us/sql"}
        shutil.rmtree(tmp_path / "hub" / "us")
        assert (await ask()).status_code == 200
        hub.log.clear()
        for wrong in (
            "other/sql",
            "us/nothing",
            "us",
            "us/../other/sql",
            "us/sql/../../other",
            "../us/sql",
            "us/sql@../x",
        ):
            answer = await ask(wrong)
            assert (answer.status_code, answer.json()["error_type"]) == (422, "validation"), wrong
        assert hub.log == []
        assert not any("hf_secret" in token for token in hub.tokens)
        assert not list((tmp_path / "home" / "tmp").glob("source-*"))
        assert "--allow-source hf://other/" in (await ask("other/sql")).json()["error"]


@pytest.mark.parametrize("limit", [{"max_source": 0}, {"source_timeout": 0.0}])
async def test_what_is_too_large_or_takes_too_long_is_not_kept(
    tmp_path: Path, numbers: Path, hub: Hub, limit: dict[str, Any]
) -> None:
    async with speaking(tmp_path, numbers, allow_sources=("hf://us/sql",), **limit) as served:
        answer = await generate(served, adapter_id="us/sql", adapter_source="hub")
        assert (answer.status_code, answer.json()["error_type"]) == (422, "validation")
        assert list(served.reconciler.runs) == ["sql"]
        assert not list((tmp_path / "home" / "tmp").glob("source-*"))


@pytest.mark.slow
async def test_an_adapter_in_a_bucket_is_fetched_from_there(
    tmp_path: Path, numbers: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path, str(SERVICES)])
    folder = put_adapter(tmp_path / "there", 7)
    with s3_server() as address:
        for name, value in environment(address).items():
            monkeypatch.setenv(name, value)
        with client(address) as s3:
            for file in folder.iterdir():
                s3.put_object(Bucket="models", Key=f"ours/sql/{file.name}", Body=file.read_bytes())
            async with speaking(tmp_path, numbers, allow_sources=("s3://models/ours",)) as served:
                asked: dict[str, Any] = {"adapter_source": "s3", "max_new_tokens": 4}
                answer = await generate(served, adapter_id="s3://models/ours/sql", **asked)
                assert answer.json()["generated_text"] == fingerprint_of(folder)[:4]
                assert (await generate(served, adapter_id="s3://models/ours/none", **asked)).status_code == 422
        import s3fs

        s3fs.S3FileSystem.clear_instance_cache()


@pytest.mark.parametrize(
    ("source", "id", "is_allowed"),
    [
        ("s3", "s3://models/sql", True), ("s3", "s3://models/sql/deep/", True), ("s3", "s3://models/sqlite", False),
        ("s3", "s3://other/sql", False), ("s3", "s3://models/sql/../chat", False), ("s3", "s3://models/sql//x", False),
        ("s3", "models/sql", False), ("s3", "gs://models/sql", False), ("s3", "https://models/sql", False),
        ("s3", "/models/sql", False), ("s3", "hf://us/sql", False), ("s3", "s3://", False), ("s3", "", False),
        ("s3", "s3://user:secret@models/sql", True), ("hub", "us/sql", True), ("hub", "us/sql@v2", True),
        ("hub", "s3://models/sql", False), ("pbase", "us/sql", False), ("hub", "us/sql?x=1", False),
    ],
)  # fmt: skip
def test_only_what_lies_under_an_allowed_address_is_fetched(source: str, id: str, is_allowed: bool) -> None:
    def found() -> str:
        return allowed(source, id, ("s3://models/sql/", "hf://us/")).shown

    if is_allowed:
        assert found().startswith(("s3://models/sql", "hf://us/sql"))
    else:
        with pytest.raises(Refused) as caught:
            found()
        assert "secret" not in str(caught.value)


async def test_a_key_that_may_not_load_brings_in_nothing_and_learns_of_no_folder(
    tmp_path: Path, numbers: Path, monkeypatch: pytest.MonkeyPatch, hub: Hub
) -> None:
    monkeypatch.setattr(keyring, "LOOK", 0.02)
    shelf = put_adapter(tmp_path / "shelf" / "mine", 7).parent
    keys = KeyStore(tmp_path / "home")
    (plain, _), (admin, _) = keys.create(Allowance(("sql*",))), keys.create(Allowance(("sql*", "mine*"), admin=True))
    async with speaking(tmp_path, numbers, roots=(str(shelf),), allow_sources=("hf://us/",)) as served:

        async def ask(key: str, id: str, source: str | None = None) -> Any:
            served.client.headers["authorization"] = f"Bearer {key}"
            return await generate(served, adapter_id=id, adapter_source=source, max_new_tokens=4)

        assert (await ask(plain, "sql")).json()["generated_text"] == fingerprint(tmp_path)[:4]
        told = [(await ask(plain, f"{shelf}/{name}", "local")).json() for name in ("mine", "none")]
        assert told[0]["error"].replace("mine", "none") == told[1]["error"]
        assert (await ask(plain, "us/sql", "hub")).status_code == 422
        assert list(served.reconciler.runs) == ["sql"]
        watched = str(tmp_path / "runs" / "sql" / "checkpoint-500")
        assert (await ask(plain, watched, "local")).json()["generated_text"] == fingerprint(tmp_path)[:4]
        assert (await ask(admin, f"{shelf}/mine", "local")).status_code == 200
        assert (await ask(plain, f"{shelf}/mine", "local")).status_code == 422  # it is there now, and not this key's
        assert (await ask(admin, "us/sql", "hub")).status_code == 200
        other = put_adapter(shelf / "other", 9)
        assert (await ask(admin, str(other), "local")).status_code == 422  # of a name that would not be its own
    keys.close()


@given(st.text())
def test_whatever_lies_anywhere_gets_a_name_of_its_own(place: str) -> None:
    check_name(name_of(place))
    assert name_of(place) != name_of(f"{place}x")


names = st.text(st.characters(codec="ascii"), max_size=12)


@given(st.lists(names, min_size=1, max_size=4), st.sampled_from(["linear", "ties", "dare_linear", "dare_ties"]))
def test_a_merge_is_the_mix_of_just_these_adapters_or_refused(ids: list[str], strategy: Any) -> None:
    merged = MergedAdapters(ids=ids, weights=[1.0] * len(ids), merge_strategy=strategy, density=0.5)
    try:
        read = parse_mix(str(as_mix(merged, ids)))
    except Refused:
        return
    assert dict(read.adapters) == {id: float(ids.count(id)) for id in ids}
    assert read.method == strategy


async def test_lorax_own_arithmetic_is_the_servers_to_choose(tmp_path: Path, numbers: Path) -> None:
    put_checkpoint(tmp_path / "runs" / "chat", 1)
    merged: dict[str, Any] = {"ids": ["sql", "chat"], "weights": [0.7, 0.3], "density": 0.5}
    async with speaking(tmp_path, numbers, lorax_arithmetic=True) as served:
        for strategy in ("linear", "ties", "dare_linear", "dare_ties"):
            asked = {**merged, "merge_strategy": strategy}
            answer = await generate(served, merged_adapters=asked, max_new_tokens=3)
            assert answer.status_code == 200, answer.text
            options = "" if strategy == "linear" else ",density=0.5"
            mix = f"mix(sql=0.7,chat=0.3,method=lorax:{strategy}{options})"
            assert answer.headers["x-lorakit-revision"] == await served.revision_of(mix)
            assert answer.headers["x-lorakit-mix-error"] == "0"  # its rank is theirs, so nothing is cut


def test_an_address_that_nothing_can_lie_under_is_refused_before_anything_starts(
    capsys: pytest.CaptureFixture[str], numbers: Path
) -> None:
    for address in ("https://files.test/", "us/sql", "s3:models"):
        assert lorakit(capsys, "serve", numbers, "--dry-run", "--allow-source", address).code == 2
    good = ("--allow-source", "hf://us/", "--allow-source", "s3://models/sql/", "--lorax-arithmetic")
    assert lorakit(capsys, "serve", numbers, "--dry-run", *good).code == 0


def test_a_server_that_fetches_from_the_hub_may_ask_it() -> None:
    """vLLM is started offline where its base is a folder, and the gateway is in its process."""
    assert Settings(allow_sources=("hf://us/",)).asks_hub
    assert not Settings(allow_sources=("s3://models/sql/",)).asks_hub
