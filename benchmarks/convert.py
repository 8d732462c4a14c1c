"""Convert beside what each trainer brings for it, on the same checkpoint: whole-process seconds until all is on the
disk, and peak private memory. Checkpoints are written by two processes: torch.distributed.checkpoint in bf16, and
DeepSpeed's ZeRO-3 in fp32 where `make setup-trainers` has installed it.
Run: python benchmarks/convert.py [--layers 6 22] [--repeat 3] [--folder DIR]"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from merge import HIDDEN, INNER, KEY_VALUE, VOCABULARY, measured

WRITE_DCP = """
import os, sys, torch, torch.distributed as dist, torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoConfig, AutoModelForCausalLM
like, out = sys.argv[1:]
dist.init_process_group("gloo")
torch.manual_seed(0)
model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(like), dtype=torch.bfloat16)
fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
dcp.save({"model": model.state_dict()}, checkpoint_id=out)
dist.barrier()
os._exit(0)
"""

WRITE_ZERO = """
import os, sys, deepspeed, torch, torch.distributed as dist
from transformers import AutoConfig, AutoModelForCausalLM
like, out = sys.argv[1:]
deepspeed.init_distributed("gloo")
torch.manual_seed(0)
model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(like), dtype=torch.float32)
settings = {
    "train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3},
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
}
engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=settings)
engine.save_checkpoint(out)
dist.barrier()
os._exit(0)
"""

BASE = """
import sys, torch
from transformers import AutoConfig, AutoModelForCausalLM
torch.manual_seed(1)
config = AutoConfig.from_pretrained(sys.argv[1])
AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(sys.argv[1])
"""

WORK = """
import sys, time, torch, lorakit.convert.convert, lorakit.convert.writer, lorakit.convert.readers
checkpoint, like, out = sys.argv[1:]
begun = time.perf_counter()
lorakit.convert(checkpoint, out, like)
print(time.perf_counter() - begun)
"""

TORCH_SAVE = """
import sys, torch
from safetensors.torch import save_file
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
checkpoint, out = sys.argv[1:]
dcp_to_torch_save(checkpoint, out + ".pt")
state = torch.load(out + ".pt", weights_only=True)["model"]
save_file(state, out)
"""

ACCELERATE = """
import sys
from accelerate.utils import merge_fsdp_weights
merge_fsdp_weights(*sys.argv[1:])
"""

ZERO_TO_FP32 = """
import sys
from deepspeed.utils.zero_to_fp32 import convert_zero_checkpoint_to_fp32_state_dict
convert_zero_checkpoint_to_fp32_state_dict(*sys.argv[1:], safe_serialization=True)
"""

COPY, OURS, WORK_ALONE = "`cp` of the weights", "`lorakit convert`", "its work, torch imported before"
DEEPSPEED = Path(sys.prefix) / "deepspeed"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, nargs="+", default=[6, 22], help="of a Llama of 2048 by 5632")
    parser.add_argument("--zero-layers", type=int, nargs="+", default=[2, 6], help="the same for DeepSpeed")
    parser.add_argument("--repeat", type=int, default=3, help="the best of so many counts")
    parser.add_argument("--folder", help="where to work; by default among temporary files")
    arguments = parser.parse_args()
    print("| checkpoint | what | seconds | × `cp` | private memory, MB |\n|---|---|---|---|---|")
    for layers in arguments.layers:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            distributed(Path(folder), layers, arguments.repeat)
    for layers in arguments.zero_layers if DEEPSPEED.is_dir() else ():
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            zero(Path(folder), layers, arguments.repeat)


def distributed(folder: Path, layers: int, repeat: int) -> None:
    like, checkpoint, out = make_base(folder / "like", layers), folder / "checkpoint", folder / "out"
    two_ranks(WRITE_DCP, like, checkpoint)
    table(
        "DCP, bf16", checkpoint.glob("*.distcp"), out, repeat,
        {
            OURS: python("-m", "lorakit", "convert", checkpoint, "--like", like, "--out", out),
            WORK_ALONE: python("-c", WORK, checkpoint, like, out),
            "`dcp_to_torch_save`, and `save_file`": then_synced(out, python("-c", TORCH_SAVE, checkpoint, out)),
            "accelerate `merge-weights`": then_synced(out, python("-c", ACCELERATE, checkpoint, out)),
        },
    )  # fmt: skip


def zero(folder: Path, layers: int, repeat: int) -> None:
    like, checkpoint, out = make_base(folder / "like", layers), folder / "checkpoint", folder / "out"
    two_ranks(WRITE_ZERO, like, checkpoint, PYTHONPATH=str(DEEPSPEED))
    theirs = then_synced(out, python("-c", ZERO_TO_FP32, checkpoint, out))
    table(
        "ZeRO-3, fp32", checkpoint.glob("*/*_optim_states.pt"), out, repeat,  # no step was made: the weights alone
        {
            OURS: python("-m", "lorakit", "convert", checkpoint, "--like", like, "--out", out),
            WORK_ALONE: python("-c", WORK, checkpoint, like, out),
            "`zero_to_fp32.py`": ["env", f"PYTHONPATH={DEEPSPEED}", *theirs],
        },
    )  # fmt: skip


def make_base(folder: Path, layers: int) -> Path:
    folder.mkdir()
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN, "vocab_size": VOCABULARY,
        "intermediate_size": INNER, "num_hidden_layers": layers, "num_attention_heads": 32,
        "num_key_value_heads": KEY_VALUE * 32 // HIDDEN, "tie_word_embeddings": False, "dtype": "bfloat16",
        "max_position_embeddings": 2048,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    subprocess.run(python("-c", BASE, folder), check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return folder


def two_ranks(program: str, like: Path, out: Path, **environment: str) -> None:
    file = out.with_suffix(".py")
    file.write_text(program)
    extensions = {"TORCH_EXTENSIONS_DIR": str(Path(sys.prefix) / "torch-extensions")}
    subprocess.run(
        [*python("-m", "torch.distributed.run"), "--standalone", "--nproc_per_node", "2", str(file), like, out],
        check=True, env={**os.environ, **extensions, **environment}, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip


def python(*arguments: object) -> list[str]:
    return [sys.executable, *map(str, arguments)]


def then_synced(out: Path, command: Sequence[str]) -> list[str]:
    """The same process, so that its memory is what is measured; what it wrote goes to the disk before it ends."""
    return [
        *command[:2],
        f"{command[2]}\nimport subprocess\nsubprocess.run(['sync', '-f', {str(out)!r}])",
        *command[3:],
    ]


def table(name: str, weights: Iterable[Path], out: Path, repeat: int, commands: Mapping[str, list[str]]) -> None:
    files = [str(file) for file in weights]
    copy = ["sh", "-c", 'mkdir "$0" && cp "$@" "$0" && sync "$0"/*', str(out), *files]
    todo = {COPY: copy, **commands}
    size = sum(os.path.getsize(file) for file in files) / 1e9
    best: dict[str, float] = {}
    peaks: dict[str, float] = {}
    for _ in range(repeat):
        for what, command in todo.items():
            seconds, memory, said = measured(command)
            seconds = float(said) if what == WORK_ALONE else seconds
            best[what] = min(seconds, best.get(what, seconds))
            peaks[what] = max(memory, peaks.get(what, 0))
            for left in (out, out.with_name(f"{out.name}.pt")):
                shutil.rmtree(left) if left.is_dir() else left.unlink(missing_ok=True)
            os.sync()
    for what, seconds in best.items():
        print(f"| {name}, {size:.2f} GB | {what} | {seconds:.2f} | {seconds / best[COPY]:.2f} | {peaks[what]:.0f} |")


if __name__ == "__main__":
    main()
