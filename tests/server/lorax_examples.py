"""The examples on lorax-client's own pages, with other addresses and names, put to a server by that very client.

A program of its own: what the client wants stands beside the other stack. It prints what it was told, as JSON.

    PYTHONPATH=.venv/lorax-client python tests/server/lorax_examples.py URL ADAPTER OTHER
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

from lorax import AsyncClient, Client, MergedAdapters  # type: ignore[import-not-found]
from lorax.errors import GenerationError, OverloadedError, ValidationError  # type: ignore[import-not-found]

PROMPT = "Why is the sky blue?"
SCHEMA = {"type": "object", "properties": {"age": {"enum": [1, 2]}}, "required": ["age"], "additionalProperties": False}


def sync_examples(endpoint_url: str, adapter: str) -> dict[str, Any]:
    client = Client(endpoint_url)
    text = client.generate(PROMPT, adapter_id=adapter).generated_text
    streamed = ""
    for response in client.generate_stream(PROMPT, adapter_id=adapter):
        if not response.token.special:
            streamed += response.token.text
    return {"sync": text, "sync_streamed": streamed, "sync_streamed_whole": response.generated_text}


async def async_examples(endpoint_url: str, adapter: str) -> dict[str, Any]:
    client = AsyncClient(endpoint_url)
    response = await client.generate(PROMPT, adapter_id=adapter)
    streamed = ""
    async for part in client.generate_stream(PROMPT, adapter_id=adapter):
        if not part.token.special:
            streamed += part.token.text
    return {"async": response.generated_text, "async_streamed": streamed}


def merged_examples(endpoint_url: str, adapter: str, other: str) -> dict[str, Any]:
    client, told = Client(endpoint_url), {}
    for strategy in ("linear", "ties", "dare_linear", "dare_ties"):
        merged = MergedAdapters(
            ids=[adapter, other], weights=[0.7, 0.3], merge_strategy=strategy, density=0.9,
            majority_sign_method="total",
        )  # fmt: skip
        told[strategy] = client.generate(PROMPT, merged_adapters=merged, max_new_tokens=8).generated_text
    return told


def other_examples(endpoint_url: str, adapter: str) -> dict[str, Any]:
    client = Client(endpoint_url)
    detailed = client.generate(
        PROMPT, adapter_id=adapter, max_new_tokens=6, decoder_input_details=True, return_k_alternatives=2
    )
    best = client.generate(PROMPT, adapter_id=adapter, max_new_tokens=6, best_of=3, do_sample=True, temperature=0.9)
    seeded = [client.generate(PROMPT, max_new_tokens=6, do_sample=True, seed=7).generated_text for _ in range(2)]
    answer = client.generate(
        "Generate a new character: ", adapter_id=adapter, response_format={"type": "json_object", "schema": SCHEMA}
    )
    full = client.generate(PROMPT, max_new_tokens=2, return_full_text=True, truncate=3)
    return {
        "base": client.generate(PROMPT, max_new_tokens=6).generated_text,
        "detailed": detailed.model_dump(mode="json"),
        "best": best.model_dump(mode="json"),
        "seeded": seeded,
        "json": answer.generated_text,
        "full": full.generated_text,
        "truncated_tokens": full.details.prompt_tokens,
    }


def errors(endpoint_url: str, adapter: str) -> dict[str, str]:
    client, told = Client(endpoint_url), {}
    for name, asked in {
        "no such adapter": {"adapter_id": "nothing"},
        "too long": {"adapter_id": adapter, "max_new_tokens": 100_000},
        "typical": {"typical_p": 0.5},
        "hub": {"adapter_id": "some/adapter", "adapter_source": "hub"},
        "outside": {"adapter_id": "/etc", "adapter_source": "local"},
    }.items():
        for way in ("generate", "generate_stream"):
            try:
                list(getattr(client, way)(PROMPT, **asked))
                told[f"{name}, {way}"] = "answered"
            except (GenerationError, OverloadedError, ValidationError) as error:
                told[f"{name}, {way}"] = type(error).__name__
    return told


def main(endpoint_url: str, adapter: str, other: str) -> None:
    told = sync_examples(endpoint_url, adapter)
    told |= asyncio.run(async_examples(endpoint_url, adapter))
    told |= {"merged": merged_examples(endpoint_url, adapter, other)}
    told |= other_examples(endpoint_url, adapter) | {"errors": errors(endpoint_url, adapter)}
    print(json.dumps(told))


if __name__ == "__main__":
    main(*sys.argv[1:])
