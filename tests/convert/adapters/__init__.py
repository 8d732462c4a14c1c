"""Adapters that a server takes in, as they are or repaired, and adapters that it refuses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tests.checkpoints.written import finish
from tests.folders import base_tensors, factors, linear_modules, write_adapter

Q = "model.layers.0.self_attn.q_proj"
UP = "model.layers.0.mlp.up_proj"
COPY = "base_model.model.model.embed_tokens.base_layer.weight"


def made_of(tensors: dict[str, Any] | None = None, *, rank: int = 2, **config: Any) -> Callable[[Path], Path]:
    """How to write one, as a finished checkpoint."""
    return lambda folder: finish(write_adapter(folder, tensors, rank=rank, **config))


def with_one(module: str, *shape: int) -> dict[str, Any]:
    return factors({Q: (8, 8), module: (shape[0], shape[1])})


def loha(rank: int) -> dict[str, Any]:
    shapes = {"hada_w1_a": (8, rank), "hada_w1_b": (rank, 8), "hada_w2_a": (8, rank), "hada_w2_b": (rank, 8)}
    return {f"base_model.model.{Q}.{part}": np.ones(shape, "float32") for part, shape in shapes.items()}


def with_rows(count: int) -> dict[str, Any]:
    rows = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
    return {**factors({Q: (8, 8)}), rows: np.ones((count, 8), "float32")}


def with_head(change: float) -> dict[str, Any]:
    head = base_tensors()["lm_head.weight"] + np.float32(change)
    return {**factors({Q: (8, 8)}), "base_model.model.lm_head.weight": head}


def spoilt(value: float) -> dict[str, Any]:
    tensors = factors(linear_modules())
    next(iter(tensors.values()))[0, 0] = value
    return tensors


SERVED = {
    "plain": made_of(),
    "rslora": made_of(use_rslora=True),
    "a part of the layers": made_of(factors({Q: (8, 8)})),
    "pefts copy of the embedding": made_of(
        {**factors({Q: (8, 8)}), COPY: base_tensors()["model.embed_tokens.weight"]}
    ),
    "another prefix": made_of(factors({"layers.0.self_attn.q_proj": (8, 8)})),
    "names of a raw state dict": made_of(
        {name.replace(".weight", ".default.weight"): value for name, value in factors({Q: (8, 8)}).items()}
    ),
    "patterns": made_of(
        factors({Q: (8, 8)}, rank=4), rank=4, rank_pattern={"q_proj": 4}, alpha_pattern={"q_proj": 1}
    ),
    "bias all of a base without": made_of(bias="all"),
    "bias lora_only of a base without": made_of(bias="lora_only"),
    "no lora_alpha": made_of(lora_alpha=None),
    "no target_modules": made_of(target_modules=None),
    "loha": made_of(loha(2), peft_type="LOHA", alpha=2),
    "trained rows": made_of(with_rows(2), trainable_token_indices={"embed_tokens": [3, 9]}),
    "a saved head that equals the base's": made_of(with_head(0), modules_to_save=["lm_head"]),
    "a copy of the base's head": made_of(with_head(0)),
    "the largest rank": made_of(factors({Q: (8, 8)}, rank=16), rank=16),
}  # fmt: skip

# By what is wrong: the check that says so, and the adapter.
REFUSED = {
    "dora": ("features", made_of(use_dora=True)),
    "modules_to_save": ("features", made_of(modules_to_save=["lm_head"])),
    "lora_bias": ("features", made_of(lora_bias=True)),
    "pissa": ("features", made_of(init_lora_weights="pissa")),
    "olora": ("features", made_of(init_lora_weights="olora")),
    "ia3": ("features", made_of(peft_type="IA3")),
    "layer_replication": ("features", made_of(layer_replication=[[0, 1]])),
    "trainable tokens": ("features", made_of(trainable_token_indices=[1])),
    "a trained head": ("features", made_of(with_head(1), modules_to_save=["lm_head"])),
    "a head that the config denies": ("tensors", made_of(with_head(1))),
    "rows beyond the vocabulary": ("shapes", made_of(with_rows(1), trainable_token_indices={"embed_tokens": [16]})),
    "a method of another formula": ("features", made_of(loha(2), peft_type="OFT")),
    "loha without a part": ("readable", made_of(dict(list(loha(2).items())[1:]), peft_type="LOHA", alpha=2)),
    "too large a rank": ("rank", made_of(factors({Q: (8, 8)}, rank=17), rank=17)),
    "smaller factors": ("shapes", made_of(factors({Q: (4, 4)}))),
    "larger factors": ("shapes", made_of(factors({Q: (16, 8)}))),
    "swapped sizes": ("shapes", made_of(factors({UP: (8, 12)}))),
    "a layer too many": ("modules", made_of(with_one("model.layers.9.self_attn.q_proj", 8, 8))),
    "an unknown module": ("modules", made_of(with_one("visual.q_proj", 8, 8))),
    "a resized vocabulary": ("tensors", made_of({**factors({Q: (8, 8)}), COPY: np.ones((17, 8), "float32")})),
    "another base's embedding": ("tensors", made_of({**factors({Q: (8, 8)}), COPY: np.ones((16, 8), "float32")})),
    "tensors of no lora": ("tensors", made_of({**factors({Q: (8, 8)}), "surprise": np.ones((2, 2), "float32")})),
    "no factors": ("factors", made_of({COPY: base_tensors()["model.embed_tokens.weight"]})),
    "whole numbers": (
        "dtype", made_of({name: value.astype("int32") for name, value in factors({Q: (8, 8)}).items()}),
    ),
    "nan": ("finite", made_of(spoilt(np.nan))),
    "infinity": ("finite", made_of(spoilt(-np.inf))),
}  # fmt: skip
