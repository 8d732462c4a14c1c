"""`--ray` takes an address behind an equals sign alone."""

from __future__ import annotations

import sys

import click
import pytest
from click.testing import CliRunner

from lorakit.cli.main import cli
from lorakit.cli.ray_option import WithRay, data_alone, ray_option, where


@click.command(cls=WithRay)
@click.argument("names", nargs=-1)
@ray_option
def verb(names: tuple[str, ...], ray: str | None) -> None:
    click.echo(f"{names} {where(ray)!r}")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["a"], "('a',) False"),
        (["--ray", "a"], "('a',) True"),
        (["a", "--ray"], "('a',) True"),
        (["--ray=head:6379", "a"], "('a',) 'head:6379'"),
        (["a", "--", "--ray"], "('a', '--ray') False"),
    ],
)
def test_an_argument_is_never_taken_for_an_address(arguments: list[str], said: str) -> None:
    assert CliRunner().invoke(verb, arguments).output == f"{said}\n"


@pytest.mark.parametrize("name", ["merge", "convert", "extract"])
def test_the_help_says_what_the_machines_need(name: str) -> None:
    said = " ".join(CliRunner().invoke(cli, [name, "--help"]).output.split())
    assert "All its machines need the same files under the same paths" in said


def test_what_ray_prints_is_no_data(capsys: pytest.CaptureFixture[str]) -> None:
    with data_alone("head:6379"):
        print("(raylet) Task write_one failed", file=sys.stdout)
    with data_alone(None):
        print("out")
    assert tuple(capsys.readouterr()) == ("out\n", "(raylet) Task write_one failed\n")
