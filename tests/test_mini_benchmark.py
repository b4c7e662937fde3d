"""The benchmark of the small model: its baselines behave as such, and it runs on any folder."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pyiqa
import pytest
import torch
from PIL import Image, ImageFilter
from safetensors.torch import load_file
from scipy import stats
from torch import Tensor

from qualiclip_pyiqa.degradations.bank import DEGRADATIONS
from qualiclip_pyiqa.evaluation import agreement as evaluation
from qualiclip_pyiqa.towers.mini import BLOCKS

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import mini  # noqa: E402
import mini_baselines as baselines  # noqa: E402
import mini_sharpness  # noqa: E402


def natural(seed: int, side: int = 192) -> Tensor:
    """(1, 3, H, W): a power spectrum of 1/f^2, as photographs have, around grey."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.fftfreq(side)[None])
    spectrum = np.fft.fft2(rng.normal(size=(side, side))) / np.maximum(frequency, 1 / side)
    luma = np.real(np.fft.ifft2(spectrum))
    luma = 0.5 + 0.15 * (luma - luma.mean()) / luma.std()
    return torch.from_numpy(luma).float().clamp(0, 1).expand(1, 3, side, side)


def write(path: Path, rgb: Tensor) -> None:
    Image.fromarray((rgb[0] * 255).round().byte().movedim(0, -1).numpy()).save(path)


@pytest.mark.parametrize(("shape", "scale"), [(0.7, 2.0), (1.0, 0.5), (2.0, 1.0), (3.5, 1.5)])
def test_generalised_gaussians_are_recovered(shape: float, scale: float) -> None:
    rng = np.random.default_rng(0)
    x = stats.gennorm.rvs(shape, scale=scale, size=(2, 100_000), random_state=rng)
    found, width = baselines.ggd(x)
    # Moments of 100,000 samples: their standard error is a few tenths of a percent.
    assert found == pytest.approx([shape] * 2, rel=0.03) and width == pytest.approx([scale] * 2, rel=0.03)

    # Twice as wide on the right, where then two thirds of the probability are.
    x = np.abs(x[:1])
    left = rng.uniform(size=x.shape) < 1 / 3
    found, below, above = baselines.aggd(np.where(left, -x, 2 * x))
    assert found == pytest.approx([shape], rel=0.03)
    assert below == pytest.approx([scale], rel=0.03) and above == pytest.approx([2 * scale], rel=0.03)


def test_a_patch_without_variation_has_statistics() -> None:
    found, sharpness = baselines.features(torch.full((3, 96, 96), 0.3))
    assert found.shape == (1, 36) and np.isfinite(found).all() and sharpness[0] < 1e-3


def test_natural_scene_statistics_know_blur_and_noise(tmp_path: Path) -> None:
    for seed in range(6):
        write(tmp_path / f"{seed}.png", natural(seed))
    model = baselines.NaturalScenes.fit(sorted(tmp_path.glob("*.png")))
    fresh = natural(100)
    blurred = [fresh]
    for _ in range(2):
        blurred.append(torch.nn.functional.avg_pool2d(blurred[-1], 5, stride=1, padding=2, count_include_pad=False))
    noise = torch.randn(fresh.shape, generator=torch.Generator().manual_seed(0))
    noisy = [(fresh + sigma * noise).clamp(0, 1) for sigma in (0, 0.03, 0.1)]
    for ladder in (blurred, noisy):
        distances = model(torch.cat(ladder)).tolist()
        assert distances == sorted(distances) and distances[2] > 1.5 * distances[0]
    assert torch.isfinite(model(fresh[..., :40, :50])).all()  # smaller than a patch
    for measure in (baselines.Sharpness(), baselines.SharpestParts()):
        sharpness = measure(torch.cat(blurred)).tolist()
        assert sharpness == sorted(sharpness, reverse=True)


