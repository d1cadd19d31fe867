"""The conditions of these tests: no network, no progress bars, and transformers as it came before and after each test."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from kimi_linear.integrations import transformers as integration

from .tiny import saved, tiny_model


@pytest.fixture(scope="session", autouse=True)
def offline(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Hosts look for models and data on the network; here they find none, at once."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TOKENIZERS_PARALLELISM", "HF_HUB_DISABLE_PROGRESS_BARS"):
            patch.setenv(name, "0" if name.startswith("TOK") else "1")
        patch.setenv("HF_HOME", str(tmp_path_factory.mktemp("hf")))
        yield


@pytest.fixture(autouse=True)
def undone() -> Iterator[None]:
    """No test leaves a patch behind."""
    integration.unpatch()
    yield
    integration.unpatch()


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model in the release layout."""
    return saved(tiny_model(), tmp_path_factory.mktemp("release") / "model")
