"""Antonym prompt pairs: what `prompts=` takes, and what it refuses."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qualiclip_pyiqa.errors import PromptError
from qualiclip_pyiqa.metrics.prompts import ATTRIBUTES, LOOK, QUALITY_SETS, prompt_set_names, resolve_prompts
from qualiclip_pyiqa.metrics.registry import METRICS, PromptSpec, metric_spec

words = st.text("abcdefghij", min_size=1, max_size=6)
pair = st.tuples(words.map("good {}".format), words.map("bad {}".format))


def test_named_sets() -> None:
    assert resolve_prompts("qualiclip").pairs == QUALITY_SETS["qualiclip"]
    assert len(resolve_prompts("qualiclip").texts) == 14
    assert resolve_prompts("look").attributes == (
        "quality", "brightness", "sharpness", "noisiness", "colorfulness", "contrast", "compression",
    )  # fmt: skip
    assert resolve_prompts("sharpness").attributes == ("sharpness",)
    for name in prompt_set_names():
        assert resolve_prompts(name).pairs


@given(st.lists(pair, min_size=1, max_size=5))
def test_a_list_is_one_score(pairs: list[tuple[str, str]]) -> None:
    prompts = resolve_prompts(pairs)
    assert prompts.attributes == ("quality",)
    assert prompts.texts == tuple(text for both in pairs for text in both)


@given(st.dictionaries(words, st.one_of(pair, st.lists(pair, min_size=1, max_size=3)), min_size=1, max_size=4))
def test_a_mapping_is_one_score_per_attribute(mapping: dict) -> None:
    prompts = resolve_prompts(mapping)
    assert prompts.attributes == tuple(mapping)
    assert resolve_prompts(prompts.as_dict()) == prompts


@pytest.mark.parametrize(
    ("prompts", "said"),
    [
        ("qualclip", "did you mean 'qualiclip'"),
        ([f"text {i}" for i in range(13)], "flat list of 13 texts"),
        ([], "empty"),
        ({}, "empty mapping"),
        ([("Good photo.", "good  PHOTO.")], "same text twice"),
        ([("Good photo.", "")], "non-empty"),
        ([("Good photo.",)], "exactly two texts"),
        ([()], "exactly two texts"),
        ({"sharpness": []}, "empty"),
        ({"sharpness": ("a", "b", "c")}, "exactly two texts"),
        ({3: ("a", "b")}, "attribute name 3"),
        (7, "expected a list"),
        ([("a", 5)], "non-empty"),
    ],
)
def test_errors_are_one_clear_line(prompts: object, said: str) -> None:
    with pytest.raises(PromptError, match=said) as caught:
        resolve_prompts(prompts)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def test_every_attribute_has_a_metric_and_unknown_metrics_get_a_neighbour() -> None:
    for attribute in ATTRIBUTES:
        assert METRICS[f"clipiqa-{attribute}"].prompts == attribute
    assert [name for name in METRICS if name.startswith("qualiclip-mini-")] == [
        f"qualiclip-mini-{attribute}" for attribute in LOOK if attribute != "quality"
    ]
    with pytest.raises(ValueError, match="did you mean 'qualiclip'"):
        metric_spec("quali-clip")
    for spec in METRICS.values():
        if isinstance(spec, PromptSpec):
            resolve_prompts(spec.prompts)
