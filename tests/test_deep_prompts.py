"""Metrics by deep prompts: what every metric must do, their files, and what the authors' own code answered."""

from __future__ import annotations

import copy
import itertools
import json
from pathlib import Path
from typing import Any

import by_rule
import numpy as np
import open_clip
import pyiqa
import pytest
import torch
import upstream
from contract import MetricContract, scores
from PIL import Image
from torch import Tensor

from qualiclip_pyiqa import Scorer
from qualiclip_pyiqa.archs import DeepPromptIQA
from qualiclip_pyiqa.errors import ImageError, SettingsError, WeightsError
from qualiclip_pyiqa.explain.mapper import Mapper
from qualiclip_pyiqa.export.graph import exportable
from qualiclip_pyiqa.metrics import deep_prompt_iqa, deep_prompts
from qualiclip_pyiqa.pretrained.convert import convert
from qualiclip_pyiqa.pretrained.deep_prompts import write_prompts
from qualiclip_pyiqa.pretrained.layouts import PROMPTS_FORMAT
from qualiclip_pyiqa.pretrained.read import stored_format
from qualiclip_pyiqa.scoring.building import metric_of_file
from qualiclip_pyiqa.towers.resampling import resize_like_pillow
from qualiclip_pyiqa.training.fitting import choose_tower

NAMES = ("clip-dqa", "clip-agiqa")
BLOCKS, WIDTH, TEXT_BLOCKS, TEXT_WIDTH, LENGTH = 3, 64, 2, 128, 4  # of tiny-vit-32, and of its prompts


def authors_files(folder: Path) -> dict[str, Path]:
    """Random prompts for tiny-vit-32 in the layouts of the authors' code, with strong effects."""
    torch.manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape) * (0.5 if len(shape) == 2 and shape[0] == LENGTH else shape[-1] ** -0.5)

    def linear(name: str, inputs: int, width: int) -> dict[str, Tensor]:
        return {f"{name}.weight": drawn(width, inputs), f"{name}.bias": drawn(width)}

    fixed = {"token_prefix": drawn(2, 1, TEXT_WIDTH), "token_suffix": drawn(2, 72, TEXT_WIDTH)}
    visual = {f"prompts_vis.{k}": drawn(LENGTH, WIDTH) for k in range(BLOCKS)}
    dqa = {**fixed, **visual, **{f"prompts_text.{k}": drawn(LENGTH, TEXT_WIDTH) for k in range(TEXT_BLOCKS)}}
    for k in range(BLOCKS):
        dqa |= linear(f"prompt_vis_projections.{k}", WIDTH, WIDTH)
    for k in range(TEXT_BLOCKS):
        dqa |= linear(f"prompt_txt_projections.{k}", TEXT_WIDTH, TEXT_WIDTH)
    sides = []
    for _ in range(2):
        side = {f"prompts_vis.{k}": drawn(LENGTH, WIDTH) for k in range(BLOCKS)}
        side |= {"ctx": drawn(LENGTH, TEXT_WIDTH), **fixed}
        side |= {f"prompts_text.{k}": drawn(LENGTH, TEXT_WIDTH) for k in range(TEXT_BLOCKS - 1)}
        sides.append(side)
    sides[0] |= linear("proj", 2 * WIDTH, WIDTH)
    for k in range(BLOCKS - 1):
        sides[0] |= linear(f"compound_prompt_projections.{k}", 2 * WIDTH, WIDTH)
    files = {
        "clip-dqa": folder / "ViT_DHQ_4_best.pth",
        "clip-agiqa": folder / "ViT_AGIQA_4_tar_best.pth",
        "auxiliary": folder / "ViT_AGIQA_4_aux_best.pth",
    }
    for path, content in zip(files.values(), (dqa, *sides), strict=True):
        torch.save(content, path)
    return files


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return authors_files(tmp_path_factory.mktemp("prompts"))


