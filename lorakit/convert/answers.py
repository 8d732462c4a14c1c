"""One question about a checkpoint and its answer; and the cures that several answers share."""

from __future__ import annotations

from dataclasses import dataclass

MERGE = "merge it into its base (lorakit merge), and serve that"
NEAR = (
    "`lorakit convert ADAPTER --base BASE --approximate` makes plain LoRA of it that is near, and says how near; or "
    f"{MERGE}"
)
PEFT = "run it with the PEFT that wrote it, as no engine and no merge does the same"
OTHER_BASE = "serve it beside the base that it was trained on"


@dataclass(frozen=True, slots=True)
class Check:
    """One question and its answer: None where it can't be answered. `cure` says what helps where it is no."""

    name: str
    ok: bool | None
    reason: str | None = None
    cure: str | None = None

    @property
    def problem(self) -> str | None:
        """What forbids serving, and what helps, in one line."""
        if self.ok is not False:
            return None
        return f"{self.reason}: {self.cure}" if self.cure else self.reason

    @property
    def question(self) -> str | None:
        """What has to be known before it may be served, and what helps, in one line."""
        return f"{self.reason}: {self.cure}" if self.ok is None and self.cure else None
