"""Run files of `qualiclip export` as metrics: ONNX by ONNX Runtime or OpenVINO, .pt2 by PyTorch; on the CPU.

An ONNX file is data: it is parsed, and refused if it refers to other files or to operators that ONNX does not define,
before an engine sees it. A .pt2 archive is not: PyTorch may unpickle parts of it and evaluate others, so it is opened
only for a caller who says that it is trusted.
"""

from __future__ import annotations

import hashlib
import io
import threading
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import SettingsError, WeightsError, reason
from ..images.convert import MIN_SIDE
from ..optional import require
from .base import BlindMetric, windows
from .export_card import IMAGE, INPUTS, KEY, SCORES, ExportCard
from .prompts import Prompts

if TYPE_CHECKING:
    import onnx
    import onnxruntime

#: Engine -> extra of this package that installs it.
ENGINES = {"onnxruntime": "onnx", "openvino": "openvino", "openvino-bf16": "openvino"}
_BF16, _PT2_ENGINE = "openvino-bf16", "torch"
# Messages of the engines' own exceptions.
_OUT_OF_MEMORY = ("Failed to allocate memory", "bad allocation", "bad_alloc", "out of memory", "can't allocate memory")
# A function from a graph's input to its scores (N, A).
Run: TypeAlias = Callable[[np.ndarray], np.ndarray]


class ExportedIQA(BlindMetric):
    """A metric from a file of `qualiclip export`. It runs on the CPU, whatever its device, and has no gradient.

    The engine uses as many threads as PyTorch had when the first image was scored, or `check` was called.

    Args:
        path: the file, `.onnx` or `.pt2`.
        engine: `onnxruntime`, `openvino`, or `openvino-bf16` (faster and coarser, on CPUs with bfloat16) for `.onnx`;
            None: ONNX Runtime.
        trusted: whether to open a `.pt2` archive, which can run code of its own.

    Shape:
        x: (N, 3, H, W) or (N, 1, H, W), RGB or grey in 0..1, H and W at least 32, any floating-point dtype -> (N, A),
        float32 (float64 for a metric in double precision); one column for each of `attributes`. Images of more than
        `card.largest` pixels have the mean score of windows, see `ExportCard`.

    Raises:
        SettingsError: an unknown engine, one that is not installed, or an archive that is not trusted.
        WeightsError: the file is missing, damaged, unsafe, or not of `qualiclip export`.
    """

    tower: EngineTower

    def __init__(self, path: str | Path, engine: str | None = None, trusted: bool = False) -> None:
        path = Path(path)
        archive = path.suffix == ".pt2"
        known = (_PT2_ENGINE,) if archive else tuple(ENGINES)
        engine = known[0] if engine is None else engine
        if engine not in known:
            raise SettingsError(f"engine is {engine!r}; expected {' or '.join(known)} for {path.name}")
        if archive and not trusted:
            raise SettingsError(
                f"{path} is a .pt2 archive, which can run code of its own when it is opened; expected an ONNX file. If "
                "you trust it, pass ExportedIQA(path, trusted=True) from Python"
            )
        data = _read(path)
        card = _card_of_archive(data, path) if archive else _card_of_onnx(data, path)
        if card.precision == "int8" and engine not in card.quantisation.get("engines", ()):
            raise SettingsError(
                f"{path.name} was not found to score alike on {engine} when it was quantised; expected one of "
                f"{', '.join(map(str, card.quantisation.get('engines', ())))}"
            )
        super().__init__(card.metric, card.paper, card.score_range, card.lower_better)
        self.card, self.path = card, path
        self.prompts: Prompts | None = card.prompts
        self.tower = EngineTower(data, path.name, engine, card)
        if engine in ENGINES:
            require(engine.partition("-")[0], ENGINES[engine], f"{path.name} on {engine}")
        if engine == _BF16:
            _check_bf16()

    @property
    def attributes(self) -> tuple[str, ...]:
        return self.card.attributes

    def check(self) -> None:
        """Score a grey image, so that a file which cannot be used is found before work begins.

        Raises:
            WeightsError: the engine cannot load or run the file, or its scores have another shape.
        """
        try:
            self.tower(torch.full((1, 3, MIN_SIDE, MIN_SIDE), 0.5))
        except MemoryError as error:
            text = f"{error}, already for an image of {MIN_SIDE}x{MIN_SIDE} pixels; it is refused"
            raise WeightsError(text) from error

    def features(self, x: Tensor) -> Tensor:
        x = self.prepare(x)
        if x.requires_grad and torch.is_grad_enabled():
            raise SettingsError(f"{self.path.name} is an exported file, which has no gradient; use the metric itself")
        if x.shape[2] * x.shape[3] <= self.card.largest:
            return self.encode(x)
        return torch.stack([self.encode(window) for window in windows(x, self.card.window)], dim=1)

    def rate(self, features: Tensor) -> Tensor:
        """Return the features, which are the scores already: (M, A) -> (M, A)."""
        return features

    def describe(self) -> dict[str, Any]:
        """Return the exported metric's own description, and how the file is run."""
        card = self.card
        return {
            **card.description,
            **super().describe(),
            "resize": f"none: the whole image at its own size; of more than {card.largest} pixels, the mean score of "
            f"windows of at most {card.window}x{card.window} pixels, evenly spread",
            "exported": {
                "file": self.path.name,
                "sha256": self.tower.sha256,
                "input": INPUTS[card.input],
                "precision": card.precision,
                "quantisation": card.quantisation,
                "opset": card.opset,
                "exported_by": card.version,
                "engine": self.tower.engine,
                "runs_on": "cpu",
            },
        }


