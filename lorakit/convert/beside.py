"""What stands beside the weights of a converted model: config, generation config, tokenizer, code, index, origin."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from lorakit.convert.described import is_described
from lorakit.convert.expected import architecture_of
from lorakit.convert.planning import ConvertPlan
from lorakit.convert.readers.huggingface import is_model_folder
from lorakit.errors import Refused
from lorakit.files.folders import read_json, write_json
from lorakit.merge.base import INDEX
from lorakit.merge.companions import CHAT_TEMPLATE, CONFIG, PREPROCESSOR, TOKENIZER, Companion, plan_companions

GENERATION = "generation_config.json"
TOKENIZER_FILE = "tokenizer.json"
_OF_TOKENIZER = (*TOKENIZER, *CHAT_TEMPLATE, *PREPROCESSOR, "tokenization_*.py", "processing_*.py")

# What trainers leave beside the weights, and is of no use to who loads them.
_OF_TRAINERS = ("zero_to_fp32.py", "*_config.yaml", "hyperparameters.*", "*requirements*.txt", "recipe_state*")


@dataclass(frozen=True, slots=True)
class Beside:
    """`config` with the class that loads the model, `generation` with all ids that end an answer, if there is one."""

    config: Mapping[str, Any]
    generation: Mapping[str, Any] | None
    companions: tuple[Companion, ...]
    notes: tuple[str, ...] = ()

    @property
    def tokenizer(self) -> Path | None:
        return next((one.source for one in self.companions if one.name == TOKENIZER_FILE), None)


def find_beside(own: Path | None, like: Path | None) -> Beside:
    """From the checkpoint's own folder where it has them, else from that of a model of its kind.

    Raises:
        Refused: neither has a config of a model.
    """
    folders = [folder for folder in (own, like) if folder is not None]
    described = next(filter(is_described, folders), None)
    if described is None:
        raise Refused(
            "there is no config.json beside the checkpoint that says a model_type: name the model that was trained "
            "with --like"
        )
    notes = []
    config = dict(read_json(described / CONFIG))
    architecture = architecture_of(config, None if like is None else read_json(like / CONFIG))
    if architecture is not None and config.get("architectures") != [architecture]:
        notes.append(f"config.json names {architecture}; it named {config.get('architectures')}")
        config["architectures"] = [architecture]
    base = like or described
    companions = plan_companions(base, [folder for folder in folders if folder != base], described)
    tidy = {folder for folder in folders if folder == like or is_model_folder(folder)}
    wanted = tuple(one for one in companions if one.name != GENERATION and _is_of_model(one, config, tidy))
    generation = next((one.source for one in companions if one.name == GENERATION), None)
    ends = _ends(config, generation, wanted)
    found = _generation(generation, ends)
    return Beside(config, found, wanted, tuple(notes))


def _is_of_model(file: Companion, config: Mapping[str, Any], tidy: Collection[Path]) -> bool:
    """Beside a model's own files nearly all belongs to it; a folder of a training may hold data and scripts, too."""
    name = file.name
    if any(fnmatch(name, pattern) for pattern in _OF_TRAINERS):
        return False
    if file.source.parent in tidy or any(fnmatch(name, one) for one in (*_OF_TOKENIZER, "LICENSE*", "NOTICE*")):
        return True
    return name.endswith(".py") and "auto_map" in config


def _ends(config: Mapping[str, Any], generation: Path | None, companions: Collection[Companion]) -> list[int]:
    """Every id that ends an answer, by the generation config, the config and the tokenizer; in that order."""
    text = config.get("text_config")
    parts = [read_json(generation) if generation else {}, config, text if isinstance(text, dict) else {}]
    said = [part.get("eos_token_id") for part in parts]
    ids = [number for value in said for number in (value if isinstance(value, list) else [value])]
    files = {one.name: one.source for one in companions}
    if "tokenizer_config.json" in files and TOKENIZER_FILE in files:
        token = read_json(files["tokenizer_config.json"]).get("eos_token")
        token = token.get("content") if isinstance(token, dict) else token
        ids.append(_id_of(files[TOKENIZER_FILE], token))
    return list(dict.fromkeys(number for number in ids if isinstance(number, int) and not isinstance(number, bool)))


def _id_of(tokenizer: Path, token: Any) -> Any:
    said = read_json(tokenizer)
    added = said.get("added_tokens")
    for entry in added if isinstance(added, list) else []:
        if isinstance(entry, dict) and entry.get("content") == token:
            return entry.get("id")
    model = said.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    return vocabulary.get(token) if isinstance(vocabulary, dict) and isinstance(token, str) else None


def _generation(file: Path | None, ends: list[int]) -> Mapping[str, Any] | None:
    """With all ends; none is made where the config alone says what there is to say."""
    if file is None:
        return {"_from_model_config": True, "eos_token_id": ends} if len(ends) > 1 else None
    said = read_json(file)
    return {**said, "eos_token_id": ends if len(ends) > 1 else ends[0]} if ends else said


def chosen(companions: Collection[Companion], only: Collection[str]) -> tuple[Companion, ...]:
    """Those of the parts that are wanted: `model`, `tokenizer`."""
    return tuple(one for one in companions if ("tokenizer" if _is_tokenizers(one.name) else "model") in only)


def _is_tokenizers(name: str) -> bool:
    return any(fnmatch(name, pattern) for pattern in _OF_TOKENIZER)


def write_model_files(plan: ConvertPlan, beside: Beside, folder: Path) -> None:
    """The config, the generation config, and the index where there are several files."""
    write_json(folder / CONFIG, plan.config)
    if beside.generation is not None:
        write_json(folder / GENERATION, beside.generation)
    if len(plan.shards) > 1:
        total = sum(stored.nbytes for shard in plan.shards for stored in shard.target.tensors.values())
        places = {name: shard.name for shard in plan.shards for name in shard.target.tensors}
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": places})