class DeepPromptContract(MetricContract):
    name: str

    @pytest.fixture(autouse=True)
    def _files(self, tiny_folder: Path, files: dict[str, Path]) -> None:
        self.options: dict[str, Any] = {
            "weights": files[self.name],
            "backbone": "tiny-vit-32",
            "backbone_weights": tiny_folder / "tiny-vit-32.pt",
        }

    def build(self, **options: object) -> DeepPromptIQA:
        return DeepPromptIQA(self.name, **{**self.options, **options}).eval()

    @torch.no_grad()
    def test_a_score_is_the_mean_over_windows(self, monkeypatch: pytest.MonkeyPatch) -> None:
        metric = self.build()
        x = upstream.pictures(2, 32 + 64 + 63, 32 + 3 * 64)  # 2 rows and 4 columns of windows; 63 rows are not seen
        windows = [x[:, :, 64 * i : 64 * i + 32, 64 * j : 64 * j + 32] for i in range(2) for j in range(4)]
        parts = []
        for window in windows:
            views = [window] if self.name == "clip-agiqa" else [window, resize_like_pillow(x, 32, 32)]
            parts.append(metric.rate(metric.encode_views(torch.stack(views, 1), metric.visual_prompts())))
        found = metric(x)
        assert (found - torch.stack(parts).mean(0)).abs().max() < 1e-6
        monkeypatch.setitem(deep_prompt_iqa.WINDOWS, "cpu", 3)  # passes that divide neither rows nor images
        assert (metric(x) - found).abs().max() < 1e-6

    def test_what_is_learned_reaches_every_block(self) -> None:
        metric = self.build().train()
        metric(upstream.pictures(2, 32, 96)).sum().backward()
        assert {name for name, _ in metric.named_parameters()} == set(metric.state_dict())
        for name, parameter in metric.named_parameters():
            assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
        before = metric(upstream.pictures(1, 32, 32)).detach()
        with torch.no_grad():
            for parameter in metric.parameters():
                parameter.mul_(0.5)
        after = metric.eval()(upstream.pictures(1, 32, 32))
        assert (after - before).abs().max() > 1e-4  # evaluation has encoded the new texts
        other = self.build()
        other.load_state_dict(metric.state_dict())
        assert torch.equal(scores(other, upstream.pictures(1, 32, 32)), after.detach())
        assert not other.encodes_like(self.build())

    def test_blocks_can_be_computed_again_for_the_gradient(self) -> None:
        from qualiclip_pyiqa.towers.recompute import recompute_activations

        x = upstream.pictures(1, 40, 40)
        found = []
        for recompute in (False, True):
            metric, own = self.build(), x.clone().requires_grad_()
            if recompute:
                recompute_activations(metric)
            metric(own).sum().backward()
            found.append(own.grad)
        assert torch.allclose(*found, atol=1e-7)

    def test_maps_are_of_the_metric_itself(self) -> None:
        """Grad-CAM runs a transformer without prompts, so it is not defined here; occlusion takes any metric."""
        metric, x = self.build(), upstream.pictures(1, 70, 130)
        with pytest.raises(
            SettingsError, match=f"'gradcam' is not defined for {self.name} on .*; kinds that work: occlusion"
        ):
            Mapper(metric, "gradcam").maps(x)
        (found,) = Mapper(metric, "occlusion", ["quality"]).maps(x)[0]
        assert found.score == pytest.approx(scores(metric, x)[0, 0].item(), abs=1e-6)

    def test_export_is_refused_before_tracing(self) -> None:
        with pytest.raises(SettingsError, match=r"^mine cannot be exported: it averages over windows"):
            exportable(self.build(), "mine")

    def test_own_file_and_scorer(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        metric = self.build()
        path = tmp_path / "prompts.safetensors"
        write_prompts(path, metric.prompt_learner.state_dict(), self.name, "tiny-vit-32", metric.clip_sha256, "")
        assert stored_format(path) == PROMPTS_FORMAT
        own = self.build(weights=path, backbone=None)
        x = upstream.pictures(1, 50, 70)
        assert torch.equal(scores(own, x), scores(metric, x))
        said = own.describe()
        assert said["backbone"] == "tiny-vit-32" and said["context"]["path"] == str(path)
        assert said["minimum_side"] == 32 and "stride of 64" in said["resize"]
        assert ("Pillow" in said["resize"]) == (self.name == "clip-dqa")
        other = next(name for name in NAMES if name != self.name)
        with pytest.raises(WeightsError, match=f"holds prompts of {self.name}, not of {other}"):
            DeepPromptIQA(other, weights=path)
        # An image that is too small is an error of its own row.
        big = self.build(
            backbone="tiny-vit",
            backbone_weights=Path(self.options["backbone_weights"]).with_name("tiny-vit.pt"),
            pretrained=False,
            weights=None,
        )
        for name, side in (("small", 60), ("large", 230)):
            Image.fromarray(np.full((side, 300, 3), 99, np.uint8)).save(tmp_path / f"{name}.png")
        scorer = Scorer({"own": big, "mini": metric}, device="cpu", workers=0)
        records = {Path(r.path).stem: r for r in scorer.score([*tmp_path.glob("*.png")])}
        assert "own" in str(
            records["small"].error
        ) and "300x60 pixels; the smallest that can be scored is 224x224" in str(records["small"].error)
        assert len(records["small"].scores) == len(metric.attributes)
        assert records["large"].error is None and len(records["large"].scores) == 2 * len(metric.attributes)


class TestClipDqa(DeepPromptContract):
    name = "clip-dqa"


class TestClipAgiqa(DeepPromptContract):
    name = "clip-agiqa"

    def test_two_attributes(self) -> None:
        metric = self.build()
        assert metric.attributes == ("quality", "alignment")
        scorer = Scorer({"m": metric}, device="cpu", workers=0)
        assert list(next(iter(scorer.score([np.full((40, 40, 3), 99, np.uint8)]))).scores) == [
            "m.quality",
            "m.alignment",
        ]


def test_prompts_are_for_the_clip_that_they_were_learned_on(
    files: dict[str, Path], tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clip = tmp_path / "clips" / "mine.pt"
    clip.parent.mkdir()
    clip.write_bytes((tiny_folder / "tiny-vit-32.pt").read_bytes())
    metric = DeepPromptIQA("clip-dqa", files["clip-dqa"], "tiny-vit-32", clip).eval()
    path, x = tmp_path / "prompts.safetensors", upstream.pictures(1, 40, 40)
    write_prompts(
        path, metric.prompt_learner.state_dict(), "clip-dqa", "tiny-vit-32", metric.clip_sha256, metric.clip_file
    )
    # The same model in another format and precision is the same model.
    convert(clip, tmp_path / "same.safetensors")
    state = torch.load(clip)
    half = {key: value.half() if value.is_floating_point() else value for key, value in state.items()}
    torch.save(half, tmp_path / "half.pt")
    for same in (tmp_path / "same.safetensors", tmp_path / "half.pt"):
        found = scores(DeepPromptIQA("clip-dqa", path, backbone_weights=same).eval(), x)
        assert (found - scores(metric, x)).abs().max() < 1e-3
    with pytest.raises(WeightsError, match=r"learned on the CLIP model mine\.pt, which is neither beside it nor in"):
        DeepPromptIQA("clip-dqa", path)
    monkeypatch.setenv("QUALICLIP_PYIQA_WEIGHTS", str(clip.parent))
    assert DeepPromptIQA("clip-dqa", path).origin.path == clip
    state["visual.transformer.resblocks.1.mlp.c_fc.weight"][0] += 0.1
    torch.save(state, tmp_path / "mine.pt")  # beside the prompts, so before the folder's
    for wrong in (None, tmp_path / "mine.pt"):
        with pytest.raises(WeightsError, match=r"was learned on another CLIP model than .*: expected mine\.pt as tiny"):
            DeepPromptIQA("clip-dqa", path, backbone_weights=wrong)
    with pytest.raises(SettingsError, match="learned on tiny-vit-32, not on tiny-vit; leave backbone out"):
        DeepPromptIQA("clip-dqa", path, backbone="tiny-vit", backbone_weights=tiny_folder / "tiny-vit.pt")
    write_prompts(path, metric.prompt_learner.state_dict(), "clip-dqa", "tiny-vit-32", "", "../clips/mine.pt")
    with pytest.raises(WeightsError, match=r"metadata 'clip_file' is '../clips/mine\.pt'; expected a file's name"):
        DeepPromptIQA("clip-dqa", path)


@pytest.mark.parametrize("name", NAMES)
def test_without_a_file_it_says_how_to_train_one(name: str) -> None:
    said = (
        rf"{name} has no published weights; pass weights=FILE \(on the command line `qualiclip score -m "
        rf"FILE\.safetensors`\), trained on .* `qualiclip tune -m {name} --ratings"
    )
    with pytest.raises(SettingsError, match=said) as caught:
        pyiqa.create_metric(name, device="cpu")
    assert "\n" not in str(caught.value)
    with pytest.raises(SettingsError, match=said):
        Scorer(name)
    assert name in pyiqa.list_models()
    with pytest.raises(SettingsError, match=f"{name} needs learned prompts beside its tower, .*; pass ViT-B/32"):
        choose_tower(name)


def test_files_that_do_not_fit(files: dict[str, Path], tiny_folder: Path, tmp_path: Path) -> None:
    own = {"backbone": "tiny-vit-32", "backbone_weights": tiny_folder / "tiny-vit-32.pt"}

    def fails(said: str, name: str, path: Path, kind: type[Exception] = WeightsError, **options: Any) -> None:
        with pytest.raises(kind, match=said) as caught:
            DeepPromptIQA(name, weights=path, **{**own, **options})
        assert "\n" not in str(caught.value)

    for file in ("clip-agiqa", "auxiliary"):
        fails("holds prompts of clip-agiqa, not of clip-dqa", "clip-dqa", files[file])
    fails("holds prompts of clip-dqa, not of clip-agiqa", "clip-agiqa", files["clip-dqa"])
    fails("prompts without maps, such as those of alignment alone", "clip-agiqa", files["auxiliary"])
    alone = tmp_path / "a_tar_best.pth"
    alone.write_bytes(files["clip-agiqa"].read_bytes())
    fails(
        "quality prompts alone; expected those of alignment in the same folder, as a_aux_best.pth", "clip-agiqa", alone
    )
    renamed = tmp_path / "mine.pth"
    renamed.write_bytes(files["clip-agiqa"].read_bytes())
    fails("as NAME_aux_REST for NAME_tar_REST", "clip-agiqa", renamed)
    fails("is a folder; expected a file of prompts of clip-dqa", "clip-dqa", tmp_path)
    fails("nothing.pth", "clip-dqa", tmp_path / "nothing.pth")
    content = torch.load(files["clip-dqa"])
    torch.save({**content, "adapter.weight": torch.ones(2)}, tmp_path / "more.pth")
    fails("holds 'adapter.weight'; expected deep prompts", "clip-dqa", tmp_path / "more.pth")
    del content["prompts_vis.1"]
    torch.save(content, tmp_path / "less.pth")
    fails("does not fit clip-dqa on tiny-vit-32: .*quality.visual.1", "clip-dqa", tmp_path / "less.pth")
    fails(
        "does not fit clip-dqa on tiny-vit: ",
        "clip-dqa",
        files["clip-dqa"],
        backbone="tiny-vit",
        backbone_weights=tiny_folder / "tiny-vit.pt",
    )
    resnet = {"backbone": "tiny-resnet", "backbone_weights": tiny_folder / "tiny-resnet.pt"}
    fails(
        "needs a vision transformer that takes prompts, which backbone 'tiny-resnet' is not",
        "clip-dqa",
        files["clip-dqa"],
        SettingsError,
        **resnet,
    )
    fails("tile is 31; clip-dqa|tile is 31; expected", "clip-dqa", files["clip-dqa"], SettingsError, tile=31)
    fails("asks for fresh ones", "clip-dqa", files["clip-dqa"], SettingsError, pretrained=False)
    with pytest.raises(SettingsError, match="clipiqa has no deep prompts; expected one of clip-dqa, clip-agiqa"):
        DeepPromptIQA("clipiqa")
    long = {
        key: value[:1].repeat(80, 1) if value.shape[0] == LENGTH else value
        for key, value in torch.load(files["clip-dqa"]).items()
    }
    torch.save(long, tmp_path / "long.pth")
    fails("prompts of 80 tokens do not fit into CLIP's 77 tokens", "clip-dqa", tmp_path / "long.pth", SettingsError)
    with pytest.raises(ImageError, match="31x64 pixels"):
        DeepPromptIQA("clip-dqa", weights=files["clip-dqa"], **own)(torch.rand(1, 3, 64, 31))
    fails("quality.text", "clip-dqa", foreign_file(tmp_path))


def foreign_file(folder: Path) -> Path:
    path = folder / "foreign.safetensors"
    write_prompts(path, {"alignment.text.0": torch.ones(1)}, "clip-dqa", "tiny-vit-32", "", "")
    return path


@torch.no_grad()
def test_memory_does_not_grow_with_the_image(files: dict[str, Path], tiny_folder: Path) -> None:
    """The largest tensor that the towers see is one pass of windows, of a 4K image too."""
    metric = DeepPromptIQA("clip-dqa", files["clip-dqa"], "tiny-vit-32", tiny_folder / "tiny-vit-32.pt").eval()
    seen: list[int] = []
    metric.tower.conv1.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[0]))
    x = upstream.pictures(1, 2160, 3840)
    assert metric.features(x).shape == (1, 34 * 60 * 32)
    assert max(seen) == 2 * deep_prompt_iqa.WINDOWS["cpu"] and sum(seen) == 2 * 34 * 60


