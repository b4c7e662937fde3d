"""The ranking-aware adapter: the contract on a small one, and the numbers that its authors' code gave."""

from __future__ import annotations

import copy
import csv
import functools
import json
from collections.abc import Iterator
from pathlib import Path

import by_rule
import numpy as np
import open_clip
import pyiqa
import pytest
import torch
import upstream
from contract import MetricContract, scores
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms.functional import resize

from qualiclip_pyiqa import BlindMetric, Scorer
from qualiclip_pyiqa.archs import RankingAwareIQA
from qualiclip_pyiqa.commands.cli import main
from qualiclip_pyiqa.errors import SettingsError, WeightsError
from qualiclip_pyiqa.evaluation.ratings import Ratings
from qualiclip_pyiqa.images.tensors import load_image
from qualiclip_pyiqa.towers import adapter
from qualiclip_pyiqa.towers.backbones import find_backbone
from qualiclip_pyiqa.training.ranking import RankingRecipe, train_ranking

CAPTION = "Rank the images by quality."
GOLDEN = by_rule.golden("ranking-aware")
TOLERANCE = 1e-5  # float32 against float64 moves scores by 1e-6; the least visible mistake by 1e-3
SIDE = 128  # both other sizes of the test of compilation are smaller: Pillow resamples larger ones in another order
SMALL = {
    "embed_dim": 64,
    "vision_cfg": {"timm_model_name": "test_convnext", "timm_pool": "", "timm_proj": "mlp", "image_size": SIDE},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 2},
}


@pytest.fixture(scope="module", autouse=True)
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint as open_clip's trainer writes it, of a small model that open_clip knows."""
    folder = tmp_path_factory.mktemp("ranking")
    (folder / "small-ranking.json").write_text(json.dumps(SMALL))
    narrow = SMALL | {"text_cfg": SMALL["text_cfg"] | {"width": 128, "heads": 2}}  # type: ignore[operator]
    (folder / "narrow-ranking.json").write_text(json.dumps(narrow))
    open_clip.add_model_config(folder)
    vision = SMALL["vision_cfg"] | {"timm_proj": ""}  # type: ignore[operator]
    model = open_clip.CLIP(64, vision, SMALL["text_cfg"])
    state = by_rule.state("small", {key: tuple(value.shape) for key, value in model.state_dict().items()})
    shapes = {f"adapter.{key}": tuple(value.shape) for key, value in adapter.RankingAdapter(64).state_dict().items()}
    state |= by_rule.state("small", shapes)
    wrapped = {"epoch": 3, "name": "run", "state_dict": {f"module.{key}": value for key, value in state.items()}}
    torch.save(wrapped | {"optimizer": {"state": {}, "param_groups": []}}, folder / "small.pt")
    return folder / "small.pt"


class TestRankingAware(MetricContract):
    @pytest.fixture(autouse=True)
    def weights(self, small: Path) -> Iterator[None]:
        self.path = small
        yield

    def build(self, **options: object) -> BlindMetric:
        options = {"caption": CAPTION, "weights": self.path, "backbone": "small-ranking", **options}
        return RankingAwareIQA(**options).eval()  # type: ignore[arg-type]

    def spread(self, metric: BlindMetric) -> float:
        return 1.0  # unbounded; these weights' scores differ by about as much

    def test_captions_share_the_tower_and_nothing_else(self) -> None:
        first, second = self.build(), self.build(caption="Rank the numbers of apples.")
        x = upstream.pictures(2, 64, 80)
        assert first.encodes_like(second)
        assert torch.equal(first.features(x), second.features(x))
        assert (first(x) - second(x)).abs().max() > 1e-3
        images = list(x)
        for record, one, two in zip(
            Scorer({"one": first, "two": second}, device="cpu", workers=0).score(images),
            scores(first, x)[:, 0].tolist(),
            scores(second, x)[:, 0].tolist(),
            strict=True,
        ):
            assert record.scores == pytest.approx({"one": one, "two": two}, abs=1e-5)

    @torch.no_grad()
    def test_pixels_are_resized_by_pillow(self, metric: BlindMetric) -> None:
        pixels = by_rule.image(4)
        small = torch.from_numpy(by_rule.image(4)).permute(2, 0, 1)[None] / 255
        resized = Image.fromarray(pixels).resize((SIDE, SIDE), Image.Resampling.BILINEAR)
        rgb = torch.from_numpy(np.array(resized)).permute(2, 0, 1)[None] / 255
        assert (metric(small) - metric(rgb)).abs().max() < TOLERANCE
        assert (metric(resize(small, [SIDE, SIDE], antialias=True)) - metric(rgb)).abs().max() > 10 * TOLERANCE

    def test_the_caption_is_said_and_pairs_are_compared(self, metric: BlindMetric) -> None:
        assert metric.describe()["caption"] == CAPTION and metric.describe()["backbone"] == "small-ranking"
        x = upstream.pictures(3, 64, 64)
        with torch.no_grad():
            logits = metric.compare(x)
        assert logits.shape == (3, 3) and logits.diagonal().std() < 1e-5 and logits.std() > 1e-3
        with pytest.raises(SettingsError, match="not compared in windows"):
            self.build(tile=64).compare(x)

    def test_memory_is_that_of_a_resize(self, metric: BlindMetric) -> None:
        """Whatever the size of an image, the networks see one of their own."""
        seen = []
        metric.tower.register_forward_pre_hook(lambda _, inputs: seen.append(tuple(inputs[0].shape)))
        with torch.no_grad():
            metric(torch.rand(1, 3, 540, 960))
        assert seen == [(1, 3, SIDE, SIDE)]


