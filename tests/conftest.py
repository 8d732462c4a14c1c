"""What every test may use. Imports no torch: most tests need none."""

from __future__ import annotations

import os
import tempfile

from hypothesis import settings

# No test may reach the network; set before any library looks.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
# Nor look into the store of whoever runs it.
os.environ["LORAKIT_HOME"] = os.path.join(tempfile.gettempdir(), "lorakit-tests-have-no-store")

# The same examples each time, so that a run says something of the change and nothing of luck; HYPOTHESIS_PROFILE=search
# looks for new ones.
settings.register_profile("same", derandomize=True, deadline=None)
settings.register_profile("search", deadline=None, max_examples=1000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))

pytest_plugins = ["tests.world"]
