"""Prompt features on disk, so that a model's text tower need not be built for texts that it has encoded before.

A file per model in the folder `prompts` of this package's cache, safe to delete at any time. A file is written whole or
not at all and carries a digest of its content; one that is damaged or of another model is ignored and replaced. Of two
processes that write at once the later one wins: what the other added is computed again when it is needed.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import reason
from . import folders
from .write import write_safetensors

if TYPE_CHECKING:
    from torch import Tensor

MAX_TEXTS = 1024  # per model; the oldest are dropped
MAX_FILES = 32  # the oldest are deleted
_MAX_BYTES = 2**26
_ABANDONED = 86400.0  # seconds after which a partial file is a killed process's

logger = logging.getLogger(__name__)


def cached_features(
    identity: Mapping[str, str], texts: Sequence[str], encode: Callable[[list[str]], Iterable[Tensor]]
) -> dict[str, Tensor]:
    """Return the feature of every text, from the cache or by `encode`.

    Args:
        identity: everything besides a text that decides its feature: the model's hash and the like.
        texts: to look up.
        encode: computes features (D,) of texts, in float32, each text alone, so that a feature does not depend, not
            even by rounding, on which texts were in the cache.
    """
    path = _file(identity)
    known = {} if path is None else _read(path, identity)
    missing = [text for text in dict.fromkeys(texts) if text not in known]
    if missing:
        known |= dict(zip(missing, encode(missing), strict=True))
        if path is not None:
            _write(path, identity, {text: known[text] for text in texts})
    return {text: known[text] for text in texts}


def cache_folder() -> Path | None:
    """Return the folder of the cache; None for a user without one."""
    base = folders.cache_folder()
    return None if base is None else base / "prompts"


def _file(identity: Mapping[str, str]) -> Path | None:
    folder = cache_folder()
    return None if folder is None else folder / f"{hashlib.sha256(_canonical(identity)).hexdigest()[:32]}.safetensors"


def _canonical(value: object) -> bytes:
    return json.dumps(value, sort_keys=True).encode()


def _digest(identity: Mapping[str, str], texts: list[str], rows: Tensor) -> str:
    content = hashlib.sha256(_canonical([dict(identity), texts, list(rows.shape)]))
    content.update(rows.numpy().astype("<f4", copy=False).tobytes())
    return content.hexdigest()


def _read(path: Path, identity: Mapping[str, str]) -> dict[str, Tensor]:
    """Read the features of a file by text; none if it is missing, damaged or of another model."""
    import torch
    from safetensors import safe_open

    try:
        if path.stat().st_size > _MAX_BYTES:
            raise ValueError("it is too large")
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata, rows = file.metadata() or {}, file.get_tensor("features")
        texts = json.loads(metadata["texts"])
        if rows.dtype != torch.float32 or rows.dim() != 2 or len(rows) != len(texts):
            raise ValueError("its texts and features do not fit")
        if metadata["digest"] != _digest(identity, texts, rows):
            raise ValueError("its digest is wrong")
    except FileNotFoundError:
        return {}
    except Exception as error:  # noqa: BLE001 - whatever a damaged file raises; its content is computed again
        logger.warning("%s is not used (%s); prompts are encoded again", path, reason(error, 100))
        return {}
    # Copies: a memory-mapped row would keep the file open, and change with it.
    return {text: row.clone() for text, row in zip(texts, rows, strict=True)}


def _write(path: Path, identity: Mapping[str, str], new: Mapping[str, Tensor]) -> None:
    """Add features to a file, and bound the cache; log why if that fails."""
    import torch

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        merged = _read(path, identity)  # again, for what another process has written since
        for text, feature in new.items():
            merged.pop(text, None)  # the order is that of use
            merged[text] = feature.detach().cpu()
        texts = list(merged)[-MAX_TEXTS:]
        rows = torch.stack([merged[text] for text in texts])
        metadata = {"texts": json.dumps(texts), "digest": _digest(identity, texts, rows), **identity}
        write_safetensors(path, {"features": rows}, metadata)
        _bound(path)
    except OSError as error:  # a read-only or full disk: the features are only computed again
        logger.info("prompt features are not kept in %s (%s)", path.parent, reason(error, 100))


def _bound(newest: Path) -> None:
    """Delete the oldest files beyond `MAX_FILES`, and partial files of killed processes."""
    ages: dict[Path, float] = {}
    for path in newest.parent.glob("*.safetensors*"):
        with suppress(OSError):  # another process deleted it
            ages[path] = path.stat().st_mtime
    whole = sorted((path for path in ages if path.suffix == ".safetensors" and path != newest), key=lambda p: -ages[p])
    partial = [path for path in ages if path.suffix == ".part" and time.time() - ages[path] > _ABANDONED]
    for path in (*whole[MAX_FILES - 1 :], *partial):
        with suppress(OSError):
            path.unlink()
