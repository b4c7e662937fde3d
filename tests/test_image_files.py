"""What stands in image files beside 8-bit RGB: formats, profiles, samples of a TIFF, metadata."""

from __future__ import annotations

import io
import json
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from image_bytes import (
    ADOBE_RGB,
    DISPLAY_P3,
    SRGB,
    encoded,
    exif,
    gamma,
    grey_profile,
    packed_12_bits,
    png,
    png_chunk,
    rgb_profile,
    srgb_curve,
    tiff,
    with_chunks,
)
from PIL import Image, ImageCms, ImageFile
from pyiqa import create_metric

from qualiclip_pyiqa import Scorer, as_batch, load_image
from qualiclip_pyiqa.commands.cli import main
from qualiclip_pyiqa.errors import ImageError
from qualiclip_pyiqa.images import formats, jxl
from qualiclip_pyiqa.images.convert import ReadRules, read_pixels, read_size
from qualiclip_pyiqa.images.formats import FORMATS, SUFFIXES, has_image_suffix, plugin_format
from qualiclip_pyiqa.training.photographs import shorter_side

RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (40, 48, 3), dtype=np.uint8)
GREY = RGB[..., 0]
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 100 100\n%%EndComments\nshowpage\n%%EOF\n"


def grey_of(source: object) -> np.ndarray:
    loaded = load_image(source)  # type: ignore[arg-type]
    assert torch.equal(loaded[0], loaded[1]) and torch.equal(loaded[0], loaded[2])
    return loaded[0].numpy()


# Formats


@pytest.fixture
def ghostscript(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Ghostscript on the PATH that writes a file when it is started; the file's name."""
    started = tmp_path / "started"
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("gs", "gswin32c", "gswin64c"):
        (folder / name).write_text(f'#!/bin/sh\ntouch "{started}"\n')
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    # Pillow looks for it once in a process.
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", None)
    return started


def test_the_stub_is_what_pillow_would_start(ghostscript: Path) -> None:
    with pytest.raises(OSError):
        Image.open(io.BytesIO(EPS)).load()
    assert ghostscript.exists()


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".eps"])
def test_no_program_is_started_for_an_image(suffix: str, ghostscript: Path, tmp_path: Path) -> None:
    file = tmp_path / f"holiday{suffix}"
    file.write_bytes(EPS)
    for source in (file, str(file), EPS):
        with pytest.raises(ImageError, match="is not an image"):
            load_image(source)
        with pytest.raises(ImageError, match="is not an image"):
            read_size(source)
    with pytest.raises(ImageError, match="is not an image"):
        shorter_side(file)
    for workers in (0, 1):
        records = list(Scorer(["qualiclip-mini"], workers=workers).score([str(file), EPS]))
        assert all("is not an image" in record.error for record in records if record.error) and len(records) == 2
        assert all(record.error for record in records)
    table = tmp_path / "scores.csv"
    assert main(["score", str(file), "-m", "qualiclip-mini", "-o", str(table), "--workers", "0"]) == 1
    assert "is not an image" in table.read_text()
    assert not ghostscript.exists()


def test_no_program_is_started_for_a_pil_image(ghostscript: Path, tmp_path: Path) -> None:
    """One that the caller opened, and that would be loaded here."""
    file = tmp_path / "eps.jpg"
    file.write_bytes(EPS)
    metric, expected = create_metric("qualiclip-mini"), r"is not an image of a supported format \(EPS\)"
    for use in (metric, load_image, as_batch, read_pixels):
        with pytest.raises(ImageError, match=rf"eps\.jpg {expected}"), Image.open(file) as image:
            use(image)  # type: ignore[operator]
    with pytest.raises(ImageError, match=f"PIL image {expected}"):
        load_image(Image.open(io.BytesIO(EPS)), allow_truncated=True)
    for workers in (0, 1):
        images = [Image.open(io.BytesIO(EPS)), Image.open(file)]
        records = list(Scorer(["qualiclip-mini"], workers=workers).score(images))
        assert len(records) == 2 and all("format (EPS)" in record.error for record in records)
    assert not ghostscript.exists()


