"""A plugin of axolotl that says what is measured, as the other programs do."""

from __future__ import annotations

from typing import Any

from axolotl.integrations.base import BasePlugin

from tests.trainers.hf_trainer import Said


class SaidPlugin(BasePlugin):  # type: ignore[misc]
    def add_callbacks_post_trainer(self, cfg: Any, trainer: Any) -> list[Any]:
        return [Said("axolotl")]
