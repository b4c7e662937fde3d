"""Maps of many images by one metric."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import SettingsError, did_you_mean
from ..metrics.base import BlindMetric, check_batch
from ..metrics.exported import ExportedIQA
from ..metrics.prompts import Pair
from ..metrics.words import comparatives
from ..scoring.building import Metrics, blind_metric, blind_only, build_metrics
from ..scoring.description import lower_is_better
from ..scoring.scorer import usable_devices
from .contributions import contributions
from .found import Found, kinds_of, no_such_map
from .gradcam import grad_cam
from .large import FittedTo
from .local import local_scores
from .occlusion import count_passes, occlusion
from .quality_map import KINDS, QualityMap, scale_of

# Besides occlusion: (metric, images as from `BlindMetric.prepare`, columns of the scores) -> maps of these columns.
_COMPUTE: dict[str, Callable[[Any, Tensor, Sequence[int]], Found]] = {
    "local": local_scores,
    "contributions": contributions,
    "gradcam": grad_cam,
}


class Mapper:
    """Maps of any number of images by one metric, which is built once.

    Args:
        metric: name or file of a metric, a metric of pyiqa, or a `BlindMetric`; or a mapping from its name to it.
        kind: one of KINDS; default: "local", or "occlusion" for metrics that have no local scores.
        attributes: names of the attributes to map; default: all.
        device: default: CUDA if available; for a network, where it is. A network is copied for another device.

    Attributes:
        metric: name of the metric.
        attributes: names of the mapped attributes, in the order of the maps.
        kind: of the maps.
        network: the metric.

    Raises:
        SettingsError: an unknown metric, kind, attribute or device, or a kind that this metric does not have.
        WeightsError: a weight file is missing or damaged.

    Example:
        >>> import torch
        >>> from qualiclip_pyiqa.explain.mapper import Mapper
        >>> mapper = Mapper("qualiclip-mini", device="cpu")
        >>> maps = mapper.maps(torch.rand(2, 3, 96, 128))
        >>> len(maps), maps[0][0].attribute, maps[0][0].values.shape
        (2, 'quality', (3, 4))
    """

    def __init__(
        self,
        metric: Metrics,
        kind: str | None = None,
        attributes: Sequence[str] | None = None,
        device: str | torch.device | None = None,
    ) -> None:
        if kind is not None and kind not in KINDS:
            raise SettingsError(f"kind is {kind!r}; expected one of {', '.join(KINDS)}{did_you_mean(str(kind), KINDS)}")
        self.metric, built = _build(metric, device)
        network = blind_metric(built)
        if isinstance(network, ExportedIQA):
            raise SettingsError(f"{self.metric} is an exported file, which has no maps; use the metric itself")
        self.kind = kind or ("local" if "local" in kinds_of(built if network is None else network) else "occlusion")
        if network is None and self.kind != "occlusion":
            raise no_such_map(self.kind, f"{self.metric}, a metric of another package", built)
        known = ("quality",) if network is None else network.attributes
        self.attributes = tuple(known if attributes is None else attributes)
        for name in self.attributes:
            if name not in known:
                raise SettingsError(
                    f"{self.metric} has no attribute {name!r}; expected one of {', '.join(known)}"
                    f"{did_you_mean(str(name), known)}"
                )
        if not self.attributes:
            raise SettingsError(f"attributes is empty; expected some of {', '.join(known)}")
        self.network = built if network is None else network
        self._columns = [known.index(name) for name in self.attributes]
        prompts = getattr(network, "prompts", None)
        groups = {} if prompts is None else dict(prompts.groups)
        self._pairs: list[tuple[Pair, ...]] = [groups.get(name, ()) for name in self.attributes]
        self._fitted_to = None if network is None else FittedTo.of(network)
        self._sign = -1 if lower_is_better(built) else 1
        self.device = _device_of(self.network)

    def passes(self, height: int, width: int) -> int:
        """Count the passes of the network that an image of this size takes; more than one for occlusion only."""
        return count_passes(height, width) if self.kind == "occlusion" else 1

    def maps(self, rgb: Tensor, tick: Callable[[], object] = lambda: None) -> list[list[QualityMap]]:
        """Map images of one size.

        Args:
            rgb: (N, 3, H, W) or (N, 1, H, W), RGB or grey in 0..1, H and W at least 32, any floating-point dtype.
            tick: called after each of the `passes`.

        Returns:
            For each image, a map for each of `attributes`.

        Raises:
            ImageError: wrong type, shape or dtype, or images smaller than 32x32 pixels.
            SettingsError: the metric has no maps of this kind, or the kind needs a package that is not installed.
        """
        network = self.network
        images = network.prepare(rgb) if isinstance(network, BlindMetric) else check_batch(rgb).float()
        if self.kind == "occlusion":
            found = occlusion(network, images.to(self.device), self._columns, tick)
        else:
            found = _COMPUTE[self.kind](network, images.to(self.device), self._columns)
            tick()
        size = rgb.shape[2], rgb.shape[3]
        return [[self._cut(found, n, a, size) for a in range(len(self._columns))] for n in range(len(rgb))]

    def _cut(self, found: Found, n: int, a: int, size: tuple[int, int]) -> QualityMap:
        """Return the map of image n and attribute a."""
        values = self._sign * found.values[n, a].float().cpu().numpy()
        low, high = scale_of(values, self.kind)
        return QualityMap(
            values=values,
            size=size,
            step=found.step,
            metric=self.metric,
            attribute=self.attributes[a],
            kind=self.kind,
            score=float(found.scores[n, a]),
            low=low,
            high=high,
            meaning=found.meaning if self._sign > 0 else f"minus the {found.meaning} (of which lower is better)",
            relation=found.relation(n, a),
            comparatives=comparatives(self._pairs[a]),
            own_scale=bool(found.own_scale and found.own_scale[a]),
            note=None if self._fitted_to is None else self._fitted_to.note(size[1], size[0]),
        )


def _build(metric: Metrics, device: str | torch.device | None) -> tuple[str, nn.Module]:
    """Return a metric's name and the metric, which is a network's own object unless it must move."""
    named = blind_only(metric, "for maps")
    if len(named) > 1:
        raise SettingsError(f"{len(named)} metrics were given ({', '.join(named)}); expected one for each Mapper")
    ((name, own),) = named.items()
    if isinstance(own, nn.Module) and device is None:
        return name, own
    where = usable_devices(device)[0]
    built = build_metrics({name: own}, where)[name].to(where)
    return name, built.eval()


def _device_of(network: nn.Module) -> torch.device:
    """Return where a network is: the device of its first tensor; the CPU if it has none."""
    first = next(chain(network.parameters(), network.buffers()), None)
    return torch.device("cpu") if first is None else first.device