def test_a_handler_of_another_package_is_not_called_for_a_pil_image() -> None:
    """Pillow's stubs, such as HDF5, have no pixels of their own."""
    from PIL import Hdf5StubImagePlugin

    class Handler:
        def open(self, image: Any) -> None:
            image._size = (64, 64)

        def load(self, image: Any) -> Image.Image:
            raise AssertionError("was called")

    Hdf5StubImagePlugin.register_handler(Handler())  # type: ignore[arg-type]
    try:
        image = Image.open(io.BytesIO(b"\x89HDF\r\n\x1a\n" + bytes(64)))
        with pytest.raises(ImageError, match=r"supported format \(HDF5\)"):
            load_image(image)
    finally:
        Hdf5StubImagePlugin.register_handler(None)


def test_pil_images_of_other_formats_are_fine_once_loaded() -> None:
    file = io.BytesIO()
    Image.fromarray(GREY.astype(np.float32) / 255).save(file, "SPIDER")
    image = Image.open(file)
    with pytest.raises(ImageError, match=r"supported format \(SPIDER\); call its load"):
        load_image(image)
    image.load()
    assert np.allclose(grey_of(image), GREY / 255)
    several = io.BytesIO()
    Image.fromarray(RGB).save(several, "MPO", save_all=True, append_images=[Image.fromarray(RGB)])
    image = Image.open(several)
    assert image.format == "MPO" and load_image(image).shape == (3, 40, 48)


def test_pillow_opens_no_image_of_ours_by_itself() -> None:
    """Of any format: all opening goes through the one list."""
    package = Path(formats.__file__).parents[1]
    allowed = {"degradations": "formats="}  # decodes what it has encoded
    for file in package.rglob("*.py"):
        for line in file.read_text().splitlines():
            if "Image.open(" in line and not line.strip().startswith(("#", '"')):
                assert allowed.get(file.parent.name, "\0") in line, f"{file}: {line}"


def test_listed_formats_start_nothing_and_are_pillows() -> None:
    Image.init()
    assert not {"EPS", "WMF", "PDF", "MPEG", "HDF5", "GRIB", "BUFR", "IPTC", "FITS"} & set(FORMATS)
    assert set(FORMATS) - set(Image.OPEN) <= {"HEIF", "JXL", "AVIF"}
    registered = {suffix for suffix, name in Image.registered_extensions().items() if name in FORMATS}
    assert registered <= SUFFIXES and all(suffix == suffix.lower() for suffix in SUFFIXES)
    assert has_image_suffix("x.MPO") and not has_image_suffix("x.pdf") and not has_image_suffix("x.h5")


class Striped(ImageFile.ImageFile):
    """A format of somebody's own: a signature, then 40 x 48 bytes of grey."""

    format = "STRIPED"

    def _open(self) -> None:
        assert self.fp is not None
        if self.fp.read(8) != b"striped!":
            raise SyntaxError("not striped")
        self._mode, self._size = "L", (48, 40)
        self.tile = [ImageFile._Tile("raw", (0, 0, 48, 40), 8, ("L", 0, 1))]


def test_a_format_that_was_registered_in_pillow_is_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    content = b"striped!" + GREY.tobytes()
    with pytest.raises(ImageError, match="is not an image"):
        load_image(content)
    for name in ("OPEN", "EXTENSION"):
        monkeypatch.setattr(Image, name, dict(getattr(Image, name)))
    monkeypatch.setattr(Image, "ID", list(Image.ID))
    Image.register_open("STRIPED", Striped, lambda prefix: prefix.startswith(b"striped!"))
    Image.register_extension("STRIPED", ".str")
    assert np.array_equal(read_pixels(content)[..., 0], GREY)
    assert has_image_suffix("x.STR") and "STRIPED" in formats.opened_formats()


FTYP = b"\0\0\0\x18ftyp"
PLUGIN_FILES = {
    "HEIF": [FTYP + b"heic\0\0\0\0mif1heic" + b"\0" * 40, FTYP + b"mif1\0\0\0\0mif1heic" + b"\0" * 40],
    "AVIF": [FTYP + b"avif\0\0\0\0mif1avif" + b"\0" * 40, FTYP + b"mif1\0\0\0\0mif1avif" + b"\0" * 40],
    "JXL": [b"\xff\x0a\xff" + b"\0" * 40, b"\0\0\0\x0cJXL \r\n\x87\n" + b"\0" * 40],
}


