"""Random weight files in upstream's exact layouts, whose features depend on the image, and, as the oracle, pyiqa's own
networks on the same files."""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock
from urllib.parse import unquote

import open_clip
import torch
from torch import Tensor, nn

TINY_RESNET = {
    "embed_dim": 32,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 224, "layers": [1, 1, 1, 1], "width": 8, "patch_size": None, "head_width": 64},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 2},
}
TINY_VIT = {
    "embed_dim": 32,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 224, "layers": 2, "width": 64, "patch_size": 14},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 2},
}

# For images of 32 pixels a side; the text tower has another width and depth than the image tower.
TINY_VIT_32 = {
    "embed_dim": 32,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 32, "layers": 3, "width": 64, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 128, "heads": 2, "layers": 2},
}

_WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] good bad sharp blurry photo image edges high low quality".split()  # noqa: SIM905
_TEXT = {"context_length": 16, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 2}
_WORD_TEXT = _TEXT | {"vocab_size": len(_WORDS), "no_causal_mask": True, "pool_type": "last"}


def families(words: Path) -> dict[str, dict[str, Any]]:
    """Configure a small model for each other kind of open_clip tower and text encoder; `words`: see `write_words`."""

    def timm(name: str, pool: str, proj: str | None) -> dict[str, Any]:
        return {"timm_model_name": name, "timm_pool": pool, "timm_proj": proj, "image_size": 224}

    vit = TINY_VIT["vision_cfg"] | {"patch_size": 16}  # type: ignore[operator]
    coca = {"attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True}
    clipa = {"no_ln_pre": True, "pool_type": "avg", "final_ln_after_pool": True}
    decoder = {"context_length": 16, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 1, "attn_pooler_heads": 1}
    own = {"embed_dim": 32, "custom_text": True}
    return {
        "tiny-convnext": {"embed_dim": 32, "vision_cfg": timm("test_convnext", "", "linear"), "text_cfg": _TEXT},
        "tiny-mlp": {"embed_dim": 32, "vision_cfg": timm("test_convnext", "", "mlp"), "text_cfg": _TEXT},
        "tiny-eva": own | {"vision_cfg": timm("eva02_tiny_patch14_224", "token", None), "text_cfg": _TEXT},
        "tiny-pe": own | {"vision_cfg": timm("vit_pe_core_tiny_patch16_384", "map", None), "text_cfg": _TEXT},
        "tiny-fastvit": own
        | {"vision_cfg": timm("fastvit_t8", "avg", None), "text_cfg": _TEXT | {"no_causal_mask": True}},
        "tiny-vitamin": own | {"vision_cfg": timm("vitamin_small_224", "", "linear"), "text_cfg": _TEXT},
        "tiny-siglip": {
            "embed_dim": 64,
            "custom_text": True,
            "init_logit_bias": -10,
            "vision_cfg": timm("test_vit", "map", "none"),
            "text_cfg": _WORD_TEXT
            | {
                "hf_tokenizer_name": str(words),
                "tokenizer_kwargs": {"clean": "canonicalize"},
                "proj_bias": True,
                "norm_kwargs": {"eps": 1e-6},
                "act_kwargs": {"approximate": "tanh"},
            },
        },
        "tiny-clipa": {
            "embed_dim": 32,
            "vision_cfg": vit | clipa,
            "text_cfg": _WORD_TEXT | {"hf_tokenizer_name": str(words), "tokenizer_kwargs": {"strip_sep_token": True}},
        },
        "tiny-coca": own
        | {
            "vision_cfg": vit | coca,
            "text_cfg": _TEXT | {"embed_cls": True, "output_tokens": True},
            "multimodal_cfg": decoder,
        },
        "tiny-bert": {
            "embed_dim": 32,
            "vision_cfg": vit | {"ls_init_value": 0.5},
            "text_cfg": {"hf_model_name": str(words), "hf_tokenizer_name": str(words), "hf_proj_type": "mlp"},
        },
    }


def write_words(folder: Path) -> None:
    """Write a tokenizer of a few words and the configuration of a small text encoder in Hugging Face's layout."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate(_WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    special = {f"{kind}_token": f"[{kind.upper()}]" for kind in ("pad", "unk", "cls", "sep", "mask")}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    BertConfig(vocab_size=len(_WORDS), **small).save_pretrained(folder)


def random_model(name: str, seed: int = 0) -> nn.Module:
    """Build open_clip's own model in eval mode, with random values such that every part affects the feature."""
    torch.manual_seed(seed)
    model = open_clip.create_model(name, pretrained_hf=False)
    for parameter in model.parameters():
        if parameter.dim() and parameter.std() < 0.05:  # zeros, ones and tiny layer scales
            parameter.data += 0.2 * torch.randn_like(parameter)
    norms = [module for module in model.visual.modules() if isinstance(module, nn.BatchNorm2d)]
    if norms:
        for norm in norms:
            norm.momentum = None
        with torch.no_grad():
            model.train().visual(pictures(8, 224, 224, seed) * 4 - 2)
    return model.eval()


def pictures(count: int, height: int, width: int, seed: int = 0) -> Tensor:
    """Draw images (N, 3, H, W) in 0..1: coloured noise of varying coarseness, contrast and brightness."""
    generator = torch.Generator().manual_seed(seed)
    out = []
    for index in range(count):
        cells = 2 + 5 * ((index + seed) % 7)
        coarse = torch.rand(1, 3, cells, cells, generator=generator)
        smooth = nn.functional.interpolate(coarse, size=(height, width), mode="bilinear", align_corners=False)
        fine = torch.rand(1, 3, height, width, generator=generator)
        share = torch.rand((), generator=generator)
        gain = 0.3 + 0.7 * torch.rand((), generator=generator)
        out.append(((1 - share) * smooth + share * fine) * gain)
    return torch.cat(out).clamp(0, 1)


def random_clip(config: dict[str, Any], seed: int = 0, side: int = 224) -> dict[str, Tensor]:
    """Draw the state dict of a whole CLIP; BatchNorm statistics are those of `pictures` of so many pixels a side."""
    torch.manual_seed(seed)
    model = open_clip.CLIP(**config)
    visual = model.visual
    for name, parameter in visual.named_parameters():
        if name.endswith("bn3.weight"):  # initialised to zero, which disables the block
            nn.init.constant_(parameter, 0.7)
    if hasattr(visual, "positional_embedding"):
        nn.init.normal_(visual.positional_embedding, std=0.3)
    norms = [module for module in visual.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = None  # cumulative average
    with torch.no_grad():
        if norms:
            pool, visual.attnpool = visual.attnpool, nn.Identity()  # its table is for images of 224 pixels a side
            visual.train()(torch.cat([pictures(8, side, side, seed), pictures(8, side, side, seed + 7)]) * 4 - 2)
            visual.attnpool = pool
        model.eval()
    # OpenAI's files hold float16 values, and pyiqa's loader rounds to float16.
    return {k: v.half().float() if v.is_floating_point() else v.clone() for k, v in model.state_dict().items()}


def write_qualiclip(path: Path, state: dict[str, Tensor], seed: int = 1) -> None:
    """Write `QualiCLIP.pth`: `clip_model.*` and unit-length `prompts_features` (14, D)."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(14, state["text_projection"].shape[1], generator=generator)
    features = features / features.norm(dim=-1, keepdim=True)
    torch.save({**{f"clip_model.{key}": value for key, value in state.items()}, "prompts_features": features}, path)


def write_context(
    path: Path, state: dict[str, Tensor], texts: list[str], per_text: bool, bare: bool, seed: int
) -> None:
    """Write a learned context of 16 tokens: a bare tensor, or pyiqa's `params` with prefix and suffix."""
    generator = torch.Generator().manual_seed(seed)
    table = state["token_embedding.weight"]
    shape = (len(texts), 16, table.shape[1]) if per_text else (16, table.shape[1])
    ctx = torch.randn(shape, generator=generator) * 0.5
    if bare:
        torch.save(ctx, path)
        return
    tokens = open_clip.SimpleTokenizer()([" ".join(["X"] * 16) + " " + text for text in texts])
    embedded = table[tokens]
    params = {
        "prompt_learner.ctx": ctx,
        "prompt_learner.token_prefix": embedded[:, :1].clone(),
        "prompt_learner.token_suffix": embedded[:, 17:].clone(),
    }
    torch.save({"params": params}, path)


def add_tiny_backbones(folder: Path) -> None:
    """Add `tiny-resnet`, `tiny-vit` and the models of `families` to open_clip's configurations."""
    own = {"tiny-resnet": TINY_RESNET, "tiny-vit": TINY_VIT, "tiny-vit-32": TINY_VIT_32}
    for name, config in {**own, **families(folder / "words")}.items():
        if not (folder / f"{name}.json").exists():  # several processes may share the folder
            (folder / f"{name}.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder)


@contextmanager
def no_random_values() -> Iterator[None]:
    """Build modules meanwhile whose initial values are whatever memory holds, for a state dict that has them all."""
    with ExitStack() as patches:
        for name in ("kaiming_normal_", "kaiming_uniform_", "normal_", "uniform_", "xavier_uniform_"):
            patches.enter_context(mock.patch.object(nn.init, name, lambda tensor, *_, **__: tensor))
        yield


def oracle(name: str, folder: Path, **more: object) -> nn.Module:
    """Build pyiqa's own network of this name on the files of `folder` instead of downloads."""
    if "pkg_resources" not in sys.modules:
        import packaging
        import packaging.version

        # openai-clip imports `packaging` from pkg_resources, which setuptools >= 82 no longer has.
        stand_in = types.ModuleType("pkg_resources")
        stand_in.packaging = packaging  # type: ignore[attr-defined]
        sys.modules["pkg_resources"] = stand_in
    from pyiqa.archs import clip_model, clipiqa_arch, qualiclip_arch

    def load(backbone: str, device: str) -> nn.Module:
        # pyiqa's loader only takes OpenAI's archives, whose tensors it passes to `build_model`.
        state = torch.load(folder / f"{backbone.replace('/', '-')}.pt", weights_only=True)
        with no_random_values():  # which would take most of the time
            return clip_model.build_model(state).float()

    def local(url: str, *_: object) -> str:
        return str(folder / unquote(url.split("/")[-1]))

    opts = {
        "clipiqa+_rn50_512": {"pos_embedding": True},
        "clipiqa+_vitL14_512": {"pos_embedding": True, "backbone": "ViT-L/14"},
    }.get(name, {})
    arch = clipiqa_arch.CLIPIQA if name.startswith("clipiqa") else qualiclip_arch.QualiCLIP
    with (
        mock.patch.object(clipiqa_arch, "load", load),
        mock.patch.object(qualiclip_arch, "load", load),
        mock.patch.object(clipiqa_arch, "load_file_from_url", local),
        mock.patch.object(qualiclip_arch, "load_file_from_url", local),
        mock.patch("pyiqa.archs.arch_util.load_file_from_url", local),
    ):
        return arch(model_type=name, **opts, **more).eval()
