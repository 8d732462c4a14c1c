"""Folders of torch.distributed.checkpoint, of any number of ranks: with `.metadata`, or of safetensors shards that say
in their heads what each holds of the whole tensors (HuggingFaceStorageWriter).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lorakit.checkpoints.writers.torch_keys import MODEL, OPTIMIZER, SCALER, SCHEDULER, TRAINER_STATE
from lorakit.convert.readers.pieced import PiecedTensor, with_config
from lorakit.convert.readers.torch_files import EMA, NO_TENSORS, NO_WEIGHTS, NOT_OF_EMA, OF_EMA, without_ema
from lorakit.convert.source import Source, SourceTensor
from lorakit.errors import Incomplete, InvalidFile, NotFound, Refused, UsageError
from lorakit.files.distributed import METADATA, Distributed, read_distributed
from lorakit.files.folders import file_state
from lorakit.files.pieces import StoredPiece, cover
from lorakit.files.safetensors import Header, read_header
from lorakit.files.torch_tensors import as_torch

SHARDING = "DCP_SHARDING_INFO"  # a JSON object in the head of a shard
_SHARD = re.compile(r"shard-(\d{1,9})-.+\.safetensors")
_FSDP = "pytorch_model_fsdp_*"  # accelerate's folder in a checkpoint, one a model
_RESUMED = frozenset((*OPTIMIZER, *SCHEDULER, *SCALER, *TRAINER_STATE, "dataloader", "data_loader", "rng", "rng_state"))
_DEEPEST = 3  # of the words by which a state is known: app.model.…


def read(path: Path, *, weights: str = "model") -> Source:
    """Open a folder, or a checkpoint that accelerate saved with FSDP.

    Raises:
        UsageError: a moving average of the weights is asked for, and there is none.
        NotFound, Incomplete: it is not a folder of that kind, or files of it are not there (yet).
        InvalidFile, Refused: what it says of its pieces is damaged, or of kinds that safetensors doesn't have.
    """
    folder = _folder(path)
    beside = with_config(folder, path, folder.parent)
    if (folder / METADATA).exists():
        return _of_metadata(path, read_distributed(folder), beside, weights)
    without_ema(path, weights)
    if not _shards(folder):
        raise NotFound(
            f"'{folder}' has neither {METADATA}, which torch.distributed.checkpoint writes last, nor shards that say "
            f"what they hold of which tensor: wait until it is written, or name the file or folder of the weights"
        )
    return _of_shards(path, folder, beside)


def _folder(path: Path) -> Path:
    if (path / METADATA).exists() or _shards(path):
        return path
    models = sorted(path.glob(_FSDP))
    if len(models) > 1:
        named = ", ".join(folder.name for folder in models)
        raise Refused(f"'{path}' holds several models ({named}): name the folder of one")
    return models[0] if models else path


def _of_metadata(path: Path, content: Distributed, beside: Path | None, weights: str) -> Source:
    sorts = {name: _sort(content.paths.get(name), name) for name in content.tensors}
    wanted = "ema" if weights == "ema" else "model"
    chosen = [name for name, sort in sorts.items() if sort == wanted]
    if not chosen:
        roots = sorted({name.partition(".")[0] for name in sorts})
        if wanted == "ema":
            raise UsageError(f"'{path}' has no moving average of the weights, only {', '.join(roots)}")
        raise Refused(f"'{path}' holds no weights of a model, only {', '.join(roots) or 'values that are no tensors'}")
    reasons = {"model": NOT_OF_EMA, "ema": OF_EMA, "resumed": NO_WEIGHTS}
    left_out: dict[str, tuple[str, ...]] = {
        reasons[one]: names
        for one in reasons
        if one != wanted and (names := tuple(name for name, sort in sorts.items() if sort == one))
    }
    if content.objects:
        left_out[NO_TENSORS] = tuple(content.objects)
    tensors: dict[str, SourceTensor] = {}
    for name in chosen:
        found = content.tensors[name]
        tensors[name] = PiecedTensor(name, found.dtype, found.shape, found.pieces)
    pieces = (piece for name in chosen for piece in content.tensors[name].pieces)
    files = {content.folder / METADATA, *(piece.file for piece in pieces)}
    return Source(path, "dcp", tensors, left_out, beside, {file: file_state(file) for file in sorted(files)})


def _sort(place: Any, name: str) -> str:
    """`model`, `ema` or `resumed`: by the first word of its path in the state that is known; a model's if none is."""
    words = [str(part) for part in place] if isinstance(place, tuple) and place else name.split(".")
    for word in words[:_DEEPEST]:
        if word in EMA:
            return "ema"
        if word in MODEL:
            return "model"
        if word in _RESUMED or word.startswith("optim"):
            return "resumed"
    return "model"


