"""One work on a cluster: joined, its nodes looked at, its tasks ended and what they left removed at the end."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from lorakit.cluster.joining import Where, joined
from lorakit.cluster.parts import drop_parts
from lorakit.cluster.sight import Sight, sight_of
from lorakit.cluster.tasks import Tasks


@contextmanager
def spread(
    ray: Where, folder: Path | None, files: Collection[Path], *, threads: int | None, most: int, device: str = "cpu"
) -> Iterator[tuple[Tasks, Sight]]:
    """Tasks that read `files` and write into `folder`, if they do, once every node is known to see both. What they
    write as parts is gone at the end, but for what was renamed.

    Raises:
        UsageError, LorakitError: see `joined` and `Tasks`.
        NotFound: see `Sight.ensure_here`.
    """
    with joined(ray) as module, sight_of(folder, files) as sight:
        with Tasks(module, threads=threads, most=most, device=device, mark=sight.place) as tasks:
            tasks.ensure_seeing(sight)
            yield tasks, sight
        if folder is not None:
            drop_parts(folder)