def test_what_is_missing_is_one_line(small: Path, tmp_path: Path) -> None:
    def refused(kind: type[Exception], said: str, **options: object) -> None:
        options = {"caption": CAPTION, "weights": small, "backbone": "small-ranking", **options}
        with pytest.raises(kind, match=said) as caught:
            RankingAwareIQA(**options)  # type: ignore[arg-type]
        assert "\n" not in str(caught.value)

    refused(SettingsError, r"needs caption=TEXT .* authors published none for quality", caption=None)
    refused(SettingsError, "needs caption=TEXT", caption=" ")
    refused(SettingsError, "needs caption=TEXT", caption=None, weights="ranking-aware")
    refused(
        WeightsError, r"ranking-aware.pt is not on this machine .* https://github.com/uynaes", weights="ranking-aware"
    )
    refused(SettingsError, "'ViT-B-32' is no convolutional trunk of timm", backbone="ViT-B-32")
    refused(SettingsError, "features of 64 and text tokens of 128", backbone="narrow-ranking")
    refused(WeightsError, "holds another model|lacks", backbone="convnext_large_d_320")
    state = torch.load(small, weights_only=True)["state_dict"]
    torch.save({k: v for k, v in state.items() if "adapter.regressor" not in k}, tmp_path / "part.pt")
    refused(WeightsError, "lacks 10 tensors", weights=tmp_path / "part.pt")
    torch.save({k: v for k, v in state.items() if "adapter" not in k}, tmp_path / "clip.pt")
    refused(
        WeightsError,
        "is not of layout ranking-aware: it lacks adapter.learnable_text_tokens",
        weights=tmp_path / "clip.pt",
    )
    with pytest.raises(SettingsError, match="belongs to FaceNorm"):
        RankingAwareIQA("face-norm", caption=CAPTION)
    built = pyiqa.create_metric("ranking-aware", weights=small, backbone="small-ranking", caption=CAPTION, device="cpu")
    assert built(upstream.pictures(1, 64, 64)).shape == (1, 1) and not built.lower_better


