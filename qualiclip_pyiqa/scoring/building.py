"""Build a scorer's metrics from names, files, pyiqa's metrics and networks."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Mapping
from contextlib import redirect_stdout
from pathlib import Path
from traceback import walk_tb
from typing import TextIO, TypeAlias, cast

import torch
from torch import Tensor, nn

from ..errors import PromptError, SettingsError, WeightsError, did_you_mean, quoted, reason
from ..metrics.base import BlindMetric
from ..metrics.deep_prompt_iqa import DeepPromptIQA
from ..metrics.exported import ExportedIQA
from ..metrics.fitted import FittedIQA
from ..metrics.prompt_iqa import OpenCLIPIQA, OpenQualiCLIP, PromptIQA
from ..metrics.prompts import Prompts
from ..metrics.ranking import RankingAwareIQA
from ..metrics.registry import METRICS
from ..metrics.specs import EXPORTED_SUFFIXES, FILE_SUFFIX, PromptedMetric, parse_spec, spec_for, split_exported
from ..pretrained.deep_prompts import metric_of_prompts
from ..pretrained.layouts import FITTED_FORMAT, detect_layout
from ..pretrained.read import read, stored_format
from ..pretrained.uses import how_to_use
from ..screen import Screen

#: A spec (the name of a metric of pyiqa, or the file of a model trained with this package, optionally with prompts:
#: `clipiqa:look`, see `metrics.specs`), a parsed one, a metric or a network.
MetricLike: TypeAlias = str | os.PathLike[str] | PromptedMetric | nn.Module
#: One metric, several, or a mapping from column to metric.
Metrics: TypeAlias = MetricLike | Iterable[MetricLike] | Mapping[str, MetricLike]


def named_metrics(metrics: Metrics) -> dict[str, str | PromptedMetric | nn.Module]:
    """Return metrics by column.

    Raises:
        SettingsError: no metric, or two with the same name.
    """
    if isinstance(metrics, Mapping):
        named: list[tuple[str, MetricLike]] = list(metrics.items())
    else:
        single = isinstance(metrics, str | os.PathLike | PromptedMetric | nn.Module)
        several: list[MetricLike] = [metrics] if single else list(metrics)  # type: ignore[arg-type,list-item]
        named = [(_name(metric), metric) for metric in several]
    found = {column: os.fspath(metric) if isinstance(metric, os.PathLike) else metric for column, metric in named}
    if len(found) < len(named):
        raise SettingsError("two metrics have the same name; pass a mapping from column to metric")
    if not found:
        raise SettingsError("no metric was given; expected names such as 'qualiclip-mini'")
    return found


def needs_reference(metric: MetricLike) -> bool:
    """Whether a metric is full-reference, from its name or its `metric_mode`, without building it.

    Example:
        >>> needs_reference("psnr"), needs_reference("qualiclip-mini:look")
        (True, False)
    """
    if isinstance(metric, nn.Module):
        return getattr(metric, "metric_mode", "NR") == "FR"
    if not isinstance(metric, str):  # prompts and files belong to this package's metrics
        return False
    from pyiqa.default_model_configs import DEFAULT_CONFIGS

    return DEFAULT_CONFIGS.get(metric, {}).get("metric_mode") == "FR"


def blind_only(metrics: Metrics, where: str = "") -> dict[str, str | PromptedMetric | nn.Module]:
    """Return metrics by column, before they are built, for what takes no references.

    Args:
        metrics: as for `Scorer`.
        where: what takes none, such as "with Ray".

    Raises:
        SettingsError: a full-reference metric, no metric, or two with the same name.
    """
    named = named_metrics(metrics)
    for column, metric in named.items():
        if needs_reference(metric):
            raise SettingsError(
                f"{column} needs a reference image; expected no-reference metrics{where and ' '}{where} "
                "(`qualiclip score --reference PATH` takes full-reference ones)"
            )
    return named


def build_metrics(
    metrics: Mapping[str, str | PromptedMetric | nn.Module], device: torch.device, full_reference: bool = False
) -> dict[str, nn.Module]:
    """Create metrics for `device` from specs, and copy modules, so that the caller's stay unchanged.

    Args:
        metrics: by column.
        device: for the metrics.
        full_reference: take metrics that need a reference too.

    Raises:
        SettingsError: an unknown metric, one that needs a reference or another package, prompts for a metric that takes
            none, an object that is not a metric, or no such file.
        PromptError: invalid prompts, or prompts that the model cannot encode.
        WeightsError: weights are missing or cannot be downloaded.
    """
    if not full_reference:
        metrics = blind_only(metrics)
    built: dict[str, nn.Module] = {}
    for column, metric in metrics.items():
        if isinstance(metric, nn.Module):
            own = _copied(metric)
        elif isinstance(metric, str | PromptedMetric):
            own = _built(metric, device)
        else:
            raise SettingsError(
                f"metric is of type {type(metric).__name__}; expected a name, a pyiqa metric or a network"
            )
        built[column] = own
    return built


def metric_of_file(path: str, prompts: Prompts | None = None) -> BlindMetric:
    """Load a metric of `qualiclip train` or `qualiclip fit`, or one by deep prompts, of `qualiclip tune` or others.

    Args:
        path: the file.
        prompts: in place of those of a model of `qualiclip train`.

    Raises:
        SettingsError: no such file, or prompts for a metric of `qualiclip fit`.
        PromptError: prompts that the model cannot encode.
        WeightsError: the file is damaged or of another kind.
    """
    if not Path(path).exists():
        raise SettingsError(f"{path} does not exist; expected a metric's name or the file of a trained model")
    if (learned := metric_of_prompts(path)) is not None:
        if prompts is not None:
            raise SettingsError(f"{path} holds learned prompts, which fit their own texts only; pass the file alone")
        return DeepPromptIQA(learned, weights=path)
    if stored_format(path) == FITTED_FORMAT:
        if prompts is not None:
            raise SettingsError(f"{path} is a metric of `qualiclip fit`, which takes no prompts; pass the file alone")
        return FittedIQA(weights=path)
    # Not by name, which is pyiqa's own metric if QUALICLIP_PYIQA_AUTOLOAD=0.
    return OpenQualiCLIP("qualiclip", weights=path, prompts=prompts)


def _built(metric: str | PromptedMetric, device: torch.device) -> nn.Module:
    import pyiqa

    known = pyiqa.list_models()
    if isinstance(metric, str) and metric not in known:
        # os.path, since Path.is_file raises an OSError for a prompt that is longer than a file's name can be.
        if os.path.isfile(metric) and not metric.endswith((FILE_SUFFIX, *EXPORTED_SUFFIXES)):  # noqa: PTH113
            raise _another_file(metric)
        metric = parse_spec(metric)
    if isinstance(metric, PromptedMetric):
        return _prompted(metric)
    exported = split_exported(metric)
    if exported is not None:
        return ExportedIQA(*exported)
    if metric.endswith(FILE_SUFFIX):
        return metric_of_file(metric)
    if metric not in known:
        meant = spec_for(metric)
        advice = did_you_mean(metric, known) if meant is None else f"; did you mean {meant!r}?"
        raise SettingsError(f"unknown metric {metric!r}{advice} (`pyiqa -ls` lists all)")
    return _created(metric, device)


def _another_file(path: str) -> SettingsError:
    """Say what a file is that cannot stand for a metric, since its suffix is not that of a trained model."""
    try:
        found = read(Path(path))
    except WeightsError:  # not a weight file at all
        use = None
    else:
        use = how_to_use(Path(path), detect_layout(found.tensors, found.metadata), found.tensors, found.metadata)
    return SettingsError(
        use
        or f"{path} is a file without the suffix {FILE_SUFFIX}; expected a metric's name or the file of a trained model"
    )


def refuse_foreign_prompts(metric: MetricLike) -> None:
    """Raise SettingsError for prompts of another package's metric, which takes none."""
    if not isinstance(metric, PromptedMetric) or metric.metric in METRICS:
        return
    import pyiqa

    if metric.metric in pyiqa.list_models():
        name = metric.metric
        raise SettingsError(
            f"{quoted(metric.spec)}: {name} is another package's metric, which takes no prompts; pass {name!r} alone"
        )


