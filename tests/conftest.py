"""The environment of every test: no hub, no telemetry, fixed seeds, two threads."""

import os
import random
import signal
import tempfile
from pathlib import Path

import hypothesis
import pytest
import torch

_hub_home = tempfile.TemporaryDirectory(prefix="pentad-tests-")

# Libraries read these variables when they are imported, so they are set before any test file is imported.
os.environ |= {
    "DO_NOT_TRACK": "1",
    "HF_HOME": _hub_home.name,  # tests must not read the user's models or token
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_OFFLINE": "1",
    "TERM": "xterm",
    "TOKENIZERS_PARALLELISM": "false",
}
for name in ("COLUMNS", "FORCE_COLOR", "HF_TOKEN", "NO_COLOR"):
    os.environ.pop(name, None)

hypothesis.settings.register_profile("pentad", deadline=None, derandomize=True)
hypothesis.settings.load_profile("pentad")


def pytest_configure(config: pytest.Config) -> None:
    config.add_cleanup(_hub_home.cleanup)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # nohup and `&` make processes ignore SIGINT
    torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)  # more than the cores would wait in turns


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "smollm2" in getattr(item, "fixturenames", ()):
            item.add_marker("network")


@pytest.fixture(autouse=True)
def _seeds() -> None:
    random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The GGUF of SmolLM2-135M-Instruct, downloaded if the user's cache lacks it."""
    from pentad.weights.registry import locate

    return locate("smollm2")