# The authors' own code, on OpenAI's ViT-B/32 with weights made by rule


@pytest.fixture(scope="module")
def golden_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("golden")
    with torch.device("meta"):
        shapes = {
            key: value.shape
            for key, value in open_clip.CLIP(**open_clip.get_model_config("ViT-B-32-quickgelu")).state_dict().items()
        }
    torch.save(by_rule.state("openai-clip", shapes), folder / "ViT-B-32.pt")
    names = {"clip-dqa": "8_best.pth", "clip-agiqa-target": "8_tar_best.pth", "clip-agiqa-auxiliary": "8_aux_best.pth"}
    for name in NAMES:
        for layout, tensors in by_rule.golden(name)["layouts"].items():
            torch.save(by_rule.state(layout, tensors), folder / names[layout])
    return folder


@pytest.fixture(scope="module")
def golden_metrics(golden_folder: Path) -> dict[str, DeepPromptIQA]:
    clip = golden_folder / "ViT-B-32.pt"
    return {
        name: DeepPromptIQA(name, golden_folder / file, backbone_weights=clip).eval()
        for name, file in zip(NAMES, ("8_best.pth", "8_tar_best.pth"), strict=True)
    }


def test_images_are_made_by_the_rule() -> None:
    import hashlib

    for index in range(6):
        expected = by_rule.golden("clip-dqa")["images"][str(index)]
        assert hashlib.sha256(by_rule.image(index).tobytes()).hexdigest() == expected


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_scores_are_those_of_the_authors_code(name: str, golden_metrics: dict[str, DeepPromptIQA]) -> None:
    metric, expected = golden_metrics[name], by_rule.golden(name)
    assert (
        sum(parameter.numel() for parameter in metric.parameters())
        == {"clip-dqa": 10361856, "clip-agiqa": 14410752}[name]
    )
    words = [word.removesuffix(".") for learner in metric.learners for word in learner.words]
    for word, feature in zip(words, metric._encode_texts(), strict=True):
        of_text = expected["text_features"][word]
        assert feature.norm().item() == pytest.approx(of_text["norm"], rel=1e-5)
        assert feature[:5].tolist() == pytest.approx(of_text["first"], abs=1e-4)
    for index in range(5):
        values = expected["pictures"][str(index)]
        found = metric(by_rule.pixels(index))[0].tolist()
        assert found[0] == pytest.approx(values["score"], abs=1e-5), index
        if len(found) == 2:
            assert found[1] == pytest.approx(values["alignment"], abs=1e-5), index
    # Of the largest image's 35 windows, the corners.
    x, values = by_rule.pixels(5), expected["pictures"]["5"]
    whole = metric.whole_view(x)
    for number, (top, left) in {0: (0, 0), 6: (0, 384), 28: (256, 0), 34: (256, 384)}.items():
        window = x[:, :, top : top + 224, left : left + 224]
        views = torch.stack([window] if whole is None else [window, whole], dim=1)
        found = metric.rate(metric.encode_views(views, metric.visual_prompts()))[0].tolist()
        assert found[0] == pytest.approx(values["window_scores"][number], abs=2e-5)
        if len(found) == 2:
            assert found[1] == pytest.approx(values["window_alignments"][number], abs=2e-5)


