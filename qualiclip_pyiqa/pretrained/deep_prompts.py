"""Files of deep prompts: this package's own, and those that the authors' code for CLIP-DQA and CLIP-AGIQA writes.

Tensors are named `ATTRIBUTE.text.BLOCK`, `ATTRIBUTE.visual.BLOCK`, and, if there are maps,
`ATTRIBUTE.text_maps.BLOCK.weight` and so on. The authors' code writes a file for each learner.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import WeightsError
from . import folders
from .files import WeightFile
from .layouts import PROMPTS_FORMAT, detect_layout
from .model import LoadedModel
from .read import ReadWeights, read
from .uses import metric_of_authors, prompts_of
from .write import write_safetensors

if TYPE_CHECKING:
    from torch import Tensor

# Names in the authors' files -> ours, and what is added to the block's number. CLIP-AGIQA's code stores the first
# block's text prompt (`ctx`) and visual map (`proj`) apart from the others.
_NAMES = {
    "prompts_text": ("text", 0),
    "prompts_vis": ("visual", 0),
    "prompt_txt_projections": ("text_maps", 0),
    "prompt_vis_projections": ("visual_maps", 0),
    "compound_prompt_projections": ("visual_maps", 1),
}
_FIRST = {"ctx": "text.0", "proj.weight": "visual_maps.0.weight", "proj.bias": "visual_maps.0.bias"}
# Embeddings of fixed tokens, which belong to CLIP; the authors' code drops them too.
_FIXED = ("token_prefix", "token_suffix")


@dataclass(frozen=True)
class LoadedPrompts:
    """Deep prompts from one file, or from one for each learner.

    Attributes:
        files: the files.
        tensors: by name, see above.
        backbone: the CLIP model that they were learned on; "" if the files do not say so.
        clip_sha256: of its tensors, see `clip_sha256`; "" if the files do not say so.
        clip_file: name of its file or folder if it is the user's own; "" for a published one.
    """

    files: tuple[WeightFile, ...]
    tensors: Mapping[str, Tensor] = field(repr=False)
    backbone: str = ""
    clip_sha256: str = ""
    clip_file: str = ""

    @property
    def path(self) -> Path:
        """Path of the first file."""
        return self.files[0].path


def load_prompts(weights: str | Path, metric: str, attributes: Sequence[str]) -> LoadedPrompts:
    """Read deep prompts.

    Args:
        weights: a file of `qualiclip tune`, or one of the authors' code. If there is one for each of two learners, that
            of the quality prompts (`..._tar_...`), beside which the other (`..._aux_...`) is expected.
        metric, attributes: name and attributes of the metric.

    Raises:
        WeightsError: the file is missing, damaged, of another kind or another metric's, or lies without the other one.
    """
    if Path(weights).is_dir():
        raise WeightsError(f"{weights} is a folder; expected a file of prompts of {metric}")
    found = read(weights)
    if found.metadata.get("format") == PROMPTS_FORMAT:
        _check_metric(found, found.metadata["metric"], metric)
        return LoadedPrompts(
            files=(found.file,),
            tensors=found.tensors,
            **{key: found.metadata[key] for key in ("backbone", "clip_sha256", "clip_file")},
        )
    tensors = _named(found, "quality")
    _check_metric(found, metric_of_authors(found.tensors), metric)
    files = [found.file]
    if len(attributes) > 1:
        beside = _beside(found, tensors)
        tensors |= _named(beside, attributes[1])
        files.append(beside.file)
    return LoadedPrompts(tuple(files), tensors)


def metric_of_prompts(path: str | Path) -> str | None:
    """Return the metric that a file of `qualiclip tune`, or one of the authors' code, was learned for; None for others.

    Raises:
        WeightsError: the file is missing or damaged.
    """
    found = read(Path(path))
    return prompts_of(detect_layout(found.tensors, found.metadata), found.tensors, found.metadata)


def clip_sha256(model: LoadedModel) -> str:
    """Hash what tells one CLIP model from another: its activation, and the first row of each of its tensors.

    Files of one model in several formats and precisions have one hash, as values are rounded to float16.
    """
    import torch

    digest = hashlib.sha256(model.activation.encode())
    tensors = {key.removeprefix("text."): value for key, value in model.state.items()}
    for key, value in sorted(tensors.items()):
        if value.dim() and value.is_floating_point() and not key.endswith("attn_mask"):
            digest.update(key.encode() + value[:1].to("cpu", torch.float16).contiguous().numpy().tobytes())
    return digest.hexdigest()


def find_clip(prompts: LoadedPrompts) -> Path | None:
    """Find the user's own CLIP model that prompts were learned on; None for a published one.

    Raises:
        WeightsError: it is neither beside the prompts nor in a folder of QUALICLIP_PYIQA_WEIGHTS.
    """
    name = prompts.clip_file
    if not name:
        return None
    if Path(name).name != name:
        raise WeightsError(f"{prompts.path}: metadata 'clip_file' is {name[:80]!r}; expected a file's name")
    for folder in (prompts.path.parent, *folders.named_folders()):
        if (folder / name).exists():
            return folder / name
    raise WeightsError(
        f"{prompts.path} was learned on the CLIP model {name}, which is neither beside it nor in a folder of "
        f"{folders.FOLDERS_VARIABLE}; put it there, or in Python pass backbone_weights=FILE"
    )


def check_clip(prompts: LoadedPrompts, model: LoadedModel, sha256: str) -> None:
    """Raise WeightsError if prompts were learned on another CLIP model; files of the authors' code know none."""
    if prompts.clip_sha256 not in ("", sha256):
        raise WeightsError(
            f"{prompts.path} was learned on another CLIP model than {model.path} as {model.backbone}: expected "
            f"{prompts.clip_file or 'the published one'} as {prompts.backbone}"
        )


