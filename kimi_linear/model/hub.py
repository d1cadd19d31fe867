"""A model's folder by its name: a folder as it is, or a repository of the Hugging Face Hub, downloaded into its cache."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from kimi_linear.config.own_file import MODEL_FILES

CODE = "tokenization_*.py"
"""Code that comes with a vocabulary: never run, only carried along, since vLLM and others want it beside the vocabulary."""
DOWNLOADED = (*MODEL_FILES, CODE)
"""What is downloaded. Never a model's code, and never pickles (*.bin, *.pt)."""
_NAME = re.compile(r"[A-Za-z0-9_][\w.-]*/[A-Za-z0-9_][\w.-]*")


def is_hub_name(name: str | Path) -> bool:
    """Whether ``name`` means a repository: the text "owner/model" where no such path, nor a folder "owner", is here."""
    return isinstance(name, str) and bool(_NAME.fullmatch(name)) and not os.path.exists(name.split("/")[0])


def local_folder(name: str | Path, revision: str | None = None, *, files: Sequence[str] = DOWNLOADED) -> Path:
    """The folder of a model, downloaded first where ``name`` is one of the hub's.

    Files that are in the hub's cache already are not downloaded again. Where the cache is, and the token for gated
    repositories, are the business of huggingface_hub.

    Args:
        name: a folder, or text such as "moonshotai/Kimi-Linear-48B-A3B-Instruct". A ``Path`` is always a folder.
        revision: a branch, tag or commit of the hub's repository; its main branch where None.
        files: patterns of the names to download.

    Raises:
        ValueError: a revision of a folder. ImportError: huggingface_hub is missing. FileNotFoundError: the hub has no
            such repository or revision. PermissionError: it is gated or private. ConnectionError: no network, and the
            cache does not hold it.
    """
    if not is_hub_name(name):
        if revision is not None:
            raise ValueError(
                f"revision: expected None for the folder {name}, got {revision!r}; only the hub has revisions"
            )
        return Path(name)
    try:
        import huggingface_hub
        from huggingface_hub import errors
    except ImportError as error:
        raise ImportError(
            f"{name}: no such folder, and downloading it from the hub needs huggingface_hub, which is not installed; "
            "install the extra with: pip install 'kimi-linear[hf]'"
        ) from error
    shown = str(name) if revision is None else f"{name} at {revision}"
    try:
        return Path(huggingface_hub.snapshot_download(str(name), revision=revision, allow_patterns=list(files)))
    except errors.GatedRepoError as error:
        raise PermissionError(
            f"{shown}: the hub gives it only to accounts that accepted its terms; accept them on its page, then log in "
            "with: hf auth login"
        ) from error
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
        raise FileNotFoundError(
            f"{shown}: expected a folder or a model of the hub, found neither here nor there; is it spelled right? "
            "A private one needs: hf auth login"
        ) from error
    except (errors.LocalEntryNotFoundError, errors.HfHubHTTPError, OSError) as error:
        raise ConnectionError(
            f"{shown}: no such folder here, and the hub could not be reached ({_first_line(error)}); connect to the "
            "network, or download it elsewhere and give the folder"
        ) from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
