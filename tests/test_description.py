"""What decides a score is described by the scorer itself, not guessed from names."""

from __future__ import annotations

import io
import json
import math
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyiqa
import pytest
from PIL import Image
from test_cli_score import picture, rows, score
from torch import nn

from qualiclip_pyiqa import Scorer
from qualiclip_pyiqa.errors import SettingsError
from qualiclip_pyiqa.images.convert import ReadRules
from qualiclip_pyiqa.scoring.tables import meta_path, read_meta


def test_directions_are_those_of_the_metrics() -> None:
    named = {"my piqe": "piqe", "other": pyiqa.create_metric("piqe", device="cpu"), "mini": "qualiclip-mini"}
    scorer = Scorer(named, device="cpu")
    assert scorer.lower_better == {"my piqe": True, "other": True, "mini": False}
    attributes = Scorer({"look": pyiqa.create_metric("qualiclip-mini", device="cpu")}, device="cpu")
    assert attributes.lower_better == dict.fromkeys(attributes.columns, False)

    class Plain(nn.Module):
        def forward(self, x):
            return x.mean((1, 2, 3))

    assert Scorer({"brightness": Plain()}, device="cpu").lower_better == {"brightness": False}


def test_everything_that_decides_a_score_is_described() -> None:
    scorer = Scorer(["qualiclip-mini", "piqe"], device="cpu", precision="bf16", ignore_orientation=True, max_pixels=9)
    found = json.loads(json.dumps(scorer.describe()))
    assert found["precision"] == "bf16" and found["device"] == "cpu"
    assert found["images"] == asdict(scorer.rules)
    assert found["images"]["ignore_orientation"] is True and found["images"]["max_pixels"] == 9
    assert list(found["columns"]) == list(scorer.columns)
    mini, piqe = found["columns"].values()
    assert mini["lower_better"] is False and len(mini["weights"]["sha256"]) == 64
    assert piqe["lower_better"] is True and piqe["metric"] == "piqe" and piqe["pyiqa_version"]


@pytest.mark.parametrize("workers", [0, 1])
def test_the_rules_of_reading_reach_the_images(workers: int, tmp_path: Path) -> None:
    rotated = picture(tmp_path / "rotated.jpg", 80, 60, quality=95)
    exif = Image.Exif()
    exif[0x0112] = 6
    with Image.open(rotated) as image:
        image.save(rotated, exif=exif)
    cut = picture(tmp_path / "cut.jpg", 200, 160)
    cut.write_bytes(cut.read_bytes()[:-200])
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((60, 80, 3), np.uint8)).save(buffer, "JPEG", exif=exif)
    sources = [rotated, cut, buffer.getvalue(), Image.open(rotated)]
    usual = list(Scorer("qualiclip-mini", device="cpu", workers=workers).score(sources))
    assert [(r.width, r.height) for r in usual] == [(60, 80), (None, None), (60, 80), (60, 80)]
    rules = {"ignore_orientation": True, "allow_truncated": True}
    scorer = Scorer("qualiclip-mini", device="cpu", workers=workers, **rules)
    assert scorer.rules == ReadRules(**rules)
    stored = list(scorer.score(sources))
    assert [(r.width, r.height) for r in stored] == [(80, 60), (200, 160), (80, 60), (80, 60)]
    for limit in (0, -1.0, math.nan):
        with pytest.raises(SettingsError, match="expected seconds above 0"):
            Scorer("qualiclip-mini", device="cpu", decode_timeout=limit)


def test_a_table_of_the_command_has_the_scorer_s_description(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photo = picture(tmp_path / "in" / "a.jpg")
    for suffix in (".csv", ".jsonl", ".parquet"):
        out = tmp_path / f"s{suffix}"
        assert score(photo, "-m", "qualiclip-mini", "-m", "piqe", "-o", out, "--workers", 0) == 0
        assert read_meta(out) == json.loads(json.dumps(Scorer(["qualiclip-mini", "piqe"], device="cpu").describe()))
        more = picture(tmp_path / "in" / "b.jpg")
        again = (more, "-m", "qualiclip-mini", "-m", "piqe", "-o", out, "--resume", "--workers", 0)
        before = out.read_bytes()
        for options, what in (
            (("--precision", "bf16"), "precision was fp32, is now bf16"),
            (("--ignore-orientation",), "images ignore orientation was False, is now True"),
        ):
            assert score(*again, *options) == 2
            assert f"was started with other settings: {what}" in capsys.readouterr().err
        assert out.read_bytes() == before and not list(tmp_path.glob("*.part"))
        assert score(*again, "--decode-timeout", 30) == 0
        assert len(rows(out)) == 2
        assert score(*again, "--max-pixels", 10**6, "--allow-truncated") == 0
        assert set(read_meta(out) or {}) == set(json.loads(meta_path(out).read_text())) > {"columns", "continued"}


def test_a_replaced_model_file_is_not_mixed_in(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import safetensors
    from safetensors.torch import load_file, save_file

    from qualiclip_pyiqa.pretrained.find import find

    embedded = find("qualiclip-mini")
    model = tmp_path / "model.safetensors"
    model.write_bytes(embedded.read_bytes())
    photos = [picture(tmp_path / "in" / f"{name}.png") for name in "ab"]
    out = tmp_path / "s.csv"
    assert score(photos[0], "-m", model, "-o", out, "--workers", 0) == 0
    with safetensors.safe_open(model, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(model)
    name = next(name for name, tensor in tensors.items() if tensor.is_floating_point() and tensor.numel() > 100)
    tensors[name] = tensors[name] * 1.01
    save_file(tensors, model, metadata)
    capsys.readouterr()
    assert score(*photos, "-m", model, "-o", out, "--resume", "--workers", 0) == 2
    assert f"weights sha256 of {model} was " in capsys.readouterr().err and len(rows(out)) == 1
    model.write_bytes(embedded.read_bytes())
    moved = model.rename(tmp_path / "in" / "model.safetensors")
    assert score(*photos, "-m", moved, "-o", out, "--resume", "--workers", 0) == 2  # the column has another name
    assert "has the scores" in capsys.readouterr().err
