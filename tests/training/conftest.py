"""What makes the many small trainings of this folder fast: one thread each, and no look at what was imported."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session", autouse=True)
def quick_trainings() -> Iterator[None]:
    """A Trainer collects garbage several times, which takes longer than such a training: torch and transformers are
    frozen, as they stay anyway. Programs that are started inherit the one thread.
    """
    import peft  # noqa: F401
    import torch
    from transformers import Trainer  # noqa: F401

    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(os.environ, "OMP_NUM_THREADS", "1")
        torch.set_num_threads(1)
        gc.collect()
        gc.freeze()
        yield
        gc.unfreeze()
        torch.set_num_threads(threads)
