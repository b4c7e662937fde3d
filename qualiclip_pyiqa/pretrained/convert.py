"""Convert weight files of any known layout to safetensors, which nothing can execute and which is memory-mapped."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..errors import SettingsError, WeightsError
from ..files import replacing, writing
from .layouts import OWN_FORMATS, detect_layout
from .read import CONVERTED_FROM, ReadWeights, read
from .verify import provenance
from .write import write_safetensors

SUFFIX = ".safetensors"


@dataclass(frozen=True)
class Converted:
    """What was converted.

    Attributes:
        layout: of the file, a key of `layouts.REQUIRED`.
        tensors: number of tensors.
        bytes: of them.
    """

    layout: str
    tensors: int
    bytes: int


def convert(source: Path, out: Path, force: bool = False) -> Converted:
    """Write the tensors of a weight file to safetensors: the same names, numbers and dtypes.

    Wherever the file is accepted, its conversion is too: by path, or under the file's own name with the suffix
    `.safetensors` in a folder of the look-up path. It holds the sha256 of the file, so that it is still known which
    weights are OpenAI's (these need QuickGELU), and its licence. Tensors that no metric uses, such as the heads of a
    training, are kept; what is no tensor, such as the state of an optimizer, is not.

    Args:
        source: file of any layout that this package reads: QualiCLIP, CLIP (OpenAI's archive or a state dict), learned
            prompts, CONTRIQUE's encoder or a pickled regression on its features, Re-IQA's encoders, and others.
        out: `*.safetensors`, written whole or not at all.
        force: whether to replace `out` if it exists.

    Raises:
        WeightsError: the file is missing, damaged, unsafe, of no known layout, or needs no conversion.
        SettingsError: `out` exists or has another suffix.
        OSError: `out` cannot be written; an existing file is unchanged.
    """
    if out.suffix != SUFFIX:
        raise SettingsError(f"{out} would not be recognised as safetensors; expected a name that ends with {SUFFIX}")
    if out.exists() and not force:
        raise SettingsError(f"{out} exists; pass --force to replace it, or choose another name")
    found = read(source)
    _check_needed(source, found)
    layout = detect_layout(found.tensors, found.metadata)
    terms = provenance(found.file)
    metadata = {
        "layout": layout,
        "licence": terms["licence"],
        "source": f"converted from {found.file.path.name}: {terms['source']}",
        CONVERTED_FROM: terms["sha256"] or "",
    }
    with writing(out), replacing(out) as part:
        write_safetensors(part, found.tensors, metadata)
        read(part, layout=layout)
    sizes = [tensor.numel() * tensor.element_size() for tensor in found.tensors.values()]
    return Converted(layout, len(sizes), sum(sizes))


def _check_needed(source: Path, found: ReadWeights) -> None:
    if found.metadata.get("format") in OWN_FORMATS:
        raise WeightsError(f"{source} is a file of this package, which is safetensors already; use it as it is")
    if found.transformers is not None:
        raise WeightsError(
            f"{source} is in the layout of transformers, whose JSON files beside it belong to it; use its folder as it "
            "is: weights=FOLDER"
        )
    if found.is_safetensors:
        raise WeightsError(f"{source} is safetensors already; use it as it is")
