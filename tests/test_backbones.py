"""Every kind of tower that open_clip has, at any size, against open_clip's own models."""

from __future__ import annotations

import copy
import json
import pickle
from dataclasses import replace
from pathlib import Path

import open_clip
import pytest
import timm
import torch
import upstream
from torch import nn

from qualiclip_pyiqa import OpenCLIPIQA, OpenQualiCLIP
from qualiclip_pyiqa.errors import SettingsError, WeightsError
from qualiclip_pyiqa.towers import timm_tower
from qualiclip_pyiqa.towers.backbones import MEAN, STD, find_backbone, image_tower, text_encoder
from qualiclip_pyiqa.towers.base import freeze

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
    return OpenCLIPIQA(**{"model_type": "clipiqa", "backbone": name, "weights": folder / f"{name}.pt", **more}).eval()


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_features_are_open_clips_own(name: str, families_folder: Path) -> None:
    model, state = oracle(name, families_folder)
    size = model.visual.trunk.default_cfg["input_size"][1] if hasattr(model.visual, "trunk") else 224
    x = upstream.pictures(3, size, size)
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
    assert same(text_encoder(find_backbone(name), state, "file")(TEXTS), expected)
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


# Half precision keeps 11 (float16) or 8 (bfloat16) bits of each of a feature's values, layer after layer.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 0.01), (torch.bfloat16, 0.08)])
@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_half_precision(name: str, dtype: torch.dtype, tolerance: float, families_folder: Path) -> None:
    net, x = build(name, families_folder), upstream.pictures(3, 64, 96)
    expected = net.features(x)
    with torch.autocast("cpu", dtype=dtype):
        cast = net.features(x)
    for found in (cast, net.to(dtype).features(x)):
        assert (found.float() - expected).norm() < tolerance * expected.norm()
    assert net(x).dtype == torch.float32


@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
def test_compiles_whole_and_for_any_size(families_folder: Path) -> None:
    torch._dynamo.reset()
    net = build("tiny-eva", families_folder)  # rotary tables, and a table that is left out
    compiled = torch.compile(net, fullgraph=True, dynamic=True, backend="eager")
    # The last has one row in the end, for which a graph of its own is right.
    for number, size in enumerate(((2, 64, 96), (3, 101, 79), (2, 33, 101))):
        x = upstream.pictures(*size)
        with torch._dynamo.config.patch(error_on_recompile=number == 1):
            assert (compiled(x) - net(x)).abs().max() < 1e-5


@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_reach_the_picture(name: str, families_folder: Path) -> None:
    x = upstream.pictures(2, 64, 90).requires_grad_()
    build(name, families_folder)(x).mean().backward()
    assert torch.isfinite(x.grad).all() and x.grad.abs().max() > 0


@pytest.mark.parametrize("pos_embedding", [False, True])
@pytest.mark.parametrize("name", ["tiny-eva", "tiny-siglip", "tiny-pe"])
@torch.no_grad()
def test_another_size_is_that_of_a_network_built_for_it(name: str, pos_embedding: bool, families_folder: Path) -> None:
    """timm's own for pictures that are twice as wide as high; its tables and rotary embeddings are made for that."""
    _, state = oracle(name, families_folder)
    config = open_clip.get_model_config(name)["vision_cfg"]
    pool = {"global_pool": config["timm_pool"], "num_classes": 0 if config["timm_proj"] == "none" else 32}
    built = timm.create_model(config["timm_model_name"], img_size=(96, 192), **pool).eval()
    trunk = {key[13:]: value for key, value in state.items() if key.startswith("visual.trunk.")}
    prefix = built.num_prefix_tokens
    table = trunk["pos_embed"] if pos_embedding else torch.zeros_like(trunk["pos_embed"])
    grid = built.patch_embed.grid_size
    skipped = 0 if built.no_embed_class else prefix
    trunk["pos_embed"] = timm.layers.resample_abs_pos_embed(table, grid, num_prefix_tokens=skipped)
    built.load_state_dict(trunk)
    x = upstream.pictures(2, 96, 192)
    expected = built((x - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1))
    for tower in (tower_of(name, state, pos_embedding), freeze(tower_of(name, state, pos_embedding))):
        assert (tower(x) - expected).abs().max() < 1e-5 * expected.abs().max()


@torch.no_grad()
def test_a_metric_does_not_change_its_tower_while_it_scores(
    families_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several threads may score with one."""
    net, x = build("tiny-siglip", families_folder), upstream.pictures(2, 64, 96)
    monkeypatch.delattr(timm_tower, "functional_call")
    assert net(x).shape == (2, 1)


@torch.no_grad()
def test_a_tower_normalises_by_the_statistics_of_its_backbone(families_folder: Path) -> None:
    _, state = oracle("tiny-eva", families_folder)
    visual = {key[7:]: value for key, value in state.items() if key.startswith("visual.")}
    plain = replace(find_backbone("tiny-eva"), mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    x = upstream.pictures(2, 64, 64)
    pixels = (x - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    found = image_tower(plain, visual, False, "file").eval()(pixels)
    assert torch.allclose(found, tower_of("tiny-eva", state, False)(x), atol=1e-5)


def test_checkpoints_of_training_are_read(families_folder: Path, tmp_path: Path) -> None:
    state = torch.load(families_folder / "tiny-convnext.pt", weights_only=True)
    wrapped = {"epoch": 3, "name": "run", "state_dict": {f"module.{key}": value for key, value in state.items()}}
    torch.save(wrapped, tmp_path / "epoch_3.pt")
    x = upstream.pictures(2, 64, 64)
    expected = build("tiny-convnext", families_folder)(x)
    assert torch.equal(build("tiny-convnext", families_folder, weights=tmp_path / "epoch_3.pt")(x), expected)


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
    with pytest.raises(SettingsError, match="takes images of one size only") as caught:
        image_tower(find_backbone(name), state, False, "file")
    assert "\n" not in str(caught.value)


def test_what_cannot_be_is_one_clear_line(families_folder: Path, tmp_path: Path) -> None:
    def refused(kind: type[Exception], said: str, name: str, **more: object) -> None:
        with pytest.raises(kind, match=said) as caught:
            OpenCLIPIQA(
                **{"model_type": "clipiqa", "backbone": name, "weights": families_folder / f"{name}.pt", **more}
            )
        assert "\n" not in str(caught.value)

    refused(SettingsError, "takes no learned context", "tiny-siglip", model_type="clipiqa+", pretrained=False)
    refused(WeightsError, "lacks .* tensors", "tiny-eva", weights=families_folder / "tiny-siglip.pt")
    more = torch.load(families_folder / "tiny-clipa.pt") | {"visual.ln_pre.weight": torch.ones(64)}
    torch.save(more, tmp_path / "more.pt")
    refused(WeightsError, "has no 'ln_pre.weight'", "tiny-clipa", weights=tmp_path / "more.pt")
    refused(SettingsError, "unknown backbone 'RN5'; did you mean 'RN50'", "RN5", weights=None)
    refused(WeightsError, "OpenAI released no weights for backbone 'tiny-eva'", "tiny-eva", weights=None)
    with pytest.raises(SettingsError, match="unknown backbone 'nope'"):
        OpenQualiCLIP("qualiclip-mini", backbone="nope")
    for schema in ("hf-hub:timm/ViT-B-16-SigLIP", "local-dir:/nowhere"):
        refused(SettingsError, "unknown backbone", schema, weights=families_folder / "tiny-eva.pt")
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
    refused(SettingsError, "pooling that is not supported", "odd", weights=families_folder / "tiny-coca.pt")