def test_at_the_command_line_the_caption_follows_a_colon(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    build = functools.partial(RankingAwareIQA, weights=small, backbone="small-ranking")
    monkeypatch.setattr("qualiclip_pyiqa.scoring.building.RankingAwareIQA", build)
    Image.fromarray(by_rule.image(4)).save(tmp_path / "image.png")
    spec = "ranking-aware:Rank the numbers of apples."
    assert main(["score", str(tmp_path / "image.png"), "-m", spec, "-o", str(tmp_path / "scores.csv")]) == 0
    with (tmp_path / "scores.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    expected = scores(build(caption="Rank the numbers of apples.").eval(), by_rule.pixels(4))
    assert float(row[spec]) == pytest.approx(float(expected), abs=1e-5)
    assert main(["score", str(tmp_path / "image.png"), "-m", "ranking-aware", "-o", str(tmp_path / "more.csv")]) == 2
    said = capsys.readouterr().err.splitlines()
    assert (
        len(
            [
                line
                for line in said
                if "needs caption=TEXT (on the command line `qualiclip score -m 'ranking-aware:TEXT'`)" in line
            ]
        )
        == 1
    )


def rated(folder: Path, lower_better: bool = False) -> Ratings:
    """Images whose brightness decides their score."""
    paths, opinions = [], []
    for k in range(12):
        level = 20 + 18 * k
        paths.append(folder / f"{k}.png")
        Image.fromarray((by_rule.image(4) // 8 + level).astype(np.uint8)[:64, : 48 + 4 * k]).save(paths[-1])
        opinions.append(float(12 - k if lower_better else k))
    return Ratings(paths, opinions, lower_better)


@pytest.mark.parametrize("start", ["checkpoint", "clip"])
def test_the_adapter_is_trained(start: str, small: Path, tmp_path: Path) -> None:
    weights = small
    if start == "clip":  # as LAION's: another head, and no adapter
        state = torch.load(small, weights_only=True)["state_dict"]
        state = {k.removeprefix("module."): v for k, v in state.items()}
        state = {k: v for k, v in state.items() if "adapter" not in k and "head.fc" not in k}
        torch.save(state | {"visual.head.mlp.fc1.weight": torch.zeros(2, 2)}, tmp_path / "clip.pt")
        weights = tmp_path / "clip.pt"
    ratings = rated(tmp_path, lower_better=start == "clip")
    recipe = RankingRecipe(epochs=12, batch=6, learning_rate=1e-3)
    run = functools.partial(
        train_ranking, weights, "Rank by light.", ratings, recipe=recipe, backbone="small-ranking", watched=ratings
    )
    path = run(tmp_path / "run")
    first, *lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert first["caption"] == "Rank by light." and len(lines) == 12
    assert lines[-1]["loss"] < lines[0]["loss"] and lines[-1]["rank"] < lines[0]["rank"]
    # Also where lower opinion scores are better, light ones are ranked higher; a fresh adapter learns more slowly.
    assert lines[-1]["validation_srcc"] > (0.9 if start == "checkpoint" else 0.5)
    if start == "clip":
        return
    metric = RankingAwareIQA(weights=path, caption="Rank by light.", backbone="small-ranking").eval()
    images = [load_image(each)[None] for each in ratings.paths]
    found = torch.cat([scores(metric, image)[:, 0] for image in images])
    assert (found.diff() > 0).float().mean() > 0.8
    with torch.no_grad():
        logits = metric.compare(torch.cat([torch.nn.functional.interpolate(images[k], (64, 64)) for k in (0, 11)]))
    assert logits[1, 0] > logits[0, 1]
    again = run(tmp_path / "again")
    assert again.read_bytes() == path.read_bytes()
    with pytest.raises(SettingsError, match="exists; choose another folder"):
        run(tmp_path / "run")


def test_what_cannot_be_trained_on_is_one_line(small: Path, tmp_path: Path) -> None:
    ratings = rated(tmp_path)
    for wrong in ({"batch": 1}, {"epochs": 0}, {"learning_rate": 0.0}, {"weight_decay": -1.0}):
        with pytest.raises(SettingsError, match=f"{next(iter(wrong))} is .*; expected"):
            RankingRecipe(**wrong)  # type: ignore[arg-type]
    same = Ratings(ratings.paths[:3], [1.0] * 3, False)
    with pytest.raises(SettingsError, match="3 rated images of one score teach no order"):
        train_ranking(small, CAPTION, same, tmp_path / "run", backbone="small-ranking")
    with pytest.raises(SettingsError, match="the caption is empty"):
        train_ranking(small, " ", ratings, tmp_path / "run", backbone="small-ranking")
    assert not (tmp_path / "run").exists()


# The authors' numbers


def rules_adapter() -> adapter.RankingAdapter:
    return adapter.adapter_of(768, by_rule.state("ranking-aware", GOLDEN["adapter_shapes"]), "rule").eval()


@pytest.fixture(scope="module")
def whole_adapter() -> adapter.RankingAdapter:
    return rules_adapter()


@torch.no_grad()
def test_golden_numbers_of_the_adapter_alone(whole_adapter: adapter.RankingAdapter) -> None:
    assert len(whole_adapter.state_dict()) == 119
    assert sum(value.numel() for value in whole_adapter.state_dict().values()) == 40_791_586
    image = by_rule.unit("ranking-aware-tokens/image", (2, 100, 768))
    text = by_rule.unit("ranking-aware-tokens/text", (2, 77, 768))
    expected = GOLDEN["adapter_alone"]

    def run(net: adapter.RankingAdapter) -> tuple[Tensor, Tensor]:
        fused = torch.cat([net(image[k : k + 1], text[k]) for k in range(2)])
        return net.score(fused), net.compare(fused).flatten()

    found, logits = run(whole_adapter)
    assert (found - torch.tensor(expected["scores"])).abs().max() < TOLERANCE
    assert (logits - torch.tensor(expected["paired_logits"])).abs().max() < TOLERANCE

    def without(part: str) -> float:
        changed = copy.deepcopy(whole_adapter)
        if part == "second transformer":
            changed.post_fuse_block = nn.Identity()
        elif part == "learned text tokens":
            changed.learnable_text_tokens = nn.Parameter(torch.empty(1, 0))
        elif part == "cross-attention":
            for block in changed.crossmodal_block.cross_attn:
                block.attn.out_proj.weight.zero_()
        else:
            changed.reg_ln = nn.Identity()
        return float((run(changed)[0] - torch.tensor(expected["scores"])).abs().max())

    for part in ("second transformer", "learned text tokens", "cross-attention", "norm of each token"):
        assert without(part) > 100 * TOLERANCE, part


def whole_shapes() -> dict[str, tuple[int, ...]]:
    definition = adapter.without_pooling(find_backbone("convnext_large_d_320"))
    with torch.device("meta"):
        model = definition.open_clip_model()
    return {key: tuple(value.shape) for key, value in model.state_dict().items()}


@torch.no_grad()
def test_golden_numbers_of_the_whole_model(whole_adapter: adapter.RankingAdapter) -> None:
    """390 million weights: one part after the other, so as to need the memory of one."""
    shapes = whole_shapes()
    assert len(shapes) + 119 == 661
    definition = find_backbone("convnext_large_d_320")
    text = {key: shape for key, shape in shapes.items() if not key.startswith("visual.")}
    state = by_rule.state("ranking-aware", text)
    captions = {name: adapter.caption_tokens(definition, state, name, "rule") for name in GOLDEN["text"]}
    for name, expected in GOLDEN["text"].items():
        assert float(captions[name].norm()) == pytest.approx(expected["tokens_norm"], rel=TOLERANCE)
    del state
    visual = {key: shape for key, shape in shapes.items() if key.startswith("visual.")}
    tower = adapter.token_tower(definition, by_rule.state("ranking-aware", visual), "rule").eval()
    net = RankingAwareIQA.__new__(RankingAwareIQA)
    BlindMetric.__init__(net, "ranking-aware", "none", "-inf, inf")
    net.tower, net.adapter, net.size = tower, whole_adapter, 320
    numbers = [0, 2, 5]
    features = torch.cat([net.features(by_rule.pixels(number)) for number in numbers])
    for number, tokens in zip(numbers, features, strict=True):
        expected = GOLDEN["pictures"][str(number)]["image_tokens"]
        assert float(tokens.norm()) == pytest.approx(expected["norm"], rel=TOLERANCE)
    for name, tokens in captions.items():
        net.register_buffer("text_tokens", tokens, persistent=False)
        expected = torch.tensor([GOLDEN["pictures"][str(number)]["scores"][name] for number in numbers])
        assert (net.score(features)[:, 0] - expected).abs().max() < TOLERANCE
        logits = whole_adapter.compare(net.fuse(features)).flatten()
        assert (logits - torch.tensor(GOLDEN["paired_logits"][name]["logits"])).abs().max() < TOLERANCE
    # Resized on tensors, or under another caption, the scores are others.
    resized = resize(by_rule.pixels(5), [320, 320], antialias=True)
    other = net.score(net.features(resized))[0, 0] - expected[2]
    assert abs(float(other)) > 2 * TOLERANCE
    assert GOLDEN["controls_score"]["other caption"] > 100 * TOLERANCE
