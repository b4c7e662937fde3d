"""`qualiclip tune` for deep prompts: it learns, its files load, groups are never divided, stopped runs go on."""

from __future__ import annotations

import csv
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyiqa
import pytest
import torch
import upstream
from PIL import Image
from test_deep_prompts import authors_files
from torchvision.transforms.functional import to_pil_image

from qualiclip_pyiqa.archs import DeepPromptIQA
from qualiclip_pyiqa.commands import cli
from qualiclip_pyiqa.errors import ImageError, SettingsError, WeightsError
from qualiclip_pyiqa.evaluation.ratings import Ratings, read_ratings
from qualiclip_pyiqa.images.tensors import load_image
from qualiclip_pyiqa.metrics.prompt_iqa import PromptIQA
from qualiclip_pyiqa.towers.resampling import resize_like_pillow
from qualiclip_pyiqa.training import tuning
from qualiclip_pyiqa.training.examples import batches_of, plan
from qualiclip_pyiqa.training.held_out import hold_out
from qualiclip_pyiqa.training.recipes import RECIPES, Recipe, default_recipe, fresh_deep_network, fresh_network
from qualiclip_pyiqa.training.tuning import tune
from qualiclip_pyiqa.training.watched import KeptEpoch

NAMES = ("clip-dqa", "clip-agiqa")
COUNT, SCENES = 18, 6


def quick(name: str, **changes: Any) -> Recipe:
    settings = {"learning_rate": 0.001, "epochs": 4, "batch": 4, "patience": 0, "keep": "last"}
    return dataclasses.replace(default_recipe(name), **{**settings, **changes})


@pytest.fixture(scope="module")
def rated_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of six scenes at three levels of darkness; `align` has nothing to do with `mos`."""
    folder = tmp_path_factory.mktemp("scenes")
    rows = ["image,mos,align,scene"]
    for number in range(COUNT):
        scene, level = number // 3, number % 3
        to_pil_image(upstream.pictures(1, 40 + scene, 100, seed=scene)[0] * 0.4**level).save(folder / f"{number}.png")
        rows.append(f"{number}.png,{90 - 40 * level + scene / 2},{1 + (number * 7) % 5},scene {scene}")
    (folder / "scores.csv").write_text("\n".join(rows))
    return folder


@pytest.fixture
def ratings(rated_folder: Path) -> Ratings:
    return read_ratings(rated_folder / "scores.csv", rated_folder, group_column="scene")


@pytest.fixture
def alignment(rated_folder: Path) -> Ratings:
    return read_ratings(rated_folder / "scores.csv", rated_folder, opinion_column="align")


def extra(name: str, alignment: Ratings) -> dict[str, Any]:
    return {"alignment": alignment} if name == "clip-agiqa" else {}


def tiny(folder: Path, name: str, recipe: Recipe) -> DeepPromptIQA:
    return fresh_deep_network(name, recipe, backbone="tiny-vit-32", backbone_weights=folder / "tiny-vit-32.pt")


def log_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", NAMES)
def test_it_learns_and_loads(
    name: str, tiny_folder: Path, ratings: Ratings, alignment: Ratings, tmp_path: Path
) -> None:
    recipe = quick(name, epochs=20)
    net = tiny(tiny_folder, name, recipe)
    path = tune(net, ratings, tmp_path, recipe, 0.34, **extra(name, alignment))
    assert path == tmp_path / "prompts.safetensors"
    first, *epochs = log_of(tmp_path)
    assert np.mean([e["mse"] for e in epochs[-3:]]) < 0.13  # 0.10; the best constant has 0.16
    assert (first["training_groups"], first["validation_groups"]) == (4, 2)
    assert epochs[0]["learning_rate"] == epochs[-1]["learning_rate"] == recipe.learning_rate
    assert ("alignment" in epochs[0]) == (name == "clip-agiqa")
    if name == "clip-agiqa":
        assert epochs[0]["loss"] == pytest.approx(epochs[0]["mse"] + 0.1 * epochs[0]["alignment"])
        assert first["alignment_range"] == [1, 5] and first["alignment_column"] == "image, align"
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["log.jsonl", "prompts.safetensors"]
    loaded = pyiqa.create_metric(
        name, device="cpu", weights=str(path), backbone_weights=str(tiny_folder / "tiny-vit-32.pt")
    )
    x = load_image(ratings.paths[0])[None]
    assert not net.training and torch.equal(loaded(x), net(x))
    assert (loaded(x) - tiny(tiny_folder, name, recipe).eval()(x)).abs().max() > 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_a_step_sees_a_window_and_the_whole_image(name: str, tiny_folder: Path, ratings: Ratings) -> None:
    recipe = quick(name, batch=COUNT, epochs=1)
    net = tiny(tiny_folder, name, recipe).train()
    (draw,), (features,) = plan(COUNT, recipe), batches_of(net, ratings.paths, recipe)
    assert bool(draw.mirrored.any()) == (name == "clip-agiqa")
    for number, (index, mirrored, place) in enumerate(zip(*draw, strict=True)):
        rgb = load_image(ratings.paths[index])[None]
        top, left = (int(p * (side - 31)) for p, side in zip(place, rgb.shape[2:], strict=True))
        views = [rgb[:, :, top : top + 32, left : left + 32]]
        if name == "clip-dqa":
            views.append(resize_like_pillow(rgb, 32, 32))
        seen = torch.stack(views, dim=1)
        expected = net.encode_views(seen.flip(-1) if mirrored else seen, net.visual_prompts())
        assert (features[number] - expected[0]).abs().max() < 1e-5
    net.score(features).sum().backward()
    assert all(parameter.grad is not None for parameter in net.parameters())


class StoppedError(Exception):
    pass


def stop_after(epochs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stop a run right after the checkpoint of so many epochs, in the middle of the next step."""
    step, write, count = tuning._step, tuning.write_checkpoint, 0

    def counted(out: Path, state: tuning.State) -> Path:
        nonlocal count
        count += 1
        return write(out, state)

    def stopping(*arguments: Any) -> dict[str, float]:
        if count == epochs:
            raise StoppedError
        return step(*arguments)

    monkeypatch.setattr(tuning, "write_checkpoint", counted)
    monkeypatch.setattr(tuning, "_step", stopping)


