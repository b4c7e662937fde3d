"""CLIPs in the layout of Hugging Face transformers, against transformers' own features."""

from __future__ import annotations

import dataclasses
import json
import math
import pickle
import re
import shutil
from pathlib import Path
from typing import Any

import by_rule
import open_clip
import pytest
import torch
import transformers
import upstream
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from qualiclip_pyiqa import OpenCLIPIQA, OpenQualiCLIP
from qualiclip_pyiqa.commands.cli import main
from qualiclip_pyiqa.errors import PromptError, SettingsError, WeightsError
from qualiclip_pyiqa.pretrained.model import load_model
from qualiclip_pyiqa.pretrained.transformers_layout import to_open_clip
from qualiclip_pyiqa.towers.backbones import MEAN, STD, find_backbone, image_tower, text_tower
from qualiclip_pyiqa.towers.text import tokenize

TEXTS = ["Good photo.", "Bad photo.", "a photograph of a dog on a beach", "X X X X sharp image, high quality"]
SIZE, DIM = 32, 24
VIT_B_32 = open_clip.get_model_config("ViT-B-32")
# float32 of both sides, with matrix products in another order; a wrong activation moves features a thousand times more.
ROUNDING = 2e-6


def configuration(act: str = "gelu", length: int = 77) -> transformers.CLIPConfig:
    tower = {"hidden_size": 64, "num_hidden_layers": 2, "hidden_act": act, "projection_dim": DIM}
    text = tower | {"intermediate_size": 256, "num_attention_heads": 1, "max_position_embeddings": length}
    vision = tower | {"intermediate_size": 128, "num_attention_heads": 2, "image_size": SIZE, "patch_size": 8}
    return transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=DIM)


def random_clip(act: str = "gelu", length: int = 77) -> transformers.CLIPModel:
    torch.manual_seed(0)
    model = transformers.CLIPModel(configuration(act, length)).eval()
    for parameter in model.parameters():
        if parameter.dim():  # so that every part has an effect
            parameter.data += (0.3 if parameter.dim() == 1 else 0.1) * torch.randn_like(parameter)
    model.logit_scale.data.fill_(3.2)
    return model


@pytest.fixture(autouse=True)
def backbone(tmp_path: Path) -> None:
    """The same sizes as a model of open_clip, `small-hf`; its name says GELU."""
    small = {
        "embed_dim": DIM,
        "vision_cfg": {
            "image_size": SIZE,
            "layers": 2,
            "width": 64,
            "head_width": 32,
            "mlp_ratio": 2.0,
            "patch_size": 8,
        },
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 2},
    }
    for name, quick in (("small-hf", False), ("small-hf-quickgelu", True)):
        (tmp_path / f"{name}.json").write_text(json.dumps(small | {"quick_gelu": quick}))
    open_clip.add_model_config(tmp_path)


def write_separate(model: transformers.CLIPModel, folder: Path, prefix: str = "model.") -> Path:
    """As TripletCLIP: an encoder with projection in each of two folders, names after `model.`, no logit scale."""
    parts = {
        "vision": (transformers.CLIPVisionModelWithProjection, model.config.vision_config),
        "text": (transformers.CLIPTextModelWithProjection, model.config.text_config),
    }
    for name, (kind, config) in parts.items():
        part = kind(config)
        part.load_state_dict({key: value for key, value in model.state_dict().items() if key in part.state_dict()})
        place = folder / f"{name}-encoder"
        part.save_pretrained(place)
        tensors = {f"{prefix}{key}": value for key, value in load_file(place / "model.safetensors").items()}
        save_file(tensors, place / "model.safetensors")
    return folder


@torch.no_grad()
def expected_features(
    model: transformers.CLIPModel, x: Tensor, mean: Any = MEAN, std: Any = STD
) -> tuple[Tensor, Tensor]:
    pixels = (x - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    ids = tokenize(TEXTS, model.config.text_config.max_position_embeddings)
    image = model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output)
    text = model.text_projection(model.text_model(input_ids=ids).pooler_output)
    return image, text


@torch.no_grad()
def features(weights: Path, x: Tensor, backbone: str = "small-hf") -> tuple[Tensor, Tensor]:
    model = load_model(weights, backbone)
    return model.image_tower(pos_embedding=True).eval()(x), model.encode(TEXTS)


