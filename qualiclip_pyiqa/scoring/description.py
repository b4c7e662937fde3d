"""Describe metrics in JSON-ready values, for `Scorer.describe` and the descriptions of tables."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from itertools import groupby
from typing import Any

import torch
from torch import nn

from ..metrics.prompts import Pair
from .building import blind_metric, needs_reference


def lower_is_better(metric: nn.Module) -> bool:
    """Return the direction of a metric; if it states none, higher is better."""
    return bool(getattr(getattr(metric, "net", metric), "lower_better", getattr(metric, "lower_better", False)))


def attributes_of(metrics: Mapping[str, nn.Module]) -> dict[str, tuple[str, tuple[Pair, ...]]]:
    """Return each column's attribute, and the antonym prompt pairs whose mean it is (none without prompts).

    Args:
        metrics: by column, those of one metric beside each other and in the order of its attributes.
    """
    found: dict[str, tuple[str, tuple[Pair, ...]]] = {}
    for _, columns in groupby(metrics, key=lambda column: id(metrics[column])):
        own = list(columns)
        net = blind_metric(metrics[own[0]])
        names = ("quality",) if net is None else net.attributes
        prompts = getattr(net, "prompts", None)
        groups = {} if prompts is None else dict(prompts.groups)
        found |= {column: (name, groups.get(name, ())) for column, name in zip(own, names, strict=True)}
    return found


def describe_metric(metric: nn.Module, device: torch.device) -> dict[str, Any]:
    """Describe a metric by its own `describe()`, or another package's metric by its name and pyiqa's version.

    Other packages' metrics run in float32 whatever the scorer's precision; on NVIDIA GPUs, pyiqa allows TF32 for
    convolutions.
    """
    net: Any = getattr(metric, "net", metric)
    if callable(getattr(net, "describe", None)):
        own: dict[str, Any] = {**net.describe(), "lower_better": lower_is_better(metric)}
        for key in ("version", "reading"):  # `Scorer.describe` states them for all metrics
            own.pop(key, None)
        return own
    return {
        "metric": getattr(metric, "metric_name", None),
        "architecture": f"{type(net).__module__}.{type(net).__qualname__}",
        "lower_better": lower_is_better(metric),
        **({"reference": "needed: the score compares an image with its reference"} if needs_reference(metric) else {}),
        "pyiqa_version": version("pyiqa"),
        "precision": "fp32, convolutions in TF32" if device.type == "cuda" else "fp32",
    }
