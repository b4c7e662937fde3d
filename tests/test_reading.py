"""One image, one score: our names read files by our rules wherever they are called from, others by pyiqa's."""

from __future__ import annotations

import io
import re
import struct
import sys
from pathlib import Path

import numpy as np
import pyiqa
import pytest
import torch
from PIL import Image, ImageCms
from pyiqa import pyiqa_cmd
from pyiqa.utils.img_util import imread2tensor

from qualiclip_pyiqa import ImageError, Scorer, as_batch

PHOTO = Path(__file__).parents[1] / "examples" / "photos" / "lighthouse.jpg"
# Kinds of file that pyiqa reads otherwise (or, in the first two cases, alike).
KINDS = ["plain.png", "plain.jpg", "grey16.png", "alpha.png", "rotated.jpg", "palette.png", "profile.png"]


def gamma_profile() -> bytes:
    """An ICC profile with sRGB's primaries and a gamma of 1.2, made of Pillow's sRGB profile."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    for tag in range(struct.unpack_from(">I", profile, 128)[0]):
        name, offset, size = struct.unpack_from(">4sII", profile, 132 + 12 * tag)
        if name in (b"rTRC", b"gTRC", b"bTRC"):
            assert profile[offset : offset + 4] == b"para" and size >= 16
            struct.pack_into(">4sIHHi", profile, offset, b"para", 0, 0, 0, round(1.2 * 65536))
    return bytes(profile)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reading")
    photo = Image.open(PHOTO).convert("RGB").resize((160, 112))
    pixels = np.asarray(photo)
    photo.save(folder / "plain.png")
    photo.save(folder / "plain.jpg", quality=90)
    Image.fromarray(pixels.mean(axis=2).astype(np.uint16) * 257).save(folder / "grey16.png")
    alpha = Image.fromarray(np.tile(np.linspace(0, 255, 160).astype(np.uint8), (112, 1)))
    photo.putalpha(alpha)
    photo.save(folder / "alpha.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(folder / "rotated.jpg", exif=exif)
    Image.fromarray(pixels).quantize(32).save(folder / "palette.png", transparency=3)
    Image.fromarray(pixels).save(folder / "profile.png", icc_profile=gamma_profile())
    (folder / "truncated.jpg").write_bytes((folder / "plain.jpg").read_bytes()[:2000])
    return folder


@pytest.fixture(scope="module")
def metric() -> torch.nn.Module:
    return pyiqa.create_metric("qualiclip-mini", device="cpu")


@pytest.fixture(scope="module")
def expected(folder: Path) -> dict[str, float]:
    """Scores of `Scorer`, by name of the file."""
    records = Scorer("qualiclip-mini", device="cpu", workers=0).score(folder / kind for kind in KINDS)
    return {kind: record.scores["qualiclip-mini"] for kind, record in zip(KINDS, records, strict=True)}


@pytest.mark.parametrize("kind", KINDS)
def test_every_way_in_has_one_score(
    folder: Path, metric: torch.nn.Module, expected: dict[str, float], kind: str
) -> None:
    path = folder / kind
    for source in (str(path), path, path.read_bytes(), Image.open(path)):
        assert metric(source).shape == (1, 1)
        assert metric(source).item() == pytest.approx(expected[kind], abs=2e-6)
    assert metric(target=str(path)).item() == pytest.approx(expected[kind], abs=2e-6)
    theirs = imread2tensor(str(path), rgb=True)[None]
    if kind.startswith("plain"):
        assert torch.equal(as_batch(path), theirs)
    else:
        assert abs(metric(theirs).item() - expected[kind]) > 1e-4  # else the kind would show nothing


def test_the_pyiqa_command_prints_that_score(
    folder: Path, expected: dict[str, float], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In this process; that the command finds our metrics in one of its own is a test of registration."""
    for kind in ("grey16.png", "rotated.jpg"):
        monkeypatch.setattr(sys, "argv", ["pyiqa", "qualiclip-mini", "-t", str(folder / kind), "--device", "cpu"])
        pyiqa_cmd.main()
        out = capsys.readouterr().out
        printed = re.search(r"'mean': (?:np\.float64\()?([\d.e-]+)", out)
        assert printed is not None, out
        assert float(printed[1]) == pytest.approx(expected[kind], abs=2e-6)


def test_what_cannot_be_read_is_one_line(folder: Path, metric: torch.nn.Module) -> None:
    for source in (str(folder / "truncated.jpg"), (folder / "truncated.jpg").read_bytes(), folder / "missing.png", 7):
        with pytest.raises(ImageError, match="expected") as caught:
            metric(source)
        assert "\n" not in str(caught.value)


def test_tensors_are_left_alone(metric: torch.nn.Module) -> None:
    x = as_batch(PHOTO).requires_grad_()
    assert not metric(x).requires_grad
    loss = pyiqa.create_metric("qualiclip-mini", device="cpu", as_loss=True)
    loss(x).backward()
    assert x.grad is not None and x.grad.abs().max() > 0
    with pytest.raises(AssertionError, match="4D"):  # pyiqa's own check
        metric(x[0])


def test_foreign_metrics_read_by_pyiqas_rules(folder: Path) -> None:
    foreign = pyiqa.create_metric("piqe", device="cpu")
    for kind in ("grey16.png", "alpha.png", "rotated.jpg"):
        theirs = foreign(imread2tensor(str(folder / kind), rgb=True)[None])
        assert torch.equal(foreign(str(folder / kind)), theirs)
        assert torch.equal(foreign((folder / kind).read_bytes()), theirs)
    full_reference = pyiqa.create_metric("psnr", device="cpu")
    image = Image.open(folder / "plain.png")
    assert full_reference(image, image).item() > 50
    with pytest.raises(Exception, match="Unsupported source type"):  # pyiqa's own
        foreign(io.BytesIO(b""))


def test_compiled_metrics_take_tensors() -> None:
    metric = pyiqa.create_metric("qualiclip-mini", device="cpu")
    x = as_batch(PHOTO)[..., :64, :96]
    assert (torch.compile(metric, backend="eager")(x) - metric(x)).abs().max() < 1e-5
