"""The commands of docs/: all of them are understood, and those marked `<!-- run -->` run as written."""

from __future__ import annotations

import csv
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pyiqa
import pytest
import torch
import yaml
from PIL import Image
from pyiqa.losses import build_loss
from pyiqa.metrics import calculate_metric
from synthetic import synthetic_photograph
from torch import Tensor, nn

from qualiclip_pyiqa.commands import cli
from qualiclip_pyiqa.degradations.bank import degrade
from qualiclip_pyiqa.metrics.registry import MetricSpec

ROOT = Path(__file__).parents[1]
# Later pages use what earlier ones made.
NAMES = ("training.md", "evaluation.md", "fit.md", "scoring.md", "embedded.md", "profile.md", "report.md", "serving.md")
PAGES = [ROOT / "docs" / name for name in NAMES]
TEXT = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
BLOCKS = re.findall(r"(<!-- run -->\n)?```bash\n(.*?)```", TEXT, flags=re.DOTALL)
COMMANDS = [line for _, block in BLOCKS for line in block.splitlines() if line.startswith("qualiclip ")]
# Those within the text and its tables too.
COMMANDS += re.findall(
    r"`(qualiclip (?:train|tune|fit|evaluate|score|describe|report|filter|serve) [^`]*--[^`]*)`",
    TEXT.replace("\n", " "),
)


@pytest.mark.parametrize("line", sorted(set(COMMANDS)))
def test_command_is_understood(line: str) -> None:
    words = [word for word in shlex.split(line, comments=True) if word != "..."]
    cli._parser().parse_args(words[1:])


def save(path: Path, rgb) -> None:
    path.parent.mkdir(exist_ok=True)
    Image.fromarray((rgb * 255).round().byte().permute(1, 2, 0).numpy()).save(path)


def test_marked_commands_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(20):  # a gMAD competition needs 18
        save(tmp_path / "photographs" / f"{number}.png", synthetic_photograph(number, 64, 64))
    rows = [["image", "mos"]]
    for level in range(6):
        for number in range(20, 24):  # a fit needs 20 images
            picture = degrade(synthetic_photograph(number, 96, 96)[None], "gaussian_blur", level, 0)[0]
            save(tmp_path / "rated" / f"{level}-{number}.png", picture)
            rows.append([f"{level}-{number}.png", f"{5 - level}"])
    with (tmp_path / "scores.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    shutil.copytree(ROOT / "examples" / "photos", tmp_path / "examples" / "photos")
    monkeypatch.chdir(tmp_path)
    ran = apart = 0
    for mark, block in BLOCKS:
        for line in block.splitlines() if mark else ():
            words = shlex.split(line, comments=True)
            # In this process, which has everything imported, but for the first interpreter of them all.
            if words[0] == "qualiclip":
                assert cli.main(words[1:]) == 0, line
            elif words[:2] == ["python", "-c"] and apart:
                exec(words[2], {})
            elif words[:2] == ["python", "-m"]:
                monkeypatch.setattr(sys, "argv", words[2:])
                with pytest.raises(SystemExit) as ended:
                    runpy.run_module(words[2], run_name="__main__", alter_sys=True)
                assert ended.value.code == 0, line
            else:
                assert words[0] == "python"
                subprocess.run([sys.executable, *words[1:]], check=True)
                apart += 1
            ran += 1
    assert ran >= 9 and apart
    results = (
        "toy.csv",
        "mine.csv",
        "sheet.png",
        "agreement.json",
        "scatter.png",
        "levels.png",
        "profile.png",
        "usual.csv",
    )
    for made in ("runs/toy/model.safetensors", "my.safetensors", *results):
        assert (tmp_path / made).stat().st_size > 0, made


@pytest.mark.parametrize("page", sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("weights/*.md")]))
def test_every_link_goes_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        assert target.startswith("http") or (page.parent / target).exists(), target


