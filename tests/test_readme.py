"""The README's table is the package's own, and its Python examples run; as a script it prints the table."""

from __future__ import annotations

import re
from pathlib import Path

import pyiqa
import pytest
import torch

from qualiclip_pyiqa.metrics.prompts import ATTRIBUTES, LOOK
from qualiclip_pyiqa.metrics.registry import METRICS, PromptSpec
from qualiclip_pyiqa.pretrained.manifest import manifest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


# Metrics of one attribute, by the start of their names: what they are and their attributes.
FAMILIES = {
    "clipiqa": ("zero-shot look and feel", [*ATTRIBUTES]),
    "qualiclip-mini": (
        "the same for one attribute; embedded, no download",
        [name for name in LOOK if name != "quality"],
    ),
}


def metrics_table() -> str:
    records = manifest()
    rows = [
        "| metric | what | range | better | weights | licence of the weights | commercial use |",
        "|---|---|---|---|---|---|---|",
    ]
    for spec in METRICS.values():
        if not spec.records:  # a metric of the user's own file
            continue
        name, summary = f"`{spec.name}`", spec.summary
        family = next((each for each in FAMILIES if spec.name.removeprefix(f"{each}-") in FAMILIES[each][1]), None)
        if family is not None:  # one row for all of its attributes
            what, attributes = FAMILIES[family]
            if spec.name != f"{family}-{attributes[0]}":
                continue
            name, summary = f"`{family}-ATTRIBUTE`", f"{what}; ATTRIBUTE is one of {', '.join(attributes)}"
        files = [records[record] for record in spec.records]
        licences = list(dict.fromkeys(record.licence for record in files))
        better = "lower" if spec.lower_better else "higher"
        span, better = (spec.score_range, better) if spec.score_range else ("of your ratings", "as your ratings")
        free = "yes" if all(record.commercial_use for record in files) else "no"
        rows.append(
            f"| {name} | {summary} | {span} | {better} "
            f"| {', '.join(f'`{record.file}`' for record in files)} | {'; '.join(licences)} | {free} |"
        )
    return "\n".join(rows)


def test_metrics_table() -> None:
    assert metrics_table() in README, "README.md's table is out of date: run python tests/test_readme.py"


def test_weights_table_names_the_files_of_every_metric() -> None:
    section = README.partition("\n## Weights\n")[2].partition("\n## ")[0]
    for spec in METRICS.values():
        if not isinstance(spec, PromptSpec):
            for record in spec.records:
                assert f"`{manifest()[record].file}`" in section, (spec.name, record)
    assert "`prompts.safetensors`" in section


def test_mean_score_of_the_examples() -> None:
    metric = pyiqa.create_metric("qualiclip-mini+", device="cpu")
    scores = [metric(str(path)).item() for path in sorted((ROOT / "examples" / "photos").glob("*.jpg"))]
    assert len(scores) == 7 and f"mean score is {sum(scores) / 7:.3f}:" in README


@pytest.fixture
def context() -> dict:
    torch.manual_seed(0)
    picture = torch.rand(1, 3, 64, 64)
    paths = sorted((ROOT / "examples" / "photos").glob("*.jpg"))[:2]
    return {"paths": paths, "l1": torch.nn.L1Loss(), "restored": (picture / 2).requires_grad_(), "target": picture}


def test_python_examples_run(
    upstream_weights: Path, monkeypatch: pytest.MonkeyPatch, context: dict, capsys: pytest.CaptureFixture[str]
) -> None:
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(blocks) >= 3
    monkeypatch.chdir(ROOT)
    for block in blocks:
        if "s3://" in block:  # tests/test_ray.py runs the same on local folders
            compile(block, "README.md", "exec")
        else:
            exec(block, context)
    assert re.search(r"^0\.\d+", capsys.readouterr().out, flags=re.MULTILINE)
    assert context["look"].net.attributes[2] == "sharpness"
    context["loss"].backward()
    assert context["restored"].grad.abs().max() > 0


if __name__ == "__main__":
    print(metrics_table())