@pytest.mark.parametrize("name", sorted(PLUGIN_FILES))
def test_a_missing_plug_in_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.init()
    monkeypatch.setattr(Image, "OPEN", {key: value for key, value in Image.OPEN.items() if key != name})

    def missing(package: str) -> None:
        raise ImportError(package)

    monkeypatch.setattr(formats, "import_module", missing)
    what, needs = {
        "HEIF": ("a HEIC image", r'pillow-heif: pip install "qualiclip-pyiqa\[formats\]"'),
        "AVIF": ("an AVIF image", "Pillow 11.3 or later"),
        "JXL": ("a JPEG XL image", "pillow-jxl-plugin: pip install pillow-jxl-plugin"),
    }[name]
    for content in PLUGIN_FILES[name]:
        assert plugin_format(content[:64]) == name
        with pytest.raises(ImageError, match=f"^bytes is {what}, which needs {needs}"):
            load_image(content)


def test_heic_is_read_when_its_plug_in_is_installed(tmp_path: Path) -> None:
    heif = pytest.importorskip("pillow_heif")
    photo = Image.fromarray(np.full((64, 96, 3), (200, 30, 90), np.uint8))
    buffer = io.BytesIO()
    heif.from_pillow(photo).save(buffer, quality=90)
    loaded = load_image(buffer.getvalue())
    assert loaded.shape == (3, 64, 96)
    torch.testing.assert_close(loaded.mean((1, 2)) * 255, torch.tensor([200.0, 30, 90]), rtol=0, atol=4)
    assert read_size(buffer.getvalue()) == (96, 64)


def jxl_codestream(*fields: tuple[int, int]) -> bytes:
    """A signature and bit fields (value, count), lowest bit first."""
    number, position = 0, 0
    for value, count in fields:
        number |= value << position
        position += count
    return b"\xff\x0a" + number.to_bytes(24, "little")


@pytest.mark.parametrize(
    ("fields", "size"),
    [
        ([(1, 1), (7, 5), (1, 3)], (64, 64)),  # eighths, square
        ([(1, 1), (7, 5), (0, 3), (9, 5)], (80, 64)),  # eighths
        ([(0, 1), (0, 2), (511, 9), (4, 3)], (768, 512)),  # 3:2
        ([(0, 1), (1, 2), (599, 13), (0, 3), (2, 2), (799, 18)], (800, 600)),
        ([(0, 1), (3, 2), (2**30 - 1, 30), (7, 3)], (2**31, 2**30)),  # 2:1
    ],
)
def test_size_of_a_jpeg_xl_image_is_read_before_it_is_decoded(
    fields: list[tuple[int, int]], size: tuple[int, int]
) -> None:
    """ISO/IEC 18181-1, size header; in a container too."""
    bare = jxl_codestream(*fields)
    boxes = b"\0\0\0\x0cJXL \r\n\x87\n\0\0\0\x14ftypjxl \0\0\0\0jxl "
    whole = boxes + struct.pack(">I4s", 8 + len(bare), b"jxlc") + bare
    parts = boxes + struct.pack(">I4sI", 12 + len(bare), b"jxlp", 0) + bare
    for content in (bare, whole, parts):
        assert jxl.read_size(io.BytesIO(content)) == size
        with pytest.raises(ImageError, match=f"is too large.*{size[0]}x{size[1]}, limit 2000 pixels"):
            load_image(content, max_pixels=2000)
    assert jxl.read_size(io.BytesIO(boxes)) is None


def test_a_git_lfs_pointer_is_named() -> None:
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a21\nsize 12345\n"
    with pytest.raises(ImageError, match=r"^bytes is a Git LFS pointer; fetch the image itself with: git lfs pull$"):
        load_image(pointer)


# Orientation


