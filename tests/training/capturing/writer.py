"""A program that writes checkpoints as a Trainer does, without one: fast, and with words on what it wrote.

python writer.py '{"template": FOLDER, "steps": 5, "pause": 0.1, "limit": 1, "code": 0}'

It copies a finished checkpoint file by file, the state last, with weights of their own for each step; of more than
`limit` it removes the oldest, after the newest. A line a checkpoint on stdout: step, and SHA-256 of each file.
"""

import hashlib
import json
import os
import shutil
import sys
import time
from pathlib import Path

ORDER = ("adapter_model.safetensors", "adapter_config.json", "trainer_state.json")


def write(template: Path, folder: Path, step: int) -> None:
    folder.mkdir(exist_ok=True)
    for name in ORDER:
        content = bytearray((template / name).read_bytes())
        if name == ORDER[0]:
            content[-8:-4] = step.to_bytes(4, "little")
        if name == ORDER[-1]:
            content = json.dumps({**json.loads(content), "global_step": step}).encode()
        (folder / f".tmp-{name}").write_bytes(content)
        (folder / f".tmp-{name}").rename(folder / name)


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def main(
    template: str, steps: int, pause: float = 0.0, limit: int | None = None, code: int = 0, first: int = 1
) -> None:
    output = Path(os.environ["FLEXAI_OUTPUT_CHECKPOINT_DIR"])
    assert os.environ["LORAKIT_OUTPUT_CHECKPOINT_DIR"] == str(output)
    written = []
    for step in range(first, first + steps):
        folder = output / f"checkpoint-{step}"
        write(Path(template), folder, step)
        print(json.dumps({"step": step, "files": digests(folder)}), flush=True)
        written.append(folder)
        if limit is not None and len(written) > limit:
            shutil.rmtree(written.pop(0))
        time.sleep(pause)
    sys.exit(code)


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
