"""Every kind of tower that open_clip has, at any size, against open_clip's own models."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path

import open_clip
import pytest
import torch
import upstream
from torch import nn

from qualiclip_pyiqa import OpenCLIPIQA
from qualiclip_pyiqa.backbones import MEAN, STD, encode_texts, find_backbone, image_tower
from qualiclip_pyiqa.errors import SettingsError, WeightsError

FAMILIES = list(upstream.families(Path()))
WITHOUT_TABLE = {"tiny-convnext", "tiny-mlp", "tiny-fastvit"}
TEXTS = ["Good photo.", "bad photo", "Sharp image, high quality", "blurry"]


def oracle(name: str, folder: Path) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    state = torch.load(folder / f"{name}.pt", weights_only=True)
    model = open_clip.create_model(name, pretrained_hf=False).eval()
    model.load_state_dict(state)
    return model, state


def tower_of(name: str, state: dict[str, torch.Tensor], pos_embedding: bool) -> nn.Module:
    visual = {key[7:]: value for key, value in state.items() if key.startswith("visual.")}
    return image_tower(find_backbone(name), visual, pos_embedding, "file").eval()


def build(name: str, folder: Path, **more: object) -> OpenCLIPIQA:
    return OpenCLIPIQA(backbone=name, weights=folder / f"{name}.pt", **more).eval()


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_features_are_open_clips_own(name: str, families_folder: Path) -> None:
    model, state = oracle(name, families_folder)
    x = upstream.pictures(3, 224, 224)
    pixels = (x - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)

    def same(found: torch.Tensor, expected: torch.Tensor) -> bool:
        # float32 of both sides, with matrix products in another order
        return bool((found - expected).abs().max() < 1e-5 * expected.abs().max())

    expected = model.encode_image(pixels, normalize=False)
    assert expected.std(dim=0).max() > 1e-3 * expected.abs().max()  # they depend on the picture
    assert same(tower_of(name, state, True)(x), expected)
    tables = [p for key, p in model.visual.named_parameters() if key.endswith(("pos_embed", "positional_embedding"))]
    assert bool(tables) == (name not in WITHOUT_TABLE)
    for table in tables:
        table.zero_()
    without = model.encode_image(pixels, normalize=False)
    assert same(tower_of(name, state, False)(x), without)
    assert same(without, expected) == (name in WITHOUT_TABLE)

    expected = model.encode_text(open_clip.get_tokenizer(name)(TEXTS), normalize=False)
    assert same(encode_texts(find_backbone(name), state, TEXTS, "file"), expected)
    assert (expected - expected[:1]).abs().amax(dim=1)[1:].min() > 1e-2  # they depend on the text


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_any_size_is_scored_as_by_any_other_metric(name: str, families_folder: Path) -> None:
    net = build(name, families_folder)
    assert not net.state_dict() and not list(net.parameters())
    for height, width in ((32, 32), (33, 47), (150, 260)):
        x = upstream.pictures(3, height, width)
        scores = net(x)
        assert scores.shape == (3, 1) and scores.std() > 1e-5
        # One float32 rounding of a logit near 20 is 2e-6 of a score at most.
        assert (scores - torch.cat([net(one[None]) for one in x])).abs().max() <= 2e-6
    assert torch.equal(copy.deepcopy(net)(x), scores)
    assert torch.equal(pickle.loads(pickle.dumps(net))(x), scores)
    assert (net.double()(x.double()) - scores).abs().max() < 1e-5
    assert build(name, families_folder, prompts="sharpness")(x).shape == (3, 1)


# Half precision keeps 11 (float16) or 8 (bfloat16) bits of a feature; the head is float32 whatever the tower is.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 0.03), (torch.bfloat16, 0.15)])
@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_half_precision(name: str, dtype: torch.dtype, tolerance: float, families_folder: Path) -> None:
    net, x = build(name, families_folder), upstream.pictures(3, 64, 96)
    expected = net(x)
    with torch.autocast("cpu", dtype=dtype):
        cast = net(x)
    for found in (cast, net.to(dtype)(x)):
        assert found.dtype == torch.float32 and (found - expected).abs().max() < tolerance


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["tiny-eva", "tiny-siglip"])  # rotary tables, and a table that is left out
@torch.no_grad()
def test_compiles_whole_and_for_any_size(name: str, families_folder: Path) -> None:
    torch._dynamo.reset()
    net = build(name, families_folder)
    compiled = torch.compile(net, fullgraph=True, dynamic=True, backend="aot_eager")
    for number, size in enumerate(((2, 64, 96), (3, 101, 79))):
        x = upstream.pictures(*size)
        with torch._dynamo.config.patch(error_on_recompile=number == 1):
            assert (compiled(x) - net(x)).abs().max() < 1e-5


@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_reach_the_picture(name: str, families_folder: Path) -> None:
    x = upstream.pictures(2, 64, 90).requires_grad_()
    build(name, families_folder)(x).mean().backward()
    assert torch.isfinite(x.grad).all() and x.grad.abs().max() > 0


@torch.no_grad()
def test_a_larger_picture_stretches_the_table_on_its_grid(families_folder: Path) -> None:
    _, state = oracle("tiny-siglip", families_folder)
    table = state["visual.trunk.pos_embed"]
    tower = tower_of("tiny-siglip", state, True)
    grid = round((table.shape[1] - 1) ** 0.5)
    size = tower.trunk.patch_embed.patch_size[0] * 2 * grid
    x = upstream.pictures(1, size, size)
    found = tower(x)
    timm_grid = table[:, 1:].unflatten(1, (grid, grid)).permute(0, 3, 1, 2)
    stretched = nn.functional.interpolate(timm_grid, size=(2 * grid, 2 * grid), mode="bicubic", antialias=True)
    other = copy.deepcopy(tower)
    other.trunk.dynamic_img_size = False
    other.trunk.patch_embed.flatten, other.trunk.patch_embed.output_fmt = True, "NCHW"
    other.trunk.pos_embed = nn.Parameter(torch.cat([table[:, :1], stretched.flatten(2).transpose(1, 2)], dim=1))
    assert torch.allclose(other(x), found, atol=1e-5)


@pytest.mark.parametrize("name", ["tiny-eva", "tiny-convnext"])
def test_a_context_is_learned_on_any_plain_text_side(name: str, families_folder: Path) -> None:
    net = build(name, families_folder, model_type="clipiqa+", pretrained=False, n_ctx=4).train()
    (1 - net(upstream.pictures(2, 64, 64))).mean().backward()
    assert net.prompt_learner.ctx.grad.abs().max() > 0


def test_pixels_are_normalised_as_the_weights_of_a_name_want_it() -> None:
    assert find_backbone("RN50").mean == find_backbone("ViT-L-14").mean == MEAN
    assert find_backbone("RN50").std == find_backbone("convnext_base").std == STD
    siglip, mobile = find_backbone("ViT-B-16-SigLIP"), find_backbone("MobileCLIP-S1")
    assert (siglip.mean, siglip.std) == ((0.5,) * 3, (0.5,) * 3)
    assert (mobile.mean, mobile.std) == ((0.0,) * 3, (1.0,) * 3)
    assert find_backbone("ViT-L-14-CLIPA").std == (0.229, 0.224, 0.225)


@pytest.mark.parametrize("name", ["vit_relpos_medium_patch16_cls_224", "swin_base_patch4_window7_224"])
def test_a_tower_for_one_size_is_refused(name: str) -> None:
    config = open_clip.get_model_config(name)
    small = config["text_cfg"] | {"layers": 1, "vocab_size": 4}
    state = open_clip.CLIP(config["embed_dim"], config["vision_cfg"], small).visual.state_dict()
    with pytest.raises(SettingsError, match="takes pictures of one size only") as caught:
        image_tower(find_backbone(name), state, False, "file")
    assert "\n" not in str(caught.value)


def test_what_cannot_be_is_one_clear_line(families_folder: Path, tmp_path: Path) -> None:
    def refused(kind: type[Exception], said: str, name: str, **more: object) -> None:
        with pytest.raises(kind, match=said) as caught:
            OpenCLIPIQA(backbone=name, **({"weights": families_folder / f"{name}.pt"} | more))
        assert "\n" not in str(caught.value)

    refused(SettingsError, "takes no learned context", "tiny-siglip", model_type="clipiqa+", pretrained=False)
    refused(WeightsError, "lacks .* tensors", "tiny-eva", weights=families_folder / "tiny-siglip.pt")
    for name, text in (
        ("far-tokenizer", {"hf_tokenizer_name": "nobody/nothing", "no_causal_mask": True}),
        ("far-encoder", {"hf_model_name": "nobody/nothing"}),
    ):
        config = upstream.families(tmp_path)["tiny-clipa"]
        config = config | {"text_cfg": upstream._TEXT | text if "hf_model_name" not in text else text}
        (tmp_path / f"{name}.json").write_text(json.dumps(config))
        open_clip.add_model_config(tmp_path)
        refused(WeightsError, "needs files from Hugging Face", name, weights=families_folder / "tiny-clipa.pt")
    odd = upstream.families(tmp_path)["tiny-coca"]
    odd["vision_cfg"] = odd["vision_cfg"] | {"attentional_pool": "parallel"}
    (tmp_path / "odd.json").write_text(json.dumps(odd))
    open_clip.add_model_config(tmp_path)
    refused(SettingsError, "pooling that is not known", "odd", weights=families_folder / "tiny-coca.pt")
