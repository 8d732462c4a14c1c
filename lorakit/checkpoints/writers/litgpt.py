"""litgpt's `step-00000N` and `final`: `lit_model.pth`, or `lit_model.pth.lora`, and then the files that say what it was
made with, `prompt_style.yaml` last. `final` has the merged model after that.
"""

from __future__ import annotations

import re

from lorakit.checkpoints.places import Place
from lorakit.checkpoints.writers.layout import COMPANIONS, LastWord, Layout, parts, plain_files
from lorakit.checkpoints.writers.torch_keys import keys_in, parts_in

NAME = re.compile(r"step-(\d{1,18})")
_LAST = "prompt_style.yaml"
_MERGED = "lit_model.pth"  # of a LoRA, which `finetune_lora` merges into the base in the end
_OWN = ("model_config.yaml", "hyperparameters.yaml", "config.json", "generation_config.json")


def layout(place: Place) -> Layout | None:
    files = plain_files(place)
    models = tuple(sorted(name for name in files if name == "lit_model.pth" or name.startswith("lit_model.pth.")))
    if not models:
        return None
    adapter = next((name for name in models if name != "lit_model.pth"), None)
    companions = tuple(name for name in files if name in _OWN or COMPANIONS.fullmatch(name))
    return Layout(
        "litgpt",
        "adapter" if adapter else "regular",
        tuple(dict.fromkeys((*parts(model=True), *parts_in(keys_in(place, adapter or models[0]))))),
        covered=(*models, *companions),
        weights=models,
    )


def last_word(place: Place, layout: Layout) -> LastWord | None:
    if place.name == "final" and f"{_MERGED}.lora" in layout.weights:
        merged = place.entries.get(_MERGED)
        return LastWord(_MERGED, merged.written) if merged else None
    last = place.entries.get(_LAST)
    if last is None:
        return None
    whole = place.read(_LAST).endswith(b"\n")  # as YAML is written
    return LastWord(_LAST, last.written, None if whole else f"{_LAST} is only partly there", partly=not whole)