def test_the_python_of_the_loop_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cv2 = pytest.importorskip("cv2")
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    pytest.importorskip("torchmetrics")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    photographs = torch.stack([synthetic_photograph(number, 96, 96) for number in range(3)])
    frames = (photographs * 255).byte().permute(0, 2, 3, 1).numpy()
    cv2.imwrite("photo.png", frames[0])
    writer = cv2.VideoWriter("video.avi", cv2.VideoWriter_fourcc(*"MJPG"), 25, (96, 96))
    for frame in frames:
        writer.write(frame[:, :, ::-1].copy())
    writer.release()

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shift = nn.Parameter(torch.zeros(()))

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"restored": x + self.shift, "loss": self.shift.square()}

    class Pipeline:
        """As much of a pipeline of diffusers as the example needs."""

        def __init__(self) -> None:
            self.vae = SimpleNamespace(
                config=SimpleNamespace(scaling_factor=0.5), decode=lambda latents: SimpleNamespace(sample=latents)
            )
            self.image_processor = SimpleNamespace(postprocess=self.postprocess)

        def postprocess(self, decoded: Tensor) -> list[Image.Image]:
            return [Image.fromarray((x.clamp(0, 1) * 255).byte().permute(1, 2, 0).numpy()) for x in decoded]

        def __call__(self, prompt: str, callback_on_step_end: Callable) -> SimpleNamespace:
            x = torch.rand(1, 3, 64, 64)
            for step in range(2):
                x = callback_on_step_end(self, step, 1000 - step, {"latents": x})["latents"] / 2
            return SimpleNamespace(images=self.postprocess(x))

    arguments = transformers.TrainingArguments(output_dir="run", use_cpu=True, report_to=[], disable_tqdm=True)
    names: dict = {
        "cv2": cv2,
        "l1": nn.functional.l1_loss,
        "target": photographs,
        "restored": (photographs / 2).requires_grad_(),
        "degraded": photographs,
        "metric": pyiqa.create_metric("qualiclip-mini+", device="cpu"),
        "comfyui_image": photographs.movedim(1, -1),
        "path": "photo.png",
        "trainer": transformers.Trainer(Model(), arguments, eval_dataset=[{"x": x} for x in photographs]),
        "pipeline": Pipeline(),
    }
    page = (ROOT / "docs" / "loop.md").read_text(encoding="utf-8")
    for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(block, names)
        if "callback_on_step_end" in block:
            assert len(names["course"]) == 4 and 0 <= names["mean"] <= 1
    assert names["restored"].grad.abs().max() > 0 and names["loss"] > 0
    assert {"eval_quality", "eval_sharpness"} <= names["means"].keys()
    assert [time for time, _ in names["course"]] == pytest.approx([0, 0.04, 0.08])
    rgb = next(names["frames"]("video.avi"))
    assert abs(rgb.mean(axis=(0, 1)) - frames[0].mean(axis=(0, 1))).max() < 2  # RGB again, but for JPEG
    (block,) = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    options = yaml.safe_load(block)
    for option in options["train"].values():
        build_loss(option)
    assert 0 <= calculate_metric([frames[0]], options["val"]["metrics"]["quality"]) <= 1


def test_the_metric_of_the_architecture_page_is_one() -> None:
    (block,) = re.findall(
        r"```python\n(.*?)```", (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8"), re.DOTALL
    )
    names: dict = {}
    exec(block, names)
    x = names["torch"].full((2, 3, 48, 64), 0.25)
    assert names["Brightness"]()(x).flatten().tolist() == [0.25, 0.25]
    # As pyiqa makes it from a row of the table, which names no file.
    spec = MetricSpec(name="brightness", arch="Brightness", weights="", summary="mean of the pixels", paper="none")
    options = spec.entry()["metric_opts"]
    assert options.pop("type") == "Brightness" and spec.records == ()
    assert names["Brightness"](**options, tile=32)(x).flatten().tolist() == [0.25, 0.25]
    (record,) = names["Scorer"]({"brightness": names["Brightness"]()}, device="cpu", workers=0).score([x[0]])
    assert record.scores == {"brightness": 0.25}
