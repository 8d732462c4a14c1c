"""`hf-lorakit`: the same command line behind Hugging Face's own, as `hf lorakit merge …`.

`hf extensions install OWNER/hf-lorakit` finds this program in a package of that name. For a lorakit that is installed
already, `hf-lorakit --register` tells `hf` of it, and `hf extensions remove lorakit` has it forget that.
"""

from __future__ import annotations

import os
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import NoReturn

import click

from lorakit import __version__
from lorakit.cli.main import main, script
from lorakit.cli.shared import note
from lorakit.errors import Conflict, LorakitError
from lorakit.files.folders import read_json, write_json

NAME = "hf-lorakit"
OWNER = "-"  # of no repository: what is registered here is updated by pip, and no one else can come to offer it
FAR = 2**40  # seconds since 1970


def program() -> NoReturn:
    """`lorakit` under another name, but for one flag."""
    if sys.argv[1:2] == ["--register"]:
        main(command=registering, called=NAME)
    script("hf lorakit")


@click.command(NAME)
@click.option("--register", "_", is_flag=True, help="Have `hf lorakit` run this program.")
def registering(_: bool) -> None:
    """Tell `hf` of this lorakit, and print the file that does.

    \b
    hf-lorakit --register
    hf lorakit merge runs/sql/checkpoint-500 --out merged
    """
    print(register(Path(sys.argv[0]).resolve(), extensions_folder()))
    note("`hf lorakit` is this lorakit from now on; `hf extensions remove lorakit` has hf forget it")


def register(executable: Path, folder: Path) -> Path:
    """Have `hf` run an executable as `hf lorakit`: the manifest in its folder of extensions.

    Raises:
        Conflict: another extension has that name.
    """
    manifest = folder / NAME / "manifest.json"
    if manifest.exists() and (other := read_json(manifest)).get("owner") != OWNER:
        raise Conflict(f"hf has a lorakit already, from {other.get('repo_id')}: hf extensions remove lorakit")
    manifest.parent.mkdir(parents=True, exist_ok=True)
    said = {
        "owner": OWNER, "repo": NAME, "repo_id": f"pip/lorakit=={__version__}", "short_name": "lorakit",
        "executable_path": str(executable), "type": "binary", "installed_at": datetime.now(UTC).isoformat(),
        "description": "Get LoRA checkpoints used: merged, mixed, converted and served.", "commit_sha": None,
    }  # fmt: skip
    beside = manifest.with_suffix(".tmp")
    write_json(beside, said)
    beside.replace(manifest)
    news = manifest.with_name(".latest_commit")  # where hf keeps what it heard of newer ones, to ask once a day
    news.touch()
    os.utime(news, (FAR, FAR))
    return manifest


def extensions_folder() -> Path:
    """Where this `hf` looks for extensions.

    Raises:
        LorakitError: it knows none.
    """
    try:
        from huggingface_hub.cli.extensions import EXTENSIONS_ROOT
    except ImportError:
        raise LorakitError("this hf knows no extensions: pip install --upgrade huggingface_hub") from None
    return Path(EXTENSIONS_ROOT).expanduser()
