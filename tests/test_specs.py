"""Metric specs: NAME:SET, NAME:POSITIVE/NEGATIVE and TOML files of prompt sets, wherever a metric is named."""

from __future__ import annotations

import json
import pickle
import re
from pathlib import Path

import pyiqa
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from qualiclip_pyiqa import Scorer
from qualiclip_pyiqa.commands import cli
from qualiclip_pyiqa.errors import PromptError, SettingsError
from qualiclip_pyiqa.evaluation.scores import read_scores
from qualiclip_pyiqa.metrics.prompts import parse_pair, prompt_set_names, read_prompt_file, resolve_prompts
from qualiclip_pyiqa.metrics.registry import guess_lower_better
from qualiclip_pyiqa.metrics.specs import PromptedMetric, parse_spec, spec_for, split_spec
from qualiclip_pyiqa.pretrained.manifest import data_folder
from qualiclip_pyiqa.scoring.tables import read_table

PHOTOS = Path(__file__).parents[1] / "examples" / "photos"
PHOTO = PHOTOS / "lighthouse.jpg"
# A trained model's file, whatever its folder is called.
MODEL = data_folder() / "qualiclip-mini.safetensors"
SHARP = ("Sharp photo.", "Blurry photo.")

SETS = """
[weather]
clear = ["Clear photo.", "Foggy photo."]
dry = [["Dry street.", "Wet street."], ["Sunny photo.", "Rainy photo."]]
[mine]
"edges" = ["Sharp photo.", "Blurry photo."]
"""


@pytest.fixture
def sets(tmp_path: Path) -> Path:
    (tmp_path / "sets.toml").write_text(SETS)
    return tmp_path / "sets.toml"


texts = (
    st.text(st.characters(exclude_categories=("C", "Z"), include_characters=" /"), min_size=1)
    .map(str.strip)
    .filter(lambda text: text and text.isprintable())
)


@given(texts, texts)
def test_every_pair_of_texts_can_be_written(positive: str, negative: str) -> None:
    if " ".join(positive.lower().split()) == " ".join(negative.lower().split()):
        return
    written = f"{positive.replace('/', '//')} / {negative.replace('/', '//')}"
    assert parse_pair(written) == (positive, negative)


@given(st.text())
def test_any_text_is_a_pair_or_one_line_of_error(text: str) -> None:
    try:
        pair = parse_pair(text)
    except PromptError as error:
        assert str(error).isprintable()
    else:
        assert all(part == part.strip() != "" for part in pair)


@given(st.text())
@example(":\ud7fc")
def test_any_spec_is_parsed_or_one_line_of_error(text: str) -> None:
    metric, prompts = split_spec(text)
    assert text == (metric if prompts is None else f"{metric}:{prompts}")
    try:
        parsed = parse_spec(text)
    except (PromptError, SettingsError) as error:
        assert str(error).isprintable()
    else:
        assert parsed == text or (isinstance(parsed, PromptedMetric) and parsed.spec == text)


@pytest.mark.parametrize(
    ("spec", "parts"),
    [
        ("niqe", ("niqe", None)),
        ("clipiqa:look", ("clipiqa", "look")),
        ("clipiqa:Photo: day/Photo: night", ("clipiqa", "Photo: day/Photo: night")),
        ("a:b/model.safetensors", ("a:b/model.safetensors", None)),
        ("a:b/model.safetensors:look", ("a:b/model.safetensors", "look")),
        (r"C:\models\m.safetensors:Good/Bad", (r"C:\models\m.safetensors", "Good/Bad")),
    ],
)
def test_the_metric_ends_at_the_first_colon_or_after_its_suffix(spec: str, parts: tuple[str, str | None]) -> None:
    assert split_spec(spec) == parts


