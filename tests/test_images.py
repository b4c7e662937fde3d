"""Pictures in: one conversion for every source, and one clear line for what cannot be scored."""

from __future__ import annotations

import errno
import io
import os
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from faults import as_nobody
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from image_bytes import encoded, exif, png
from PIL import Image, ImageFile

from qualiclip_pyiqa.errors import ImageError, SettingsError
from qualiclip_pyiqa.images.convert import MIN_SIDE, ReadRules, read_pixels, read_size
from qualiclip_pyiqa.images.tensors import as_batch, load_image

RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (40, 48, 3), dtype=np.uint8)
EXACT = torch.from_numpy(RGB).movedim(-1, 0).float() / 255


def test_every_source_of_the_same_pixels_is_the_same_tensor(tmp_path: Path) -> None:
    file = tmp_path / "a b ü.png"
    Image.fromarray(RGB).save(file)
    chw = torch.from_numpy(RGB).movedim(-1, 0)
    read_only = RGB.copy()
    read_only.setflags(write=False)
    sources = [file, str(file), file.read_bytes(), Image.open(file), RGB, RGB[:, ::-1][:, ::-1], read_only, chw]
    sources += [EXACT, EXACT.double(), RGB / 255.0, (RGB / 255.0).astype(">f4")]
    for source in sources:
        loaded = load_image(source)
        assert loaded.shape == (3, 40, 48) and loaded.dtype == torch.float32 and loaded.is_contiguous()
        # Division in double and rounding to single may differ by one unit in the last place.
        torch.testing.assert_close(loaded, EXACT, rtol=1.2e-7, atol=0)
        assert torch.equal(as_batch(source)[0], loaded)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "BMP", "TIFF"])
def test_plain_rgb_files_equal_pyiqas_pixels(format: str, tmp_path: Path) -> None:
    from pyiqa.utils.img_util import imread2tensor

    file = tmp_path / f"x.{format.lower()}"
    Image.fromarray(RGB).save(file)
    assert torch.equal(load_image(file), imread2tensor(str(file), rgb=True))


@settings(deadline=None, derandomize=True, max_examples=25)
@given(hnp.arrays(np.uint8, st.tuples(st.integers(32, 40), st.integers(32, 40), st.sampled_from([1, 3, 4]))))
def test_arrays_and_tensors_agree(pixels: np.ndarray) -> None:
    tensor = torch.from_numpy(pixels).movedim(-1, 0)
    assert torch.equal(load_image(pixels), load_image(tensor))
    assert torch.equal(as_batch(tensor.unsqueeze(0))[0], load_image(tensor))
    wide = pixels.astype(np.uint16) * 257  # 255 * 257 = 65535
    torch.testing.assert_close(load_image(wide), load_image(pixels), rtol=2.4e-7, atol=0)


def test_exif_rotation_is_applied() -> None:
    turned = encoded(Image.fromarray(RGB), exif=exif(6))  # by 90 degrees clockwise when shown
    assert torch.equal(load_image(turned), EXACT.rot90(-1, (1, 2)))
    assert torch.equal(load_image(turned, ignore_orientation=True), EXACT)
    assert torch.equal(as_batch(turned, ignore_orientation=True)[0], EXACT)
    assert read_size(turned) == (40, 48) and read_size(turned, ReadRules(ignore_orientation=True)) == (48, 40)


def test_grey_becomes_three_equal_channels() -> None:
    grey = RGB[..., 0]
    expected = (torch.from_numpy(grey).float() / 255).expand(3, -1, -1)
    for source in (grey, grey[..., None], torch.from_numpy(grey), torch.from_numpy(grey)[None], Image.fromarray(grey)):
        assert torch.equal(load_image(source), expected)
    bits = Image.fromarray((grey > 127).astype(np.uint8) * 255).convert("1")
    assert set(load_image(bits).unique().tolist()) == {0.0, 1.0}