def _prompted(metric: PromptedMetric) -> BlindMetric:
    name = metric.metric
    if name.endswith(FILE_SUFFIX):
        return metric_of_file(name, metric.prompts)
    if name not in METRICS:
        refuse_foreign_prompts(metric)
        raise SettingsError(f"unknown metric {name!r} in {quoted(metric.spec)}{did_you_mean(name, METRICS)}")
    # Not by name, as in `metric_of_file`.
    if METRICS[name].captioned:
        return RankingAwareIQA(name, caption=metric.caption)
    kinds: dict[str, type[PromptIQA]] = {kind.__name__: kind for kind in (OpenCLIPIQA, OpenQualiCLIP)}
    try:
        return kinds[METRICS[name].arch](name, prompts=metric.prompts)
    except PromptError as error:
        raise PromptError(f"{quoted(metric.spec)}: {error}") from error


def _created(name: str, device: torch.device) -> nn.Module:
    """Create a metric of pyiqa; what other packages raise becomes this package's errors.

    They print what they download, which must not get into a table on standard output.
    """
    import pyiqa

    try:
        with redirect_stdout(cast(TextIO, Screen())):
            metric: nn.Module = pyiqa.create_metric(name, device=device)
    except (SettingsError, PromptError, WeightsError, MemoryError, torch.OutOfMemoryError):
        raise
    except OSError as error:
        raise WeightsError(
            f"metric {name} cannot be built ({type(error).__name__}: {reason(error)}); check the network, or "
            f"{_by_hand(error)}"
        ) from error
    except Exception as error:
        raise SettingsError(
            f"metric {name} cannot be built ({type(error).__name__}: {reason(error)}); "
            "see pyiqa's documentation for what it needs"
        ) from error
    return metric


