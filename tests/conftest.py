"""What every test may use. Imports no torch: most tests need none."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
from collections.abc import Generator

import pytest
from hypothesis import HealthCheck, settings

# No test may reach the network; set before any library looks.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
# Nor look into the store of whoever runs it.
os.environ["LORAKIT_HOME"] = os.path.join(tempfile.gettempdir(), "lorakit-tests-have-no-store")

# The same examples each time, so that a run says something of the change and nothing of luck; HYPOTHESIS_PROFILE=search
# looks for new ones. Nothing depends on how fast the machine is, and one folder serves all examples of a test.
CALM = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]}
settings.register_profile("same", derandomize=True, **CALM)
settings.register_profile("search", max_examples=1000, **CALM)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as a shell has it for what it runs in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)

# The suite's groups of tests that take more than half a minute, the longest first.
LONGEST = (
    "world", "tests/examples/test_examples.py", "tests/checkpoints/test_real_trainers.py",
    "tests/checkpoints/test_tensors.py", "tests/mix/test_real_vllm.py", "tests/convert/test_vllm_rows.py",
    "tests/training/test_capture.py", "tests/page/test_screens.py", "tests/server/test_supervisor.py",
)  # fmt: skip

pytest_plugins = ["tests.world", "tests.trainers.written"]


@pytest.fixture
def plain_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pickle looks for some names in every module that is loaded, and those of transformers load more when asked."""
    for module in [name for name in sys.modules if name.partition(".")[0] == "transformers"]:
        monkeypatch.delitem(sys.modules, module)


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups, which it does for pytest before 9.2
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """For the suite's processes: a file is in one of them, and so are all tests that share one real vLLM. The
    longest groups are begun first, so that no process is left with one at the end."""
    groups = {item: _group(item) for item in items}
    for item, group in groups.items():
        item.add_marker(pytest.mark.xdist_group(group))
    items.sort(key=lambda item: LONGEST.index(groups[item]) if groups[item] in LONGEST else len(LONGEST))


def _group(item: pytest.Item) -> str:
    uses_world = isinstance(item, pytest.Function) and "world" in item.fixturenames
    return "world" if uses_world else item.nodeid.partition("::")[0]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Names that are no text may be in what was logged; xdist hands reports on as text alone."""
    report = yield
    report.sections = [(name, text.encode(errors="backslashreplace").decode()) for name, text in report.sections]
    return report