@pytest.mark.parametrize("format", ["PNG", "WEBP", "TIFF", "JPEG"])
@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.filterwarnings("error")
def test_all_orientations_and_sizes(format: str, orientation: int, tmp_path: Path) -> None:
    options = {"lossless": True} if format == "WEBP" else {}
    plain = read_pixels(encoded(Image.fromarray(RGB), format, **options))
    file = tmp_path / "x"
    file.write_bytes(encoded(Image.fromarray(RGB), format, exif=exif(orientation), **options))
    turned = plain.transpose(1, 0, 2) if orientation > 4 else plain  # EXIF 2.32, orientation
    shown = turned[:: -1 if orientation in (3, 4, 7, 8) else 1, :: -1 if orientation in (2, 3, 6, 7) else 1]
    stored = ReadRules(ignore_orientation=True)
    for source in (file, file.read_bytes()):
        assert np.array_equal(read_pixels(source), shown) and read_size(source) == shown.shape[1::-1]
        assert np.array_equal(read_pixels(source, stored), plain) and read_size(source, stored) == (48, 40)
    with Image.open(file) as opened:
        assert np.array_equal(read_pixels(opened), shown)


def test_orientation_after_the_pixels_of_a_png() -> None:
    late = with_chunks(encoded(Image.fromarray(RGB)), png_chunk(b"eXIf", exif(6).tobytes()[6:]), late=True)
    assert read_pixels(late).shape == (48, 40, 3) and read_size(late) == (40, 48)
    refused = png_chunk(b"zTXt", b"Comment\0\0" + zlib.compress(b"x" * 3_000_000))
    assert read_pixels(with_chunks(late, refused, late=True)).shape == (48, 40, 3)
    assert read_size(with_chunks(late, refused, late=True)) == (40, 48)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data:UserWarning")
def test_damaged_exif_does_not_matter() -> None:
    fraction = struct.pack("<2sHLHHHLLHHLHHL", b"II", 42, 8, 2, 0x011A, 5, 1, 38, 0x0112, 3, 1, 6, 0, 0)
    for tags in (fraction + struct.pack("<LL", 72, 0), fraction, b"II*\0\xff\xff\xff\xff", b"nonsense", b""):
        for format in ("JPEG", "PNG", "WEBP"):
            content = encoded(Image.fromarray(RGB), format, exif=b"Exif\0\0" + tags)
            assert sorted(read_pixels(content).shape) == [3, 40, 48], (tags, format)
    turned = encoded(Image.fromarray(RGB), "PNG", exif=b"Exif\0\0" + fraction + struct.pack("<LL", 72, 0))
    assert read_size(turned) == (40, 48) and read_pixels(turned).shape == (48, 40, 3)


# Colour


def linear(encoded: np.ndarray) -> np.ndarray:
    """IEC 61966-2-1."""
    return np.where(encoded <= 0.04045, encoded / 12.92, ((encoded + 0.055) / 1.055) ** 2.4)


def srgb(light: np.ndarray) -> np.ndarray:
    light = np.clip(light, 0, 1)
    return np.where(light <= 0.0031308, light * 12.92, 1.055 * light ** (1 / 2.4) - 0.055)


SAME = [ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(), rgb_profile(SRGB, srgb_curve())]
PROFILES = {
    "Display P3": (rgb_profile(DISPLAY_P3, srgb_curve()), DISPLAY_P3, linear),
    "Adobe RGB": (rgb_profile(ADOBE_RGB, gamma(2.19921875)), ADOBE_RGB, lambda v: v**2.19921875),
}


@pytest.mark.parametrize("profile", SAME)
@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_an_srgb_profile_changes_nothing(profile: bytes, format: str) -> None:
    for image in (Image.fromarray(RGB), Image.fromarray(GREY), Image.fromarray(RGB).convert("P")):
        if format in ("JPEG", "WEBP") and image.mode == "P":
            continue
        without = read_pixels(encoded(image, format))
        assert np.array_equal(read_pixels(encoded(image, format, icc_profile=profile)), without)