def without(part: str, metric: DeepPromptIQA, monkeypatch: pytest.MonkeyPatch) -> DeepPromptIQA:
    """A copy of a metric that lacks a part."""
    metric = copy.deepcopy(metric)
    prompts = metric.prompt_learner
    if part == "rounding to float16":
        monkeypatch.setattr(deep_prompts, "in_half_precision", lambda prompts: prompts)
    elif part == "ImageNet's statistics":
        metric.tower.mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(1, 3, 1, 1)
        metric.tower.std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(1, 3, 1, 1)
    elif part == "deep visual prompts":
        forward = type(metric.tower).forward_prompted
        monkeypatch.setattr(
            type(metric.tower),
            "forward_prompted",
            lambda tower, views, p: forward(tower, views, [p[0], *[p[0][:0]] * 11]),
        )
    elif part == "maps of text prompts":
        prompts["quality"].text_maps = torch.nn.ModuleList()
    elif part == "maps of visual prompts":
        prompts["quality"].visual_maps = torch.nn.ModuleList()
    elif part == "the whole view":
        monkeypatch.setattr(DeepPromptIQA, "whole_view", lambda metric, rgb: None)
    elif part == "Pillow's antialiasing":
        monkeypatch.setattr(
            deep_prompt_iqa,
            "resize_like_pillow",
            lambda rgb, h, w: torch.nn.functional.interpolate(rgb, (h, w), mode="bilinear"),
        )
    elif part == "mixed prompts":
        for own in prompts["alignment"].visual:
            own.data.zero_()
    elif part == "deep text prompts":
        for own in itertools.islice(prompts["quality"].text, 1, None):
            own.data.zero_()
    metric._refresh()
    return metric