def write_prompts(
    path: Path, tensors: Mapping[str, Tensor], metric: str, backbone: str, clip_sha256: str, clip_file: str
) -> None:
    """Write deep prompts in this package's format, whole or not at all; equal prompts give equal bytes.

    Args:
        path: the file.
        tensors: by name, see above.
        metric: name of the metric.
        backbone, clip_sha256, clip_file: see `LoadedPrompts`.

    Raises:
        OSError: the file cannot be written.
    """
    clip = {"backbone": backbone, "clip_sha256": clip_sha256, "clip_file": clip_file}
    write_safetensors(path, tensors, {"format": PROMPTS_FORMAT, "metric": metric, **clip})


def _check_metric(found: ReadWeights, held: str, wanted: str) -> None:
    if held != wanted:
        raise WeightsError(f"{found.file.path} holds prompts of {held[:80]}, not of {wanted}")


def _named(found: ReadWeights, attribute: str) -> dict[str, Tensor]:
    """Rename the tensors of a file of the authors' code."""
    tensors: dict[str, Tensor] = {}
    path = found.file.path
    shift = int("ctx" in found.tensors)
    for key, value in found.tensors.items():
        if key in _FIXED:
            continue
        match = re.fullmatch(r"(\w+)\.(\d{1,3})((?:\.weight|\.bias)?)", key)
        if key in _FIRST:
            name = _FIRST[key]
        elif match is not None and match[1] in _NAMES:
            kind, first = _NAMES[match[1]]
            name = f"{kind}.{int(match[2]) + first + shift * (kind == 'text')}{match[3]}"
        else:
            raise WeightsError(
                f"{path} holds {key[:80]!r}; expected deep prompts of `qualiclip tune`, or of the authors' code"
            )
        tensors[f"{attribute}.{name}"] = value
    return tensors


def _beside(found: ReadWeights, tensors: Mapping[str, Tensor]) -> ReadWeights:
    """Read the prompts that the authors' code stored beside those of quality."""
    path = found.file.path
    if not any(key.startswith("quality.visual_maps.") for key in tensors):
        raise WeightsError(
            f"{path} holds prompts without maps, such as those of alignment alone; expected the file of the quality "
            "prompts ('..._tar_...')"
        )
    name = "_aux_".join(path.name.rsplit("_tar_", 1))
    if name == path.name or not path.with_name(name).is_file():
        expected = "NAME_aux_REST for NAME_tar_REST" if name == path.name else name
        raise WeightsError(
            f"{path} holds the quality prompts alone; expected those of alignment in the same folder, as {expected}"
        )
    return read(path.with_name(name), layout="deep-prompts")