@pytest.mark.parametrize("name", sorted(PROFILES))
@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_colours_of_a_profile_become_srgb(name: str, format: str) -> None:
    profile, columns, curve = PROFILES[name]
    to_srgb = np.linalg.inv(np.array(SRGB).T) @ np.array(columns).T
    expected = srgb(curve(RGB / 255) @ to_srgb.T) * 255
    image = Image.fromarray(RGB)
    content = encoded(image, format, icc_profile=profile)
    assert np.abs(read_pixels(content) - expected).max() < 1.5
    assert np.array_equal(read_pixels(content, ReadRules(ignore_profile=True)), RGB)
    assert torch.equal(load_image(content, ignore_profile=True), load_image(image))
    assert np.array_equal(read_pixels(Image.open(io.BytesIO(content))), read_pixels(content))

    image.putalpha(Image.fromarray(GREY))
    with_alpha = read_pixels(encoded(image, format, icc_profile=profile))
    assert np.array_equal(with_alpha[..., :3], read_pixels(content)) and np.array_equal(with_alpha[..., 3], GREY)


def test_grey_profiles_keep_grey_and_its_steps() -> None:
    profile = grey_profile(gamma(1.8))
    ramp = np.tile(np.arange(256, dtype=np.uint8), (40, 1))
    converted = grey_of(encoded(Image.fromarray(ramp), icc_profile=profile))
    assert np.abs(converted - srgb((ramp / 255) ** 1.8)).max() < 1.5 / 255
    deep = np.tile(np.linspace(0, 65535, 4000).round().astype(np.uint16), (40, 1))
    content = encoded(Image.fromarray(deep), "TIFF", icc_profile=profile)
    converted = grey_of(content)
    assert np.abs(converted - srgb((deep / 65535) ** 1.8)).max() < 1.5 / 255 and np.unique(converted).size > 3000
    assert np.array_equal(read_pixels(content, ReadRules(ignore_profile=True)), deep)
    # A profile for RGB, which grey files often have, is one for the greys among its colours.
    expected = grey_of(np.repeat(ramp[..., None], 3, axis=2))
    converted = grey_of(encoded(Image.fromarray(ramp), icc_profile=rgb_profile(ADOBE_RGB, gamma(1.8))))
    assert np.abs(converted - srgb(expected**1.8)).max() < 1.5 / 255


def test_profiles_that_cannot_be_used_are_ignored() -> None:
    broken = [b"x" * 300, SAME[0][:200], PROFILES["Adobe RGB"][0][:300], grey_profile(gamma(1.8)), b"\0"]
    for profile in broken:
        assert np.array_equal(read_pixels(encoded(Image.fromarray(RGB), icc_profile=profile)), RGB)
    cmyk = Image.fromarray(RGB).convert("CMYK")
    assert np.array_equal(read_pixels(encoded(cmyk, "TIFF", icc_profile=SAME[0])), read_pixels(cmyk))


def test_lab_becomes_srgb() -> None:
    lab = Image.new("LAB", (40, 40), (136, 208, 195))  # CIELAB 53.3, 80, 67: sRGB red, adapted to D50
    red, green, blue = load_image(encoded(lab, "TIFF"))[:, 0, 0]
    assert red > 0.98 and green < 0.1 and blue < 0.1


# TIFF


@pytest.mark.parametrize("order", "<>")
def test_sixteen_bit_tiff(order: str) -> None:
    deep = RNG.integers(0, 65536, (40, 48), dtype=np.uint16)
    data = deep.astype(f"{order}u2").tobytes()
    assert np.array_equal(read_pixels(tiff(48, 40, data, {258: 16, 262: 1}, order)), deep)


def test_tiff_that_stores_white_as_zero() -> None:
    deep = RNG.integers(0, 65536, (40, 48), dtype=np.uint16)
    assert np.array_equal(read_pixels(tiff(48, 40, deep.tobytes(), {258: 16, 262: 0})), 65535 - deep)
    assert np.array_equal(read_pixels(tiff(48, 40, GREY.tobytes(), {258: 8, 262: 0}))[..., 0], 255 - GREY)
    light = RNG.random((40, 48), dtype=np.float32)
    for order in "<>":
        data = light.astype(f"{order}f4").tobytes()
        assert np.array_equal(read_pixels(tiff(48, 40, data, {258: 32, 262: 0, 339: 3}, order)), 1 - light)
        assert np.array_equal(read_pixels(tiff(48, 40, data, {258: 32, 262: 1, 339: 3}, order)), light)


