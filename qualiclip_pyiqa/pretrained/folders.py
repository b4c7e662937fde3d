"""Folders that may hold weight files; also for users without a home directory."""

from __future__ import annotations

import os
import sys
from pathlib import Path

FOLDERS_VARIABLE = "QUALICLIP_PYIQA_WEIGHTS"


def home() -> Path | None:
    """The user's home directory; None if there is none, as in containers with an arbitrary user id."""
    try:
        return Path.home()
    except RuntimeError:
        return None


def expanded(path: str | Path) -> Path:
    """Expand `~` in a path; leave it if the home directory is unknown."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def named_folders() -> list[Path]:
    """The folders in QUALICLIP_PYIQA_WEIGHTS, in order."""
    return [expanded(folder) for folder in os.environ.get(FOLDERS_VARIABLE, "").split(os.pathsep) if folder]


def user_cache() -> Path | None:
    """`$XDG_CACHE_HOME` or `~/.cache`; None if neither is known."""
    if own := os.environ.get("XDG_CACHE_HOME"):
        return expanded(own)
    base = home()
    return None if base is None else base / ".cache"


def cache_folder() -> Path | None:
    """This package's cache, created by the first download; None if `user_cache` is."""
    base = user_cache()
    return None if base is None else base / "qualiclip_pyiqa"


def torch_hub() -> Path | None:
    """torch.hub's folder, where pyiqa stores its downloads; None if unknown."""
    # Importing torch takes seconds, and only an imported torch can have been given another folder.
    if "torch" in sys.modules:
        folder = Path(sys.modules["torch"].hub.get_dir())
    elif own := os.environ.get("TORCH_HOME"):
        folder = expanded(own) / "hub"
    else:
        base = user_cache()
        if base is None:
            return None
        folder = base / "torch" / "hub"
    # Without a home directory, torch would use a folder called "~" in the working directory.
    return None if folder.parts[:1] == ("~",) else folder


def hugging_face_cache() -> Path | None:
    """The Hugging Face cache; None if unknown."""
    from huggingface_hub import constants

    folder = Path(constants.HF_HUB_CACHE)
    return None if folder.parts[:1] == ("~",) else folder