def same(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> bool:
    return all(
        float((one - two).abs().max()) < ROUNDING * float(two.abs().max())
        for one, two in zip(found, expected, strict=True)
    )


@pytest.mark.parametrize("act", ["gelu", "quick_gelu"])
@pytest.mark.parametrize("layout", ["folder", "file", "parts", "separate", "pickled"])
def test_features_are_transformers_own(layout: str, act: str, tmp_path: Path) -> None:
    model = random_clip(act)
    folder = tmp_path / "clip"
    if layout == "separate":
        write_separate(model, folder)
    else:
        model.save_pretrained(folder, max_shard_size="100KB" if layout == "parts" else "5GB")
    if layout == "parts":
        assert len(list(folder.glob("*.safetensors"))) > 2
    if layout == "pickled":  # as before safetensors
        torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
    x = upstream.pictures(3, SIZE, SIZE)
    expected = expected_features(model, x)
    assert expected[0].std(dim=0).max() > 1e-2 and expected[1].std(dim=0).max() > 1e-2
    found = features(folder / "model.safetensors" if layout == "file" else folder, x)
    assert same(found, expected)
    # The configuration beside the tensors decides the activation, whatever the name of the backbone says.
    assert same(features(folder, x, "small-hf-quickgelu"), expected)
    assert load_model(folder, "small-hf").activation == {"gelu": "GELU", "quick_gelu": "QuickGELU"}[act]
    other = expected_features(random_clip("gelu" if act == "quick_gelu" else "quick_gelu"), x)
    assert not same(found, other)


def test_without_a_configuration_the_backbone_decides(tmp_path: Path) -> None:
    model = random_clip("quick_gelu")
    model.save_pretrained(tmp_path / "clip")
    (tmp_path / "clip" / "config.json").unlink()
    x = upstream.pictures(2, SIZE, SIZE)
    expected = expected_features(model, x)
    assert same(features(tmp_path / "clip", x, "small-hf-quickgelu"), expected)
    assert not same(features(tmp_path / "clip", x, "small-hf"), expected)


def test_pixels_are_normalised_as_the_preprocessor_says(tmp_path: Path) -> None:
    model = random_clip()
    write_separate(model, tmp_path / "clip")
    mean, std = [0.5, 0.4, 0.3], [0.2, 0.25, 0.3]
    for values, expected in (
        ({"image_mean": mean, "image_std": std}, (mean, std)),
        ({"do_normalize": False, "image_mean": mean, "image_std": std}, ([0.0] * 3, [1.0] * 3)),
        ({"crop_size": 224}, (MEAN, STD)),
    ):
        (tmp_path / "clip" / "preprocessor_config.json").write_text(json.dumps(values))
        x = upstream.pictures(2, SIZE, SIZE)
        assert same(features(tmp_path / "clip", x), expected_features(model, x, *expected))
    metric = OpenCLIPIQA("clipiqa", backbone="small-hf", weights=tmp_path / "clip")
    assert metric.describe()["pixel_mean"] == pytest.approx(MEAN, abs=1e-5)


def test_a_text_tower_for_shorter_texts(tmp_path: Path) -> None:
    """TripletCLIP's has 64 or 77 tokens by different sources."""
    model = random_clip(length=20)
    write_separate(model, tmp_path / "clip", prefix="")
    x = upstream.pictures(2, SIZE, SIZE)
    assert same(features(tmp_path / "clip", x), expected_features(model, x))
    net = OpenCLIPIQA("clipiqa+", backbone="small-hf", weights=tmp_path / "clip", pretrained=False, n_ctx=8)
    assert net.prompt_learner.token_suffix.shape[1] == 20 - 8 - 1
    with pytest.raises(SettingsError, match="do not fit into CLIP's 20 tokens"):
        OpenCLIPIQA("clipiqa+", backbone="small-hf", weights=tmp_path / "clip", pretrained=False, n_ctx=16)


@torch.no_grad()
def test_scores_are_those_of_the_same_tensors_in_open_clips_layout(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = random_clip()
    model.save_pretrained(tmp_path / "whole")
    write_separate(model, tmp_path / "apart")
    torch.save(to_open_clip(tmp_path, model.state_dict()), tmp_path / "clip.pt")
    x = upstream.pictures(3, 48, 64)

    def build(weights: str, **more: object) -> OpenCLIPIQA:
        return OpenCLIPIQA("clipiqa", backbone="small-hf", weights=tmp_path / weights, **more).eval()

    plain, whole = build("clip.pt"), build("whole")
    assert torch.equal(whole(x), plain(x)) and whole.describe()["logit_scale"] == pytest.approx(math.exp(3.2))
    assert not caplog.records
    apart = build("apart")
    assert "has no logit_scale; cosines are multiplied by 100" in caplog.text
    assert apart.describe()["logit_scale"] == pytest.approx(100)
    assert torch.allclose(build("apart", temperature=100 / math.exp(3.2))(x), plain(x), atol=1e-6)
    assert torch.equal(pickle.loads(pickle.dumps(apart))(x), apart(x))

    # The files are read again for new prompts.
    for metric in (whole, apart):
        metric.set_prompts({"fog": ("Clear photo.", "Foggy photo.")})
    described = apart.describe()["weights"]
    assert described["file"] == "apart" and len(described["sha256"]) == 64 and described["check"] == "unknown"
    assert whole.describe()["weights"]["file"] == "model.safetensors"
    shutil.copy(tmp_path / "apart/vision-encoder/model.safetensors", tmp_path / "kept")
    save_file(load_file(tmp_path / "kept"), tmp_path / "apart/vision-encoder/model.safetensors", {"again": "yes"})
    with pytest.raises(WeightsError, match="apart changed after this model was loaded"):
        apart.set_prompts("quality")
    config = json.loads((tmp_path / "whole/config.json").read_text())
    for section in ("text_config", "vision_config"):
        config[section]["hidden_act"] = "quick_gelu"
    (tmp_path / "whole/config.json").write_text(json.dumps(config))
    with pytest.raises(WeightsError, match="changed after this model was loaded"):
        whole.set_prompts("quality")


def test_old_configurations(tmp_path: Path) -> None:
    """`*_config_dict` overrides, and what it leaves out is a default: QuickGELU."""
    model = random_clip("quick_gelu")
    model.save_pretrained(tmp_path / "clip")
    path = tmp_path / "clip/config.json"
    config = json.loads(path.read_text())
    for section in ("text", "vision"):
        heads = config[f"{section}_config"]["num_attention_heads"]
        config[f"{section}_config"]["hidden_act"] = "gelu"
        config[f"{section}_config"]["eos_token_id"] = 2
        config[f"{section}_config_dict"] = {"num_attention_heads": heads}
    path.write_text(json.dumps(config))
    x = upstream.pictures(2, SIZE, SIZE)
    assert same(features(tmp_path / "clip", x), expected_features(model, x))
    config |= {"text_config_dict": None, "vision_config_dict": None}
    path.write_text(json.dumps(config))
    assert load_model(tmp_path / "clip", "small-hf").activation == "GELU"


@pytest.mark.filterwarnings("ignore")
def test_whatever_does_not_fit_is_one_clear_line(tmp_path: Path) -> None:
    model = random_clip()
    folder = tmp_path / "clip"
    model.save_pretrained(folder)
    original = (folder / "config.json").read_text()

    def refused(
        said: str, path: Path = folder, kind: type[Exception] = WeightsError, backbone: str = "small-hf"
    ) -> None:
        with pytest.raises(kind, match=said) as caught:
            OpenCLIPIQA("clipiqa", backbone=backbone, weights=path)
        assert "\n" not in str(caught.value)

    def with_vision(**values: object) -> None:
        config = json.loads(original)
        config["vision_config"] |= values
        (folder / "config.json").write_text(json.dumps(config))

    refused("backbone 'RN50' is none of open_clip's; pass the backbone of these weights", backbone="RN50")
    with_vision(num_attention_heads=4)
    refused("has 4 attention heads in its image tower, and backbone 'small-hf' has 2")
    with_vision(hidden_act="gelu_new")
    refused("hidden_act is 'gelu_new'; expected 'gelu' or 'quick_gelu'")
    with_vision(hidden_act="quick_gelu")
    refused("has quick_gelu in its vision and gelu in its text encoder")
    with_vision(layer_norm_eps=1e-6)
    refused("layer_norm_eps is 1e-06; expected 1e-05")
    with_vision(num_attention_heads="2")
    refused("num_attention_heads is '2'; expected a positive integer")
    (folder / "config.json").write_text(json.dumps(json.loads(original) | {"model_type": "bert"}))
    refused("config.json is that of a model of type 'bert'; expected one of clip, clip_vision_model, clip_text_model")
    (folder / "config.json").write_text(json.dumps({"vision_config": 3}))
    refused("config.json is damaged: expected an object as vision_config")
    for damaged in ("{", "[]"):
        (folder / "config.json").write_text(damaged)
        refused("config.json cannot be read")
    (folder / "config.json").write_text(original)
    (folder / "preprocessor_config.json").write_text('{"image_mean": [0, 0, 0], "image_std": [1, 1, 0]}')
    refused("three positive ones as image_std")
    (folder / "preprocessor_config.json").unlink()

    empty = tmp_path / "empty"
    empty.mkdir()
    refused("empty is a folder without model.safetensors or pytorch_model.bin", empty)
    apart = write_separate(model, tmp_path / "apart")
    refused("has no text tower, which encodes prompts", apart / "vision-encoder", PromptError)
    refused("it lacks visual", apart / "text-encoder")
    shutil.rmtree(apart / "text-encoder")
    refused("apart lacks text-encoder with model.safetensors", apart)
    tensors = load_file(folder / "model.safetensors")
    key = "vision_model.encoder.layers.1.self_attn.k_proj.weight"
    save_file({name: value for name, value in tensors.items() if name != key}, tmp_path / "part.safetensors")
    refused(
        "lacks a query, key or value of 'visual.transformer.resblocks.1.attn.in_proj", tmp_path / "part.safetensors"
    )
    save_file(tensors | {"vision_model.head.probe": torch.ones(3)}, tmp_path / "more.safetensors")
    refused("'vision_model.head.probe', which transformers' CLIPModel does not have", tmp_path / "more.safetensors")
    model.save_pretrained(tmp_path / "parts", max_shard_size="100KB")
    next((tmp_path / "parts").glob("model-00002*")).unlink()
    refused("index.json names 'model-00002.*', which is not in the folder", tmp_path / "parts")
    index = tmp_path / "parts/model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../clip/model.safetensors"}}))
    refused("names 'model.safetensors', which is not in the folder", tmp_path / "parts")
    index.write_text("{}")
    refused("expected a 'weight_map' from tensors to files", tmp_path / "parts")


