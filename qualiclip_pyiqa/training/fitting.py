"""Fit a metric to opinion scores: a ridge regression on the statistics of an image tower, which stays as it is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import SettingsError, WeightsError, counted, did_you_mean
from ..evaluation.agreement import LEAST, Floats, agreement
from ..evaluation.ratings import Ratings
from ..files import replacing
from ..images.convert import source_name
from ..metrics.fitted import FittedIQA
from ..metrics.prompts import resolve_prompts
from ..metrics.registry import METRICS, DeepPromptSpec
from ..pretrained.contrastive import load_encoders
from ..pretrained.fitted import FIGURES, Fit, FittedModel, load_fitted, write_fitted
from ..pretrained.layouts import CONTRASTIVE_TOWERS, FITTED_FORMAT, OWN_FORMAT
from ..pretrained.manifest import openai_record
from ..pretrained.model import LoadedTower, load_model
from ..pretrained.read import stored_format
from ..pretrained.verify import provenance
from ..towers.base import freeze
from .features import Watch, compute_statistics
from .ridge import STRENGTHS, choose_strength, fit_ridge
from .splits import Indices, folds, repeated_splits, united

LEAST_IMAGES = 20
LEAST_GROUPS = 3  # one to test on, two to choose the strength by
INNER_FOLDS = 5
LEAST_OTHERS = INNER_FOLDS  # images whose opinion score is not the most frequent one: one for each fold
# Of opinion scores, in absolute value: intermediate results are larger, and float32 ends at 3e38.
LARGEST_OPINION = 1e20
LEAST_RANGE = 1e-20
LEAST_STEPS = 10_000  # numbers of float32 in the range of the opinion scores
SUFFIX = ".safetensors"
# Rules of reading that change an image's pixels.
_RULES = ("ignore_orientation", "ignore_profile", "allow_truncated")


@dataclass(frozen=True)
class ChosenTower:
    """A tower to fit on.

    Attributes:
        name: as the user named it.
        model: its tensors and settings.
        pos_embedding: whether it adds its positional table.
    """

    name: str
    model: LoadedTower
    pos_embedding: bool


@dataclass(frozen=True)
class Rated:
    """Rated images as a regression takes them.

    Attributes:
        x: (n, S) statistics.
        y: (n,) mean opinion scores.
        groups: (n,) number of each image's group, which is never divided.
        hashes: sha256 of each image's file.
    """

    x: Floats
    y: Floats
    groups: Indices
    hashes: list[str]


@dataclass(frozen=True)
class CrossValidation:
    """What repeated splits found.

    Attributes:
        agreement: `srcc`, `plcc` and `krcc`, each with `median`, `sd`, `min` and `max` over the splits in which it is
            defined; None if there are none.
        tests: number of images in the test part of each split.
        measured: number of splits in which the SRCC is defined.
    """

    agreement: dict[str, dict[str, float | None]]
    tests: list[int] = field(repr=False)
    measured: int


@dataclass(frozen=True)
class FitOptions:
    """Settings of a fit.

    Attributes:
        splits: number of repeated splits.
        test_share: share of the groups in the test part of a split.
        seed: of splits and folds.
        cache: folder of cached statistics; None: no cache.
        force: whether to replace an existing file.
    """

    splits: int = 10
    test_share: float = 0.2
    seed: int = 0
    cache: Path | None = None
    force: bool = False


def choose_tower(name: str, weights: Path | None = None) -> ChosenTower:
    """Load the tower that a user names.

    Args:
        name: a metric of this package, a backbone of OpenAI or open_clip, or a file of `qualiclip train` or
            `qualiclip fit`.
        weights: file of the tower's weights, in place of the metric's or OpenAI's; for `reiqa` a folder of two files.

    Raises:
        SettingsError: an unknown name, another package's metric, or a backbone without weights.
        WeightsError: weights are missing, damaged or of another tower.
    """
    texts = resolve_prompts("qualiclip").texts
    if name in METRICS:
        spec = METRICS[name]
        backbone = getattr(spec, "backbone", None)
        if isinstance(spec, DeepPromptSpec):
            raise SettingsError(
                f"{name} needs learned prompts beside its tower, which a regression does not take; pass {backbone}"
            )
        if backbone in CONTRASTIVE_TOWERS:
            return ChosenTower(name, load_encoders(backbone, weights), False)
        if backbone is None:
            raise SettingsError(f"{name} has no tower of its own; expected a metric with one, such as qualiclip-mini")
        model = load_model(weights or spec.weights, backbone, texts)
        return ChosenTower(name, model, bool(getattr(spec, "pos_embedding", False)))
    if name.endswith(SUFFIX) or Path(name).is_file():
        return _tower_of_file(name, weights)
    _check_backbone_name(name)
    if weights is not None:
        return ChosenTower(name, load_model(weights, name, texts), False)
    from ..towers.backbones import plain_name

    try:
        record = openai_record(plain_name(name))
    except WeightsError as error:
        raise SettingsError(f"{error}; pass --backbone-weights FILE") from error
    return ChosenTower(name, load_model(record, name), False)


def _tower_of_file(name: str, weights: Path | None) -> ChosenTower:
    if not Path(name).exists():
        raise SettingsError(f"{name} does not exist; expected a metric's or backbone's name, or the file of a model")
    if weights is not None:
        raise SettingsError(f"{name} has weights already; leave --backbone-weights out, or name the backbone with -m")
    found = stored_format(name)
    if found == FITTED_FORMAT:
        fitted = load_fitted(name)
        return ChosenTower(Path(name).name, fitted.tower, fitted.fit.pos_embedding)
    if found != OWN_FORMAT:
        raise SettingsError(
            f"{name} does not name its backbone, as files of `qualiclip train` do; pass -m BACKBONE "
            f"--backbone-weights {name}"
        )
    return ChosenTower(Path(name).name, load_model(Path(name), ""), False)


def _check_backbone_name(name: str) -> None:
    """Raise SettingsError if a name is not one of open_clip's or OpenAI's backbones."""
    import open_clip
    from pyiqa.default_model_configs import DEFAULT_CONFIGS

    from ..towers.backbones import OPENAI_BACKBONES

    known = [*OPENAI_BACKBONES, *open_clip.list_models()]
    if name in known:
        return
    if name in DEFAULT_CONFIGS:
        needs = " and needs a reference image" if DEFAULT_CONFIGS[name].get("metric_mode") != "NR" else ""
        raise SettingsError(
            f"{name} is another package's metric{needs}; expected a metric of this package with a tower, such as "
            "qualiclip-mini, or a backbone, such as RN50"
        )
    raise SettingsError(
        f"unknown tower {name!r}{did_you_mean(name, [*METRICS, *known])}; expected a metric of this package, a "
        "backbone of open_clip, or the file of a model"
    )


def check_ratings(ratings: Ratings) -> None:
    """Raise SettingsError if there are too few images, or opinion scores that nothing can be fitted to in float32."""
    opinions = ratings.mean_opinions()
    if len(opinions) < LEAST_IMAGES:
        raise SettingsError(
            f"{counted(len(opinions), 'rated image')}; expected at least {LEAST_IMAGES}, better 100 or more"
        )
    if len(set(opinions.values())) == 1:
        raise SettingsError(f"all opinion scores are {next(iter(opinions.values())):g}; there is nothing to fit")
    (usual, count), *_ = Counter(opinions.values()).most_common(1)
    if len(opinions) - count < LEAST_OTHERS:
        raise SettingsError(
            f"{count} of {len(opinions)} images have the opinion score {usual:g}; expected at least {LEAST_OTHERS} "
            "images with another one: rate more images, or on a finer scale"
        )
    low, high = min(opinions.values()), max(opinions.values())
    largest = max(-low, high)
    if largest > LARGEST_OPINION or high - low < max(LEAST_RANGE, LEAST_STEPS * float(np.spacing(np.float32(largest)))):
        raise SettingsError(
            f"opinion scores from {low} to {high} are beyond float32, in which metrics score; expected numbers of at "
            f"most {LARGEST_OPINION:g} whose range holds {LEAST_STEPS:,} of float32's numbers: rescale them, "
            "for example to 0..100"
        )


def check_target(path: Path, force: bool) -> None:
    """Raise SettingsError if a metric cannot be written to `path`."""
    if path.suffix != SUFFIX:
        raise SettingsError(f"{path} would not be recognised as a metric; expected a name that ends with {SUFFIX}")
    if path.exists() and not force:
        raise SettingsError(f"{path} exists; pass --force to replace it, or choose another name")


def fit(
    tower: ChosenTower, ratings: Ratings, out: Path, options: FitOptions, watch: Watch, **reading: Any
) -> tuple[FittedModel, CrossValidation]:
    """Fit a metric, measure it by repeated splits, and write it to a file, whole or not at all.

    In each split the strength is chosen and the regression fitted on the training part alone. The metric that is
    written is fitted on all images in the same way, and loaded from its file before that gets its name. Tower, images,
    ratings and options determine the bytes of the file, for one machine, version of torch and NumPy, and number of
    threads.

    Args:
        tower: from `choose_tower`.
        ratings: opinion scores of any range and direction, averaged where an image has several. Images of one group,
            images with identical files, and so on in a chain, are one group.
        out: file, `*.safetensors`.
        options: see `FitOptions`.
        watch: wraps the records of images that are computed, for example in a progress bar.
        reading: options of `Scorer`: device, workers and rules of reading.

    Returns:
        The metric, and what the repeated splits found.

    Raises:
        WeightsError: the file cannot be loaded again; `out` is unchanged.
        SettingsError: `out` exists; ratings or options from which nothing can be fitted; SciPy is not installed.
        ImageError: images that cannot be read.
        OSError: `out` cannot be written, or the cache cannot be used.
    """
    check_target(out, options.force)
    check_ratings(ratings)
    if not 0 < options.test_share < 1 or options.splits < 1:
        raise SettingsError(
            f"{counted(options.splits, 'split')} with a share of {options.test_share} to test on; expected "
            "at least 1, and a share between 0 and 1"
        )
    rated = rated_statistics(tower, ratings, options.cache, watch, **reading)
    x, y, groups = rated.x, rated.y, rated.groups
    chosen = choose_strength(x, y, folds(groups, INNER_FOLDS, [options.seed, options.splits]))
    ridge = fit_ridge(x, y, [STRENGTHS[chosen]])
    found = cross_validate(x, y, groups, options)
    files = [provenance(file) for file in (tower.model.file, *tower.model.beside)]
    names = " + ".join(file["file"] for file in files)
    described = Fit(
        pos_embedding=tower.pos_embedding,
        regressor="ridge",
        strength=STRENGTHS[chosen],
        at_edge=chosen in (0, len(STRENGTHS) - 1),
        intercept=float(ridge.intercepts[0]),
        low=ridge.low,
        high=ridge.high,
        lower_better=ratings.lower_better,
        images=len(y),
        groups=int(groups.max()) + 1,
        splits=options.splits,
        test_share=options.test_share,
        seed=options.seed,
        agreement=found.agreement,
        tower_name=tower.name[:200],
        tower_file=names[:200],
        tower_sha256=" + ".join(file["sha256"] or "" for file in files),
        ratings=ratings.columns[:1000],
        reading=", ".join(f"{name}={value}" for name, value in sorted(reading.items()) if name in _RULES),
    )
    model = FittedModel(tower.model, described, ridge.stored(), _hashes(rated.hashes))
    try:
        with replacing(out) as part:
            licence = " AND ".join(dict.fromkeys(file["licence"] for file in files))
            write_fitted(part, model, licence, f"fitted with `qualiclip fit` on the tower of {names}")
            _check_loads(part, out)
    except OSError as error:
        raise OSError(f"{out} cannot be written ({error.strerror or error}); make room and repeat") from error
    return model, found


def _check_loads(part: Path, out: Path) -> None:
    """Raise WeightsError if a file cannot be loaded as a metric."""
    try:
        FittedIQA(weights=part)
    except WeightsError as error:
        why = str(error).replace(str(part), "it")
        raise WeightsError(f"{out} is not written, since it could not be used: {why}") from error


def rated_statistics(tower: ChosenTower, ratings: Ratings, cache: Path | None, watch: Watch, **reading: Any) -> Rated:
    """Compute the statistics of rated images, or take them from the cache, and find their groups.

    Args:
        tower, ratings, watch, reading: see `fit`.
        cache: folder of cached statistics; None: no cache.

    Raises:
        SettingsError: an image without a group, or too few groups.
        ImageError: images that cannot be read.
        OSError: the cache cannot be used.
    """
    network = tower.model.image_tower(tower.pos_embedding)
    if not hasattr(network, "statistics"):
        raise SettingsError(f"the tower of {tower.name} has no `statistics` to fit on; choose another")
    settings = {
        "backbone": tower.model.backbone,
        "activation": tower.model.activation,
        "options": dict(tower.model.tower_options),
        "pos_embedding": tower.pos_embedding,
    }
    means = ratings.mean_opinions()
    paths, y = list(means), np.array(list(means.values()))
    labels = _labels(ratings, paths)
    found = compute_statistics(freeze(network), settings, paths, cache, watch, **reading)
    groups = united([[*own, ("content", sha256)] for own, sha256 in zip(labels, found.hashes, strict=True)])
    if groups.max() + 1 < LEAST_GROUPS:
        raise SettingsError(
            f"{len(paths)} images in {counted(int(groups.max()) + 1, 'group')}, never divided; expected at least "
            f"{LEAST_GROUPS} groups"
        )
    return Rated(found.values.astype(np.float64), y, groups, found.hashes)


def cross_validate(x: Floats, y: Floats, groups: Indices, options: FitOptions) -> CrossValidation:
    """Measure by repeated splits how a metric fitted on one part agrees with the opinion scores of the other.

    The scores are those that the metric gives once it is written, in float32.

    Args:
        x: (n, S) statistics.
        y: (n,) opinion scores.
        groups: (n,), never divided.
        options: number of splits, share of the test part, and seed.
    """
    tests: list[int] = []
    figures: dict[str, list[float]] = {name: [] for name in FIGURES}
    for number, split in enumerate(repeated_splits(groups, options.splits, options.test_share, options.seed)):
        tests.append(len(split.test))
        opinions = y[split.training]
        if np.ptp(opinions) == 0 or len(split.test) < LEAST or len(set(groups[split.training].tolist())) < 2:
            continue
        inner = folds(groups[split.training], INNER_FOLDS, [options.seed, number])
        chosen = choose_strength(x[split.training], opinions, inner)
        ridge = fit_ridge(x[split.training], opinions, [STRENGTHS[chosen]])
        found = agreement(ridge.stored_scores(x[split.test]), y[split.test])
        for name, values in figures.items():
            value = getattr(found, name)
            if value is not None:
                values.append(value)
    spread = {name: _spread(values) for name, values in figures.items()}
    return CrossValidation(spread, tests, len(figures["srcc"]))


def _spread(values: Sequence[float]) -> dict[str, float | None]:
    if not values:
        return {"median": None, "sd": None, "min": None, "max": None}
    numbers = {"median": np.median(values), "sd": np.std(values), "min": np.min(values), "max": np.max(values)}
    return {name: round(float(number), 6) for name, number in numbers.items()}


def _labels(ratings: Ratings, paths: Sequence[Path]) -> list[Iterable[Hashable]]:
    """Return the groups that the rows of each image name; none without a group column."""
    found: dict[Path, list[Hashable]] = {path: [] for path in paths}
    for image, group in zip(ratings.images, ratings.groups, strict=False):
        if not group.strip():
            raise SettingsError(f"{source_name(image)} has no group; expected one for every image")
        found[image].append(("group", group.strip()))
    return list(found.values())


def _hashes(hashes: Sequence[str]) -> torch.Tensor:
    rows = [list(bytes.fromhex(each)) for each in sorted(hashes)]
    return torch.tensor(rows, dtype=torch.uint8)