@pytest.mark.parametrize("name", [*NAMES, "clipiqa+"])
@pytest.mark.parametrize("keep", ["last", "best"])
def test_a_stopped_run_goes_on(
    name: str,
    keep: str,
    tiny_folder: Path,
    ratings: Ratings,
    alignment: Ratings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if name == "clipiqa+":
        recipe = dataclasses.replace(RECIPES["pyiqa"], epochs=4, batch=4, crop=0, keep=keep)

        def build() -> PromptIQA | DeepPromptIQA:
            return fresh_network(name, recipe, backbone="tiny-resnet", weights=tiny_folder / "tiny-resnet.pt")
    else:
        recipe = quick(name, keep=keep)

        def build() -> PromptIQA | DeepPromptIQA:
            return tiny(tiny_folder, name, recipe)

    more = {"validation": 0.34, **extra(name, alignment)}
    whole = tune(build(), ratings, tmp_path / "whole", recipe, **more)
    with monkeypatch.context() as patched:
        stop_after(2, patched)
        with pytest.raises(StoppedError):
            tune(build(), ratings, tmp_path / "parts", recipe, **more)
    assert not (tmp_path / "parts" / whole.name).exists()
    with (tmp_path / "parts" / "log.jsonl").open("a") as log:
        log.write('{"epoch": 3, "step": 9')  # of an epoch without a checkpoint
    with pytest.raises(SettingsError, match="checkpoint of an earlier run; pass --resume"):
        tune(build(), ratings, tmp_path / "parts", recipe, **more)
    other = dataclasses.replace(recipe, learning_rate=0.005)
    with pytest.raises(SettingsError, match="belongs to another run"):
        tune(build(), ratings, tmp_path / "parts", other, **more, resume=True)
    found = tune(build(), ratings, tmp_path / "parts", recipe, **more, resume=True)
    assert found.read_bytes() == whole.read_bytes()
    assert (tmp_path / "parts" / "log.jsonl").read_bytes() == (tmp_path / "whole" / "log.jsonl").read_bytes()
    assert not list((tmp_path / "parts").glob("checkpoint*"))
    torch.manual_seed(7)  # what the caller has drawn does not matter
    fresh = tune(build(), ratings, tmp_path / "fresh", recipe, **more, resume=True)  # nothing to go on from
    assert fresh.read_bytes() == whole.read_bytes()


def test_the_best_epoch_is_kept_and_patience_ends(
    tiny_folder: Path, ratings: Ratings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = quick("clip-dqa", keep="best", patience=3, epochs=20)
    srcc = iter([0.1, None, 0.5, 0.5, 0.4, 0.2, 0.9])
    monkeypatch.setattr(tuning.Watched, "evaluate", lambda watched: {"validation_srcc": next(srcc)})
    path = tune(tiny(tiny_folder, "clip-dqa", recipe), ratings, tmp_path / "best", recipe, 0.34)
    first, *epochs = log_of(tmp_path / "best")
    assert [epoch["best_epoch"] for epoch in epochs] == [1, 1, 3, 3, 3, 3]
    assert first["validation_use"] == "chose the epoch that is kept"
    held_out = f"{first['validation_images']} held-out images"
    assert str(KeptEpoch.of(tmp_path / "best" / "log.jsonl")) == (
        f"kept epoch 3 of 6, the best on {held_out}: SRCC 0.5000, PLCC -; optimistic, since these images chose it"
    )
    monkeypatch.undo()
    last = dataclasses.replace(recipe, epochs=3, keep="last")
    assert (
        tune(tiny(tiny_folder, "clip-dqa", last), ratings, tmp_path / "last", last, 0.34).read_bytes()
        == path.read_bytes()
    )
    # Nothing is held out: the last epoch is kept, whatever the recipe says.
    short = dataclasses.replace(recipe, epochs=1)
    tune(tiny(tiny_folder, "clip-dqa", short), ratings, tmp_path / "all", short, 0)
    assert "best_epoch" not in log_of(tmp_path / "all")[1]
    assert log_of(tmp_path / "all")[0]["validation_use"].startswith("watched only")


def test_no_group_is_on_both_sides(ratings: Ratings, alignment: Ratings) -> None:
    scene = dict(zip(ratings.paths, ratings.groups, strict=True))
    seen = set()
    for seed in range(8):
        parts = hold_out(ratings, alignment, 0.34, seed)
        sides = [{scene[path] for path in side.paths} for side in (parts.training, parts.watched)]
        assert not sides[0] & sides[1] and len(sides[0]) == 4 and len(sides[1]) == 2 and parts.groups == (4, 2)
        assert len(parts.training.paths) + len(parts.watched.paths) == COUNT
        assert parts.alignment is not None and parts.alignment.paths == parts.training.paths
        given = dict(zip(alignment.paths, alignment.opinions, strict=True))
        assert parts.alignment.opinions == [given[path] for path in parts.training.paths]
        seen.add(frozenset(sides[1]))
    assert len(seen) > 1
    # An image of two scenes unites them.
    bridge = dataclasses.replace(
        ratings,
        paths=[*ratings.paths, ratings.paths[0]],
        opinions=[*ratings.opinions, 1.0],
        groups=[*ratings.groups, "scene 1"],
    )
    for seed in range(8):
        parts = hold_out(bridge, None, 0.34, seed)
        sides = [{scene[path] for path in side.paths} for side in (parts.training, parts.watched)]
        assert not sides[0] & sides[1] and len({"scene 0", "scene 1"} & sides[1]) != 1
    one = dataclasses.replace(ratings, groups=["a"] * COUNT)
    with pytest.raises(SettingsError, match="18 images are of one group, which is never divided"):
        hold_out(one, None, 0.2, 0)
    assert hold_out(one, None, 0, 0).groups == (1, 0)
    with pytest.raises(SettingsError, match=r"0\.png has no group"):
        hold_out(dataclasses.replace(ratings, groups=[" ", *ratings.groups[1:]]), None, 0.2, 0)
    short = dataclasses.replace(alignment, paths=alignment.paths[1:], opinions=alignment.opinions[1:])
    with pytest.raises(SettingsError, match=r"0\.png has no alignment score"):
        hold_out(ratings, short, 0, 0)


def test_what_cannot_be_learned_from(tiny_folder: Path, ratings: Ratings, alignment: Ratings, tmp_path: Path) -> None:
    nets = {name: tiny(tiny_folder, name, quick(name)) for name in NAMES}

    def fails(said: str, name: str, rated: Ratings, kind: type[Exception] = SettingsError, **options: Any) -> None:
        changes = {key: options.pop(key) for key in ("crop", "learning_rate") if key in options}
        with pytest.raises(kind, match=said) as caught:
            tune(nets[name], rated, tmp_path / "run", quick(name, **changes), validation=0, **options)
        assert "\n" not in str(caught.value) and not list(tmp_path.glob("run/prompts*"))

    fails("learns the alignment of image and text too; pass its scores .*train clip-dqa", "clip-agiqa", ratings)
    fails("clip-dqa has no alignment score", "clip-dqa", ratings, alignment=alignment)
    fails(
        "all opinion scores to learn from are 3",
        "clip-agiqa",
        ratings,
        alignment=dataclasses.replace(alignment, opinions=[3.0] * COUNT),
    )
    fails("crop is 48; clip-dqa learns on its windows of 32 pixels", "clip-dqa", ratings, crop=48)
    small = tmp_path / "small.png"
    Image.fromarray(np.zeros((31, 80, 3), np.uint8)).save(small)
    with_small = dataclasses.replace(ratings, paths=[small, *ratings.paths[1:]])
    fails(
        "1 of 18 images are smaller than a window of 32 pixels .*small.png has a side of 31",
        "clip-dqa",
        with_small,
        ImageError,
    )
    fails(
        r"loss is nan at step \d+ .*no longer finite; try a lower learning rate",
        "clip-dqa",
        ratings,
        learning_rate=1e29,
    )
    broken = tiny(tiny_folder, "clip-dqa", quick("clip-dqa"))
    broken.tower.proj.fill_(float("nan"))
    with pytest.raises(WeightsError, match=r"step 1 .*tiny-vit-32.pt gives image features that are not finite"):
        tune(broken, ratings, tmp_path / "broken", quick("clip-dqa"), 0)


# The command


def command(folder: Path, out: Path, name: str, tiny_folder: Path, *options: object) -> list[str]:
    own = ["--backbone", "tiny-vit-32", "--backbone-weights", tiny_folder / "tiny-vit-32.pt", "--device", "cpu"]
    files = ["--ratings", folder / "scores.csv", "--images", folder, "--out", out]
    return list(map(str, ["tune", "-m", name, *files, *own, *options]))


@pytest.mark.parametrize("name", NAMES)
def test_the_command_s_file_scores(
    name: str, tiny_folder: Path, rated_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Started from a file of the authors' code, with which it agrees but for one epoch."""
    files = authors_files(tmp_path)
    options = ["--group", "scene", "--epochs", 1, "--learning-rate", 1e-9, "--start", files[name], "--validation", 0.34]
    options += ["--mos-range", 0, 100] + (["--alignment-column", "align"] if name == "clip-agiqa" else [])
    out = tmp_path / "run"
    assert cli.main(command(rated_folder, out, name, tiny_folder, *options)) == 0
    captured = capsys.readouterr()
    assert captured.out == f"{out}/prompts.safetensors\n" and "18 images" in captured.err
    recipe = log_of(out)[0]["recipe"]
    assert recipe == {**dataclasses.asdict(default_recipe(name)), "epochs": 1, "learning_rate": 1e-9}
    clip = {"backbone_weights": tiny_folder / "tiny-vit-32.pt"}
    tuned = DeepPromptIQA(name, out / "prompts.safetensors", **clip).eval()
    start = DeepPromptIQA(name, files[name], backbone="tiny-vit-32", **clip).eval()
    x = load_image(rated_folder / "0.png")[None]
    assert 0 <= (tuned(x) - start(x)).abs().max() < 1e-4


def test_a_file_stands_for_its_metric(
    tiny_folder: Path,
    rated_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The file names metric and backbone; the CLIP is found in a folder by the name of its file."""
    monkeypatch.setenv("QUALICLIP_PYIQA_WEIGHTS", str(tiny_folder))
    options = ["--alignment-column", "align", "--epochs", 1, "--validation", 0, "--batch", 6]
    assert cli.main(command(rated_folder, tmp_path / "run", "clip-agiqa", tiny_folder, *options)) == 0
    path = tmp_path / "run" / "prompts.safetensors"
    table = tmp_path / "scores.csv"
    assert (
        cli.main(
            [
                "score",
                str(rated_folder / "0.png"),
                "-m",
                str(path),
                "-o",
                str(table),
                "--device",
                "cpu",
                "--workers",
                "0",
            ]
        )
        == 0
    )
    (row,) = csv.DictReader(table.open())
    metric = DeepPromptIQA("clip-agiqa", path).eval()
    expected = metric(load_image(rated_folder / "0.png")[None])[0].tolist()
    assert [float(row[f"{path}.{attribute}"]) for attribute in metric.attributes] == pytest.approx(expected, abs=1e-6)
    assert cli.main(["score", str(rated_folder / "0.png"), "-m", f"{path}:look"]) == 2
    assert "holds learned prompts, which fit their own texts only" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("clip-dqa", ["--recipe", "pyiqa"], "--recipe has no effect on clip-dqa"),
        ("clip-dqa", ["--shared"], "--shared has no effect on clip-dqa"),
        ("clip-dqa", ["--crop", "40"], "--crop has no effect on clip-dqa"),
        ("clip-dqa", ["--alignment-column", "align"], "--alignment-column has no effect on clip-dqa, which has"),
        (
            "clip-agiqa",
            [],
            "clip-agiqa learns the alignment of image and text too; pass its scores (--alignment-column)",
        ),
        ("clip-agiqa", ["--alignment-column", "aligned"], "no column 'aligned'; did you mean 'align'?"),
        ("clip-dqa", ["--group", "scen"], "no column 'scen'; did you mean 'scene'?"),
        ("clip-dqa", ["--start", "none.pth"], "none.pth"),
        ("clip-dqa", ["--context-length", "0"], "n_ctx is 0"),
        ("clip-dqa", ["--backbone", "tiny-resnet"], "tiny-"),
        ("clipiqa+", ["--start", "none.pth"], "--start has no effect on clipiqa+"),
        ("clipiqa+", ["--alignment-column", "align"], "--alignment-column has no effect on clipiqa+"),
    ],
)
def test_wrong_command_lines(
    name: str,
    options: list[str],
    said: str,
    tiny_folder: Path,
    rated_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main(command(rated_folder, tmp_path / "run", name, tiny_folder, *options)) in (1, 2)
    captured = capsys.readouterr().err
    assert said in captured and not (tmp_path / "run").exists(), captured


def test_what_is_left_of_a_killed_process_is_deleted(
    tiny_folder: Path, rated_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    out.mkdir()
    for name in ("checkpoint-000000002.safetensors", "prompts.safetensors"):
        (out / f"{name}.0123456789ab.part").write_bytes(b"half")
    options = ["--epochs", 1, "--validation", 0, "--resume"]
    assert cli.main(command(rated_folder, out, "clip-dqa", tiny_folder, *options)) == 0
    assert [path.name for path in sorted(out.iterdir())] == ["log.jsonl", "prompts.safetensors"]
    assert f"{out} holds no checkpoint to resume from; the run starts at its first epoch" in capsys.readouterr().err


def test_trackers_are_told(tiny_folder: Path, ratings: Ratings, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from test_tuning import Recorder

    recipe = quick("clip-dqa", epochs=2)
    recorder = Recorder()
    tracked, plain = (
        tune(tiny(tiny_folder, "clip-dqa", recipe), ratings, tmp_path / name, recipe, 0.34, trackers=trackers)
        for name, trackers in (("tracked", [recorder]), ("plain", []))
    )
    assert tracked.read_bytes() == plain.read_bytes()
    steps = [line["step"] for line in log_of(tmp_path / "tracked")[1:]]
    assert recorder.logged["score/quality"] == steps and [step for step, _ in recorder.images] == steps
