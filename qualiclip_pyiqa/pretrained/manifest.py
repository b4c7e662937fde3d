"""Records of all known weight files, read from `weights/manifest.toml`."""

from __future__ import annotations

import functools
import os
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import WeightsError

EMBEDDED_METRIC = "qualiclip-mini"
SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class WeightRecord:
    """One weight file and where to get it.

    Attributes:
        name: key in the manifest.
        file: upstream's file name.
        layout: key of `layouts.REQUIRED`, or `context-tensor` or `params`.
        licence, licence_url, commercial_use: terms of the weights.
        source, citation: who made them, and the paper to cite.
        hf_repo, hf_file: repository and file on the Hugging Face hub; its format may differ from that of `file`.
        hf_revision: full commit hash to download from; empty for the head of `main`.
        hf_sha256, hf_size: of `hf_file`, if its bytes differ from those of `file`.
        urls: other addresses of `file`.
        by_hand: where to get a file that cannot be downloaded; empty for others.
        sha256: of `file`: whole, its first digits, or empty if unknown.
        size: of `file` in bytes; 0 if unknown.
        fitted_side: pixels on the longer side of most photographs that an embedded model was fitted to; 0 for others.
    """

    name: str
    file: str
    layout: str
    licence: str
    licence_url: str
    commercial_use: bool
    source: str
    citation: str
    hf_repo: str = ""
    hf_file: str = ""
    hf_revision: str = ""
    hf_sha256: str = ""
    hf_size: int = 0
    urls: tuple[str, ...] = ()
    by_hand: str = ""
    sha256: str = ""
    size: int = 0
    fitted_side: int = 0

    @property
    def origin(self) -> str:
        """Address for fetching the file by hand; empty for the embedded model and for a file without an address."""
        if self.hf_repo:
            return f"https://huggingface.co/{self.hf_repo}/resolve/{self.hf_revision or 'main'}/{self.hf_file}"
        return self.urls[0] if self.urls else ""

    @property
    def hub_sha256(self) -> str:
        """Known sha256 of the file on the hub; empty if unknown."""
        return self.hf_sha256 or (self.sha256 if self.hf_file == self.file else "")

    @property
    def hub_size(self) -> int:
        """Known size of the file on the hub in bytes; 0 if unknown."""
        return self.hf_size or (self.size if self.hf_file == self.file else 0)

    @property
    def known_hashes(self) -> tuple[str, ...]:
        """Known sha256, whole or abbreviated, of the file and of its conversion on the hub."""
        return tuple(filter(None, (self.sha256, self.hf_sha256)))


def data_folder() -> Path:
    """Folder of the manifest and the embedded model: inside an installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    inside = package / "_weights"
    return inside if inside.is_dir() else package.parent / "weights"


@functools.cache
def _manifest_file() -> dict[str, Any]:
    path = data_folder() / "manifest.toml"
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise WeightsError(f"{path} cannot be read ({error.strerror}); reinstall qualiclip-pyiqa") from error


@functools.cache
def manifest() -> dict[str, WeightRecord]:
    """All records of `weights/manifest.toml` by name."""
    rows = _manifest_file()["weights"].items()
    return {name: WeightRecord(name=name, **{**row, "urls": tuple(row.get("urls", ()))}) for name, row in rows}


def published() -> list[dict[str, Any]]:
    """Published agreements: metric, dataset, srcc, source, verified (read at the source) and mostly plcc."""
    return list(_manifest_file()["published"])


def find_record(name_or_path: str | Path | WeightRecord) -> WeightRecord | None:
    """Return the record that an argument stands for; None for a user's own file.

    Raises:
        WeightsError: neither a record, a name nor a path.
    """
    if isinstance(name_or_path, WeightRecord):
        return name_or_path
    if not isinstance(name_or_path, str | os.PathLike) or not str(name_or_path):
        raise WeightsError(f"weights is {name_or_path!r}; expected a path or a record's name")
    return manifest().get(name_or_path) if isinstance(name_or_path, str) else None


def openai_record(backbone: str) -> WeightRecord:
    """Return the record of OpenAI's weights for an open_clip model, from the manifest or open_clip's table.

    Raises:
        WeightsError: OpenAI released no weights for this model.
    """
    import open_clip

    config = open_clip.get_pretrained_cfg(backbone, "openai") or {}
    url, repo = config.get("url", ""), config.get("hf_hub", "").strip("/")
    for record in manifest().values():
        if (url and url in record.urls) or (repo and repo == record.hf_repo):
            return record
    if not url and not repo:
        raise WeightsError(f"OpenAI released no weights for backbone {backbone!r}; pass weights=FILE")
    like = manifest()["RN50"]
    parts = url.split("/")
    return WeightRecord(
        name=backbone,
        file=parts[-1] or f"{backbone}.pt",
        layout="openai-clip",
        licence=like.licence,
        licence_url=like.licence_url,
        commercial_use=like.commercial_use,
        source=like.source,
        citation=like.citation,
        hf_repo=repo,
        hf_file=like.hf_file if repo else "",
        urls=(url,) if url else (),
        sha256=parts[-2] if url and SHA256.fullmatch(parts[-2]) else "",
    )


@functools.cache
def _open_clips_hashes() -> frozenset[str]:
    import open_clip

    urls = ((open_clip.get_pretrained_cfg(name, "openai") or {}).get("url", "") for name in open_clip.list_models())
    return frozenset(part for url in urls for part in url.split("/") if SHA256.fullmatch(part))


def openai_hashes() -> frozenset[str]:
    """Return the sha256 of every archive released by OpenAI, from the manifest and the URLs in open_clip's table."""
    own = {record.sha256 for record in manifest().values() if record.layout == "openai-clip"}
    return _open_clips_hashes() | own


def record_of(sha256: str) -> WeightRecord | None:
    """Return the manifest's record of a file with this sha256, whatever the file's name; None if there is none."""
    return next((r for r in manifest().values() if any(map(sha256.startswith, r.known_hashes))), None)