PARTS = ("rounding to float16", "ImageNet's statistics", "deep text prompts", "deep visual prompts")
OF = {
    "clip-dqa": (*PARTS, "maps of text prompts", "maps of visual prompts", "the whole view", "Pillow's antialiasing"),
    "clip-agiqa": (*PARTS, "mixed prompts"),
}


@pytest.mark.parametrize(("name", "part"), [(name, part) for name in NAMES for part in OF[name]])
@torch.no_grad()
def test_a_part_that_is_left_out_shows(
    name: str, part: str, golden_metrics: dict[str, DeepPromptIQA], monkeypatch: pytest.MonkeyPatch
) -> None:
    lacking = without(part, golden_metrics[name], monkeypatch)
    expected = by_rule.golden(name)["pictures"]
    moved = [abs(lacking(by_rule.pixels(index))[0, 0].item() - expected[str(index)]["score"]) for index in (0, 2)]
    assert max(moved) > 2e-5, moved


@pytest.mark.parametrize("name", NAMES)
def test_training_steps_are_those_of_the_authors_code(name: str, golden_metrics: dict[str, DeepPromptIQA]) -> None:
    metric, expected = copy.deepcopy(golden_metrics[name]).train(), by_rule.golden(name)
    x = torch.cat([by_rule.pixels(0), by_rule.pixels(1)])
    targets = [
        torch.tensor(expected["training"][key])
        for key in ("targets", "alignment_targets")
        if key in expected["training"]
    ]
    optimiser = torch.optim.Adam(metric.parameters(), lr=1e-4)
    for number, step in enumerate(expected["training"]["steps"]):
        found = metric(x)
        losses = [(column - target).square().mean() for column, target in zip(found.T, targets, strict=True)]
        tolerance = 1e-5 if number == 0 else 1e-3
        assert losses[0].item() == pytest.approx(step["loss"], abs=tolerance)
        if len(losses) == 2:
            assert losses[1].item() == pytest.approx(step["auxiliary_loss"], abs=tolerance)
        optimiser.zero_grad()
        (losses[0] + (0.1 * losses[1] if len(losses) == 2 else 0)).backward()
        if number == 0:
            check_gradients(name, metric, expected["gradient_norms_step0"])
        optimiser.step()


