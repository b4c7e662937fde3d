"""The commands of docs/: all of them are understood, and those marked `<!-- run -->` run as written."""

from __future__ import annotations

import csv
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from synthetic import synthetic_photograph

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
    ran = 0
    for mark, block in BLOCKS:
        for line in block.splitlines() if mark else ():
            words = shlex.split(line, comments=True)
            if words[0] == "qualiclip":  # in this process, which has everything imported
                assert cli.main(words[1:]) == 0, line
            else:
                assert words[0] == "python"
                subprocess.run([sys.executable, *words[1:]], check=True)
            ran += 1
    assert ran >= 9
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
