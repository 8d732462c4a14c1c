"""Run a trainer in its own environment under strace, and keep what it wrote.

python -m tests.trainers.by_hand.keep torchtune PYTHON        PYTHON is the environment's
  torchtune   pip install torchtune==0.6.1 torchao==0.15.0 torchdata
  litgpt      pip install --no-deps litgpt==0.5.13; pip install lightning==2.6.6 jsonargparse
  axolotl     pip install -c <(echo torch==2.13.0) axolotl==0.19.0
  llamafactory  pip install --no-deps llamafactory==0.9.5; pip install what it requires but gradio, modelscope,
              torchaudio and torchvision
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

from tests.trainers.by_hand import HERE
from tests.trainers.by_hand.small import make_base
from tests.trainers.record import TRACING, completed, order_of, thinned

WORK = Path("/tmp/lorakit-by-hand")  # one place, as some write it into their files
# What is kept of the run's folder: the checkpoints, and what belongs to them.
SAVED = {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "tokenizer_config.json",
         "chat_template.jinja", "checkpoint-2", "checkpoint-4"}  # fmt: skip
KEPT = {
    "torchtune": {"epoch_0", "epoch_1", "recipe_state"},
    "litgpt": {"step-000002", "step-000004", "final"},
    "axolotl": {*SAVED, "config.json"},
    "llamafactory": {*SAVED, "training_args.bin", "trainer_state.json"},
}
SAID = re.compile(r'\{"run": .*\}')  # progress bars may stand before it


def without_owner(member: tarfile.TarInfo) -> tarfile.TarInfo:
    member.uid = member.gid = 0
    member.uname = member.gname = ""
    return member


def main(name: str, python: str) -> None:
    shutil.rmtree(WORK, ignore_errors=True)
    base, out, log = make_base(WORK / "base"), WORK / "work" / name, WORK / "strace.log"
    program = [python, "-m", f"tests.trainers.by_hand.{name}_lora", str(base), str(out)]
    command = [*TRACING, "-o", str(log), *program]
    shown = subprocess.run(command, check=True, cwd=HERE.parents[2], stdout=subprocess.PIPE, text=True).stdout
    if said := SAID.findall(shown):
        (HERE / f"{name}.said.jsonl").write_text("\n".join(said) + "\n")
    order = order_of(list(completed(log.read_text(errors="replace").splitlines())), out, KEPT[name])
    lines = ",\n ".join(map(json.dumps, [("folder", "."), *thinned(order)]))
    (HERE / f"{name}.json").write_text(f"[\n {lines}\n]\n")
    with tarfile.open(HERE / f"{name}.tar.gz", "w:gz", format=tarfile.PAX_FORMAT) as archive:
        for kept in sorted(KEPT[name]):
            archive.add(out / kept, kept, filter=without_owner)
    shutil.rmtree(WORK)


if __name__ == "__main__":
    main(*sys.argv[1:])