def test_twelve_bit_tiff() -> None:
    values = RNG.integers(0, 4096, (40, 48))
    values[0, :2] = 0, 4095
    loaded = grey_of(tiff(48, 40, packed_12_bits(values), {258: 12, 262: 1}))
    np.testing.assert_allclose(loaded, values / 4095, rtol=0, atol=1e-7)


@pytest.mark.parametrize(
    ("tags", "dtype", "order", "message"),
    [
        ({258: 8, 262: 1, 339: 2}, "i1", "<", "signed 8-bit"),
        ({258: 16, 262: 1, 339: 2}, "i2", "<", "signed 16-bit"),
        ({258: 16, 262: 1, 339: 2}, "i2", ">", "signed 16-bit"),
        ({258: 32, 262: 1, 339: 2}, "i4", "<", "signed 32-bit"),
        ({258: 32, 262: 1}, "u4", "<", "32-bit integers"),
        ({258: 16}, "u2", "<", "PhotometricInterpretation"),
        ({258: 16, 262: 1, 339: 3}, "f2", "<", "samples Pillow cannot read"),
        ({258: 64, 262: 1, 339: 3}, "f8", "<", "samples Pillow cannot read"),
        ({258: 16, 262: 0}, "u2", ">", "samples Pillow cannot read"),
        ({258: 8, 262: 1, 50706: 1}, "u1", "<", "a camera raw file"),
        ({258: 8, 262: 1, 254: 1, 330: 8}, "u1", "<", "a camera raw file"),
    ],
)
def test_tiff_that_would_be_read_wrong_is_refused(tags: dict[int, Any], dtype: str, order: str, message: str) -> None:
    content = tiff(48, 40, np.ones((40, 48), order + dtype).tobytes(), tags, order)
    with pytest.raises(ImageError, match=f"^bytes .*{message}"):
        load_image(content)
    opened = None
    try:
        opened = Image.open(io.BytesIO(content))
    except Image.UnidentifiedImageError:
        return
    with pytest.raises(ImageError, match=message):
        load_image(opened)


def test_planes_of_a_tiff() -> None:
    tifffile = pytest.importorskip("tifffile")
    deep = (RGB.astype(np.uint16) * 257).transpose(2, 0, 1)

    def written(planes: np.ndarray, **options: object) -> bytes:
        buffer = io.BytesIO()
        tifffile.imwrite(buffer, planes, photometric="rgb", planarconfig="separate", **options)
        return buffer.getvalue()

    for options in ({}, {"compression": "zlib"}, {"tile": (16, 16)}):
        assert np.array_equal(read_pixels(written(RGB.transpose(2, 0, 1).copy(), **options)), RGB), options
    with pytest.raises(ImageError, match="16-bit channels in separate planes"):
        load_image(written(deep))
    assert np.array_equal(read_pixels(written(deep, compression="zlib")), RGB)
    light = np.full((40, 48), 0.5, ">f4")
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, light, photometric="minisblack", byteorder=">", compression="zlib")
    with pytest.raises(ImageError, match="big-endian TIFF of floats"):
        load_image(buffer.getvalue())


# PNG

LARGE = RNG.bytes(1000) * 3000


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize(
    ("kind", "data"),
    [
        (b"zTXt", b"Comment\0\0" + zlib.compress(LARGE)),
        (b"iTXt", b"Comment\0\1\0\0\0" + zlib.compress(LARGE)),
        (b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(LARGE)),
        (b"tEXt", b"Comment\0" + b"x" * 70_000_000),
        (b"iCCP", b"Large\0\0" + zlib.compress(LARGE)),
    ],
    ids=["zTXt", "iTXt", "XMP", "tEXt", "iCCP"],
)
def test_large_metadata_of_a_png_do_not_matter(kind: bytes, data: bytes, late: bool) -> None:
    content = with_chunks(encoded(Image.fromarray(RGB), exif=exif(6)), png_chunk(kind, data), late=late)
    assert np.array_equal(read_pixels(content), np.rot90(RGB, -1)) and read_size(content) == (40, 48)