class EngineTower(nn.Module):
    """The graph of an exported file in an engine. Copies and pickles hold the file's bytes, and load them when used.

    Shape:
        rgb: (N, 3, H, W) in 0..1 -> scores (N, A) of the same dtype and device.
    """

    def __init__(self, data: bytes, name: str, engine: str, card: ExportCard) -> None:
        super().__init__()
        self.name, self.engine, self.input = name, engine, card.input
        self.columns = len(card.attributes)
        self.sha256 = hashlib.sha256(data).hexdigest()
        self._data = data
        self._run: Run | None = None
        self._lock = threading.Lock()

    def forward(self, rgb: Tensor) -> Tensor:
        run = self._loaded()
        try:
            scores = run(pixels(rgb, self.input))
        except Exception as error:  # each engine has classes of its own
            if isinstance(error, MemoryError) or any(words in str(error) for words in _OUT_OF_MEMORY):
                raise MemoryError(f"{self.name} is out of memory in {self.engine}") from error
            raise WeightsError(
                f"{self.name} cannot be run by {self.engine} ({reason(error, 200)}); export the metric again"
            ) from error
        if scores.shape != (len(rgb), self.columns):
            raise WeightsError(
                f"{self.name} returned scores of shape {scores.shape}, not {(len(rgb), self.columns)}: the file is "
                "damaged"
            )
        return torch.from_numpy(scores).to(rgb)

    def _loaded(self) -> Run:
        with self._lock:
            if self._run is None:
                try:
                    self._run = run_by(self.engine, self._data)
                except Exception as error:
                    raise WeightsError(
                        f"{self.name} cannot be loaded by {self.engine} ({reason(error, 200)}); export the metric again"
                    ) from error
            return self._run

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_run": None, "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._lock = threading.Lock()


def pixels(rgb: Tensor, kind: str) -> np.ndarray:
    """Convert images to the input of a graph, see `INPUTS`."""
    rgb = rgb.detach().cpu()
    if kind == "uint8":
        return (rgb.float() * 255).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()
    return rgb.float().contiguous().numpy()