def write_ratings(folder: Path) -> tuple[Path, Path]:
    from PIL import Image

    images = folder / "images"
    images.mkdir()
    for k, picture in enumerate(upstream.pictures(24, 48, 64)):
        Image.fromarray((picture.permute(1, 2, 0) * 255).byte().numpy()).save(images / f"{k}.png")
    ratings = folder / "ratings.csv"
    ratings.write_text("image,mos\n" + "".join(f"{k}.png,{10 * k}\n" for k in range(24)))
    return ratings, images


def test_tune_and_fit_take_a_folder(tmp_path: Path) -> None:
    folder = write_separate(random_clip("quick_gelu"), tmp_path / "clip")
    ratings, images = write_ratings(tmp_path)
    rated = ["--ratings", str(ratings), "--images", str(images)]
    run = tmp_path / "run"
    options = ["--epochs", "1", "--batch", "4", "--validation", "0", "--device", "cpu"]
    tower = ["--backbone", "small-hf", "--backbone-weights", str(folder)]
    assert main(["tune", "-m", "clipiqa+", *rated, "--out", str(run), *options, *tower]) == 0
    net = OpenCLIPIQA("clipiqa+", backbone="small-hf", weights=folder, pretrained=run / "params.pth").eval()
    assert net.describe()["activation"] == "QuickGELU"
    assert net(upstream.pictures(2, 48, 64)).shape == (2, 1)
    fitted = tmp_path / "fitted.safetensors"
    assert main(["fit", "-m", "small-hf", "--backbone-weights", str(folder), *rated, "-o", str(fitted)]) == 0
    assert fitted.is_file()


