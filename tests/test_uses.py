"""Weight files that are no whole model say what they are and how to use them, wherever a model is expected."""

from __future__ import annotations

import pickle
from pathlib import Path

import pyiqa
import pytest
import torch
from torch import Tensor

from qualiclip_pyiqa import Scorer
from qualiclip_pyiqa.errors import PromptError, SettingsError, WeightsError
from qualiclip_pyiqa.pretrained.contrastive import load_regression
from qualiclip_pyiqa.pretrained.convert import convert

ONE = torch.ones(1)


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        (
            {"encoder.0.weight": ONE, "encoder.7.weight": ONE},
            r"CONTRIQUE's encoder, a part of contrique; use it with create_metric\('contrique', weights=FILE\), or put "
            r"the published file \(CONTRIQUE_checkpoint25\.tar, .* QUALICLIP_PYIQA_WEIGHTS and pass -m contrique$",
        ),
        ({"coef": ONE, "intercept": ONE}, r"a regression on CONTRIQUE's features, .*regression=FILE\), .*Koniq\.save"),
        (
            {"encoder.conv1.weight": ONE, "encoder.layer4.weight": ONE},
            "one of Re-IQA's two encoders; fit a metric on both with `qualiclip fit -m reiqa --backbone-weights",
        ),
        (
            {"input_layer.0.weight": ONE, "body.0.weight": ONE, "output_layer.0.weight": ONE},
            r"a network of face recognition, .*create_metric\('face-norm', weights=FILE\), .* pass -m face-norm$",
        ),
        (
            {"visual.trunk.a": ONE, "token_embedding.weight": ONE, "adapter.learnable_text_tokens": ONE},
            r"CLIP with the ranking-aware adapter, .* caption=CAPTION\), .* pass -m ranking-aware:CAPTION$",
        ),
        (
            {"prompt_learner.ctx": ONE},
            r"a learned prompt context; use it with create_metric\(METRIC, pretrained=FILE\)",
        ),
    ],
)
def test_a_part_says_how_to_use_it(tensors: dict[str, Tensor], said: str, tmp_path: Path) -> None:
    torch.save(tensors, tmp_path / "file.pth")
    with pytest.raises(SettingsError, match=rf"file\.pth is {said}"):
        Scorer(str(tmp_path / "file.pth"))
    converted = tmp_path / "file.safetensors"
    convert(tmp_path / "file.pth", converted)
    with pytest.raises(WeightsError, match=rf"file\.safetensors is {said.removesuffix('$')}") as caught:
        Scorer(str(converted))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("metric", "options"), [("reiqa", {}), ("fitted", {}), ("face-norm", {}), ("ranking-aware", {"caption": "Good."})]
)
def test_a_folder_in_place_of_a_file(metric: str, options: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"is a folder; expected a (weight )?file"):
        pyiqa.create_metric(metric, weights=str(tmp_path), device="cpu", **options)


def test_a_long_prompt_is_not_printed_whole() -> None:
    with pytest.raises(PromptError, match="no feature for 'aaa") as caught:
        Scorer(f"qualiclip-mini:{'a' * 1000}/b")
    assert str(caught.value).count("a" * 60) == 2 and len(str(caught.value)) < 1000
    with pytest.raises(PromptError, match="unknown prompt set") as caught:
        Scorer(f"qualiclip-mini:{'a' * 1000}")
    assert len(str(caught.value)) < 1000


def test_another_pickle_than_a_regression(tmp_path: Path) -> None:
    (tmp_path / "state.pkl").write_bytes(pickle.dumps({"a": [1.0]}))
    with pytest.raises(WeightsError, match=r"neither torch\.save nor scikit-learn's Ridge wrote") as caught:
        load_regression(tmp_path / "state.pkl")
    assert "\n" not in str(caught.value)


def test_what_is_no_weight_file_is_not_explained(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("# Weights")
    with pytest.raises(SettingsError, match=r"README\.md is a file without the suffix \.safetensors; expected"):
        Scorer(str(tmp_path / "README.md"))