def check_gradients(name: str, metric: DeepPromptIQA, expected: dict[str, float]) -> None:
    """Compare the norm of each gradient, under the authors' names."""
    kinds = {
        "prompts_text": "text",
        "prompts_vis": "visual",
        "prompt_vis_projections": "visual_maps",
        "prompt_txt_projections": "text_maps",
    }
    parameters = dict(metric.prompt_learner.named_parameters())
    for key, norm in expected.items():
        owner, kind, *rest = key.split(".")
        attribute = "alignment" if owner.endswith("aux") else "quality"
        if kind == "ctx":
            own = "text.0"
        elif kind == "proj":
            own = f"visual_maps.0.{rest[0]}"
        elif kind == "compound_prompt_projections":
            own = f"visual_maps.{int(rest[0]) + 1}.{rest[1]}"
        else:
            shift = name == "clip-agiqa" and kind == "prompts_text"
            own = ".".join([kinds[kind], str(int(rest[0]) + shift), *rest[1:]])
        gradient = parameters.pop(f"{attribute}.{own}").grad
        assert gradient.norm().item() == pytest.approx(norm, rel=1e-3), key
    assert not parameters


@pytest.mark.parametrize("name", NAMES)
def test_pyiqa_creates_it(name: str, golden_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUALICLIP_PYIQA_WEIGHTS", str(golden_folder))
    monkeypatch.setenv("QUALICLIP_PYIQA_VERIFY", "0")
    file = {"clip-dqa": "8_best.pth", "clip-agiqa": "8_tar_best.pth"}[name]
    metric = pyiqa.create_metric(name, weights=str(golden_folder / file), device="cpu")
    found = metric(by_rule.pixels(0))
    assert found[0, 0].item() == pytest.approx(by_rule.golden(name)["pictures"]["0"]["score"], abs=1e-5)
    said = metric.net.describe()
    assert said["backbone"] == "ViT-B/32" and said["activation"] == "QuickGELU" and json.dumps(said)
    assert metric.net.clip_file == ""
    # The authors' files stand for the metric once they are safetensors.
    for part in {file, file.replace("_tar_", "_aux_")}:
        convert(golden_folder / part, (tmp_path / part).with_suffix(".safetensors"))
    with pytest.raises(SettingsError, match=f"holds prompts of {name}; pass what `qualiclip weights convert` makes of"):
        Scorer(str(golden_folder / file))
    converted = metric_of_file(str((tmp_path / file).with_suffix(".safetensors"))).eval()
    assert (scores(converted, by_rule.pixels(0)) - found).abs().max() < 1e-6