def test_training_starts_from_a_folder(tmp_path: Path) -> None:
    from qualiclip_pyiqa.training.alignment import TEXTS, build, save
    from qualiclip_pyiqa.training.config import load_config

    model = random_clip("quick_gelu", length=40)
    folder = write_separate(model, tmp_path / "clip")
    tiny = dict.fromkeys(("widths", "depths"), ()) | {"hidden": 0, "dim": 0, "dropout": 0.0}
    config = dataclasses.replace(load_config("toy"), backbone="small-hf", weights=str(folder), **tiny)
    aligned = build(config, seed=0)
    ids = tokenize(TEXTS, 40)
    with torch.no_grad():
        expected = nn.functional.normalize(model.text_projection(model.text_model(input_ids=ids).pooler_output), dim=-1)
    assert torch.allclose(aligned.anchors, expected, atol=1e-5)
    save(tmp_path / "model.safetensors", aligned, aligned.tower.state_dict(), {}, "not stated")
    metric = OpenQualiCLIP("qualiclip", weights=tmp_path / "model.safetensors").eval()
    assert metric.describe()["activation"] == "QuickGELU"
    metric.set_prompts({"fog": ("Clear photo.", "Foggy photo.")})  # by the stored text tower, of 40 tokens
    x = upstream.pictures(2, SIZE, SIZE)
    with torch.no_grad():
        expected = load_model(folder, "small-hf").image_tower(pos_embedding=False).eval()(x)
        assert torch.allclose(metric.tower(x), expected, atol=1e-5)