def test_prompts_argument_takes_pairs_and_files(sets: Path) -> None:
    metric = pyiqa.create_metric("qualiclip-mini", device="cpu", prompts=f"{sets}:mine")
    assert metric.net.prompts.groups == (("edges", (SHARP,)),)
    assert resolve_prompts("Sharp photo./Blurry photo.").groups == (("quality", (SHARP,)),)
    assert resolve_prompts(f"{sets}:weather").attributes == ("clear", "dry")
    with pytest.raises(PromptError, match=r"has 2 sets; choose one: .*sets.toml:weather, .*sets.toml:mine"):
        resolve_prompts(str(sets))
    with pytest.raises(PromptError, match="has no set 'wether'; expected one of weather, mine; did you mean 'weather'"):
        resolve_prompts(f"{sets}:wether")
    sets.write_text(SETS.partition("[mine]")[0])
    assert resolve_prompts(str(sets)).attributes == ("clear", "dry")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "is empty; expected a table"),
        ("[weather", "is not TOML"),
        ("x = 3", "set 'x' is '3', not a table"),
        ("[weather]", "set 'weather' is empty"),
        ("[look]\na = ['b', 'c']", "has the name of a predefined set"),
        ("['my set']\na = ['b', 'c']", "'my set' cannot name a set or an attribute"),
        ("[mine]\n'a.b' = ['b', 'c']", "'a.b' cannot name a set or an attribute"),
        ("[mine]\na = 3", r"set 'mine': prompts\['a'\] is 3; expected a list"),
        ("[mine]\na = ['one']", "exactly two texts"),
        ("[mine]\na = ['one', 2]", "exactly two texts|non-empty text"),
        ("[mine]\na = {b = ['c', 'd']}", "expected a list"),
        (b"\xff\xfe", "is not TOML"),
        ("[" * 10_000, "is not TOML"),
    ],
)
def test_a_wrong_file_is_one_line(tmp_path: Path, content: str | bytes, said: str) -> None:
    file = tmp_path / "wrong.toml"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(PromptError, match=said) as error:
        read_prompt_file(file)
    assert str(file) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_file_is_one_line(tmp_path: Path) -> None:
    for path in (tmp_path / "none.toml", tmp_path):
        with pytest.raises(PromptError, match="cannot be read"):
            read_prompt_file(path)


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("clipiqa:", "unknown prompt set ''"),
        ("clipiqa:lok", "'clipiqa:lok': unknown prompt set 'lok'.*did you mean 'look'"),
        ("clipiqa:a/b/c", "has 3 texts"),
        ("clipiqa:a//b", "unknown prompt set 'a//b'.*or a pair POSITIVE/NEGATIVE"),
        ("clipiqa:Good/good", "same text twice"),
        ("clipiqa:Good/", "non-empty"),
        (":look", "names no metric; expected METRIC:PROMPTS"),
        ("niqe:look", "another package's metric, which takes no prompts"),
        ("qualiclip+:look", "learned prompt context"),
        ("fitted:look", "takes no prompts"),
        ("qualiclip-mni:look", "unknown metric 'qualiclip-mni' in .* did you mean 'qualiclip-mini'"),
        ("qualiclip-mini:Clear photo./Foggy photo.", "no text tower and no feature for 'Clear photo.'"),
        ("none.safetensors:look", "none.safetensors does not exist"),
    ],
)
def test_a_wrong_spec_is_one_line(spec: str, said: str) -> None:
    with pytest.raises((PromptError, SettingsError), match=said) as error:
        Scorer(spec, device="cpu", workers=0)
    assert "\n" not in str(error.value)


def test_specs_score_as_the_metric_with_these_prompts() -> None:
    specs = ["qualiclip-mini:look", "qualiclip-mini:Sharp photo./Blurry photo.", f"{MODEL}:sharpness"]
    scorer = Scorer(specs, device="cpu", workers=0)
    (record,) = scorer.score([str(PHOTO)])
    expected = pyiqa.create_metric("qualiclip-mini", device="cpu", prompts="look")(str(PHOTO))[0].tolist()
    names = [f"qualiclip-mini:look.{name}" for name in resolve_prompts("look").attributes]
    assert [record.scores[name] for name in names] == pytest.approx(expected, abs=2e-6)
    sharpness = record.scores["qualiclip-mini:look.sharpness"]
    assert list(record.scores) == [*names, *specs[1:]]
    assert [record.scores[spec] for spec in specs[1:]] == pytest.approx([sharpness, sharpness], abs=2e-6)
    assert scorer.describe()["columns"][specs[1]]["prompts"] == {"quality": [list(SHARP)]}
    assert not any(scorer.lower_better.values())


def test_a_parsed_spec_can_be_sent_to_another_process(sets: Path) -> None:
    parsed = parse_spec("qualiclip-mini:mine", read_prompt_file(sets))
    assert pickle.loads(pickle.dumps(parsed)) == parsed
    assert Scorer([parsed], device="cpu", workers=0).columns == ("qualiclip-mini:mine",)


def test_the_direction_of_a_column_is_its_metrics() -> None:
    assert not guess_lower_better("clipiqa:Clear photo./Foggy photo.")
    assert not guess_lower_better("clipiqa:look.contrast")
    assert guess_lower_better("niqe")


def run(*arguments: object) -> int:
    return cli.main([*map(str, arguments)])


