"""What llama.cpp itself makes of a model, and an adapter on it: the likeliest next tokens with their logprobs, in JSON.

python -m tests.convert.llama_cpp_says MODEL.gguf TOKENS [ADAPTER.gguf]        TOKENS: 3,4,5
"""

from __future__ import annotations

import json
import sys
import urllib.request
from typing import Any

LIKELIEST = 10


def main(model: str, tokens: str, adapter: str | None = None) -> None:
    import xllamacpp

    settings: Any = xllamacpp.CommonParams()
    settings.model.path = model
    settings.n_ctx = 64
    settings.warmup = False
    if adapter is not None:
        info: Any = xllamacpp.CommonAdapterLoraInfo()
        info.path, info.scale = adapter, 1.0
        settings.lora_adapters = [info]
    server: Any = xllamacpp.Server(settings)
    wanted = {"prompt": list(map(int, tokens.split(","))), "n_predict": 1, "n_probs": LIKELIEST, "temperature": 0.0}
    address = f"http://{server.listening_address.removeprefix('http://')}/completion"
    request = urllib.request.Request(address, json.dumps(wanted).encode(), {"content-type": "application/json"})
    with urllib.request.urlopen(request) as answer:
        (said,) = json.load(answer)["completion_probabilities"]
    print(json.dumps({each["id"]: each["logprob"] for each in said["top_logprobs"]}))


if __name__ == "__main__":
    main(*sys.argv[1:])
