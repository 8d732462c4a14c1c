"""A mix answers on real vLLM as the base with the weighted sum of the dense deltas added does."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import httpx
import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from transformers import AutoTokenizer, LlamaForCausalLM

from tests.mix.test_real_vllm import TOKENS, greedy_logprobs, with_deltas
from tests.server.real import PROMPTS, Answer, ask, make_random_adapter, write_checkpoint
from tests.server.test_real_serving import load_on, wait_for_step
from tests.world import World

pytestmark = pytest.mark.timeout(240)

Deltas = dict[str, torch.Tensor]


@pytest.fixture
def client(world: World) -> Iterator[httpx.Client]:
    with world.server.client() as client:
        yield client


def put(world: World, run: str, adapter: Path, step: int, eval_loss: float | None = None) -> Deltas:
    """Write a checkpoint, wait until its run's name means it, and give back what it adds to each weight."""
    write_checkpoint(world.watched / run, adapter, step, eval_loss)
    wait_for_step(world, run, step)
    return deltas_of(world.base, adapter)


def deltas_of(base: Path, adapter: Path) -> Deltas:
    """What PEFT's own modules say that they add."""
    model = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base, dtype=torch.float64), adapter)
    return {
        f"{path.removeprefix('base_model.model.')}.weight": module.get_delta_weight("default").detach().double()
        for path, module in model.named_modules()
        if isinstance(module, LoraLayer)
    }


def weighted_sum(*parts: tuple[Deltas, float]) -> Deltas:
    total: Deltas = {}
    for deltas, weight in parts:
        for name, delta in deltas.items():
            total[name] = total.get(name, torch.zeros(())) + weight * delta
    return total


def cut(deltas: Deltas, rank: int) -> tuple[Deltas, float]:
    """The best approximation of each, by a full SVD; and ‖Δ - Δ'‖ / ‖Δ‖ over all."""
    found, lost, total = {}, 0.0, 0.0
    for name, delta in deltas.items():
        u, s, vh = torch.linalg.svd(delta, full_matrices=False)
        found[name] = u[:, :rank] * s[:rank] @ vh[:rank]
        lost, total = lost + float(s[rank:].square().sum()), total + float(s.square().sum())
    return found, (lost / total) ** 0.5


def answers_of(base: Path, deltas: Mapping[str, torch.Tensor]) -> dict[str, list[float]]:
    """What the merged model says to each prompt, as logprobs."""
    model, tokenizer = with_deltas(base, dict(deltas)), AutoTokenizer.from_pretrained(base)
    return {prompt: greedy_logprobs(model, tokenizer(prompt, return_tensors="pt").input_ids) for prompt in PROMPTS}


def assert_answers(client: httpx.Client, model: str, expected: Mapping[str, list[float]]) -> str:
    """The revision that answered."""
    found = {prompt: ask(client, model, prompt, max_tokens=TOKENS) for prompt in PROMPTS}
    for prompt, answer in found.items():
        assert answer.logprobs == pytest.approx(expected[prompt], abs=2e-3), (model, prompt)
    (revision,) = {answer.revision for answer in found.values()}
    assert revision is not None
    return revision


def mix_error(client: httpx.Client, model: str) -> float:
    response = client.post("/v1/completions", json={"model": model, "prompt": "a", "max_tokens": 1})
    return float(response.headers["x-lorakit-mix-error"])


def test_mixes_of_unequal_ranks_modules_and_patterns_answer_as_the_dense_sum_merged_into_the_base(
    world: World, client: httpx.Client, tmp_path: Path
) -> None:
    wide = make_random_adapter(tmp_path / "wide", world.base, 21, r=4, lora_alpha=8)
    narrow = make_random_adapter(tmp_path / "narrow", world.base, 22, r=2, target_modules=["q_proj", "down_proj"])
    patterned = make_random_adapter(
        tmp_path / "patterned", world.base, 23, r=2, rank_pattern={"up_proj": 1}, alpha_pattern={"q_proj": 6}
    )
    rows = make_random_adapter(tmp_path / "rows", world.base, 24, r=2, target_modules=["embed_tokens", "v_proj"])
    deltas = {
        adapter.name: put(world, f"mixed-{adapter.name}", adapter, 1, eval_loss=1.0)
        for adapter in (wide, narrow, patterned, rows)
    }
    for weights in (
        {"wide": 0.7, "narrow": 0.3}, {"wide": 0.5, "narrow": -0.4, "patterned": 0.6}, {"wide": 0.6, "rows": 0.8},
    ):  # fmt: skip
        expected = answers_of(world.base, weighted_sum(*((deltas[name], weight) for name, weight in weights.items())))
        model = "mix(" + ",".join(f"mixed-{name}@best={weight}" for name, weight in weights.items()) + ")"
        revision = assert_answers(client, model, expected)
        assert revision.startswith("mix@")
        assert assert_answers(client, revision, expected) == revision
        assert mix_error(client, model) == 0


def test_a_mix_that_is_cut_answers_as_the_best_approximation_and_says_how_good_that_is(
    world: World, client: httpx.Client
) -> None:
    """Two of rank 8 at --max-lora-rank 8."""
    parts = [(put(world, f"cut{number}", world.adapters[number], 1), weight) for number, weight in ((0, 0.7), (1, 0.3))]
    best, error = cut(weighted_sum(*parts), 8)
    assert_answers(client, "mix(cut0=0.7,cut1=0.3)", answers_of(world.base, best))
    assert 0.1 < error < 0.6
    assert mix_error(client, "mix(cut0=0.7,cut1=0.3)") == pytest.approx(error, rel=1e-3)
    refused = client.post("/v1/completions", json={"model": "mix(cut0,cut1,rank=1)", "prompt": "a"})
    assert (refused.status_code, refused.json()["error"]["type"]) == (422, "UnprocessableEntityError")


def test_a_named_mix_follows_under_load_and_no_answer_is_half_of_each(
    world: World, client: httpx.Client, tmp_path: Path
) -> None:
    small = [make_random_adapter(tmp_path / f"s{seed}", world.base, 30 + seed, r=2, lora_alpha=8) for seed in range(3)]
    steady = put(world, "steady", make_random_adapter(tmp_path / "steady", world.base, 40, r=3), 1)
    moving = [put(world, "moving", small[0], 1)]
    named = {"name": "assistant", "mix": "mix(moving=0.8,steady=0.2)", "follow": True}
    assert client.post("/v1/mixes", json=named).status_code == 201
    revisions = [client.get("/v1/mixes/assistant").json()["revision"]]
    with load_on(world.server, "assistant", "mix(moving=0.8,steady=0.2)", "base") as seen:
        for step, adapter in ((2, small[1]), (3, small[2])):
            moving.append(put(world, "moving", adapter, step))
            revisions.append(world.server.wait_until(lambda: _moved(client, revisions[-1])))
    expected = {
        revision: answers_of(world.base, weighted_sum((deltas, 0.8), (steady, 0.2)))
        for revision, deltas in zip(revisions, moving, strict=True)
    }
    for _, prompt, answer in seen:
        assert isinstance(answer, Answer), answer
        if answer.revision != "base":
            assert answer.logprobs[:TOKENS] == pytest.approx(expected[str(answer.revision)][prompt], abs=2e-3)
    assert {answer.revision for _, _, answer in seen if isinstance(answer, Answer)} >= {"base", *revisions[1:2]}


def _moved(client: httpx.Client, before: str) -> str | None:
    revision = client.get("/v1/mixes/assistant").json()["revision"]
    return revision if revision != before else None