def test_palette_and_its_transparent_colour() -> None:
    indices = RNG.integers(0, 3, (40, 40), dtype=np.uint8)
    image = Image.new("P", (40, 40))
    image.putdata(indices.ravel().tolist())
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    red, green, blue = load_image(encoded(image))
    assert torch.equal(torch.stack([red, green, blue]).argmax(0), torch.from_numpy(indices).long())
    seen_through = load_image(encoded(image, transparency=1))
    assert (seen_through[:, indices == 1] == 1).all()
    assert torch.equal(seen_through[:, indices != 1], load_image(encoded(image))[:, indices != 1])


def test_alpha_lies_over_white() -> None:
    alpha = RNG.integers(0, 256, (40, 48, 1), dtype=np.uint8)
    alpha[:10], alpha[10:20] = 0, 255
    rgba = np.concatenate([RGB, alpha], axis=2)
    a = torch.from_numpy(alpha).movedim(-1, 0).float() / 255
    for source in (rgba, Image.fromarray(rgba), encoded(Image.fromarray(rgba)), torch.from_numpy(rgba).movedim(-1, 0)):
        loaded = load_image(source)
        torch.testing.assert_close(loaded, EXACT * a + 1 - a, rtol=0, atol=1e-6)
        assert (loaded[:, :10] == 1).all() and torch.equal(loaded[:, 10:20], EXACT[:, 10:20])
    grey_alpha = Image.merge("LA", [Image.fromarray(RGB[..., 0]), Image.fromarray(alpha[..., 0])])
    assert (load_image(encoded(grey_alpha))[:, :10] == 1).all()
    keyed = np.full((40, 40, 3), 7, np.uint8)
    keyed[:20] = 200
    assert (load_image(encoded(Image.fromarray(keyed), transparency=(7, 7, 7)))[:, 20:] == 1).all()


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_sixteen_bit_grey_keeps_its_steps(format: str) -> None:
    deep = np.arange(40 * 40, dtype=np.uint16).reshape(40, 40) * 40
    loaded = load_image(encoded(Image.fromarray(deep), format))
    torch.testing.assert_close(loaded[0], torch.from_numpy(deep).float() / 65535, rtol=0, atol=0)
    assert loaded[0].unique().numel() == 1600


def test_other_modes_go_through_pillow() -> None:
    cmyk = Image.frombytes("CMYK", (40, 40), RNG.integers(0, 256, 6400, dtype=np.uint8).tobytes())
    expected = torch.from_numpy(np.array(cmyk.convert("RGB"))).movedim(-1, 0).float() / 255
    assert torch.equal(load_image(cmyk), expected)
    assert torch.equal(load_image(encoded(cmyk, "TIFF")), expected)
    floats = Image.fromarray(RGB[..., 0].astype(np.float32) / 255)
    assert torch.equal(load_image(floats)[0], EXACT[0])
    ints = Image.fromarray(RGB[..., 0].astype(np.int32) * 257)
    torch.testing.assert_close(load_image(ints)[0], EXACT[0], rtol=2.4e-7, atol=0)


def test_first_frame_of_an_animation() -> None:
    frames = [Image.new("RGB", (40, 40), colour) for colour in ("red", "blue")]
    loaded = load_image(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]))
    assert loaded[0].mean() > 0.9 and loaded[2].mean() < 0.1


def test_tensors_keep_gradient_and_batch() -> None:
    batch = torch.rand(2, 1, 32, 33, dtype=torch.float64, requires_grad=True)
    out = as_batch(batch)
    assert out.shape == (2, 3, 32, 33) and out.dtype == torch.float32
    out.sum().backward()
    assert batch.grad is not None and torch.equal(batch.grad, torch.full_like(batch, 3))
    leaf = torch.rand(4, 32, 32, requires_grad=True)
    load_image(leaf).mean().backward()
    assert leaf.grad is not None and leaf.grad.abs().sum() > 0
    array = np.zeros((32, 32, 3), np.float32)
    loaded = load_image(array)
    array += 1
    assert (loaded == 0).all()