def _by_hand(error: OSError) -> str:
    """Say which file to put where, in place of the download that failed."""
    for frame, _ in walk_tb(error.__traceback__):
        if frame.f_code is torch.hub.download_url_to_file.__code__:  # the error has neither the URL nor the file
            return f"download {frame.f_locals['url']} and put it at {frame.f_locals['dst']}"
    return f"put the files of its weights into {Path(torch.hub.get_dir()) / 'pyiqa'}"


def blind_metric(metric: nn.Module) -> BlindMetric | None:
    """Return the network of this package in a metric, or None for other packages' metrics."""
    net = getattr(metric, "net", metric)
    return net if isinstance(net, BlindMetric) else None


def columns_of(name: str, metric: nn.Module) -> list[str]:
    """Return the names of a metric's scores: `name`, or `name.attribute` if it has several attributes."""
    net = blind_metric(metric)
    if net is None or len(net.attributes) == 1:
        return [name]
    return [f"{name}.{attribute}" for attribute in net.attributes]


def _name(metric: MetricLike) -> str:
    if isinstance(metric, PromptedMetric):
        return metric.spec
    if isinstance(metric, str | os.PathLike):
        return os.fspath(metric)
    named = getattr(metric, "metric_name", None) or getattr(metric, "model_type", None)
    return str(named) if named else type(metric).__name__


def _copied(metric: nn.Module) -> nn.Module:
    """Copy a metric so that the copy follows `.to()`.

    pyiqa's metrics derive their device from `dummy_param`. Off the CPU it is not a parameter but the result of `.to()`:
    it would not move, and PyTorch refuses to copy tensors that are not leaves of the graph.
    """
    marker = metric.__dict__.get("dummy_param")
    if not isinstance(marker, Tensor):
        return copy.deepcopy(metric)
    parameter = nn.Parameter(marker.detach())
    copied = copy.deepcopy(metric, {id(marker): parameter})
    copied.dummy_param = parameter
    return copied
