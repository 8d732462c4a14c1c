"""What PEFT gives the tokens of an answer, asked after the fact: an oracle that knows nothing of vLLM or of lorakit."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any


class PeftOracle:
    """One base with some adapters, by their place in the list."""

    def __init__(self, base: Path, adapters: Sequence[Path]) -> None:
        from peft import PeftModel
        from transformers import AutoModelForCausalLM

        model: Any = PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(base), str(adapters[0]), adapter_name="0"
        )
        for number, folder in enumerate(adapters[1:], start=1):
            model.load_adapter(str(folder), adapter_name=str(number))
        self._model = model.eval()
        self.logprobs = cache(self._logprobs)

    def _logprobs(self, adapter: int, prompt: tuple[int, ...], answer: tuple[int, ...]) -> tuple[float, ...]:
        """Of each token of an answer, in its place behind the prompt."""
        import torch

        self._model.set_adapter(str(adapter))
        tokens = torch.tensor([prompt + answer])
        with torch.inference_mode():
            scores = self._model(input_ids=tokens).logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)
        return tuple(float(score) for score in scores.gather(1, tokens[0, len(prompt) :, None])[:, 0])

    def agreement(
        self, adapter: int, prompt: tuple[int, ...], answer: tuple[int, ...], logprobs: Sequence[float]
    ) -> int:
        """How many of an answer's tokens, from its first, have the logprobs that this adapter gives them."""
        pairs = zip(self.logprobs(adapter, prompt, answer), logprobs, strict=True)
        return next((place for place, (mine, told) in enumerate(pairs) if abs(mine - told) > 2e-3), len(answer))