def test_a_large_profile_of_a_png_is_used() -> None:
    profile = PROFILES["Adobe RGB"][0]
    padded = (len(profile) + 2_000_000).to_bytes(4, "big") + profile[4:] + bytes(2_000_000)
    content = encoded(Image.fromarray(RGB))
    large = with_chunks(content, png_chunk(b"iCCP", b"Large\0\0" + zlib.compress(padded)))
    assert np.array_equal(read_pixels(large), read_pixels(encoded(Image.fromarray(RGB), icc_profile=profile)))


@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
def test_transparent_grey_of_a_png_at_any_depth(depth: int) -> None:
    values = np.tile(np.arange(40) % 2 ** min(depth, 4), (40, 1))
    bits = (values[..., None] >> np.arange(depth - 1, -1, -1)) & 1
    rows = [np.packbits(row.ravel()).tobytes() for row in bits]
    key = png_chunk(b"tRNS", struct.pack(">H", 1))
    loaded = grey_of(png(40, 40, depth, 0, rows, key))
    np.testing.assert_allclose(loaded, np.where(values == 1, 1, values / (2**depth - 1)), rtol=0, atol=1e-6)


def test_transparent_colour_of_sixteen_bits_is_refused() -> None:
    key = png_chunk(b"tRNS", struct.pack(">HHH", 0, 0, 0))
    with pytest.raises(ImageError, match="16-bit colour with a transparent colour"):
        load_image(png(40, 40, 16, 2, [bytes(240)] * 40, key))


def test_integers_of_thirty_two_bits() -> None:
    assert np.array_equal(grey_of(Image.fromarray(GREY.astype(np.int32) * 257)), grey_of(GREY))
    with pytest.raises(
        ImageError, match=r"has 32-bit integers from \d+ to 255; expected 16 bits \(0..65535\) or an 8-bit"
    ):
        load_image(Image.fromarray(np.maximum(GREY, 255 * np.eye(40, 48, dtype=np.uint8)).astype(np.int32)))
    deep = b"P5 48 40 65535\n" + np.full((40, 48), 200, ">u2").tobytes()  # a dark one, of known depth
    np.testing.assert_allclose(grey_of(deep), 200 / 65535, atol=1e-7)


def test_scorer_and_the_commands_read_by_the_rules_they_are_given(tmp_path: Path) -> None:
    """Orientation, profile and truncation: one image, one score, with workers and without, and `load_image`'s."""
    photo = Image.open(Path(__file__).parents[1] / "examples" / "photos" / "hats.jpg").convert("RGB")
    content = encoded(photo.resize((160, 128)), "JPEG", exif=exif(8), icc_profile=PROFILES["Adobe RGB"][0])[:-2]
    file = tmp_path / "x.jpg"
    file.write_bytes(content)
    net = Scorer(["qualiclip-mini"], workers=0).networks[0].metrics["qualiclip-mini"]
    seen = set()
    for rules in ({}, {"ignore_orientation": True}, {"ignore_profile": True}):
        with torch.no_grad():
            expected = net(load_image(file, allow_truncated=True, **rules)[None]).item()
        seen.add(round(expected, 5))
        for workers in (0, 1):
            scorer = Scorer(["qualiclip-mini"], workers=workers, allow_truncated=True, **rules)
            scores = [record.scores["qualiclip-mini"] for record in scorer.score([file, content, Image.open(file)])]
            assert scores == pytest.approx([expected] * 3, abs=2e-6)
        table = tmp_path / "scores.jsonl"
        options = [f"--{name.replace('_', '-')}" for name in rules]
        command = ["score", str(file), "-m", "qualiclip-mini", "-o", str(table), "--workers", "0", *options]
        assert main([*command, "--allow-truncated"]) == 0
        row = json.loads(table.read_text())
        assert row["qualiclip-mini"] == pytest.approx(expected, abs=1e-6)
        table.unlink()
        table.with_name("scores.jsonl.meta.json").unlink()
        assert main(command) == 1 and "is damaged" in table.read_text()
        table.unlink()
        table.with_name("scores.jsonl.meta.json").unlink()
    assert len(seen) == 3
