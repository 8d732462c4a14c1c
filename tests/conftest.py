"""What every test may use. Imports no torch: most tests need none."""

from __future__ import annotations

import os
import tempfile

# No test may reach the network; set before any library looks.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
# Nor look into the store of whoever runs it.
os.environ["LORAKIT_HOME"] = os.path.join(tempfile.gettempdir(), "lorakit-tests-have-no-store")

pytest_plugins = ["tests.world"]
