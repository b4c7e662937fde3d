"""The page `/metrics`: what Ray exports about the application on each node, as one text for Prometheus."""

from __future__ import annotations

import logging
from urllib.error import URLError
from urllib.request import urlopen

import ray
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families

logger = logging.getLogger(__name__)

# Of Ray's figures: what its Serve library counts, and what this package counts.
_PREFIXES = ("ray_serve_", "ray_qualiclip_")
_TIMEOUT = 5.0  # seconds for a node


def cluster_figures() -> str:
    """Collect the figures of all nodes; Ray's processes report them every few seconds."""
    families: dict[str, Metric] = {}
    for node in ray.nodes():
        if not node["Alive"] or not node.get("MetricsExportPort"):
            continue
        url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
        try:
            with urlopen(url, timeout=_TIMEOUT) as answer:
                text = answer.read().decode()
        except (URLError, OSError) as error:
            logger.warning("no figures from %s: %s", url, error)
            continue
        merge(text, families)
    return render(families)


def merge(text: str, families: dict[str, Metric]) -> None:
    """Add a node's figures, whose labels tell them from other nodes'."""
    for family in text_string_to_metric_families(text):
        if family.name.startswith(_PREFIXES):
            known = families.setdefault(family.name, family)
            if known is not family:
                known.samples.extend(family.samples)


def render(families: dict[str, Metric]) -> str:
    """Write families of figures in Prometheus' text format."""

    class Collector:
        def collect(self) -> list[Metric]:
            return list(families.values())

    registry = CollectorRegistry(auto_describe=False)
    registry.register(Collector())
    return generate_latest(registry).decode()