# Norm and first values of features that transformers' own towers gave on weights made by rule.
GOLDEN_IMAGE = (22.511507, [-0.76803203, -0.67385924, -0.88814193, 0.35350174, 0.14123225])
GOLDEN_TEXTS = {
    "Good photo.": (24.156855, [0.71167260, -0.76673549, 0.04652947, 0.59540683, 1.55111766]),
    "Bad photo.": (24.467203, [0.53306592, -0.28692827, 0.14743467, 1.28992498, 1.68314314]),
    "a photo of a dog": (24.037374, [1.61031306, -1.26709139, 0.75903171, 0.12398212, 0.91187137]),
}
GOLDEN_TOLERANCE = 1e-4  # 3e-6 between transformers and open_clip; plain GELU moves these numbers by 5e-4 to 3e-2


def to_transformers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The names of transformers for tensors of OpenAI's ViT-B/32."""
    plain = {
        "visual.class_embedding": "vision_model.embeddings.class_embedding",
        "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
        "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
        "visual.proj": "visual_projection.weight",
        "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
        "positional_embedding": "text_model.embeddings.position_embedding.weight",
        "text_projection": "text_projection.weight",
    }
    out: dict[str, Tensor] = {}
    for key, value in state.items():
        if key == "logit_scale":
            continue
        if key in plain:
            out[plain[key]] = value.T if key in ("visual.proj", "text_projection") else value
            continue
        name = key.replace("visual.ln_pre", "vision_model.pre_layrnorm")
        name = name.replace("visual.ln_post", "vision_model.post_layernorm")
        name = name.replace("ln_final", "text_model.final_layer_norm")
        name = re.sub(r"^visual\.transformer\.resblocks", "vision_model.encoder.layers", name)
        name = re.sub(r"^transformer\.resblocks", "text_model.encoder.layers", name)
        for one, other in (("ln_", "layer_norm"), ("c_fc", "fc1"), ("c_proj", "fc2"), (".attn.", ".self_attn.")):
            name = name.replace(one, other)
        if "in_proj" in name:
            for part, rows in zip("qkv", value.chunk(3), strict=True):
                out[name.replace("in_proj_", f"{part}_proj.")] = rows
        else:
            out[name] = value
    return out


@torch.no_grad()
def test_golden_numbers_of_triplet_clips_towers() -> None:
    with torch.device("meta"):
        shapes = {key: tuple(value.shape) for key, value in open_clip.CLIP(**VIT_B_32).state_dict().items()}
        names = transformers.CLIPModel(transformers.CLIPConfig()).state_dict()
    renamed = to_transformers(by_rule.state("openai-clip", shapes))
    assert {key: value.shape for key, value in renamed.items()} == {
        key: value.shape for key, value in names.items() if key != "logit_scale"
    }
    state = to_open_clip(Path("by rule"), {f"model.{key}": value for key, value in renamed.items()})
    visual = {key.removeprefix("visual."): value for key, value in state.items() if key.startswith("visual.")}

    def off(name: str) -> list[float]:
        """Largest differences of the norms and of the first values of the image and of each text."""
        backbone = find_backbone(name)
        found = [image_tower(backbone, visual, True, "file").eval()(by_rule.pixels(0))[0]]
        found += [*text_tower(backbone, state, "file").eval().encode(tokenize(list(GOLDEN_TEXTS)))]
        return [
            max(abs(float(one.norm()) - norm), float((one[:5] - torch.tensor(first)).abs().max()))
            for one, (norm, first) in zip(found, [GOLDEN_IMAGE, *GOLDEN_TEXTS.values()], strict=True)
        ]

    assert max(off("ViT-B/32")) < GOLDEN_TOLERANCE
    assert min(off("ViT-B-32")) > GOLDEN_TOLERANCE  # plain GELU