def test_the_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pristine, rated = tmp_path / "pristine", tmp_path / "rated"
    pristine.mkdir()
    rated.mkdir()
    lines = ["image,dmos"]
    photos = sorted((ROOT / "examples" / "photos").glob("*[!0d].jpg"))
    for number, path in enumerate(photos):
        with Image.open(path) as photo:
            small = photo.convert("RGB").resize((128, 96))
        small.save(pristine / path.name)
        for radius in (0, 1, 3):
            small.filter(ImageFilter.GaussianBlur(radius)).save(rated / f"{number}{radius}.png")
            lines.append(f"{number}{radius}.png,{10 + 20 * radius - number}")
    (pristine / "manifest.csv").write_text(f"file,held_out\n{photos[0].name},1\n")
    (rated / "dmos.csv").write_text("\n".join(lines) + "\n")
    for module, name, value in ((mini, "REPEAT", 1), (mini, "HEIGHT", 64), (evaluation, "RESAMPLES", 50)):
        monkeypatch.setattr(module, name, value)
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes((ROOT / "weights" / "qualiclip-mini.safetensors").read_bytes())
    command = ["--pristine", pristine, "--ratings", rated / "dmos.csv", "--images", rated]
    out = tmp_path / "runs" / "report.json"
    both = ["--weights", ROOT / "weights" / "qualiclip-mini.safetensors", copy]
    mini.main([str(each) for each in (*command, *both, "--output", out)])
    said, result = capsys.readouterr().out, json.loads(out.read_text())

    assert {"date", "command", "machine", "versions"} <= result.keys()
    assert result["rated"] == {"all": 12, "choice_half": 6, "other_half": 6}
    assert result["pristine"] == {"photographs": 4, "held_out": 1, "fitted": 3, "degraded": 1}
    simple = [mini.LAPLACIAN, mini.SHARPEST, mini.RELATIVE, mini.SCENES, "piqe", "entropy"]
    assert list(result["baselines"]) == simple and result["baselines"]["piqe"]["lower_better"]
    assert "niqe_modelparameters.mat" in result["not_run"]["niqe"]
    one, other = result["models"].values()
    assert one == other and one["all"]["srcc"] > 0.7  # a lower DMOS is better, and so is a higher score
    assert result["baselines"][mini.LAPLACIAN]["all"]["srcc"] > 0.7
    for part in ("all", "choice_half", "other_half"):
        assert {"n", "srcc", "plcc", "krcc", "srcc_ci95"} <= one[part].keys()
        assert set(one[part]["versus"]) <= set(simple)
    together = result["models_together"]
    assert together["all srcc"] == {"mean": one["all"]["srcc"], "std": 0} and "types_falling" in together
    ladder = one["degradations"]
    assert ladder["types"] == len(ladder["means"]) == len(DEGRADATIONS)
    assert ladder["monotone_types"] == sum(each.monotone for each in DEGRADATIONS.values())
    assert ladder["types_falling"] == len(DEGRADATIONS) - len(ladder["not_falling"])
    assert ladder["monotone_types_falling"] <= ladder["types_falling"]
    speeds = result["pictures_per_second"]
    assert set(speeds) == {str(both[1]), *mini.TIMED}  # towers that are alike are timed once
    assert all(value > 0 for row in speeds.values() for value in row.values())
    assert "not run: niqe" in said and f"| {copy} | {one['all']['srcc']:.4f} |" in said
    assert not list(out.parent.glob("*.part"))


def test_sharpness_is_put_into_a_finished_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fitted to the photographs here; all else is the model's."""
    photos = sorted((ROOT / "examples" / "photos").glob("*[!0d].jpg"))
    for number in range(26):  # 24 of them validate
        with Image.open(photos[number % len(photos)]) as photo:
            photo.convert("RGB").resize((400, 400)).save(tmp_path / f"{number:02}.png")
    model, out = ROOT / "weights" / "qualiclip-mini.safetensors", tmp_path / "model.safetensors"
    options = ["--weights", model, "--pristine", tmp_path, "--out", out]
    monkeypatch.setattr("sys.argv", ["mini_sharpness.py", *map(str, options)])
    mini_sharpness.main()
    before, after = load_file(model), load_file(out)
    line = f"visual.heads.{BLOCKS.index(('sharpness',))}.line"
    assert before.keys() == after.keys()
    assert [key for key in before if not torch.equal(before[key], after[key])] == [line]
    assert torch.isfinite(after[line]).all()
    score = pyiqa.create_metric("qualiclip", weights=str(out), device="cpu")(str(photos[0]))
    assert 0 < float(score) < 1


def test_nothing_to_measure(tmp_path: Path) -> None:
    (tmp_path / "mos.csv").write_text("image,mos\n" + "".join(f"{k}.png,{k}\n" for k in range(6)))
    command = ["--pristine", str(tmp_path / "none"), "--ratings", str(tmp_path / "mos.csv"), "--images", str(tmp_path)]
    with pytest.raises(SystemExit, match=r"error: .*0\.png is not there"):
        mini.main(command)
    for k in range(6):
        write(tmp_path / f"{k}.png", natural(k, 48))
    with pytest.raises(SystemExit, match=r"error: no photographs in .*none"):
        mini.main(command)
    (tmp_path / "few.csv").write_text("image,mos\n0.png,1\n1.png,2\n")
    with pytest.raises(SystemExit, match="rates 2 pictures; expected 6 or more"):
        mini.main([*command[:2], "--ratings", str(tmp_path / "few.csv"), *command[4:]])
