"""Format results of evaluations as lines of text, with tables in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import counted, decimals
from ..images.convert import source_name
from .agreement import LEAST, Agreement
from .gmad import Duel
from .ladders import LadderReport
from .opinions import OpinionReport
from .ratings import Ratings


def number(value: float | None) -> str:
    """Format a correlation; `-` for None."""
    return "-" if value is None else decimals(value)


def cell(name: str) -> str:
    r"""Format a name as a table cell.

    Example:
        >>> cell("a|b.png")
        'a\\|b.png'
    """
    return source_name(name).replace("|", "\\|")


def read_rule(settings: Mapping[str, Any] | None, name: str) -> bool | None:
    """Look up a reading rule, such as `ignore_orientation`, in a scorer's description; None if it is absent.

    Example:
        >>> read_rule({"rules": {"ignore_orientation": True}}, "ignore_orientation")
        True
    """
    for rules in (settings or {}).values():
        if isinstance(rules, Mapping) and isinstance(rules.get(name), bool):
            return bool(rules[name])
    return None


def reading(settings: Mapping[str, Any] | None) -> str:
    """State how EXIF orientation and ICC profiles were handled; both affect scores."""
    said = {None: "unknown", False: "applied, as viewers show images", True: "ignored, as in published figures"}
    rules = (("EXIF orientation", "ignore_orientation"), ("ICC profiles", "ignore_profile"))
    return "; ".join(f"{what}: {said[read_rule(settings, name)]}" for what, name in rules)


def opinions(report: OpinionReport, ratings: Ratings, column: str | None, warnings: Iterable[str] = ()) -> list[str]:
    """Format agreement with opinion scores; `column` is the group column, `warnings` follow the first table."""
    lines = [*_agreements(report.agreements), *warnings]
    if len({each.n for each in report.agreements.values()}) > 1:
        lines.append("the metrics scored different images; compare them by the differences below")
    for (first, second), difference in report.differences.items():
        low, high = difference.ci95
        lines += [
            "",
            f"SRCC of {source_name(first)} minus SRCC of {source_name(second)}: {difference.difference:+.4f} "
            f"(95 % interval {low:+.4f} to {high:+.4f}, p = {difference.p:.3g}, paired bootstrap)",
        ]
    for group, part in report.groups.items():
        count = len(ratings.mean_opinions(group))
        lines += ["", f"{column} = {source_name(group) or '(empty)'}, {counted(count, 'image')}", *_agreements(part)]
    return lines


def _agreements(found: Mapping[str, Agreement]) -> list[str]:
    lines = [
        "| metric | n | SRCC | 95 % interval | PLCC | PLCC after logistic | KRCC | RMSE after logistic |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, each in found.items():
        interval = "-" if each.srcc_ci95 is None else f"{each.srcc_ci95[0]:.4f} to {each.srcc_ci95[1]:.4f}"
        cells = [number(each.srcc), interval, *map(number, (each.plcc, each.plcc_logistic, each.krcc, each.rmse))]
        lines.append(f"| {cell(name)} | {each.n} | " + " | ".join(cells) + " |")
    for name, each in found.items():
        if each.n < LEAST:
            lines.append(f"{source_name(name)}: too few images to correlate")
        elif each.srcc is None:
            lines.append(f"{source_name(name)}: no correlation, because all scores or all opinion scores are equal")
    return lines


def ladders(report: LadderReport) -> list[str]:
    """Format mean scores by type and level."""
    lines: list[str] = []
    for column, found in report.behaviours.items():
        falling = sum(each.falls for each in found.values())
        photographs = counted(report.photographs[column], "photograph")
        levels = range(1, len(next(iter(found.values())).means))
        lines += [
            "",
            f"{source_name(column)}, {photographs}: the mean gets worse at every level for "
            f"{falling} of {len(found)} types",
            "in order: share of correctly ranked pairs of levels of one photograph, pristine included",
            "",
            f"| type | pristine | {' | '.join(map(str, levels))} | falls | in order |",
            "|---" * (len(levels) + 4) + "|",
        ]
        for name, each in found.items():
            means = " | ".join(f"{mean:.3f}" for mean in each.means)
            lines.append(f"| {name} | {means} | {'yes' if each.falls else 'no'} | {each.in_order:.3f} |")
    return lines


def duels(found: Sequence[Duel], paths: Sequence[Path]) -> list[str]:
    """Format the pairs of a gMAD competition; `paths` are the images."""
    lines = [
        "| defender | at | attacker | finds better | and worse | attacker's gap | defender's gap |",
        "|---|---|---|---|---|---|---|",
    ]
    for duel in found:
        cells = [cell(duel.defender), f"{duel.level:.4f}", cell(duel.attacker)]
        cells += [cell(str(paths[duel.better])), cell(str(paths[duel.worse]))]
        cells += [f"{duel.attacker_gap:.4f}", f"{duel.defender_gap:.4f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines
