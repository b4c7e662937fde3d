"""What decides a score, as plain values: `Scorer.describe`, which tables of scores are stored with."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import torch
from torch import nn


def lower_is_better(metric: nn.Module) -> bool:
    """Return the direction of a metric of this package or of pyiqa; of a network that states none, higher is better."""
    return bool(getattr(getattr(metric, "net", metric), "lower_better", getattr(metric, "lower_better", False)))


def describe_metric(metric: nn.Module, device: torch.device) -> dict[str, Any]:
    """Describe a metric: its own `describe()`, or name and version of what another package brings.

    Another package's metrics run in float32 whatever the scorer's precision, and as pyiqa runs them: on an NVIDIA GPU
    it allows TF32 for convolutions.
    """
    net: Any = getattr(metric, "net", metric)
    if callable(getattr(net, "describe", None)):
        own: dict[str, Any] = {**net.describe(), "lower_better": lower_is_better(metric)}
        for each in (
            "version",
            "reading",
        ):  # the whole has them, and perhaps other rules
            own.pop(each, None)
        return own
    return {
        "metric": getattr(metric, "metric_name", None),
        "architecture": f"{type(net).__module__}.{type(net).__qualname__}",
        "lower_better": lower_is_better(metric),
        "pyiqa_version": version("pyiqa"),
        "precision": "fp32, convolutions in TF32" if device.type == "cuda" else "fp32",
    }