def _shards(folder: Path) -> list[Path]:
    return sorted(file for file in folder.glob("shard-*.safetensors") if _SHARD.fullmatch(file.name))


def _of_shards(path: Path, folder: Path, beside: Path | None) -> Source:
    files = _shards(folder)
    _ensure_numbered(folder, files)
    pieces: dict[str, list[StoredPiece]] = {}
    for header in map(read_header, files):
        offsets = _offsets(header)
        for name, stored in header.tensors.items():
            pieces.setdefault(name, []).append(StoredPiece(offsets[name], as_torch(stored)))
    tensors = {name: _whole(folder, name, placed) for name, placed in pieces.items()}
    return Source(path, "dcp", tensors, {}, beside, {file: file_state(file) for file in files})


def _ensure_numbered(folder: Path, files: Iterable[Path]) -> None:
    """Each rank has a number; that the last ranks' are missing shows where shapes are not those of the config."""
    numbers = {int(match[1]) for file in files if (match := _SHARD.fullmatch(file.name))}
    missing = min(set(range(1, max(numbers) + 1)) - numbers, default=None)
    if missing is not None:
        raise Incomplete(f"'{folder}' has files of rank {max(numbers)}, and none of rank {missing}: copy it again")


def _offsets(header: Header) -> Mapping[str, tuple[int, ...]]:
    """Where in the whole each tensor of a shard begins.

    Raises:
        InvalidFile: its head doesn't say that.
    """
    try:
        said = json.loads(header.metadata[SHARDING])
        found = {name: tuple(said[name]["saved_offsets"]) for name in header.tensors}
    except KeyError as error:
        raise InvalidFile(f"'{header.file}' is a shard, and does not say what of ({error})") from None
    except (TypeError, ValueError, RecursionError):
        raise InvalidFile(f"'{header.file}' has a {SHARDING} that can't be read") from None
    for name, offsets in found.items():
        if len(offsets) != len(header.tensors[name].shape) or not all(type(at) is int and at >= 0 for at in offsets):
            raise InvalidFile(f"'{header.file}' says that its part of '{name}' begins at {list(offsets)}")
    return found


def _whole(folder: Path, name: str, pieces: list[StoredPiece]) -> PiecedTensor:
    """Its shape is that which the pieces reach to, for none of them says it."""
    dtypes = {piece.tensor.dtype for piece in pieces}
    dimensions = {len(piece.shape) for piece in pieces}
    if len(dtypes) != 1 or len(dimensions) != 1:
        raise InvalidFile(f"'{folder}': the parts of '{name}' are of {len(dtypes)} dtypes, or don't fit together")
    shape = tuple(max(piece.offsets[axis] + piece.shape[axis] for piece in pieces) for axis in range(dimensions.pop()))
    if not cover(pieces, shape, str(folder)):
        raise InvalidFile(f"'{folder}': the parts of '{name}' are not the whole of it, each once: copy it again")
    return PiecedTensor(name, dtypes.pop(), shape, pieces)