def png_of_size(width: int, height: int) -> bytes:
    """A PNG whose header promises that size and whose pixel data is nearly nothing."""
    return png(width, height, 8, 2, [b"\0" * 998])


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.png", b"", "is empty"),
        ("page.jpg", b"<html>404</html>" * 9, "is not an image"),
        ("cut.png", encoded(Image.fromarray(RGB))[:900], "is damaged"),
        (
            "cut.jpg",
            encoded(Image.fromarray(RGB), "JPEG")[:-300],
            r"damaged \(truncated: its image data end too early",
        ),
        ("cut.webp", encoded(Image.fromarray(RGB), "WEBP")[:-300], "is damaged|is not an image"),
        ("cut.tif", encoded(Image.fromarray(RGB), "TIFF")[:400], "is damaged|is not an image"),
        ("header.png", b"\x89PNG\r\n\x1a\n", "is damaged|is not an image"),
        ("zero.png", png_of_size(0, 0), r"is damaged \(PNG: no size in its header\); expected a whole image"),
        ("warned.png", png_of_size(10000, 10000), "too large.*bomb.*MAX_IMAGE_PIXELS"),
        ("bomb.png", png_of_size(60000, 60000), "too large.*bomb.*MAX_IMAGE_PIXELS"),
        ("small.png", encoded(Image.new("RGB", (31, 200))), "31x200.*smallest.*32x32"),
    ],
)
def test_hostile_files_are_one_line_that_names_them(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(ImageError, match=message) as caught:
        load_image(file)
    assert str(file) in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(ImageError, match=message) as caught:
        load_image(content)
    assert str(caught.value).startswith("bytes ")


def test_paths_that_are_no_files(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"is a folder"):
        load_image(tmp_path)
    with pytest.raises(ImageError, match=r"nowhere\.png does not exist"):
        load_image(tmp_path / "nowhere.png")
    with pytest.raises(ImageError, match="cannot be read"):
        load_image("a\0b.png")
    for several in (["a.png", "b.png"], ("a.png",)):
        with pytest.raises(ImageError, match=r"image is a (list|tuple); .*; for several images use Scorer"):
            load_image(several)  # type: ignore[arg-type]
    with pytest.raises(ImageError, match=r"image is an int; expected a path, .* or a tensor$"):
        load_image(3)  # type: ignore[arg-type]
    with pytest.raises(ImageError, match=r"^image path is empty; expected an image file"):
        load_image("")


def test_advice_for_a_file_is_not_that_for_an_array() -> None:
    for values in (200.0, -3.0):
        content = encoded(Image.fromarray(np.full((40, 40), values, np.float32)), "TIFF")
        with pytest.raises(ImageError, match=r"expected 0\.\.1") as caught:
            load_image(content)
        assert "store" in str(caught.value) and "pass" not in str(caught.value) and "clamp" not in str(caught.value)
    with pytest.raises(ImageError, match="divide by 255, or pass uint8"):
        load_image(Image.fromarray(np.full((40, 40), 200.0, np.float32)))


def test_unreadable_file(tmp_path: Path) -> None:
    file = tmp_path / "x.png"
    Image.fromarray(RGB).save(file)
    file.chmod(0)

    def message() -> str:
        with pytest.raises(ImageError) as caught:
            read_pixels(file)
        return str(caught.value)

    assert as_nobody(message) == f"{file} cannot be read (Permission denied); expected an image file"


def test_a_read_error_is_one_line() -> None:
    """Linux's own memory is a regular file whose first byte cannot be read."""
    with pytest.raises(ImageError) as caught:
        load_image("/proc/self/mem")
    assert str(caught.value) == "/proc/self/mem cannot be read (Input/output error); expected an image file"


def test_a_read_error_in_mid_picture_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "x.png"
    Image.fromarray(RGB).save(file)

    class FailingDisk(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            if self.tell() > 1000:
                raise OSError(errno.EIO, "Input/output error")
            return super().read(size)

    content = file.read_bytes()
    monkeypatch.setattr(Path, "open", lambda path, mode: FailingDisk(content))
    with pytest.raises(ImageError, match=r"x\.png cannot be read \(Input/output error\); expected an image file"):
        load_image(file)


def test_truncated_is_damaged_whatever_others_told_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    """pyiqa's AVA data set, once imported, lets Pillow fill what is missing with grey."""
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    whole = encoded(Image.fromarray(RGB), "JPEG")
    with pytest.raises(ImageError, match="is damaged"):
        load_image(whole[: len(whole) // 2])
    assert ImageFile.LOAD_TRUNCATED_IMAGES is True


def test_truncated_is_damaged_in_every_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    photo = Image.fromarray(RGB).resize((400, 300))
    jpeg, bitmap = encoded(photo, "JPEG")[:-3000], encoded(photo, "BMP")[:-3000]
    accepted: list[object] = []

    def read(content: bytes) -> None:
        for _ in range(60):
            try:
                accepted.append(load_image(content).shape)
            except ImageError:
                load_image(content, allow_truncated=True)

    threads = [threading.Thread(target=read, args=(content,)) for content in (jpeg, bitmap) * 4]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not accepted and ImageFile.LOAD_TRUNCATED_IMAGES is True


def test_limit_of_one_thread_is_not_another_threads() -> None:
    large, errors = encoded(Image.new("L", (400, 400))), []
    before = Image.MAX_IMAGE_PIXELS

    def read(limit: int | None) -> None:
        for _ in range(200):
            try:
                load_image(large, max_pixels=limit)
                refused = False
            except ImageError:
                refused = True
            if refused is not (limit == 1000):
                errors.append(limit)

    threads = [threading.Thread(target=read, args=(limit,)) for limit in (None, 1000, 10**9, 1000, None)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and before == Image.MAX_IMAGE_PIXELS


def test_pillows_limit_holds_unless_another_one_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    file = encoded(Image.new("L", (400, 400)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    for source in (file, Image.open(io.BytesIO(encoded(Image.new("L", (40, 26)))))):
        with pytest.raises(ImageError, match="limit 1000 pixels"):
            load_image(source)
    with pytest.raises(ImageError, match="limit 1000 pixels"):
        read_size(file)
    assert load_image(file, max_pixels=160000).shape == (3, 400, 400)
    assert read_size(file, ReadRules(max_pixels=160000)) == (400, 400)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert load_image(file).shape == (3, 400, 400)
    with pytest.raises(ImageError, match="limit 159999 pixels"):
        load_image(file, max_pixels=159999)
    with pytest.raises(SettingsError, match="max_pixels is 0; expected at least 1"):
        load_image(file, max_pixels=0)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "BMP", "GIF", "TIFF", "PPM"])
@pytest.mark.parametrize("kept", [0.97, 0.5, 0.1])
def test_truncated_on_request_is_what_pillow_makes_of_it(
    format: str, kept: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    photo = Image.fromarray(RGB).resize((300, 200))
    cut = encoded(photo, format)
    cut = cut[: int(kept * len(cut))]
    with pytest.raises(ImageError, match="is damaged"):
        load_image(cut)
    loaded = load_image(cut, allow_truncated=True)
    opened = load_image(Image.open(io.BytesIO(cut)), allow_truncated=True)
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    expected = np.asarray(Image.open(io.BytesIO(cut)).convert("RGB"))
    assert torch.equal(loaded, torch.from_numpy(expected.copy()).movedim(-1, 0).float() / 255)
    assert torch.equal(opened, loaded)


def test_a_jpeg_without_its_end_marker_is_whole_on_request() -> None:
    photo = encoded(Image.fromarray(RGB).resize((300, 200)), "JPEG")
    assert photo.endswith(b"\xff\xd9")
    with pytest.raises(ImageError, match="is damaged"):
        load_image(photo[:-2])
    assert torch.equal(load_image(photo[:-2], allow_truncated=True), load_image(photo))
    assert torch.equal(load_image(photo, allow_truncated=True), load_image(photo))


def test_truncated_before_the_first_row_is_damaged_even_on_request() -> None:
    photo = encoded(Image.fromarray(RGB))
    with pytest.raises(ImageError, match="truncated before its first row"):
        load_image(photo[: photo.index(b"IDAT") + 6], allow_truncated=True)


def test_default_dtype_of_torch_does_not_matter() -> None:
    sources = [
        encoded(Image.fromarray(RGB)),
        RGB,
        RGB / 255.0,
        EXACT,
        RGB.astype(np.uint16),
        np.dstack([RGB, RGB[..., :1]]),
    ]
    expected = [load_image(source) for source in sources]
    torch.set_default_dtype(torch.float64)
    try:
        for source, loaded in zip(sources, expected, strict=True):
            assert load_image(source).dtype == torch.float32 and torch.equal(load_image(source), loaded)
    finally:
        torch.set_default_dtype(torch.float32)


def test_pipes_devices_and_folders_are_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    for path in (tmp_path / "pipe.png", Path("/dev/zero")):
        with pytest.raises(ImageError, match="is a pipe, socket or device; expected an image file"):
            load_image(path)
    with pytest.raises(ImageError, match="is a folder"):
        load_image(tmp_path)


def test_errors_stay_one_line_whatever_the_files_name(tmp_path: Path) -> None:
    for name in ("a\nb.png", os.fsdecode(b"\xff.png")):
        with pytest.raises(ImageError) as caught:
            load_image(tmp_path / name)
        assert "\n" not in str(caught.value)
        str(caught.value).encode()  # no surrogates: it can be printed and written


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (np.zeros((40, 40, 2), np.uint8), "expected .H, W"),
        (np.zeros((3, 40, 40), np.uint8), "expected .H, W"),
        (np.zeros((2, 40, 40, 3), np.uint8), "expected .H, W"),
        (np.zeros((40, 40, 3), np.int64), "dtype int64"),
        (np.zeros((40, 40, 3), bool), "dtype bool"),
        (np.full((40, 40, 3), np.nan), "NaN"),
        (np.full((40, 40, 3), 1.5), "0..1"),
        (np.full((40, 40, 3), 200.0), "divide by 255"),
        (np.full((40, 40, 3), -0.1), "0..1"),
        (np.zeros((31, 40), np.uint8), "40x31"),
        (torch.zeros(2, 40, 40), "expected 1, 3 or 4 channels"),
        (torch.zeros(40, 40, 3), "looks like"),
        (torch.full((3, 40, 40), float("inf")), "infinite"),
        (torch.zeros(3, 40, 40, dtype=torch.int64), "int64"),
        (torch.zeros(3, 8, 40), "40x8"),
        (torch.zeros(3, 0, 40), "40x0"),
        (torch.zeros(40), "shape"),
        (Image.fromarray(np.full((40, 40), 70000, np.int32)), "32-bit"),
        (Image.fromarray(np.full((40, 40), 7.0, np.float32)), "0..1"),
    ],
)
def test_wrong_arrays_and_tensors(source: object, message: str) -> None:
    with pytest.raises(ImageError, match=message):
        load_image(source)  # type: ignore[arg-type]


def test_wrong_batches() -> None:
    for source in (torch.zeros(0, 3, 40, 40), torch.zeros(1, 2, 40, 40), torch.zeros(1, 1, 3, 40, 40)):
        with pytest.raises(ImageError, match="shape"):
            as_batch(source)
    with pytest.raises(ImageError, match="shape"):
        load_image(torch.zeros(1, 3, 40, 40))


def test_smallest_side_is_enough() -> None:
    assert load_image(np.zeros((MIN_SIDE, MIN_SIDE), np.uint8)).shape == (3, 32, 32)
