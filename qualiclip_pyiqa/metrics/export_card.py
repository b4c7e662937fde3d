"""What an exported file says about itself: one JSON object, in an ONNX file's metadata or an entry of a .pt2 archive.

The writer (`export`) and the reader (`metrics.exported`) share this class, so that no field can be written and not
read.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from ..errors import PromptError, WeightsError
from ..images.convert import MIN_SIDE
from .prompts import Prompts, resolve_prompts

#: Key of the JSON object in an ONNX file's metadata, and the name of a .pt2 archive's entry.
KEY = "qualiclip_pyiqa.json"
FORMAT = "qualiclip-pyiqa-export/1"
#: What a graph takes -> shape and dtype, in words.
INPUTS = {
    "float": "float32 (N, 3, H, W), RGB in 0..1, H and W at least 32",
    "uint8": "uint8 (N, H, W, 3), RGB in 0..255, H and W at least 32",
}
IMAGE, SCORES = "image", "scores"  # names of a graph's input and output
PRECISIONS = ("fp32", "int8")
_MAX_JSON = 2**20  # characters
_MAX_NAMES, _MAX_TEXT = 1000, 1000


@dataclass(frozen=True)
class ExportCard:
    """Description of an exported metric.

    Attributes:
        metric: name of the metric.
        attributes: names of the A columns of `scores`.
        lower_better: whether a lower score means a better image.
        score_range: lowest and highest score, such as `"0, 1"`.
        paper: reference of the method.
        licence: of the weights.
        input: key of `INPUTS`.
        largest: number of pixels of the largest image that is scored whole. A larger one would take much memory, so its
            score is the mean over windows of at most `window` x `window` pixels, evenly spread, as by `tile`.
        window: see `largest`.
        precision: `fp32`, or `int8` for a quantised graph.
        quantisation: how it was quantised; empty for fp32.
        opset: version of ONNX's operators; 0 for a .pt2 archive.
        description: the metric's own `describe()`: prompts, weight files with their hashes, backbone and others.
        version, torch: of this package and PyTorch, when the file was written.
        format: version of this object.
    """

    metric: str
    attributes: tuple[str, ...]
    lower_better: bool
    score_range: str
    paper: str
    licence: str
    input: str
    largest: int
    window: int
    precision: str
    quantisation: dict[str, Any]
    opset: int
    description: dict[str, Any]
    version: str
    torch: str
    format: str = FORMAT

    @property
    def prompts(self) -> Prompts | None:
        """Antonym prompt pairs of each attribute; None for a metric without prompts."""
        return _prompts(self.description, self.attributes)

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str | None, source: object) -> ExportCard:
        """Read and validate the object.

        Args:
            text: as `to_json` wrote it; None if the file has none.
            source: name of the file, for error messages.

        Raises:
            WeightsError: there is none, it is of another version, or a field is missing or invalid.
        """
        if text is None:
            raise WeightsError(f"{source} was not written by `qualiclip export`; expected a file with its metadata")
        try:
            values = json.loads(text) if len(text) <= _MAX_JSON else None
        except (ValueError, RecursionError):
            values = None
        if not isinstance(values, dict):
            raise WeightsError(f"{source}: the metadata of `qualiclip export` is damaged; export the metric again")
        if values.get("format") != FORMAT:
            raise WeightsError(
                f"{source} has format {str(values.get('format'))[:80]!r}; expected {FORMAT!r}: for a newer file update "
                "qualiclip-pyiqa, or export the metric again"
            )
        names = [field.name for field in fields(cls)]
        wrong = next((name for name in names if not _CHECKS[name](values.get(name))), None)
        if wrong is not None:
            value = repr(values[wrong])[:80] if wrong in values else "missing"
            raise WeightsError(f"{source}: {wrong!r} of the metadata is {value}; export the metric again")
        try:
            _prompts(values["description"], values["attributes"])
        except PromptError as error:
            raise WeightsError(f"{source}: the metadata is damaged ({error}); export the metric again") from error
        return cls(**{name: values[name] for name in names} | {"attributes": tuple(values["attributes"])})


def _is_text(value: object) -> bool:
    return isinstance(value, str) and 0 < len(value) <= _MAX_TEXT and value.isprintable()


def is_range(value: object) -> bool:
    """Whether a score range is two finite numbers, lower and higher, as a file must state it."""
    try:
        low, high = map(float, value.split(",")) if isinstance(value, str) else (math.nan, math.nan)
    except ValueError:
        return False
    return math.isfinite(low) and math.isfinite(high) and low < high


def _are_names(value: object) -> bool:
    return isinstance(value, list) and 0 < len(value) <= _MAX_NAMES and all(map(_is_text, value))


def _among(least: int, most: int) -> Callable[[object], bool]:
    return lambda value: isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


_CHECKS: dict[str, Callable[[Any], bool]] = {
    "metric": _is_text,
    "attributes": lambda value: _are_names(value) and len(set(value)) == len(value),
    "lower_better": lambda value: isinstance(value, bool),
    "score_range": is_range,
    "paper": _is_text,
    "licence": _is_text,
    "input": lambda value: isinstance(value, str) and value in INPUTS,
    "largest": _among(MIN_SIDE**2, 2**31),
    "window": _among(MIN_SIDE, 2**15),
    "precision": lambda value: isinstance(value, str) and value in PRECISIONS,
    "quantisation": lambda value: isinstance(value, dict),
    "opset": _among(0, 1000),
    "description": lambda value: isinstance(value, dict),
    "version": _is_text,
    "torch": _is_text,
    "format": _is_text,
}


def _prompts(description: dict[str, Any], attributes: Sequence[str]) -> Prompts | None:
    found = description.get("prompts")
    if found is None:
        return None
    if not isinstance(found, dict) or list(found) != list(attributes):
        raise PromptError("its prompts are not those of its attributes")
    return resolve_prompts(found)


def licence_of(description: dict[str, Any]) -> str:
    """Return the licences of the weight files in a metric's `describe()`.

    Example:
        >>> licence_of({"weights": {"licence": "MIT"}, "context": {"licence": "CC0-1.0"}})
        'MIT AND CC0-1.0'
    """
    files = [value for value in (description.get("weights"), description.get("context")) if isinstance(value, dict)]
    return " AND ".join(dict.fromkeys(str(file.get("licence", "unknown")) for file in files)) or "unknown"
