"""Metric specs: a metric's name, optionally with prompts of the user's choice.

The grammar::

    spec    = metric | metric ":" prompts
            | file of `qualiclip export` [":" engine], such as "model.onnx:openvino"
    metric  = name, such as "clipiqa" | file, which ends in ".safetensors"
            | "ranking-aware", after whose colon is a caption in place of prompts
    prompts = what `resolve_prompts` takes as a text: a set, POSITIVE/NEGATIVE, FILE.toml or FILE.toml:SET
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..errors import PromptError, SettingsError, quoted
from .prompts import Prompts, prompt_set_names, resolve_prompts
from .registry import METRICS, PromptSpec

FILE_SUFFIX = ".safetensors"
EXPORTED_SUFFIXES = (".onnx", ".pt2")


@dataclass(frozen=True)
class PromptedMetric:
    """A metric with prompts in place of its own, or with a caption.

    Attributes:
        spec: how the user wrote it; the name of its columns.
        metric: name or file.
        prompts: the antonym prompt pairs; None where there is a caption.
        caption: of a metric that ranks by one; "" for others.
    """

    spec: str
    metric: str
    prompts: Prompts | None = None
    caption: str = ""


def split_spec(spec: str) -> tuple[str, str | None]:
    """Split a spec into the metric and its prompts; None if it has none.

    Example:
        >>> split_spec("clipiqa:look"), split_spec("runs/12:30/model.safetensors")
        (('clipiqa', 'look'), ('runs/12:30/model.safetensors', None))
    """
    if spec.endswith(FILE_SUFFIX) or split_exported(spec) is not None:
        return spec, None
    file, mark, prompts = spec.partition(f"{FILE_SUFFIX}:")
    if mark:
        return file + FILE_SUFFIX, prompts
    metric, mark, prompts = spec.partition(":")
    return metric, prompts if mark else None


def split_exported(spec: str) -> tuple[str, str | None] | None:
    """Split the spec of an exported file into its path and engine; None for a spec of another kind.

    Example:
        >>> split_exported("model.onnx"), split_exported("model.onnx:openvino"), split_exported("clipiqa:look")
        (('model.onnx', None), ('model.onnx', 'openvino'), None)
    """
    if spec.endswith(EXPORTED_SUFFIXES):
        return spec, None
    path, mark, engine = spec.rpartition(":")
    return (path, engine) if mark and path.endswith(EXPORTED_SUFFIXES) else None


def parse_spec(spec: str, sets: Mapping[str, Prompts] | None = None) -> str | PromptedMetric:
    """Parse a metric spec; one without prompts is returned as it is.

    Args:
        spec: as the user wrote it.
        sets: named prompt sets besides the predefined ones.

    Raises:
        PromptError: no or invalid prompts after the colon.
        SettingsError: no metric before the colon, or one that takes no prompts.

    Example:
        >>> parse_spec("clipiqa")
        'clipiqa'
        >>> parse_spec("clipiqa:Clear photo./Foggy photo.").prompts.pairs
        (('Clear photo.', 'Foggy photo.'),)
        >>> parse_spec("ranking-aware:Rank the numbers of apples.").caption
        'Rank the numbers of apples.'
    """
    metric, prompts = split_spec(spec)
    if prompts is None:
        return spec
    if not metric:
        raise SettingsError(f"{quoted(spec)} names no metric; expected METRIC:PROMPTS, such as clipiqa:look")
    row = METRICS.get(metric)
    if isinstance(row, PromptSpec) and row.context is not None:
        raise SettingsError(
            f"{quoted(spec)}: {metric} has a learned prompt context, which fits its own prompts only; "
            "choose a metric with fixed prompts, such as clipiqa or qualiclip"
        )
    if row is not None and row.captioned:
        return PromptedMetric(spec, metric, caption=prompts)
    if row is not None and not isinstance(row, PromptSpec):
        raise SettingsError(f"{quoted(spec)}: {metric} takes no prompts; leave out {':' + prompts!r}")
    try:
        return PromptedMetric(spec, metric, resolve_prompts(prompts, sets))
    except PromptError as error:
        raise PromptError(f"{quoted(spec)}: {error}") from error


def spec_for(name: str) -> str | None:
    """Return the spec that an unknown name such as `qualiclip-mini+-sharpness` means; None if it is none of these.

    Only some metrics have a name for each attribute; all metrics with fixed prompts take a set after a colon.

    Example:
        >>> spec_for("qualiclip-mini+-sharpness"), spec_for("clipiqa:look"), spec_for("qualiclip-mini-sharpness")
        ('qualiclip-mini+:sharpness', 'clipiqa:look', None)
    """
    if name in METRICS:
        return None
    metric, prompts = split_spec(name)
    if prompts is None:
        metric, _, prompts = name.rpartition("-")
        if prompts not in prompt_set_names():
            return None
    row = METRICS.get(metric)
    return f"{metric}:{prompts}" if isinstance(row, PromptSpec) and row.context is None else None


def column_belongs(column: str, spec: str) -> bool:
    """Return whether a column holds a score of a metric, `SPEC` or `SPEC.ATTRIBUTE`.

    Example:
        >>> column_belongs("clipiqa:look.contrast", "clipiqa:look"), column_belongs("clipiqa:look", "clipiqa")
        (True, False)
    """
    return spec in (column, column.rpartition(".")[0])


def refuse_prompts(spec: str, where: str) -> None:
    """Raise SettingsError if a spec has prompts, because they have no effect `where`."""
    metric, prompts = split_spec(spec)
    if prompts is not None:
        raise SettingsError(f"{quoted(spec)}: prompts have no effect {where}; pass {metric!r} alone")
