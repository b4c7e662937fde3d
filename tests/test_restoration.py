"""The gradient of QualityLoss leads where it should, and the restorers of examples/restoration learn from it."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from qualiclip_pyiqa import QualityLoss, load_image

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples" / "restoration"
PHOTOS = ROOT / "examples" / "photos"


@pytest.fixture(scope="module")
def example() -> Iterator[ModuleType]:
    """`train.py`, imported as it imports its neighbours."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [str(EXAMPLE), *sys.path])
        yield importlib.import_module("train")
    for name in ("networks", "tasks", "measures", "train"):
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def noisy() -> Tensor:
    return load_image(PHOTOS / "lighthouse-noisy.jpg")[None, :, 200:328, 300:428]


@pytest.mark.parametrize("name", ["qualiclip-mini", "qualiclip-mini+"])
def test_gradient_is_the_slope(name: str, noisy: Tensor) -> None:
    loss = QualityLoss(name).double()
    x = (0.1 + 0.8 * noisy).double().requires_grad_()  # away from 0 and 1, where the gradient is one-sided
    (gradient,) = torch.autograd.grad(loss(x), x)
    rng = torch.Generator().manual_seed(0)
    for _ in range(3):
        direction = torch.randn(x.shape, generator=rng, dtype=torch.float64)
        direction += gradient / gradient.norm() * direction.norm()  # random ones alone are almost orthogonal to it
        step = 1e-7 * direction / direction.norm()  # small: the tower has kinks
        with torch.no_grad():
            slope = (loss(x + step) - loss(x - step)).item() / 2
        # Rounding in float64 is about 1e-16 of the loss, of a slope times step of about 1e-7.
        assert slope == pytest.approx((gradient * step).sum().item(), rel=1e-4)


@pytest.mark.parametrize("name", ["qualiclip-mini", "qualiclip-mini+"])
@pytest.mark.parametrize("photo", ["blurred", "jpeg10", "noisy"])
def test_ten_gradient_steps_raise_the_score(name: str, photo: str) -> None:
    loss = QualityLoss(name)
    x = load_image(PHOTOS / f"lighthouse-{photo}.jpg")[None, :, 200:328, 300:428].requires_grad_()
    optimizer = torch.optim.SGD([x], lr=0.1)
    losses = []
    for _ in range(10):
        losses.append(loss(x))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert loss(x) < losses[0] - 0.05


def run(example: ModuleType, monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> None:
    given = ["train.py", "--photographs", PHOTOS, "--quick", *arguments]
    monkeypatch.setattr(sys, "argv", [str(each) for each in given])
    example.main()


@pytest.mark.parametrize("task", ["denoise", "sr2"])
def test_example_runs_small(
    example: ModuleType, task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(example, monkeypatch, "--task", task, "--relative-to", "target", "--out", tmp_path / "first")
    table = json.loads((tmp_path / "first" / "measures.json").read_text())
    assert table.keys() == {"input", "restored", "photograph"}
    assert table["restored"].keys() == {"psnr", "ssim", "fsim", "qualiclip-mini", "qualiclip-mini+", "piqe"}
    assert table["photograph"]["ssim"] == pytest.approx(1) and table["input"]["ssim"] < 1
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == [*table]
    with Image.open(tmp_path / "first" / "sheet.png") as sheet:
        assert sheet.width > 3 * 90

    first = load_file(tmp_path / "first" / "restorer.safetensors")
    again = ["--task", task, "--weight", "0", "--start", tmp_path / "first" / "restorer.safetensors"]
    run(example, monkeypatch, *again, "--rate", "0", "--out", tmp_path / "second")
    second = load_file(tmp_path / "second" / "restorer.safetensors")
    assert all(torch.equal(second[name], tensor) for name, tensor in first.items())
    other = "sr2" if task == "denoise" else "denoise"
    with pytest.raises(SystemExit, match=r"error: .*restorer.safetensors has other tensors; expected a restorer of"):
        run(example, monkeypatch, *again, "--task", other, "--out", tmp_path / "third")
    assert not (tmp_path / "third").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch", "0"], "--batch is 0; expected at least 1"),
        (["--crop", "31"], "--crop is 31; expected an even number of at least 32"),
        (["--rate", "nan"], "--rate is nan; expected a number of at least 0"),
        (["--weight", "-1"], "weight is -1.0; expected a number of at least 0"),
        (["--metric", "qualiclip-mini+:look"], r"of which more is not better \(brightness, colorfulness, contrast\)"),
    ],
)
def test_wrong_options_of_the_example_are_one_line(
    example: ModuleType, arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit, match=f"error: .*{message}"):
        run(example, monkeypatch, *arguments, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_pixel_loss_restores_and_the_quality_loss_raises_the_score(example: ModuleType) -> None:
    from networks import Denoiser

    task = example.TASKS["denoise"]
    crops = example.Crops([PHOTOS / f"{name}.jpg" for name in ("hats", "parrots")], 64)
    target = load_image(PHOTOS / "lighthouse.jpg")[None, :, 200:328, 300:428]
    torch.manual_seed(0)
    restorer = Denoiser(width=16, depth=1)
    example.fit(restorer, task, crops, None, steps=40, batch=2, rate=5e-3)
    (noisy,), (restored,) = example.restore(restorer, task, [target])
    assert (restored - target).square().mean() < 0.6 * (noisy - target).square().mean()

    losses = []
    for weight in (0, 0.1):
        tuned = Denoiser(width=16, depth=1)
        tuned.load_state_dict(restorer.state_dict())
        quality = QualityLoss("qualiclip-mini", weight=weight) if weight else None
        example.fit(tuned, task, crops, quality, steps=40, batch=2, rate=2e-3, seed=1)
        losses.append(QualityLoss("qualiclip-mini")(example.restore(tuned, task, [target])[1][0]))
    assert losses[1] < losses[0] - 0.05


def test_photographs_held_out_are_not_trained_on(example: ModuleType, tmp_path: Path) -> None:
    for name in "abcdefgh":
        (tmp_path / f"{name}.png").touch()
    training, held_out = example.split(tmp_path)
    assert [path.stem for path in training] == [*"abcdef"] and [path.stem for path in held_out] == [*"gh"]
    (tmp_path / "manifest.csv").write_text("file,held_out\na.png,1\nb.png,0\n")
    training, held_out = example.split(tmp_path)
    assert [path.stem for path in held_out] == ["a"] and [path.stem for path in training] == [*"bcdefgh"]
