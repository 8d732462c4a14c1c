"""The command line: one file a verb, loaded when it is used."""

from lorakit.cli.main import main, script

__all__ = ["main", "script"]