def onnx_session(data: bytes) -> onnxruntime.InferenceSession:
    """Load a graph into ONNX Runtime, with as many threads as PyTorch has."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = torch.get_num_threads(), 1
    options.log_severity_level = 4  # fatal ones: others are raised too
    return onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])


def run_by(engine: str, data: bytes) -> Run:
    """Load a graph into an engine, and return the function that runs it."""
    return _LOAD[engine](data)


def _in_onnx_runtime(data: bytes) -> Run:
    session = onnx_session(data)

    def run(image: np.ndarray) -> np.ndarray:
        scores: np.ndarray = session.run([SCORES], {IMAGE: image})[0]
        return scores

    return run


def _in_openvino(data: bytes, precision: str = "f32") -> Run:
    import openvino

    core = openvino.Core()
    settings = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": precision,  # by default OpenVINO rounds to bfloat16 where the CPU has it
    }
    compiled = core.compile_model(core.read_model(io.BytesIO(data)), "CPU", settings)

    def run(image: np.ndarray) -> np.ndarray:
        # A request of its own, as calls may come from several threads.
        return np.array(compiled.create_infer_request().infer({IMAGE: image})[compiled.output(SCORES)])

    return run


def _check_bf16() -> None:
    import openvino

    if "BF16" not in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        raise SettingsError("this CPU does not compute in bfloat16; expected engine 'openvino' without -bf16")


def _in_torch(data: bytes) -> Run:
    module = torch.export.load(io.BytesIO(data)).module()

    def run(image: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            scores: Tensor = module(torch.from_numpy(image))
        return scores.numpy()

    return run


_LOAD: dict[str, Callable[[bytes], Run]] = {
    "onnxruntime": _in_onnx_runtime,
    "openvino": _in_openvino,
    _BF16: partial(_in_openvino, precision="bf16"),
    _PT2_ENGINE: _in_torch,
}


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise SettingsError(f"{path} does not exist; expected a file of `qualiclip export`") from None
    except OSError as error:
        raise WeightsError(f"{path} cannot be read ({error.strerror or error})") from error


def _card_of_archive(data: bytes, path: Path) -> ExportCard:
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            name = next((name for name in archive.namelist() if name.endswith(f"/extra/{KEY}")), None)
            text = None if name is None else archive.read(name).decode()
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise WeightsError(f"{path} is not a .pt2 archive, or damaged ({reason(error, 200)})") from error
    return ExportCard.from_json(text, path)


def _card_of_onnx(data: bytes, path: Path) -> ExportCard:
    """Parse an ONNX file, and refuse what could make an engine read other files or load code."""
    onnx = require("onnx", "onnx", f"{path.name}")
    try:
        model = onnx.load_model_from_string(data)
    except Exception as error:
        raise WeightsError(f"{path} is not an ONNX file, or damaged ({reason(error, 200)})") from error
    properties = {each.key: each.value for each in model.metadata_props}
    card = ExportCard.from_json(properties.get(KEY), path)
    _refuse_unsafe(model, path)
    names = [each.name for each in model.graph.input], [each.name for each in model.graph.output]
    if names != ([IMAGE], [SCORES]):
        raise WeightsError(f"{path} has inputs {names[0]} and outputs {names[1]}; expected {[IMAGE]} and {[SCORES]}")
    taken = model.graph.input[0].type.tensor_type.elem_type
    if taken != {"float": onnx.TensorProto.FLOAT, "uint8": onnx.TensorProto.UINT8}[card.input]:
        raise WeightsError(f"{path} takes another input than its metadata says ({card.input}); export the metric again")
    return card


def _refuse_unsafe(model: onnx.ModelProto, path: Path) -> None:
    domains = {each.domain for each in model.opset_import} | {node.domain for node in _nodes(model.graph)}
    foreign = sorted(domains - {"", "ai.onnx"})
    if foreign or model.functions:
        raise WeightsError(f"{path} has operators that are not ONNX's own ({', '.join(foreign)[:80]}); it is refused")
    for tensor in _tensors(model.graph):
        if tensor.external_data or tensor.data_location:
            raise WeightsError(f"{path} refers to another file for its values; expected one file with all of them")


def _nodes(graph: Any) -> Iterator[Any]:
    """Yield the nodes of a graph and of the graphs inside them."""
    for node in graph.node:
        yield node
        for inner in _inner(node):
            yield from _nodes(inner)


def _inner(node: Any) -> Iterator[Any]:
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def _tensors(graph: Any) -> Iterator[Any]:
    """Yield every stored tensor of a graph and of the graphs inside it."""
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    for node in graph.node:
        for attribute in node.attribute:
            yield from (attribute.t, *attribute.tensors)
            for sparse in (attribute.sparse_tensor, *attribute.sparse_tensors):
                yield from (sparse.values, sparse.indices)
        for inner in _inner(node):
            yield from _tensors(inner)
