"""Files of CONTRIQUE and Re-IQA in their authors' layouts: encoders made by rule, and pickled regressions."""

from __future__ import annotations

import struct
from pathlib import Path

import by_rule
import numpy as np
import torch
from torch import Tensor
from torchvision.models.resnet import Bottleneck, ResNet

SHALLOW = (1, 1, 1, 1)  # bottlenecks in each layer of a tower for tests, with as many features as a ResNet-50's
_NUMBERS = {"conv1": "0", "bn1": "1", "layer1": "4", "layer2": "5", "layer3": "6", "layer4": "7"}


def trunk_shapes(depths: tuple[int, ...] = (3, 4, 6, 3)) -> dict[str, torch.Size]:
    with torch.device("meta"):
        state = ResNet(Bottleneck, list(depths)).state_dict()
    return {key: value.shape for key, value in state.items() if not key.startswith("fc.")}


def contrique_state(depths: tuple[int, ...] = (3, 4, 6, 3)) -> dict[str, Tensor]:
    """The encoder's file: a plain state dict, parts by number, with the projector of the training."""
    shapes = {}
    for key, shape in trunk_shapes(depths).items():
        part, _, rest = key.partition(".")
        shapes[f"encoder.{_NUMBERS[part]}.{rest}"] = shape
    for number, width in ((1, 2048), (4, 128)):
        shapes[f"projector.{number - 1}.weight"] = torch.Size((width, 2048))
        for name in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"projector.{number}.{name}"] = torch.Size((width,))
        shapes[f"projector.{number}.num_batches_tracked"] = torch.Size(())
    return by_rule.state("contrique", shapes)


def re_iqa_checkpoint(branch: str, depths: tuple[int, ...] = (3, 4, 6, 3)) -> dict[str, object]:
    """An encoder's file as a trainer with DistributedDataParallel saved it, with what scoring does not need."""
    shapes = {f"module.encoder.{key}": shape for key, shape in trunk_shapes(depths).items()}
    for number, width in ((0, 2048), (2, 128)):
        shapes[f"module.head.{number}.weight"] = torch.Size((width, 2048))
        shapes[f"module.head.{number}.bias"] = torch.Size((width,))
    model = by_rule.state(f"re-iqa-{branch}", shapes)
    optimizer = {"state": {}, "param_groups": [{"lr": 12.0, "params": [0, 1]}]}
    return {"model": model, "contrast": {"memory": torch.zeros(4, 128)}, "optimizer": optimizer, "epoch": 40}


def write_contrique(folder: Path, depths: tuple[int, ...] = SHALLOW) -> Path:
    path = folder / "CONTRIQUE_checkpoint25.tar"
    torch.save(contrique_state(depths), path)
    return path


def write_re_iqa(folder: Path, depths: tuple[int, ...] = SHALLOW) -> list[Path]:
    paths = []
    for branch in ("quality", "content"):
        paths.append(folder / f"{branch}_aware_r50.pth")
        torch.save(re_iqa_checkpoint(branch, depths), paths[-1])
    return paths


def rule_regression() -> Tensor:
    """The coefficients on CONTRIQUE's features; their intercept is 50."""
    return by_rule.unit("contrique-regressor/coef", (4096,), factor=5.0)


def pickled_ridge(coefficients: Tensor, intercept: float, alpha: float = 0.1) -> bytes:
    """A pickle of scikit-learn 1.0.1's Ridge under NumPy 1, put together opcode by opcode.

    Written from the list of opcodes alone, and so independently of the reader; today's scikit-learn and NumPy pickle
    other attributes and other paths.
    """
    out, kept = bytearray(b"\x80\x03"), 0

    def keep() -> None:
        nonlocal kept
        out.extend(b"q" + bytes([kept]))
        kept += 1

    def text(value: str) -> None:
        out.extend(b"X" + struct.pack("<I", len(value)) + value.encode())
        keep()

    def imported(module: str, name: str) -> None:
        out.extend(f"c{module}\n{name}\n".encode())
        keep()

    def number(value: float) -> bytes:
        return b"G" + struct.pack(">d", value)

    def put(code: bytes, then_keep: bool = False) -> None:
        out.extend(code)
        if then_keep:
            keep()

    imported("sklearn.linear_model._ridge", "Ridge")
    put(b")")
    put(b"\x81", True)
    put(b"}", True)
    put(b"(")
    for key, value in (
        ("alpha", number(alpha)),
        ("fit_intercept", b"\x88"),
        ("normalize", "deprecated"),
        ("copy_X", b"\x88"),
        ("max_iter", b"N"),
        ("tol", number(0.001)),
        ("solver", "auto"),
        ("positive", b"\x89"),
        ("random_state", b"N"),
        ("n_features_in_", b"M" + struct.pack("<H", len(coefficients))),
        ("_normalize", b"\x89"),
    ):
        text(key)
        if isinstance(value, str):
            text(value)
        else:
            put(value)
    text("coef_")
    imported("numpy.core.multiarray", "_reconstruct")
    imported("numpy", "ndarray")
    put(b"K\x00\x85", True)
    put(b"C\x01b", True)
    put(b"\x87", True)
    put(b"R", True)
    put(b"(K\x01M" + struct.pack("<H", len(coefficients)) + b"\x85", True)
    imported("numpy", "dtype")
    text("f4")
    put(b"\x89\x88\x87", True)
    put(b"R", True)
    dtype = kept - 1
    put(b"(K\x03")
    text("<")
    put(b"NNN" + 2 * (b"J" + struct.pack("<i", -1)) + b"K\x00t", True)
    put(b"b\x89")
    data = coefficients.numpy().astype("<f4").tobytes()
    put(b"B" + struct.pack("<I", len(data)) + data, True)
    put(b"t", True)
    put(b"b")
    text("n_iter_")
    put(b"N")
    text("intercept_")
    imported("numpy.core.multiarray", "scalar")
    put(b"h" + bytes([dtype]))
    put(b"C\x04" + np.float32(intercept).astype("<f4").tobytes(), True)
    put(b"\x86", True)
    put(b"R", True)
    text("_sklearn_version")
    text("1.0.1")
    put(b"ub.")
    return bytes(out)
