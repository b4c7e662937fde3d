"""Quantise the convolutions of an exported metric to 8 bits, as far as its scores allow.

Activations become uint8 and weights int8 per channel, around each convolution and the ReLU or addition that follows
(QDQ format), for which engines have integer kernels. Weights use 7 of their 8 bits, so that CPUs without VNNI, whose
16-bit sums of two products would overflow, compute the same. Pooling, statistics and the head stay in float32, as do
the first and the last convolution.

Which other convolutions stay is measured. Half of the photographs give the ranges of activations, the other half the
differences from the fp32 scores. If all are too many, each convolution is quantised alone, which orders them by their
mean squared difference. Then all are quantised but the 1, 2, 4, ... worst, until no score is off by more than
`FARTHEST` of the range, and the rank correlation with fp32 is at least `LEAST_SRCC` for every attribute.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ..errors import ImageError, SettingsError
from ..images.paths import list_images
from ..images.tensors import load_image
from ..metrics.export_card import IMAGE, ExportCard
from ..metrics.exported import pixels, run_by
from ..optional import require

if TYPE_CHECKING:
    import onnx

FARTHEST = 0.03  # largest difference of a score, as a share of the range of scores
LEAST_SRCC = 0.995
FEWEST, MOST = 32, 128  # photographs
SIDE = 256  # of the central part of a photograph that is used
_ALONE = 12  # photographs by which each convolution is measured alone
_ENGINES = ("onnxruntime", "openvino")  # what is measured by the first is checked on the others that are installed
# Operators that may run on integers; elementwise ones only between convolutions.
_TYPES = ["Conv", "Relu", "Clip", "Add", "AveragePool"]

Floats = NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Difference:
    """How far scores are from those in float32.

    Attributes:
        farthest: largest difference, as a share of the range of scores.
        srcc: lowest rank correlation of an attribute.
    """

    farthest: float
    srcc: float

    def within(self, limits: Difference) -> bool:
        return self.farthest <= limits.farthest and self.srcc >= limits.srcc


LIMITS = Difference(FARTHEST, LEAST_SRCC)


def quantise(
    model: onnx.ModelProto,
    card: ExportCard,
    photographs: Path,
    tick: Callable[[int, int], object] = lambda *_: None,
    limits: Difference = LIMITS,
) -> tuple[onnx.ModelProto, dict[str, Any]]:
    """Quantise a model of `to_onnx`.

    Args:
        model: in float32; it is not changed.
        card: of the model.
        photographs: folder of images like those that will be scored.
        tick: called with the number of convolutions that were measured alone, and of all.
        limits: on the difference from the scores in float32.

    Returns:
        The quantised model, and what was measured, JSON-ready, for `ExportCard.quantisation`.

    Raises:
        SettingsError: a folder of too few photographs, a model without convolutions, or one whose scores change too
            much even with half of its convolutions in float32.
    """
    for module in ("onnxruntime", "scipy"):
        require(module, "onnx", "quantisation")
    images = [pixels(each, card.input) for each in central_parts(photographs)]
    calibrating, judging = images[::2], images[1::2]
    candidates = [node.name for node in model.graph.node if node.op_type == "Conv"][1:-1]
    if not candidates:
        raise SettingsError(f"{card.metric} has no convolutions between its first and last; export it without --int8")
    ranges = _ranges(model, calibrating)
    low, high = map(float, card.score_range.split(","))
    engines = [engine for engine in _ENGINES if find_spec(engine) is not None]
    before = _scores(model, judging)
    worst: list[str] = []
    for kept in _steps(len(candidates)):
        if kept and not worst:
            worst = _worst_first(model, candidates, ranges, judging[:_ALONE], before[:_ALONE], tick)
        chosen = [name for name in candidates if name not in worst[:kept]]
        made = _quantised(model, chosen, ranges)
        found = difference(before, _scores(made, judging), high - low)
        if found.within(limits):
            return made, {
                "format": "QDQ, uint8 activations, int8 weights of 7 bits per channel",
                "engines": [
                    engine
                    for engine in engines
                    if difference(before, _scores(made, judging, engine), high - low).within(limits)
                ],
                "photographs": len(images),
                "convolutions": len(chosen),
                "convolutions_in_fp32": len(candidates) + 2 - len(chosen),
                "largest_difference": round(found.farthest, 5),
                "srcc_with_fp32": round(found.srcc, 5),
            }
    raise SettingsError(
        f"{card.metric} does not allow int8: with half of its convolutions in float32, scores differ by up to "
        f"{found.farthest:.3f} of their range (at most {limits.farthest}) and have an SRCC of {found.srcc:.3f} with "
        f"fp32 (at least {limits.srcc}); export it without --int8"
    )


def _worst_first(
    model: onnx.ModelProto,
    candidates: Sequence[str],
    ranges: Any,
    images: Sequence[np.ndarray],
    before: Floats,
    tick: Callable[[int, int], object],
) -> list[str]:
    """Order convolutions by the mean squared difference of scores when each alone is quantised."""
    noise = {}
    for number, name in enumerate(candidates):
        noise[name] = float(np.square(_scores(_quantised(model, [name], ranges), images) - before).mean())
        tick(number + 1, len(candidates))
    return sorted(candidates, key=lambda name: noise[name], reverse=True)


def central_parts(folder: Path) -> list[Tensor]:
    """Load the centres of at most `MOST` images of a folder, evenly spread by name: each (1, 3, H, W).

    Raises:
        SettingsError: fewer than `FEWEST` can be read.
    """
    paths = list_images(folder)
    count = min(MOST, len(paths))
    found = []
    for path in (paths[k * len(paths) // count] for k in range(count)):
        try:
            image = load_image(path)
        except ImageError:
            continue
        top, left = (max(0, (side - SIDE) // 2) for side in image.shape[1:])
        found.append(image[None, :, top : top + SIDE, left : left + SIDE])
    if len(found) < FEWEST:
        raise SettingsError(
            f"{folder} has {len(found)} images that can be read; calibration takes at least {FEWEST} photographs"
        )
    return found


def difference(before: Floats, after: Floats, width: float) -> Difference:
    """Compare scores (N, A) with those in float32; `width` is that of the range of scores."""
    columns = [(before[:, k], after[:, k]) for k in range(before.shape[1])]
    return Difference(float(np.abs(after - before).max()) / width, min(_srcc(*pair) for pair in columns))


def _srcc(x: Floats, y: Floats) -> float:
    """Compute the rank correlation of scores; 0 for constant ones."""
    from scipy.stats import spearmanr

    return 0.0 if np.ptp(x) == 0 or np.ptp(y) == 0 else float(spearmanr(x, y)[0])


def _steps(count: int) -> Iterator[int]:
    """Yield 0, 1, 2, 4, ... up to half of the count."""
    kept = 0
    while kept <= count // 2:
        yield kept
        kept = 2 * kept or 1


def _scores(model: onnx.ModelProto, images: Sequence[np.ndarray], engine: str = "onnxruntime") -> Floats:
    run = run_by(engine, model.SerializeToString())
    return np.concatenate([run(image) for image in images])


def _ranges(model: onnx.ModelProto, images: Sequence[np.ndarray]) -> Any:
    """Measure the smallest and largest value of every activation."""
    from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, create_calibrator

    class Images(CalibrationDataReader):
        def __init__(self) -> None:
            self.each = iter(images)

        def get_next(self) -> dict[str, np.ndarray] | None:
            image = next(self.each, None)
            return None if image is None else {IMAGE: image}

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.onnx")
        path.write_bytes(model.SerializeToString())
        calibrator = create_calibrator(
            path, _TYPES, str(Path(folder, "augmented.onnx")), calibrate_method=CalibrationMethod.MinMax
        )
        calibrator.collect_data(Images())
        return calibrator.compute_data()


def _quantised(model: onnx.ModelProto, convolutions: Collection[str], ranges: Any) -> onnx.ModelProto:
    """Quantise some convolutions, and what lies between them."""
    import onnx
    from onnxruntime.quantization import QDQQuantizer, QuantType

    own = onnx.ModelProto()
    own.CopyFrom(model)
    nodes = [*convolutions, *_between(own, set(convolutions))]
    level = logging.root.level
    try:
        logging.root.setLevel(logging.ERROR)  # it warns of every tensor that has no range
        quantiser = QDQQuantizer(own, True, True, QuantType.QInt8, QuantType.QUInt8, ranges, nodes, [], _TYPES, {})
        quantiser.quantize_model()
        quantiser.model.topological_sort()
    finally:
        logging.root.setLevel(level)
    made: onnx.ModelProto = quantiser.model.model
    return made


def _between(model: onnx.ModelProto, convolutions: Collection[str]) -> list[str]:
    """Name the elementwise operators and pools all of whose inputs come from quantised operators, weights aside."""
    constants = {each.name for each in model.graph.initializer}
    done: set[str] = set()  # tensors that quantised operators return
    found = []
    for node in model.graph.node:  # in topological order
        inputs = [name for name in node.input if name and name not in constants]
        if node.name in convolutions:
            done.update(node.output)
        elif node.op_type in _TYPES and node.op_type != "Conv" and inputs and done.issuperset(inputs):
            done.update(node.output)
            found.append(node.name)
        elif node.op_type == "Constant":
            constants.update(node.output)
    return found