def test_score_filter_and_evaluate_use_the_sets_of_a_file(
    sets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = tmp_path / "scores.csv"
    metrics = ("-m", "qualiclip-mini:mine", "-m", "qualiclip-mini:look")
    score = ("score", PHOTOS, "-o", table, "--device", "cpu", "--workers", "0", *metrics, "--prompts", sets)
    assert run(*score) == 0
    assert run(*score, "--resume") == 0
    column = read_scores(table, ["qualiclip-mini:mine"]).values["qualiclip-mini:mine"]
    assert list(read_scores(table, ["qualiclip-mini:look"]).values["qualiclip-mini:look.sharpness"]) == pytest.approx(
        list(column), abs=2e-6
    )
    capsys.readouterr()
    assert run("filter", table, "-m", "qualiclip-mini:mine", "--best", "0.2") == 0
    out = capsys.readouterr().out
    assert len(out.split()) == 2 and "blurred" not in out

    ratings = tmp_path / "ratings.csv"
    ratings.write_text("name,mos\n" + "".join(f"{path.name},{k}\n" for k, path in enumerate(PHOTOS.glob("*.jpg"))))
    rated = ("evaluate", "--ratings", ratings, "--images", PHOTOS)
    report = tmp_path / "report.json"
    for source in ((*metrics[:2], "--prompts", sets, "--device", "cpu"), ("--scores", table, *metrics[:2])):
        assert run(*rated, *source, "--json", report) == 0
        assert list(json.loads(report.read_text())["metrics"]) == ["qualiclip-mini:mine"]
    capsys.readouterr()
    assert run(*rated, "--scores", table, "--prompts", sets) == 2
    assert "--prompts has no effect with --scores" in capsys.readouterr().err
    assert run("evaluate", "--gmad", "qualiclip-mini:mine", "qualiclip-mini", PHOTOS, "--prompts", sets) == 2
    assert "7 images" in capsys.readouterr().err  # the set was found, but a competition needs more images


@pytest.mark.parametrize(
    ("metrics", "said"),
    [
        ((), "has no effect: no metric uses a set of it (weather, mine); name one, such as -m clipiqa:weather"),
        (("-m", "clipiqa:look"), "has no effect"),
        (("-m", "clipiqa:wether"), "did you mean 'weather'"),
        (("-m", "clipiqa:mine", "-m", "clipiqa:mine"), "given twice"),
    ],
)
def test_a_file_of_sets_must_be_used(
    sets: Path, metrics: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("score", PHOTO, "--prompts", sets, *metrics) == 2
    assert said in capsys.readouterr().err


def test_resuming_notices_changed_prompts(sets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # An attribute may be called as a field that a table's description ignores.
    sets.write_text("[mine]\nsource = ['Sharp photo.', 'Blurry photo.']\nversion = ['Clean photo.', 'Noisy photo.']\n")
    table = tmp_path / "scores.csv"
    score = ("score", PHOTO, "-o", table, "--device", "cpu", "--workers", "0", "-m", "qualiclip-mini:mine")
    assert run(*score, "--prompts", sets) == 0
    before = table.read_bytes()
    for old, new in (("Sharp photo.', 'Blurry photo.", "Good photo.', 'Bad photo."), ("Clean photo", "Sharp photo")):
        kept = sets.read_text()
        sets.write_text(kept.replace(old, new))
        capsys.readouterr()
        assert run(*score, "--prompts", sets, "--resume") == 2
        assert "prompts" in capsys.readouterr().err
        sets.write_text(kept)
    assert table.read_bytes() == before
    assert run(*score, "--prompts", sets, "--resume") == 0
    assert [list(record.scores) for record in read_table(table)] == [
        ["qualiclip-mini:mine.source", "qualiclip-mini:mine.version"]
    ]


def test_commands_for_towers_and_contexts_refuse_prompts(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("tune", "-m", "clipiqa+:look", "--ratings", "r.csv", "--out", "run") == 2
    assert "'clipiqa+:look': prompts have no effect here" in capsys.readouterr().err
    assert run("fit", "-m", "RN50:look", "--ratings", "r.csv", "-o", "m.safetensors") == 2
    assert "pass 'RN50' alone" in capsys.readouterr().err


def test_every_predefined_name_can_be_named_in_a_spec() -> None:
    for name in prompt_set_names():
        parsed = parse_spec(f"clipiqa:{name}")
        assert isinstance(parsed, PromptedMetric) and parsed.prompts == resolve_prompts(name)


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("qualiclip-mini+-sharpness", "qualiclip-mini+:sharpness"),
        ("qualiclip-look", "qualiclip:look"),
        ("clipiqa:Clear photo./Foggy photo.", "clipiqa:Clear photo./Foggy photo."),
        ("qualiclip-mini-sharpness", None),
        ("clipiqa+-sharpness", None),
        ("niqe-sharpness", None),
        ("zzz", None),
    ],
)
def test_a_name_that_looks_like_one_of_ours_is_told_what_to_pass(name: str, meant: str | None) -> None:
    assert spec_for(name) == meant
    if meant is None:
        return
    if ":" not in name:
        with pytest.raises(SettingsError, match=f"; did you mean '{re.escape(meant)}'"):
            Scorer(name, device="cpu")
