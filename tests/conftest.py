"""The conditions that every test runs under.

One torch thread, fixed seeds, uninitialised memory filled with NaN, and the jaxtyping shapes of the public signatures
checked at every call. Three markers change this for a test, a class or a module (``pytestmark``):

- ``unchecked_shapes``: bad input reaches our own validation, whose message is then what the test reads;
- ``unpoisoned``: memory from ``torch.empty`` stays as it comes, and non-deterministic operations are allowed;
- ``gpu``, ``hopper``, ``browser``: skipped, with the reason, where the machine has no such thing.
"""

from __future__ import annotations

import importlib.util
import os
import random
import shutil
from collections.abc import Iterator

import jaxtyping

# cuBLAS needs this before its first call, or deterministic mode refuses every matrix product on a GPU.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
# Before anything imports the package: modules that are already loaded would go unchecked.
CHECKED = ("kimi_linear.ops", "kimi_linear.model")
jaxtyping.install_import_hook(CHECKED, "beartype.beartype")

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)

CHROMIUM = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test starts from the same random numbers, whatever ran before it."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002  (libraries still draw from the global generator)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def poisoned(request: pytest.FixtureRequest) -> Iterator[None]:
    """``torch.empty`` gives NaN, so that a result that reads memory nobody wrote cannot look right.

    Torch fills only in its deterministic mode. That mode refuses some CUDA operations outright, so GPU tests get it
    with warnings instead of errors.
    """
    wanted = request.node.get_closest_marker("unpoisoned") is None
    on_gpu = any(request.node.get_closest_marker(name) for name in ("gpu", "hopper"))
    torch.use_deterministic_algorithms(wanted, warn_only=on_gpu)
    torch.utils.deterministic.fill_uninitialized_memory = wanted
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def shapes_checked(request: pytest.FixtureRequest) -> Iterator[None]:
    """The shapes written in public signatures hold at every call, unless the test is marked ``unchecked_shapes``."""
    jaxtyping.config.update("jaxtyping_disable", request.node.get_closest_marker("unchecked_shapes") is not None)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def why_skip(marker: str) -> str | None:
    """Why a test with this marker cannot run on this machine, or None where it can."""
    if marker == "gpu" and not torch.cuda.is_available():
        return "needs a CUDA device; torch sees none"
    if marker == "hopper":
        if not torch.cuda.is_available():
            return "needs a CUDA device of compute capability 9.0; torch sees none"
        if torch.cuda.get_device_capability() != (9, 0):
            return f"needs compute capability 9.0, got {torch.cuda.get_device_capability()}"
    if marker == "browser":
        if not any(shutil.which(name) for name in CHROMIUM):
            return f"needs headless Chromium; none of {', '.join(CHROMIUM)} is installed (apt-get install chromium)"
        if importlib.util.find_spec("playwright") is None:
            return "needs playwright; pip install -c constraints.txt playwright"
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reasons = {marker: why_skip(marker) for marker in ("gpu", "hopper", "browser")}
    for item in items:
        for marker, reason in reasons.items():
            if reason is not None and item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))
