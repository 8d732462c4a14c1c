"""A real server takes in what vLLM would not serve right, repairs it, and answers as PEFT does."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
from transformers import AutoTokenizer

from tests.convert.adapters.test_convert import of_method
from tests.convert.test_vllm_rows import greedy, lora
from tests.merge.kinds import make_kind, open_model, unmerged
from tests.server.real import PROMPTS, ask, serving

ROWS = lora(trainable_token_indices=[104, 101, 108])
PATTERNS = lora(rank_pattern={"q_proj": 4}, alpha_pattern={"v_proj": 8})


@pytest.mark.slow
def test_what_is_repaired_on_the_way_in_answers_as_peft_does_and_the_rest_is_refused_with_its_cure(
    materials: tuple[Path, list[Path]], tmp_path: Path
) -> None:
    base = materials[0]
    prompts = [AutoTokenizer.from_pretrained(base)(prompt, return_tensors="pt").input_ids for prompt in PROMPTS[:2]]
    wanted = {}
    for name, kind in (("rows", ROWS), ("patterns", PATTERNS)):
        adapter = make_kind(tmp_path / "made" / name, base, "llama", kind)
        wanted[name] = greedy(unmerged(base, "llama", [adapter], kind), prompts)
    loha, _ = of_method(tmp_path / "made" / "loha", base, peft.LoHaConfig(r=3, alpha=6, target_modules=["q_proj"]))
    wanted["loha"] = greedy(peft.PeftModel.from_pretrained(open_model(base, "llama", "float32"), loha).eval(), prompts)
    make_kind(tmp_path / "made" / "dora", base, "llama", lora(use_dora=True))
    adapters = [part for name in (*wanted, "dora") for part in ("--adapter", f"{name}={tmp_path / 'made' / name}")]
    flags = (*adapters, "--max-loras", "3", "--max-lora-rank", "16")
    with serving(base, tmp_path / "home", tmp_path / "serve.log", *flags) as server, server.client() as client:
        for name, logprobs in wanted.items():
            found = [logprob for prompt in PROMPTS[:2] for logprob in ask(client, name, prompt, max_tokens=4).logprobs]
            assert found == pytest.approx(logprobs, abs=2e-3), name
        refused = server.adapter("dora")
        assert "--approximate" in str(refused)
