"""Mixes by what they are made of and by name, over an engine that answers with the digest of the weights it has."""

from __future__ import annotations

import asyncio
import json
import shutil
import threading
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from lorakit.mix.lineage import lineage_of
from lorakit.server.mixes import kept as module
from lorakit.store.store import open_store
from tests.folders import factors, linear_modules
from tests.server.fake_engine import (
    WEIGHTS,
    FakeEngine,
    Served,
    fingerprint_of,
    overwrite,
    put_adapter,
    put_checkpoint,
    serving,
)

pytestmark = pytest.mark.anyio


def put_two(folder: Path, **ranks: int) -> tuple[Path, Path]:
    """The runs sql and chat."""
    return (
        put_checkpoint(folder / "runs" / "sql", 500, 1, eval_loss=0.5, rank=ranks.get("sql", 2)),
        put_checkpoint(folder / "runs" / "chat", 100, 2, eval_loss=0.5, rank=ranks.get("chat", 3)),
    )


def dense(folder: Path) -> dict[str, np.ndarray[Any, Any]]:
    """alpha/r · B A of every module, in float64."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = {name: value.astype("float64") for name, value in load_file(folder / WEIGHTS).items()}
    found = {}
    for name, a in tensors.items():
        path, _, _ = name.removeprefix("base_model.model.").partition(".lora_")
        if not name.endswith(("lora_A.weight", "lora_embedding_A")):
            continue
        suffixes = [key for key in config.get("rank_pattern", {}) if path.endswith(key)]
        rank = config["rank_pattern"][suffixes[0]] if suffixes else config["r"]
        product = tensors[name.replace("_A", "_B")] @ a
        found[path] = config["lora_alpha"] / rank * (product.T if "embedding" in name else product)
    return found


def weighted_sum(*parts: tuple[Path, float]) -> dict[str, np.ndarray[Any, Any]]:
    total: dict[str, Any] = {}
    for folder, weight in parts:
        for name, delta in dense(folder).items():
            total[name] = total.get(name, 0.0) + weight * delta
    return total


def folder_of(served: Served, answer: httpx.Response) -> Path:
    """Where the mix lies that answered."""
    revision = served.reconciler.resolve(answer.headers["x-lorakit-revision"])
    assert revision is not None
    assert answer.status_code == 200
    assert answer.json()["model"] == revision.name
    assert answer.json()["choices"][0]["text"] == fingerprint_of(revision.folder)
    return revision.folder


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    for name, delta in found.items():
        np.testing.assert_allclose(delta, expected[name], rtol=1e-5, atol=1e-5)


def assert_refused(answer: httpx.Response, status: int, *words: str) -> None:
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert error["code"] == status
    for word in words:
        assert word in error["message"]


def mixes_in(folder: Path) -> int:
    return len([path for path in (folder / "home" / "revisions").iterdir() if "mix" in _operation(path)])


def _operation(folder: Path) -> str:
    try:
        return str(json.loads((folder / "lorakit.json").read_text())["operation"])
    except FileNotFoundError:  # it is being removed
        return ""


async def name_mix(served: Served, name: str, mix: str, **more: Any) -> httpx.Response:
    return await served.client.post("/v1/mixes", json={"name": name, "mix": mix, **more})


# what answers


async def test_a_mix_is_the_weighted_sum_of_what_its_names_mean_now_and_says_which_revision_it_is(
    tmp_path: Path, numbers: Path
) -> None:
    sql, chat = put_two(tmp_path)
    async with serving(tmp_path, numbers) as served:
        answer = await served.ask("mix(sql@best=0.7,chat=0.3)")
        folder = folder_of(served, answer)
        assert_same(dense(folder), weighted_sum((sql, 0.7), (chat, 0.3)))
        assert answer.headers["x-lorakit-mix-error"] == "0"
        assert answer.headers["x-lorakit-revision"] == f"mix@{folder.name[:8]}"
        assert "x-lorakit-mix-error" not in (await served.ask("sql")).headers


@pytest.mark.parametrize("stream", [False, True])
async def test_a_stream_names_the_mix_too(tmp_path: Path, numbers: Path, stream: bool) -> None:
    put_two(tmp_path)
    async with serving(tmp_path, numbers) as served:
        answer = await served.ask("mix(sql,chat)", stream=stream)
        assert f'"model":"{answer.headers["x-lorakit-revision"]}"' in answer.text
        assert answer.headers["x-lorakit-mix-error"] == "0"


async def test_the_same_mix_however_its_adapters_are_named_is_made_and_loaded_once(
    tmp_path: Path, numbers: Path
) -> None:
    put_two(tmp_path)
    async with serving(tmp_path, numbers) as served:
        exact = await served.revision_of("sql")
        texts = ["mix(sql=0.5,chat)", "mix(sql@best=0.5,chat@latest=1)", "mix( sql@step-500=.5 , chat@step-100)",
                 f"mix({exact}=0.25,chat=1.0,sql=0.25)"]  # fmt: skip
        names = {await served.revision_of(text) for text in texts}
        (name,) = names
        assert name is not None
        assert served.engine.loads.count(name) == 1
        assert mixes_in(tmp_path) == 1
        assert await served.revision_of(name) == name


async def test_many_who_ask_for_one_mix_at_once_share_one_making(tmp_path: Path, numbers: Path) -> None:
    put_two(tmp_path)
    async with serving(tmp_path, numbers) as served:
        answers = await asyncio.gather(*(served.ask("mix(sql=0.7,chat=0.3)") for _ in range(12)))
        assert len({answer.headers["x-lorakit-revision"] for answer in answers}) == 1
        assert [event.kind for event in served.reconciler.events._kept].count("mixed") == 1


async def test_an_alias_that_moved_makes_another_mix_and_the_first_stays_what_it_was(
    tmp_path: Path, numbers: Path
) -> None:
    _, chat = put_two(tmp_path)
    async with serving(tmp_path, numbers) as served:
        before = await served.revision_of("mix(sql=0.7,chat=0.3)")
        later = put_checkpoint(tmp_path / "runs" / "sql", 1000, 7)
        await served.until(lambda: served.reconciler.resolve("sql").label == "step-1000")
        answer = await served.ask("mix(sql=0.7,chat=0.3)")
        assert answer.headers["x-lorakit-revision"] != before
        assert_same(dense(folder_of(served, answer)), weighted_sum((later, 0.7), (chat, 0.3)))
        assert await served.revision_of("mix(sql@step-500=0.7,chat=0.3)") == before


async def test_unequal_ranks_other_modules_patterns_embeddings_and_repaired_names_mix(
    tmp_path: Path, numbers: Path
) -> None:
    modules = linear_modules()
    attention = {name: shape for name, shape in modules.items() if "q_proj" in name}
    rows = factors({"model.embed_tokens": (8, 16)}, 2, 3)
    rows = {name.replace("lora_A.weight", "lora_embedding_A").replace("lora_B.weight", "lora_embedding_B"): value
            for name, value in rows.items()}  # fmt: skip
    run = tmp_path / "runs"
    parts = [
        (_write(run / "narrow", factors(attention, 1, 4), rank=1), 0.5),
        (_write(run / "wide", factors(modules, 5, 5), rank=5), -0.25),
        (_write(run / "rows", rows, rank=2, target_modules=["embed_tokens"]), 2.0),
        (_patterned(run / "patterned"), 1.5),
        (_write(run / "headless", factors(_without_head(modules), 2, 8), rank=2), 0.5),
    ]
    async with serving(tmp_path, numbers) as served:
        answer = await served.ask("mix(" + ",".join(f"{folder.name}={weight}" for folder, weight in parts) + ")")
        whole = weighted_sum(*parts[:-1])
        for module, delta in dense(parts[-1][0]).items():
            whole[f"model.{module}"] += 0.5 * delta
        assert_same(dense(folder_of(served, answer)), whole)


def _without_head(modules: dict[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
    """As an AutoModel calls them."""
    return {name.removeprefix("model."): shape for name, shape in modules.items()}


def _write(folder: Path, tensors: dict[str, Any], **config: Any) -> Path:
    from tests.folders import write_adapter

    return write_adapter(folder, tensors, **config)


def _patterned(folder: Path) -> Path:
    """Of rank 3, but the down projections of rank 1."""
    modules = linear_modules()
    down = {name: shape for name, shape in modules.items() if "down_proj" in name}
    rest = {name: shape for name, shape in modules.items() if name not in down}
    return _write(folder, factors(rest, 3, 6) | factors(down, 1, 7), rank=3, rank_pattern={"down_proj": 1})


async def test_what_is_cut_to_the_servers_rank_is_the_optimum_and_its_error_is_in_the_header(
    tmp_path: Path, numbers: Path
) -> None:
    sql, chat = put_two(tmp_path)
    async with serving(tmp_path, numbers, engine=FakeEngine(numbers, max_rank=4), max_mix_error=1.0) as served:
        answer = await served.ask("mix(sql=0.7,chat=0.3)")
        whole = weighted_sum((sql, 0.7), (chat, 0.3))
        lost = total = 0.0
        for name, delta in dense(folder_of(served, answer)).items():
            spectrum = np.linalg.svd(whole[name], compute_uv=False)
            assert np.linalg.matrix_rank(delta) <= 4
            assert np.linalg.norm(whole[name] - delta) == pytest.approx(np.linalg.norm(spectrum[4:]), rel=1e-4)
            lost, total = lost + float((spectrum[4:] ** 2).sum()), total + float((spectrum**2).sum())
        assert float(answer.headers["x-lorakit-mix-error"]) == pytest.approx((lost / total) ** 0.5, rel=1e-4)
        assert 0.01 < float(answer.headers["x-lorakit-mix-error"]) < 1


async def test_rank_method_density_and_seed_decide_as_they_do_for_lorakit_mix(tmp_path: Path, numbers: Path) -> None:
    import lorakit

    sql, chat = put_two(tmp_path)
    async with serving(tmp_path, numbers, max_mix_error=1.0) as served:
        said = "mix(sql=0.7,chat=0.3,method=dare_ties,density=0.6,seed=5,rank=4)"
        found = dense(folder_of(served, await served.ask(said)))
        mixed = lorakit.mix([(sql, 0.7), (chat, 0.3)], "dare_ties", 4, density=0.6, seed=5)
        assert_same(found, dense(mixed.save(tmp_path / "by-hand")))
        other = await served.revision_of("mix(sql=0.7,chat=0.3,method=dare_ties,density=0.6,seed=6,rank=4)")
        assert other != (await served.ask(said)).headers["x-lorakit-revision"]


# what is refused


REFUSED: list[tuple[str, int, list[str]]] = [
    ("mix(", 400, ["no end", "mix(sql@best=0.7,chat=0.3)"]),
    ("mix()", 400, ["empty place"]),
    ("mix(sql=x)", 400, ["finite number"]),
    ("mix(sql,mix(chat))", 400, ["made of adapters, not of mixes"]),
    ("mix(sql,method=sum)", 400, ["no method 'sum'"]),
    ("mix(sql,numbers=0.5)", 400, ["'numbers'", "is the base"]),
    ("mix(sql,nobody)", 404, ["`nobody` does not exist"]),
    ("mix(sql@step-7)", 404, ["`sql@step-7` does not exist"]),
    ("mix(sql,\ud800)", 404, ["does not exist"]),
    ("mix(sql,../chat)", 404, ["does not exist"]),
    ("mix(sql=1e300,chat=1e300)", 422, ["can't be made", "smaller weights"]),
    ("mix(sql=1e308,sql=1e308)", 422, ["can't be made"]),
    ("mix(sql,more,chat,method=slerp)", 422, ["can't be made"]),
    ("mix(sql,chat,method=ties,density=0.2)", 422, ["would lose", "--max-mix-error"]),
]


async def test_a_mix_that_can_not_be_served_is_refused_in_words_and_nothing_is_kept_of_it(
    tmp_path: Path, numbers: Path
) -> None:
    put_two(tmp_path)
    put_checkpoint(tmp_path / "runs" / "more", 1, 9)
    async with serving(tmp_path, numbers, engine=FakeEngine(numbers, max_rank=6), max_mix_error=0.01) as served:
        for model, status, words in REFUSED * 2:
            for path in ("/v1/completions", "/v1/chat/completions"):
                answer = await served.client.post(path, content=json.dumps({"model": model}))
                assert_refused(answer, status, *words)
            name = quote(model.encode(errors="replace").decode(), safe="")
            assert (await served.client.get(f"/v1/models/{name}")).status_code == 404
        assert not mixes_in(tmp_path)
        assert not list((tmp_path / "home" / "tmp").iterdir())


WORDS = (
    "sql",
    "chat",
    "@",
    "best",
    "=",
    "0.5",
    "-1e9",
    ",",
    "mix(",
    ")",
    "rank",
    "method",
    "ties",
    "seed",
    "density",
    " ",
)


@settings(max_examples=4)
@given(inner=st.lists(st.lists(st.sampled_from(WORDS), max_size=12).map("".join), min_size=40, max_size=40))
def test_no_text_of_a_mix_makes_the_gateway_fail(tmp_path: Path, numbers: Path, inner: list[str]) -> None:
    async def play() -> None:
        async with serving(tmp_path, numbers) as served:
            for text in inner:
                for model in (f"mix({text}", f"mix({text})"):
                    assert (await served.ask(model)).status_code in (200, 400, 404, 422), model

    if not (tmp_path / "runs").exists():
        put_two(tmp_path)
    asyncio.run(play())


async def test_what_would_lose_too_much_is_refused_with_the_rank_that_it_needs(tmp_path: Path, numbers: Path) -> None:
    put_two(tmp_path, sql=4, chat=4)
    async with serving(tmp_path, numbers, engine=FakeEngine(numbers, max_rank=4)) as served:
        refused = await served.ask("mix(sql=0.7,chat=0.3)")
        assert_refused(refused, 422, "of its norm at rank 4", "lose 0.1", "--max-lora-rank 8, where it is exact")
        assert_refused(await served.ask("mix(sql,chat,rank=2)"), 422, "ask for a larger rank", "takes 4")
        assert_refused(await served.ask("mix(sql,chat,rank=exact)"), 422, "has rank 8", "takes 4")
        assert_refused(await served.ask("mix(sql,chat,method=ties)"), 422, "a larger --max-lora-rank")
        assert (await served.ask("mix(sql,sql@best,rank=exact)")).status_code == 200


async def test_a_refusal_is_remembered_so_that_asking_again_costs_nothing(
    tmp_path: Path, numbers: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_two(tmp_path, sql=4, chat=4)
    made = []
    write = module.write_mix
    monkeypatch.setattr(module, "write_mix", lambda *given, **more: made.append(1) or write(*given, **more))
    async with serving(tmp_path, numbers, engine=FakeEngine(numbers, max_rank=4)) as served:
        for _ in range(3):
            assert_refused(await served.ask("mix(sql,chat)"), 422, "would lose")
        assert len(made) == 1


async def test_what_the_engine_refuses_is_refused_with_its_reason(tmp_path: Path, numbers: Path) -> None:
    put_two(tmp_path)
    async with serving(tmp_path, numbers) as served:
        folder = folder_of(served, await served.ask("mix(sql,chat)"))
        await served.reconciler.residency.leave(f"mix@{folder.name[:8]}")
        served.engine.broken.add(fingerprint_of(folder))
        for model in ("mix(sql,chat)", "mix(sql@best,chat@best)"):
            assert_refused(await served.ask(model), 422, "refused by the engine", "nan")
        assert_refused(await served.ask(f"mix@{folder.name[:8]}"), 404, "refused by the engine")


async def test_a_disk_that_takes_no_more_is_503_and_the_next_try_succeeds(
    tmp_path: Path, numbers: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_two(tmp_path)
    async with serving(tmp_path, numbers) as served:
        with monkeypatch.context() as broken:
            broken.setattr(served.reconciler.mixes.store, "keep", _full)
            refused = await served.ask("mix(sql,chat)")
            assert_refused(refused, 503, "no space left")
            assert refused.headers["retry-after"]
        assert (await served.ask("mix(sql,chat)")).status_code == 200


def _full(*_: Any, **__: Any) -> None:
    raise OSError(28, "No space left on device")


async def test_a_parent_whose_files_went_away_is_404(tmp_path: Path, numbers: Path) -> None:
    put_two(tmp_path)
    async with serving(tmp_path, numbers) as served:
        folder = served.reconciler.resolve("sql").folder
        folder.chmod(0o755)
        shutil.rmtree(folder)
        assert_refused(await served.ask("mix(sql,chat)"), 404, "was removed")


# limits


async def test_unnamed_mixes_make_room_for_one_another_the_least_recently_asked_for_first(
    tmp_path: Path, numbers: Path
) -> None:
    put_two(tmp_path)
    async with serving(tmp_path, numbers, mixes_kept=3) as served:
        first, second, third = [await served.revision_of(f"mix(sql={weight},chat)") for weight in (1, 2, 3)]
        assert await served.revision_of("mix(sql=1,chat)") == first
        fourth = await served.revision_of("mix(sql=4,chat)")
        await served.until(lambda: mixes_in(tmp_path) == 3)
        for name, there in ((first, True), (second, False), (third, True), (fourth, True)):
            assert (await served.ask(name)).status_code == (200 if there else 404)
        assert second not in served.reconciler.residency.names
        again = await served.ask("mix(sql=2,chat)")
        assert again.headers["x-lorakit-revision"] == second
        assert again.json()["choices"][0]["text"] == fingerprint_of(folder_of(served, again))


async def test_they_may_take_so_many_bytes_and_no_more(tmp_path: Path, numbers: Path) -> None:
    put_two(tmp_path)
    async with serving(tmp_path, numbers) as served:
        await served.ask("mix(sql=1,chat)")
        (size,) = (revision.size for revision in served.reconciler.mixes.revisions())
    async with serving(tmp_path, numbers, mix_bytes=int(2.5 * size)) as served:
        for weight in range(2, 7):
            assert (await served.ask(f"mix(sql={weight},chat)")).status_code == 200
        await served.until(lambda: mixes_in(tmp_path) == 2)


async def test_a_mix_in_use_is_never_let_go(tmp_path: Path, numbers: Path) -> None:
    put_two(tmp_path)
    async with serving(tmp_path, numbers, mixes_kept=1) as served:
        held = asyncio.create_task(served.ask("mix(sql=1,chat)", hold="x"))
        await served.until(lambda: any(request.get("hold") for request in served.engine.asked))
        for weight in (2, 3, 4):
            assert (await served.ask(f"mix(sql={weight},chat)")).status_code == 200
        assert len(served.reconciler.mixes.revisions()) == 2
        served.engine.gate("x").set()
        answer = await held
        assert answer.json()["choices"][0]["text"] == fingerprint_of(folder_of(served, answer))


async def test_more_mixes_than_slots_and_than_are_kept_all_answer_right_at_once(tmp_path: Path, numbers: Path) -> None:
    put_two(tmp_path)
    async with serving(tmp_path, numbers, slots=2, mixes_kept=3) as served:
        asked = [f"mix(sql={weight},chat)" for weight in range(1, 9)] * 3
        answers = await asyncio.gather(*(served.ask(model) for model in asked))
        names: dict[str, set[str]] = {}
        for model, answer in zip(asked, answers, strict=True):
            assert answer.status_code == 200, answer.text
            names.setdefault(model, set()).add(answer.json()["choices"][0]["text"])
        assert all(len(texts) == 1 for texts in names.values())
        assert len({text for texts in names.values() for text in texts}) == 8
        await served.until(lambda: mixes_in(tmp_path) <= 3)


async def test_a_mix_that_is_asked_for_again_while_it_is_let_go_is_whole(
    tmp_path: Path, numbers: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_two(tmp_path)
    async with serving(tmp_path, numbers, mixes_kept=1) as served:
        store, gate = served.reconciler.mixes.store, threading.Event()
        first = await served.revision_of("mix(sql=1,chat)")
        forget = store.forget

        def late(revision: Any) -> None:
            gate.wait(60)
            forget(revision)

        monkeypatch.setattr(store, "forget", late)
        await served.ask("mix(sql=2,chat)")
        assert served.reconciler.mixes._clearing
        again = asyncio.create_task(served.ask("mix(sql=1,chat)"))
        await asyncio.sleep(0.1)
        gate.set()
        answer = await again
        assert answer.headers["x-lorakit-revision"] == first
        folder = folder_of(served, answer)
        await served.until(lambda: not served.reconciler.mixes._clearing)
        assert store.is_there(served.reconciler.resolve(str(first)))
        assert (folder / WEIGHTS).is_file()


async def test_only_so_many_are_made_at_once_and_the_others_wait_or_are_503(
    tmp_path: Path, numbers: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_two(tmp_path)
    monkeypatch.setattr(module, "MOST_MAKINGS", 4)
    async with serving(tmp_path, numbers, mixes_at_once=2) as served:
        working, most, gate = 0, 0, threading.Event()
        write = module.write_mix

        def slowly(*given: Any, **more: Any) -> Any:
            nonlocal working, most
            working += 1
            most = max(most, working)
            gate.wait(60)
            made = write(*given, **more)
            working -= 1
            return made

        monkeypatch.setattr(module, "write_mix", slowly)
        asked = [asyncio.create_task(served.ask(f"mix(sql={weight},chat)")) for weight in range(4)]
        await served.until(lambda: len(served.reconciler.mixes._makings) == 4 and working == 2)
        assert_refused(await served.ask("mix(sql=9,chat)"), 503, "4 mixes are being made already")
        assert served.reconciler.is_busy(served.reconciler.resolve("chat"))  # so that nothing takes it away meanwhile
        gate.set()
        assert [answer.status_code for answer in await asyncio.gather(*asked)] == [200] * 4
        assert most == 2
        assert not served.reconciler.is_busy(served.reconciler.resolve("chat"))


async def test_a_client_that_leaves_while_its_mix_is_made_does_not_end_it_for_the_others(
    tmp_path: Path, numbers: Path
) -> None:
    put_two(tmp_path)
    async with serving(tmp_path, numbers) as served:
        first = asyncio.create_task(served.reconciler.mixes.revision_for("mix(sql,chat)"))
        second = asyncio.create_task(served.reconciler.mixes.revision_for("mix(sql,chat)"))
        await asyncio.sleep(0)
        first.cancel()
        assert (await second).kind == "mix"
        assert first.cancelled()


# in the store


async def test_a_mix_is_a_revision_of_the_store_with_its_parents_and_is_there_after_a_restart(
    tmp_path: Path, numbers: Path
) -> None:
    put_two(tmp_path)
    async with serving(tmp_path, numbers) as served:
        answer = await served.ask("mix(sql@best=0.7,chat=0.3)")
        name, folder = answer.headers["x-lorakit-revision"], folder_of(served, answer)
        parents = {await served.revision_of("sql"): 0.7, await served.revision_of("chat"): 0.3}
        base = served.reconciler.store.base
    lineage = lineage_of(folder)
    assert (lineage.operation, lineage.error, lineage.rank) == ("mix", 0.0, 5)
    assert [(parent.state, parent.weight) for parent in lineage.parents] == [("there", 0.7), ("there", 0.3)]
    said = json.loads((folder / "lorakit.json").read_text())["parents"]
    assert {parent["revision"]: parent["weight"] for parent in said} == parents
    with open_store(tmp_path / "home", base) as store:
        (stored,) = store.runs()["mix"].revisions.values()
    assert (stored.name, stored.kind, stored.rank) == (name, "mix", 5)
    async with serving(tmp_path, numbers) as served:
        assert await served.revision_of(name) == name
        again = await served.ask("mix(sql@best=0.7,chat=0.3)")
        assert again.headers["x-lorakit-revision"] == name
        assert again.headers["x-lorakit-mix-error"] == "0"
        assert "mixed" not in {event.kind for event in served.reconciler.events._kept}


async def test_a_mix_that_another_process_removed_is_made_again(tmp_path: Path, numbers: Path) -> None:
    put_two(tmp_path)
    async with serving(tmp_path, numbers) as served:
        folder = folder_of(served, await served.ask("mix(sql,chat)"))
        await served.reconciler.residency.leave(f"mix@{folder.name[:8]}")
        folder.chmod(0o755)
        shutil.rmtree(folder)
        again = await served.ask("mix(sql,chat)")
        assert folder_of(served, again) == folder


async def test_mixes_are_listed_with_the_models_and_are_no_adapters(tmp_path: Path, numbers: Path) -> None:
    put_two(tmp_path)
    async with serving(tmp_path, numbers) as served:
        name = await served.revision_of("mix(sql,chat)")
        await name_mix(served, "assistant", "mix(sql=2,chat)")
        ids = [card["id"] for card in (await served.client.get("/v1/models")).json()["data"]]
        assert {name, "assistant", await served.revision_of("assistant")} <= set(ids)
        for model in (name, "assistant", "mix(sql,chat)", "mix@assistant"):
            found = (await served.client.get(f"/v1/models/{quote(str(model), safe='')}")).json()
            assert found["id"] == model
            assert found["root"].startswith("mix@")
        listed = (await served.client.get("/v1/adapters")).json()["data"]
        assert {adapter["name"] for adapter in listed} == {"sql", "chat"}


# names


async def test_a_name_means_a_mix_and_follows_what_it_is_made_of(tmp_path: Path, numbers: Path) -> None:
    _, chat = put_two(tmp_path)
    async with serving(tmp_path, numbers) as served:
        named = await name_mix(served, "assistant", "mix(sql@best=0.7, chat@best=0.3)", follow=True)
        assert named.status_code == 201, named.text
        before = await served.revision_of("assistant")
        view = named.json()
        assert view["revision"] == before
        assert (view["name"], view["mix"], view["follow"], view["error"], view["state"]) == (
            "assistant", "mix(sql@best=0.7,chat@best=0.3)", True, 0.0, "ready",
        )  # fmt: skip
        put_checkpoint(tmp_path / "runs" / "sql", 1000, 8, eval_loss=0.9)
        await served.until(lambda: served.reconciler.resolve("sql").label == "step-1000")
        assert await served.revision_of("assistant") == before
        better = put_checkpoint(tmp_path / "runs" / "sql", 1500, 9, eval_loss=0.1)

        async def moved() -> bool:
            return await served.revision_of("assistant") != before

        await served.until(moved)
        answer = await served.ask("assistant")
        assert_same(dense(folder_of(served, answer)), weighted_sum((better, 0.7), (chat, 0.3)))
        assert answer.headers["x-lorakit-mix-error"] == "0"
        assert await served.revision_of("mix(sql@best=0.7,chat@best=0.3)") == await served.revision_of("assistant")


async def test_a_name_that_does_not_follow_stays(tmp_path: Path, numbers: Path) -> None:
    put_two(tmp_path)
    async with serving(tmp_path, numbers) as served:
        await name_mix(served, "fixed", "mix(sql=0.7,chat=0.3)", follow=False)
        before = await served.revision_of("fixed")
        overwrite(tmp_path / "runs" / "sql" / "checkpoint-500", 44)
        await served.until(lambda: len(served.reconciler.runs["sql"].revisions) == 2)
        await served.reconciler.step()
        assert await served.revision_of("fixed") == before
        assert not served.reconciler.mixes._makings


async def test_a_name_moves_only_after_its_new_mix_is_in_the_engine(tmp_path: Path, numbers: Path) -> None:
    put_two(tmp_path)
    async with serving(tmp_path, numbers) as served:
        await name_mix(served, "assistant", "mix(sql,chat)")
        before = await served.revision_of("assistant")
        served.engine.load_seconds = 0.1
        put_checkpoint(tmp_path / "runs" / "sql", 1000, 8)
        seen = []
        while (now := await served.revision_of("assistant")) == before:
            seen.append(now)
            await asyncio.sleep(0.01)
        assert now in served.engine.inside
        assert seen


async def test_a_name_survives_a_restart_and_catches_up_with_what_moved_meanwhile(
    tmp_path: Path, numbers: Path
) -> None:
    _, chat = put_two(tmp_path)
    async with serving(tmp_path, numbers) as served:
        await name_mix(served, "assistant", "mix(sql=0.7,chat=0.3)")
        await name_mix(served, "gone", "mix(sql,chat)")
        before = await served.revision_of("assistant")
        assert (await served.client.delete("/v1/mixes/gone")).json()["deleted"] is True
    async with serving(tmp_path, numbers) as served:
        assert await served.revision_of("assistant") == before
        assert before in served.engine.inside
        assert await served.revision_of("gone") is None
    later = put_checkpoint(tmp_path / "runs" / "sql", 1000, 8)
    async with serving(tmp_path, numbers) as served:

        async def moved() -> bool:
            return await served.revision_of("assistant") != before

        await served.until(moved)
        folder = folder_of(served, await served.ask("assistant"))
        assert_same(dense(folder), weighted_sum((later, 0.7), (chat, 0.3)))


async def test_a_name_stays_where_it_is_and_says_why_when_its_mix_can_not_be_made_again(
    tmp_path: Path, numbers: Path
) -> None:
    put_two(tmp_path)
    async with serving(tmp_path, numbers, engine=FakeEngine(numbers, max_rank=5)) as served:
        await name_mix(served, "assistant", "mix(sql,chat)")
        before = await served.revision_of("assistant")
        put_checkpoint(tmp_path / "runs" / "sql", 1000, 8, rank=5)

        async def reason() -> str:
            return str((await served.client.get("/v1/mixes/assistant")).json()["reason"] or "")

        await served.until(reason)
        assert "would lose" in await reason()
        assert await served.revision_of("assistant") == before
        put_checkpoint(tmp_path / "runs" / "sql", 1500, 9, rank=2)

        async def moved() -> bool:
            return await served.revision_of("assistant") != before

        await served.until(moved)
        assert await reason() == ""
        assert (await served.client.delete("/v1/adapters/sql")).status_code == 200
        await served.until(reason)
        assert "`sql` does not exist" in await reason()
        assert (await served.ask("assistant")).status_code == 200


async def test_a_named_mix_is_never_let_go_and_a_forgotten_one_is(tmp_path: Path, numbers: Path) -> None:
    put_two(tmp_path)
    async with serving(tmp_path, numbers, mixes_kept=1) as served:
        await name_mix(served, "assistant", "mix(sql=9,chat)")
        for weight in (2, 3, 4):
            await served.ask(f"mix(sql={weight},chat)")
        assert (await served.ask("assistant")).status_code == 200
        listed = (await served.client.get("/v1/mixes")).json()["data"]
        assert [mix["name"] for mix in listed] == ["assistant", None]
        await served.client.delete("/v1/mixes/assistant")
        assert (await served.ask("assistant")).status_code == 404
        await served.ask("mix(sql=5,chat)")
        await served.until(lambda: mixes_in(tmp_path) == 1)


async def test_a_named_mix_may_be_pinned_to_the_engine(tmp_path: Path, numbers: Path) -> None:
    put_two(tmp_path)
    async with serving(tmp_path, numbers, slots=2, pins=("assistant",)) as served:
        await name_mix(served, "assistant", "mix(sql=2,chat)")
        name = await served.revision_of("assistant")
        for model in ("sql", "chat", "mix(sql,chat)") * 2:
            assert (await served.ask(model)).status_code == 200
        assert name in served.engine.inside
        assert name not in served.engine.removes


async def test_what_can_not_be_named_is_refused(tmp_path: Path, numbers: Path) -> None:
    put_two(tmp_path)
    refused: list[tuple[Any, Any, int, str]] = [
        ("sql", "mix(sql,chat)", 409, "is an adapter"), ("numbers", "mix(sql,chat)", 400, "reserved"),
        ("mix", "mix(sql,chat)", 400, "reserved"), ("best", "mix(sql,chat)", 400, "reserved"),
        ("a b", "mix(sql,chat)", 400, "can't be a name"), ("", "mix(sql,chat)", 400, "can't be a name"),
        ("deadbeef", "mix(sql,chat)", 400, "would read as"), ("a", "mix(", 400, "no end"),
        ("a", "sql", 400, "mix("), ("a", "mix(nobody)", 404, "nobody"), ("a", "mix(sql=1e300)", 422, "smaller weights"),
        ("a", 3, 400, "mix"), (None, "mix(sql)", 400, "name"),
    ]  # fmt: skip
    async with serving(tmp_path, numbers) as served:
        for name, mix, status, word in refused:
            assert_refused(await name_mix(served, name, mix), status, word)
        assert (await served.client.get("/v1/mixes")).json()["data"] == []


async def test_a_name_has_one_meaning_whoever_comes_first(tmp_path: Path, numbers: Path) -> None:
    put_two(tmp_path)
    async with serving(tmp_path, numbers, roots=(str(tmp_path),)) as served:
        await name_mix(served, "assistant", "mix(sql,chat)")
        put_checkpoint(tmp_path / "runs" / "assistant", 1, 5)
        await served.until(lambda: any(one.candidate.run == "assistant" for one in served.reconciler.waiting.values()))
        assert str(await served.revision_of("assistant")).startswith("mix@")
        told = (await served.client.get("/v1/adapters/assistant")).json()
        assert "is a mix's" in told["reason"]
        put_adapter(tmp_path / "plain", 4)
        body = {"name": "assistant", "source": str(tmp_path / "plain")}
        assert_refused(await served.client.post("/v1/adapters", json=body), 400, "is a mix's")


async def test_a_mix_of_a_mix_by_its_name_is_refused_in_words(tmp_path: Path, numbers: Path) -> None:
    put_two(tmp_path)
    async with serving(tmp_path, numbers) as served:
        await name_mix(served, "assistant", "mix(sql,chat)")
        name = await served.revision_of("assistant")
        for model in (f"mix({name},sql)", "mix(assistant=0.5,sql)", "mix(mix@assistant,sql)"):
            assert_refused(await served.ask(model), 400, "a mix is made of adapters")
        assert_refused(await name_mix(served, "other", "mix(assistant)"), 400, "a mix is made of adapters")


async def test_there_is_an_end_to_the_names(tmp_path: Path, numbers: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_two(tmp_path)
    monkeypatch.setattr(module, "MOST_NAMES", 2)
    async with serving(tmp_path, numbers) as served:
        for name in ("a", "b"):
            assert (await name_mix(served, name, "mix(sql,chat)")).status_code == 201
        assert_refused(await name_mix(served, "c", "mix(sql,chat)"), 409, "forget one first")
        assert (await name_mix(served, "a", "mix(sql=2,chat)")).status_code == 201
        assert_refused(await served.client.delete("/v1/mixes/c"), 404)
        assert_refused(await served.client.get("/v1/mixes/c"), 404)
